"""Reward functions of other libraries as ours. What they raise is a failure of the rollouts they raised for."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rerankkit.adapters.columns import COLUMNS, chat, columns_of, flat
from rerankkit.errors import PluginError, did_you_mean
from rerankkit.types import Failed, NotApplicable, Outcome, Reward, Rollout, SidSurface

_PLURAL = {"prompts": "prompt", "completions": "completion", "answers": "answer", "states": "state", "infos": "info",
           "tasks": "task"}  # fmt: skip
"""Parameters by which a verifiers function says that it judges a whole group -> those of one that does not."""


@dataclass(frozen=True)
class from_trl:  # noqa: N801 (called like the function it wraps)
    """A TRL reward function, sync or async: `function(prompts=, completions=, completion_ids=, **columns)`.

    It is called once with all rollouts. Beside TRL's own arguments it gets the lists of `COLUMNS`; `columns` adds
    others under the names that it expects: its name -> ours. `chat`: prompts and completions are lists of messages, as
    TRL has them for conversational data sets; otherwise plain text. None means not applicable.

    Raises PluginError for a function that needs an argument which is none of these.
    """

    function: Callable[..., Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: bool = True
    surface: SidSurface = field(default_factory=SidSurface)

    def __post_init__(self) -> None:
        own = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
        _check_arguments(self.function, own, self.columns)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        if not rollouts:
            return []
        pairs = [chat(rollout, self.surface) for rollout in rollouts]
        rows = [_renamed(columns_of(rollout, self.surface), self.columns) for rollout in rollouts]
        told: dict[str, Any] = {
            "prompts": [prompt if self.chat else flat(prompt) for prompt, _ in pairs],
            "completions": [completion if self.chat else flat(completion) for _, completion in pairs],
            "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
            **{name: [row[name] for row in rows] for name in rows[0]},
        }
        values = _called(self.function, told)
        if isinstance(values, Failed):
            return [values] * len(rollouts)
        values = list(values)
        if len(values) != len(rollouts):
            raise ValueError(f"{_name(self.function)}: returned {len(values)} rewards for {len(rollouts)} completions")
        return [_outcome(value, self.function) for value in values]


@dataclass(frozen=True)
class from_verifiers:  # noqa: N801
    """A verifiers rubric function, sync or async, with any of `prompt, completion, answer, state, task, info`.

    Prompt and completion are lists of messages, `answer` is the target's SID, `info` and `state` are fresh dicts with
    `COLUMNS`, `state` with all the others besides. One with `prompts`, `completions`, ... judges a group at a time, and
    returns a list. `columns` adds keyword arguments: its name -> ours.

    Raises PluginError for a function that needs another argument, such as a parser: bind it with functools.partial.
    """

    function: Callable[..., Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    surface: SidSurface = field(default_factory=SidSurface)

    def __post_init__(self) -> None:
        own = (*_PLURAL, *_PLURAL.values())
        _check_arguments(self.function, own, self.columns)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        told = [self._told(rollout) for rollout in rollouts]
        if not _PLURAL.keys() & inspect.signature(self.function).parameters.keys():
            return [_outcome(_called(self.function, one), self.function) for one in told]
        outcomes: dict[int, Outcome] = {}
        for group in dict.fromkeys(rollout.group for rollout in rollouts):
            rows = [row for row, rollout in enumerate(rollouts) if rollout.group == group]
            lists = {many: [told[row][one] for row in rows] for many, one in _PLURAL.items()}
            values = _called(self.function, lists)
            if isinstance(values, Failed):
                outcomes |= dict.fromkeys(rows, values)
                continue
            if len(values) != len(rows):
                raise ValueError(f"{_name(self.function)}: returned {len(values)} rewards for a group of {len(rows)}")
            outcomes |= {row: _outcome(value, self.function) for row, value in zip(rows, values, strict=True)}
        return [outcomes[row] for row in range(len(rollouts))]

    def _told(self, rollout: Rollout) -> dict[str, Any]:
        prompt, completion = chat(rollout, self.surface)
        row = _renamed(columns_of(rollout, self.surface), self.columns)
        told = {"prompt": prompt, "completion": completion, "answer": row["target"], "task": "rerank", "info": row}
        extra = {name: row[name] for name in self.columns}
        return {**extra, **told, "state": {**row, **told, "completion_ids": list(rollout.token_ids)}}


@dataclass(frozen=True)
class from_verl:  # noqa: N801
    """A verl score function: `compute_score(data_source, solution_str, ground_truth, extra_info)`, sync or async.

    It returns a number, or a dict whose `score` is the reward; other numbers in it go to the log. `ground_truth` is the
    target's SID, `extra_info` the dict of `COLUMNS`. A list without a target is not applicable. `more` are further
    keyword arguments, verl's `reward_kwargs`.
    """

    function: Callable[..., Any]
    more: Mapping[str, Any] = field(default_factory=dict)
    data_source: str = "rerankkit"
    surface: SidSurface = field(default_factory=SidSurface)

    def __post_init__(self) -> None:
        own = ("data_source", "solution_str", "ground_truth", "extra_info", *self.more)
        _check_arguments(self.function, own, {}, offer_columns=False)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        return [self._judge(rollout) for rollout in rollouts]

    def _judge(self, rollout: Rollout) -> Outcome:
        row = columns_of(rollout, self.surface)
        if not row["target"]:
            return NotApplicable("no candidate is relevant")
        told = {
            "data_source": self.data_source,
            "solution_str": rollout.text,
            "ground_truth": row["target"],
            "extra_info": row,
            **self.more,
        }
        return _outcome(_called(self.function, told), self.function)


# --- what they share -----------------------------------------------------------------------------------------------


def _called(function: Callable[..., Any], told: Mapping[str, Any]) -> Any:
    """What it returns, awaited if need be, given as much as it takes; Failed if it raises."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    try:
        value = function(**{name: value for name, value in told.items() if takes_all or name in parameters})
        return _awaited(value) if inspect.isawaitable(value) else value
    except Exception as error:
        return Failed(f"{_name(function)} raised {type(error).__name__}: {error}")


