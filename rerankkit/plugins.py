"""Plugins: how parts are registered, found and built. The only file that knows pluggy.

A plugin is a module with one function, announced by one entry point of the group `rerankkit`:

    @hookimpl
    def rerankkit_register(register: Register) -> None:
        register.rewards.add("brevity", BrevityConfig, build)
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy
from pydantic import BaseModel, ConfigDict

from rerankkit.errors import PluginError, did_you_mean
from rerankkit.types import RunInfo, StepReport

if TYPE_CHECKING:
    from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer

GROUP = "rerankkit"
ONLY = "RERANKKIT_PLUGINS"
"""Environment variable: a comma-separated list of entry points to load; unset means all."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class PluginConfig(BaseModel):
    """Base of every part's settings: frozen, unknown keys refused, the string under a field is its documentation."""

    # The strings under fields are read by `describe_settings` when somebody asks: pydantic's own way of reading them,
    # and building validators at once, would double the time of `rerankkit plugins list`.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


P = TypeVar("P")
C = TypeVar("C", bound=PluginConfig)


@dataclass(frozen=True)
class PartSpec(Generic[P]):
    """A registered part: its name, settings and builder, and whose it is."""

    kind: str
    name: str
    config: type[PluginConfig]
    build: Callable[[Any, RunInfo], P]
    plugin: str
    distribution: str = ""
    version: str = ""


@dataclass
class Slot(Generic[P]):
    """The parts of one kind, by name."""

    kind: str
    parts: dict[str, PartSpec[P]] = field(default_factory=dict)
    owner: tuple[str, str, str] = ("", "", "")

    def add(self, name: str, config: type[C], build: Callable[[C, RunInfo], P]) -> None:
        """Offer a part under `name`. `build` is called only when a run has chosen it: import heavy things there.

        Raises PluginError if another plugin already holds the name.
        """
        plugin, distribution, version = self.owner
        if name in self.parts:
            raise PluginError(
                f"two plugins register the {self.kind} {name!r}: {self.parts[name].plugin} and {plugin}. "
                f"Rename one, uninstall one, or load only what you need with {ONLY}."
            )
        self.parts[name] = PartSpec(self.kind, name, config, build, plugin, distribution, version)


@dataclass
class Register:
    """What a plugin fills in: one slot for each of the four parts."""

    tokenizers: Slot[Tokenizer] = field(default_factory=lambda: Slot("tokenizer"))
    teachers: Slot[Teacher] = field(default_factory=lambda: Slot("teacher"))
    rewards: Slot[RewardFn] = field(default_factory=lambda: Slot("reward"))
    optimizers: Slot[PolicyOptimizer] = field(default_factory=lambda: Slot("optimizer"))

    def slots(self) -> tuple[Slot[Any], ...]:
        """The four slots, in pipeline order."""
        return (self.tokenizers, self.teachers, self.rewards, self.optimizers)


class HookSpecs:
    """The hooks a plugin may implement. Each is called with keyword arguments; take only those you need."""

    @hookspec
    def rerankkit_register(self, register: Register) -> None:
        """Add parts. Called once, at start-up, for `--help` too: import nothing heavy."""

    @hookspec
    def rerankkit_step(self, stage: str, report: StepReport) -> None:
        """Watch training. Called after every optimizer step, in the main process; must not change anything."""

    @hookspec
    def rerankkit_report(self, report: Mapping[str, Any]) -> Mapping[str, str] | None:
        """Add sections to the report: heading -> plain text. Called once, when report.json is complete."""


@dataclass(frozen=True)
class LoadedPlugin:
    """One plugin, and what became of it: `error` is empty if it is in working order."""

    name: str
    module: str
    distribution: str
    version: str
    error: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Plugins:
    """Everything that was found: the register, the list of plugins (broken ones too), and the hooks to call."""

    register: Register
    loaded: tuple[LoadedPlugin, ...]
    hooks: Any

    def part(self, kind: str, name: str, where: str) -> PartSpec[Any]:
        """The part that a config names at the path `where`. Raises PluginError with what was possible."""
        slot = next(slot for slot in self.register.slots() if slot.kind == kind)
        if name in slot.parts:
            return slot.parts[name]
        broken = [plugin for plugin in self.loaded if plugin.error]
        blame = "".join(f"\n  {p.name} ({p.distribution or p.module}) could not be loaded: {p.error}" for p in broken)
        hint = did_you_mean(name, slot.parts)
        raise PluginError(f"{where}: no {kind} is named {name!r}; {hint}{blame}")


