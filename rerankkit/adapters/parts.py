"""The settings of foreign reward functions, and how each is found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rerankkit.adapters.rewards_in import from_trl, from_verifiers, from_verl
from rerankkit.errors import PluginError, did_you_mean
from rerankkit.part_config import PluginConfig
from rerankkit.protocols import RewardFn
from rerankkit.types import RunInfo


class _Foreign(PluginConfig):
    function: str
    """Where it is: `module:function`, of a module that Python finds, or `path/to/file.py:function`. It is imported,
    and so run, when the run reaches reinforcement; a changed function does not count as a changed setting."""

    @field_validator("function")
    @classmethod
    def _there(cls, function: str) -> str:
        home, colon, name = function.rpartition(":")
        if not colon or not home or not name.isidentifier():
            raise ValueError(f"{function!r} is not written as module:function or path/to/file.py:function")
        if home.endswith(".py"):
            if not Path(home).is_file():
                raise ValueError(f"there is no file {home}")
        elif not all(part.isidentifier() for part in home.split(".")) or not _findable(home.split(".")[0]):
            raise ValueError(f"Python finds no module {home.split('.')[0]!r}; install it, or name its file")
        return function


class TrlConfig(_Foreign):
    """A TRL reward function: called with prompts, completions and the columns of docs/adapters.md, sync or async."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Further columns: the name that it expects -> ours. `{ label = "target_id" }`."""
    chat: bool = True
    """Prompts and completions as lists of messages; otherwise as plain text."""


class VerifiersConfig(_Foreign):
    """A verifiers rubric function: called with those of prompt, completion, answer, state, task and info it names."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Further arguments: the name that it expects -> our column. `{ label = "target_id" }`."""


class VerlConfig(_Foreign):
    """A verl compute_score function: data_source, solution_str, ground_truth (the target's SID), extra_info."""

    data_source: str = "rerankkit"
    """What it is told as data_source."""
    reward_kwargs: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """Further keyword arguments."""


def trl(config: TrlConfig, info: RunInfo) -> RewardFn:
    """`trl`"""
    return from_trl(find(config.function), config.columns, config.chat, info.surface)


def verifiers(config: VerifiersConfig, info: RunInfo) -> RewardFn:
    """`verifiers`"""
    return from_verifiers(find(config.function), config.columns, info.surface)


def verl(config: VerlConfig, info: RunInfo) -> RewardFn:
    """`verl`"""
    return from_verl(find(config.function), config.reward_kwargs, config.data_source, info.surface)


def find(function: str) -> Callable[..., Any]:
    """Import it. Raises PluginError with what its module has instead."""
    home, _, name = function.rpartition(":")
    try:
        module = _from_file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
    except Exception as error:
        raise PluginError(f"{function}: cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        choices = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PluginError(f"{function}: {home} has no function {name!r}; {did_you_mean(name, choices)}")
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    name = f"rerankkit_function_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it is a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _findable(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