def _awaited(value: Awaitable[Any]) -> Any:
    """The result; on a thread of its own where this one runs a loop already, as in a notebook."""

    async def wait() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(asyncio.run(wait()))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _outcome(value: Any, function: Callable[..., Any]) -> Outcome:
    """A number is a reward, None is not applicable, a dict has `score` and parts; anything else failed."""
    if isinstance(value, Failed):
        return value
    if value is None:
        return NotApplicable(f"{_name(function)} returned None")
    parts: dict[str, float] = {}
    if isinstance(value, Mapping):
        key = next((key for key in ("score", "reward") if key in value), None)
        if key is None:
            return Failed(f"{_name(function)} returned a dict without score: {sorted(map(str, value))[:5]}")
        parts = {str(k): float(v) for k, v in value.items() if k != key and isinstance(v, int | float)}
        parts = {name: number for name, number in parts.items() if math.isfinite(number)}
        value = value[key]
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Failed(f"{_name(function)} returned {value!r:.80}, which is no number")
    if not math.isfinite(number):
        return Failed(f"{_name(function)} returned {number}")
    return Reward(number, parts)


def _check_arguments(
    function: Callable[..., Any], own: Sequence[str], columns: Mapping[str, str], *, offer_columns: bool = True
) -> None:
    for theirs, ours in columns.items():
        if ours not in COLUMNS:
            raise PluginError(f"columns: {theirs} = {ours!r} is no column; {did_you_mean(ours, COLUMNS)}")
    known = [*own, *columns, *(COLUMNS if offer_columns else ())]
    for name, parameter in inspect.signature(function).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.kind is parameter.POSITIONAL_ONLY or (
            named and parameter.default is parameter.empty and name not in known
        ):
            raise PluginError(
                f"{_name(function)}: it needs {name!r}, and is given only what it names of {', '.join(known)}. Give "
                "the parameter a default, or bind it with functools.partial."
            )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {**row, **{theirs: row[ours] for theirs, ours in columns.items()}}


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Where TRL would log; our parts of a reward go through `Reward.parts`."""


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