def load_plugins(files: Iterable[str | Path] = (), only: str | None = None) -> Plugins:
    """Find and load every installed plugin, each on its own: one that breaks costs the others nothing.

    `files` are single-file plugins for this run. `only` (default: the variable RERANKKIT_PLUGINS) names the entry
    points to load, comma-separated.
    """
    only = os.environ.get(ONLY) if only is None else only
    wanted = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    register = Register()
    loaded = []
    sources = [*_installed(wanted), *(_from_file(Path(file)) for file in files)]
    for name, module_name, distribution, version, load in sources:
        error = warning = ""
        before = {slot.kind: dict(slot.parts) for slot in register.slots()}
        try:
            module = load()
            for slot in register.slots():
                slot.owner = (name, distribution, version)
            register_parts = getattr(module, "rerankkit_register", None)
            manager.register(module, name)
            if register_parts is not None:
                register_parts(register=register)
            warning = _misspelt(module)
        except (Exception, SystemExit) as caught:
            for slot in register.slots():
                slot.parts.clear()
                slot.parts.update(before[slot.kind])
            if manager.has_plugin(name):
                manager.unregister(name=name)
            error = _one_line(caught)
        loaded.append(LoadedPlugin(name, module_name, distribution, version, error, warning))
    return Plugins(register, tuple(loaded), manager.hook)


_Source = tuple[str, str, str, str, Callable[[], ModuleType]]


def _installed(wanted: set[str] | None) -> Iterator[_Source]:
    seen = set()
    for distribution in distributions():
        # Reading the file first is many times faster than parsing every distribution's metadata.
        text = distribution.read_text("entry_points.txt")
        if not text or f"[{GROUP}]" not in text:
            continue
        for entry in distribution.entry_points.select(group=GROUP):
            if entry.name in seen or (wanted is not None and entry.name not in wanted):
                continue
            seen.add(entry.name)
            yield entry.name, entry.value, _name(distribution), distribution.version, entry.load


def _name(distribution: Distribution) -> str:
    return str(distribution.metadata["Name"])


def _from_file(path: Path) -> _Source:
    name = f"rerankkit_file_{path.stem}"

    def load() -> ModuleType:
        if not path.is_file():
            raise PluginError(f"plugin file {path} does not exist")
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise PluginError(f"plugin file {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pydantic look their module up there
        spec.loader.exec_module(module)
        return module

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""
    return path.stem, str(path), str(path), digest, load


def _misspelt(module: ModuleType) -> str:
    """A word about functions that look like hooks and are none."""
    known = [name for name in vars(HookSpecs) if name.startswith("rerankkit_")]
    for name, value in vars(module).items():
        marked = getattr(value, f"{GROUP}_impl", None) is not None
        if callable(value) and name not in known and (marked or name.startswith("rerankkit_")):
            return f"{name} is not a hook and is never called; {did_you_mean(name, known)}"
        if name in known and not marked:
            return f"{name} lacks the @hookimpl decorator; add it."
    return ""


def _one_line(error: BaseException) -> str:
    """The error with the place in the plugin where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, PluginError) else ""
    text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()) + place


def describe_settings(config: type[PluginConfig]) -> list[dict[str, str]]:
    """name, type, default and documentation (the string under the field) of every setting."""
    about = _field_documentation(config)
    rows: list[dict[str, str]] = []
    for name, setting in config.model_fields.items():
        required = setting.is_required()
        default = "required" if required else _shown(setting.get_default(call_default_factory=True))
        kind = str(getattr(setting.annotation, "__name__", "")) if isinstance(setting.annotation, type) else ""
        kind = kind or re.sub(r"\b\w+\.", "", str(setting.annotation))
        documentation = setting.description or about.get(name, "")
        rows.append({"name": name, "type": kind, "default": default, "documentation": documentation})
    return rows


def _field_documentation(config: type[PluginConfig]) -> dict[str, str]:
    """Field -> the string literal under it, in the class or the nearest base that documents it."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not issubclass(owner, PluginConfig) or owner is PluginConfig:
            continue
        try:
            [tree] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, ValueError, SyntaxError):
            continue
        for field_, text in pairwise(getattr(tree, "body", [])):
            if isinstance(field_, ast.AnnAssign) and isinstance(field_.target, ast.Name) and isinstance(text, ast.Expr):
                value = getattr(text.value, "value", None)
                if isinstance(value, str):
                    found[field_.target.id] = " ".join(value.split())
    return found


def _shown(value: Any) -> str:
    return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value, default=str)
