"""Parts that are a function: its further arguments are their settings. `Slot.add_function` offers them."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import Field, PositiveInt, create_model
from pydantic.fields import FieldInfo

from rerankkit.errors import PluginError
from rerankkit.part_config import PluginConfig
from rerankkit.types import (
    Catalog,
    Item,
    Outcome,
    RerankExample,
    Reward,
    Rollout,
    RunInfo,
    StepReport,
    Trace,
    TraceFailure,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer


class ByNamesConfig(PluginConfig):
    """What every tokenizer that is a function has, beside its own settings."""

    codes: PositiveInt = 256
    """Codes at each level; a catalogue that needs more is refused."""


def part_from(
    kind: str, name: str, function: Callable[..., Any]
) -> tuple[type[PluginConfig], Callable[[Any, RunInfo], Any]]:
    """Settings and builder of the part that a function is."""
    given, base, make = _KINDS[kind]
    config = settings_of(name, function, given.split(), base)
    fields = list(config.model_fields)
    return config, lambda chosen, info: make(name, function, {key: getattr(chosen, key) for key in fields})


def settings_of(
    name: str, function: Callable[..., Any], given: Sequence[str], base: type[PluginConfig]
) -> type[PluginConfig]:
    """The settings that a function's signature says: every argument but the first ones, which are `given` to it.

    A setting's documentation is the line `name: what it is` of the docstring; the rest of it is the part's own.
    Raises PluginError for a signature that cannot be called so.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    first, own = parameters[: len(given)], parameters[len(given) :]
    by_place = [p for p in first if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    if len(by_place) < len(given):  # a default: one of them was forgotten, and a setting stands in its place
        asked = ", ".join(p.name for p in parameters)
        raise PluginError(
            f"{name}: its first arguments must be {', '.join(given)}, without defaults, not ({asked}); those that "
            "follow are settings."
        )
    about, told = _told(inspect.getdoc(function) or "", [parameter.name for parameter in own])
    for parameter in own:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PluginError(f"{name}: {parameter} is no setting; name each, with its type and a default.")
        if parameter.annotation is parameter.empty:
            raise PluginError(f"{name}: the setting {parameter.name!r} has no type; write `{parameter.name}: float`.")
        if isinstance(parameter.default, FieldInfo):
            raise PluginError(
                f"{name}: the default of {parameter.name!r} is pydantic's Field, and a call would be given that; write "
                f"`{parameter.name}: Annotated[float, Field(...)] = 1.0`."
            )
        if parameter.name in base.model_fields:
            raise PluginError(f"{name}: every such part has a setting {parameter.name!r} already; rename yours.")
    # Not those of the first arguments: what they name may be imported for the type checker alone.
    stated = SimpleNamespace(__annotations__={parameter.name: parameter.annotation for parameter in own})
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        types = get_type_hints(stated, scope, include_extras=True)
    except NameError as error:
        raise PluginError(
            f"{name}: {error}, and a setting has this type; import it where the program runs, not under TYPE_CHECKING."
        ) from error
    fields: dict[str, Any] = {}
    for parameter in own:
        default = ... if parameter.default is parameter.empty else parameter.default
        about_it: dict[str, Any] = {"description": told[parameter.name]} if parameter.name in told else {}
        fields[parameter.name] = (types[parameter.name], Field(default, **about_it))
    title = "".join(word.capitalize() for word in re.split(r"\W+", name)) + "Config"
    return create_model(title, __base__=base, __module__=function.__module__, __doc__=about, **fields)


def _told(doc: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What a docstring says of the whole, and of each name, whose paragraph starts with `name: `."""
    whole: list[str] = []
    told: dict[str, str] = {}
    current = ""
    for line in doc.splitlines():
        first, colon, text = line.strip().partition(": ")
        if colon and first in names:
            current, told[first] = first, text
        elif line.strip() and current:
            told[current] += f" {line.strip()}"
        else:
            current = ""
            whole += [line] if line.strip() != "Args:" else []
    return "\n".join(whole).strip(), told


def as_reward(name: str, function: Callable[..., float | Outcome], settings: Mapping[str, Any]) -> RewardFn:
    """A reward that judges each rollout by itself: by a number, or by any outcome."""

    @wraps(function)
    def judge(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [_outcome(function(rollout, **settings)) for rollout in rollouts]

    judge.__qualname__ = name  # for reports
    return judge


def _outcome(answer: Any) -> Any:
    """A number as an outcome; what is neither is refused where outcomes are checked."""
    return Reward(float(answer)) if isinstance(answer, Real) else answer


class OneByOne:
    """A teacher that is asked for one example at a time."""

    def __init__(self, name: str, function: Callable[..., Trace | TraceFailure], settings: Mapping[str, Any]) -> None:
        self._name, self._answer = name, partial(function, **settings)
        self.__qualname__, self.__module__ = name, function.__module__  # for reports

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        """Each answer, as soon as it is there."""
        for example in info.progress(examples, total=len(examples), what=self._name):
            yield self._answer(example, info)


class Loop:
    """An optimizer that is a generator."""

    def __init__(self, name: str, function: Callable[..., Iterator[StepReport]], settings: Mapping[str, Any]) -> None:
        self.optimize = partial(function, **settings)
        self.__qualname__, self.__module__ = name, function.__module__


class ByNames:
    """A tokenizer that spells what the function calls an item, broad to narrow, and a number among its namesakes.

    Every name takes the next free code below those before it, and keeps it; so does every item its SID. An item that
    comes later takes what is free, and moves nobody.
    """

    def __init__(self, name: str, function: Callable[..., Sequence[str]], settings: Mapping[str, Any]) -> None:
        self._name, own = name, {key: value for key, value in settings.items() if key != "codes"}
        self._names_of: Callable[[Item], Sequence[str]] = partial(function, **own)
        self._codes, self._levels = int(settings["codes"]), 0
        self._book: dict[str, list[int]] = {}
        """Item -> its SID."""
        self._below: dict[str, dict[str, int]] = {}
        """The names so far, as JSON -> name -> its code."""
        self._held: Counter[str] = Counter()
        """All names of an item, as JSON -> how many have them."""
        self.__qualname__, self.__module__ = name, function.__module__

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """As many codes a level; known once it is fitted or loaded."""
        return (self._codes,) * self._levels

    def fit(self, catalog: Catalog) -> None:
        """Give every item its SID."""
        self.encode(catalog)

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """SIDs [N, names + 1]: those given before; an item that is new takes its own now."""
        import numpy as np

        for item in catalog.items:
            if item.item_id not in self._book:
                self._book[item.item_id] = self._placed(item)
        return np.array([self._book[item.item_id] for item in catalog.items], dtype=np.int64)

    def _placed(self, item: Item) -> list[int]:
        given = self._names_of(item)
        names = [] if isinstance(given, str) else list(given)
        if isinstance(given, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{self._name}: {given!r} for {item.item_id}; give a list of texts, one a level")
        self._levels = self._levels or len(names) + 1
        if len(names) + 1 != self._levels:
            raise ValueError(
                f"{self._name}: {len(names)} names for {item.item_id}, and {self._levels - 1} for those before it; "
                "give as many for each, empty ones if need be"
            )
        sid = []
        for level, name in enumerate(names):
            below = self._below.setdefault(json.dumps(names[:level]), {})
            sid.append(below.setdefault(name, len(below)))
        key = json.dumps(names)
        sid.append(self._held[key])
        self._held[key] += 1
        if max(sid) >= self._codes:
            where = " > ".join(names[: sid.index(max(sid))]) or "the first level"
            raise ValueError(
                f"{self._name}: {self._codes} codes are too few at {where}; set tokenizer.codes higher, or give names "
                "that tell more items apart"
            )
        return sid

    def save(self, folder: Path) -> None:
        """One JSON file."""
        state = [self._codes, self._levels, self._book, self._below, self._held]
        (folder / "names.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        state = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        self._codes, self._levels, self._book, self._below, held = state
        self._held = Counter(held)


_KINDS: Mapping[
    str, tuple[str, type[PluginConfig], Callable[..., Tokenizer | Teacher | RewardFn | PolicyOptimizer]]
] = {
    "tokenizer": ("item", ByNamesConfig, ByNames),
    "teacher": ("example info", PluginConfig, OneByOne),
    "reward": ("rollout", PluginConfig, as_reward),
    "optimizer": ("policy examples reward info", PluginConfig, Loop),
}
"""Kind -> the arguments that a function is given, the settings that it has anyway, and what makes a part of it."""
