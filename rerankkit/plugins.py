"""Plugins: how parts are registered, found and built. The only file that knows pluggy.

A plugin is a module with one hook, announced by one entry point of the group `rerankkit`:

    @hookimpl
    def rerankkit_register(register: Register) -> None:
        register.rewards.add_function("brevity", brevity)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NamedTuple, TypeVar, get_type_hints

import pluggy

from rerankkit.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from rerankkit.lm import Policy
    from rerankkit.part_config import PluginConfig as PluginConfig
    from rerankkit.part_config import describe_settings as describe_settings
    from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
    from rerankkit.types import Item, Outcome, RerankExample, Rollout, RunInfo, StepReport, Trace, TraceFailure

GROUP = "rerankkit"
ONLY = "RERANKKIT_PLUGINS"
"""Environment variable: a comma-separated list of entry points to load; unset means all."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""Decorator of a plugin module's functions that are hooks: `@hookimpl`, without brackets."""


P = TypeVar("P")
C = TypeVar("C", bound="PluginConfig")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class PartSpec(Generic[P]):
    """A registered part: its name, settings and builder, and whose it is."""

    kind: str
    name: str
    load: Callable[[], tuple[type[PluginConfig], Callable[[Any, RunInfo], P]]]
    """Gives settings and builder; of a lazy part, by importing it."""
    summary: str
    plugin: str
    distribution: str = ""
    version: str = ""

    @property
    def config(self) -> type[PluginConfig]:
        """The class of its settings."""
        return self.load()[0]

    @property
    def build(self) -> Callable[[Any, RunInfo], P]:
        """Makes it, from settings and what there is to know about the run."""
        return self.load()[1]


@dataclass
class Slot(Generic[P, F]):
    """The parts of one kind, by name."""

    kind: str
    parts: dict[str, PartSpec[P]] = field(default_factory=dict)
    owner: tuple[str, str, str] = ("", "", "")
    """Plugin, distribution and version of whoever is registering now."""

    def add(self, name: str, config: type[C], build: Callable[[C, RunInfo], P]) -> None:
        """Offer a part under `name`. `build` is called only when a run has chosen it: import heavy things there.

        Raises PluginError if the name is taken, or if a config could not reach a setting.
        """
        _check_settings(self.kind, name, config)
        summary = next(iter((config.__doc__ or "").strip().splitlines()), "")
        self._put(name, lambda: (config, build), summary)

    def lazy(self, name: str, where: str, summary: str) -> None:
        """Offer the part that the function `where` ("module:function") builds; it is imported when it is looked at.

        The function's parameter `config` is annotated with the class of its settings. For plugins of many parts, which
        would otherwise slow every `rerankkit plugins list` down. Raises PluginError if the name is taken.
        """
        self._put(name, partial(_import_part, self.kind, name, where), summary)

    def add_function(self, name: str, function: F) -> None:
        """Offer a part that is a function. Its further arguments are its settings, each with a type, and a line
        `argument: what it is` in the docstring. Raises PluginError as `add` does, and for arguments that do not fit.
        """
        from rerankkit.functions import part_from

        config, build = part_from(self.kind, name, function)
        self.add(name, config, build)

    def _put(self, name: str, load: Callable[[], Any], summary: str) -> None:
        plugin, distribution, version = self.owner
        if name in self.parts:
            raise PluginError(
                f"two plugins register the {self.kind} {name!r}: {self.parts[name].plugin} and {plugin}. "
                f"Rename one, uninstall one, or load only what you need with {ONLY}."
            )
        self.parts[name] = PartSpec(self.kind, name, load, summary, plugin, distribution, version)


def _import_part(kind: str, name: str, where: str) -> tuple[Any, Any]:
    module, _, function = where.partition(":")
    build = getattr(importlib.import_module(module), function)
    config = get_type_hints(build).get("config")
    _check_settings(kind, name, config)
    return config, build


def _check_settings(kind: str, name: str, config: Any) -> None:
    from rerankkit.part_config import PluginConfig

    if not (isinstance(config, type) and issubclass(config, PluginConfig)):
        raise PluginError(f"{kind} {name!r}: its settings must be a subclass of PluginConfig, not {config!r}.")
    reserved = {"use", "weight", "gate"} if kind == "reward" else {"use"}
    if taken := sorted(reserved & config.model_fields.keys()):
        raise PluginError(f"{kind} {name!r}: a block keeps {taken[0]!r} for itself; rename that setting.")


@dataclass
class Register:
    """What a plugin fills in: one slot for each of the four parts."""

    tokenizers: Slot[Tokenizer, Callable[Concatenate[Item, ...], Sequence[str]]] = field(
        default_factory=lambda: Slot("tokenizer")
    )
    """A function of an item gives names, broad to narrow, as many for each: the SID is a code for each name, and a
    number among the items of the same names. It has a setting `codes`, too."""
    teachers: Slot[Teacher, Callable[Concatenate[RerankExample, RunInfo, ...], Trace | TraceFailure]] = field(
        default_factory=lambda: Slot("teacher")
    )
    """A function of an example, and of what there is to know about the run, writes its trace."""
    rewards: Slot[RewardFn, Callable[Concatenate[Rollout, ...], float | Outcome]] = field(
        default_factory=lambda: Slot("reward")
    )
    """A function of a rollout judges it by itself, with a number or an outcome."""
    optimizers: Slot[
        PolicyOptimizer,
        Callable[Concatenate[Policy, Sequence[RerankExample], RewardFn, RunInfo, ...], Iterator[StepReport]],
    ] = field(default_factory=lambda: Slot("optimizer"))
    """A generator is the loop itself."""

    def slots(self) -> tuple[Slot[Any, Any], ...]:
        """The four slots, in pipeline order."""
        return (self.tokenizers, self.teachers, self.rewards, self.optimizers)


class HookSpecs:
    """The hooks a plugin may implement. Each is called with keyword arguments; take only those you need."""

    @hookspec
    def rerankkit_register(self, register: Register) -> None:
        """Add parts. Called once, at start-up, for `--help` too: import nothing heavy."""

    @hookspec
    def rerankkit_step(self, stage: str, report: StepReport) -> None:
        """Watch training. Called after every optimizer step, in the main process, with all that is logged of the step;
        must not change anything.
        """

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
    """Calls a hook in every plugin: `hooks.rerankkit_report(report=...)` gives a list of results."""

    def part(self, kind: str, name: str, where: str) -> PartSpec[Any]:
        """The part that a config names at the path `where`. Raises PluginError with what was possible."""
        slot = next(slot for slot in self.register.slots() if slot.kind == kind)
        if name in slot.parts:
            return slot.parts[name]
        hint = did_you_mean(name, slot.parts)
        raise PluginError(f"{where}: no {kind} is named {name!r}; {hint}{self.not_in_order()}")

    def not_in_order(self) -> str:
        """For the end of an error, a line for each plugin that may be why a part is not there."""
        return "".join(
            f"\n  plugin {p.name} ({p.distribution or 'not installed'}) is not in order: {p.error or p.warning}"
            for p in self.loaded
            if p.error or p.warning
        )


def load_plugins(files: Iterable[str | Path] = (), only: str | None = None) -> Plugins:
    """Find and load every installed plugin, each on its own: one that breaks costs the others nothing.

    `files` are single-file plugins for this run. `only` (default: the variable RERANKKIT_PLUGINS) names the entry
    points to load, comma-separated.
    """
    installed = _installed()
    known = [source.name for source in installed]
    only = os.environ.get(ONLY) if only is None else only
    wanted = known if only is None else [name.strip() for name in only.split(",") if name.strip()]
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    register = Register()
    loaded: list[LoadedPlugin] = []
    for source in [*(s for s in installed if s.name in wanted), *(_from_file(Path(file)) for file in files)]:
        twin = next((plugin for plugin in loaded if plugin.name == source.name), None)
        if twin is None:
            error, warning = _load(source, register, manager)
        else:
            error = f"another plugin has this name: {twin.distribution}. Rename one, or uninstall one."
            warning = ""
        loaded.append(LoadedPlugin(source.name, source.module, source.distribution, source.version, error, warning))
    for name in (name for name in wanted if name not in known):
        error = f"{ONLY} asks for it, but it is not installed; {did_you_mean(name, known)}"
        loaded.append(LoadedPlugin(name, "", "", "", error))
    return Plugins(register, tuple(loaded), manager.hook)


class _Source(NamedTuple):
    """Where a plugin is to be had."""

    name: str
    module: str
    distribution: str
    version: str
    load: Callable[[], Any]


def _load(source: _Source, register: Register, manager: pluggy.PluginManager) -> tuple[str, str]:
    """Load one plugin; its (error, warning). One that breaks leaves nothing in the register or among the hooks."""
    before = [dict(slot.parts) for slot in register.slots()]
    module: Any = None
    try:
        with redirect_stdout(sys.stderr):  # or a plugin that prints would spoil `--json`
            module = source.load()
            for slot in register.slots():
                slot.owner = (source.name, source.distribution, source.version)
            others = manager.get_plugins()
            manager.register(module, source.name)
            manager.subset_hook_caller("rerankkit_register", others)(register=register)
        return "", _misspelt(module)
    except KeyboardInterrupt:
        raise
    except BaseException as caught:  # SystemExit, too, and the panics of extensions written in Rust
        for slot, parts in zip(register.slots(), before, strict=True):
            slot.parts = parts
        if module is not None and manager.get_plugin(source.name) is module:
            manager.unregister(module)
        return _one_line(caught), ""


def _installed() -> list[_Source]:
    """Every installed plugin: rerankkit's own first, then by distribution. The first to come keeps a name.

    Read from the `entry_points.txt` that installers write: importing importlib.metadata, which does the same and more,
    would take longer than all the rest of this function.
    """
    found: dict[str, list[_Source]] = {}
    for info in _distributions():
        name, _, version = info.stem.partition("-")
        name = re.sub(r"[-_.]+", "-", name).lower()
        sources = list(_entries(info / "entry_points.txt", name, version))
        if sources:
            found.setdefault(name, sources)  # what lies further down the path is an older copy
    return [source for name in sorted(found, key=lambda name: (name != GROUP, name)) for source in found[name]]


def _distributions() -> Iterator[Path]:
    """The metadata folders on the path, in its order; `rerankkit-0.1.0.dist-info` is one."""
    for folder in dict.fromkeys(sys.path):
        try:
            names = os.listdir(folder or ".")  # noqa: PTH208 (a Path for each of thousands of names takes its time)
        except OSError:  # a zip file, or nothing at all
            continue
        yield from (Path(folder, name) for name in sorted(names) if name.endswith((".dist-info", ".egg-info")))


def _entries(path: Path, distribution: str, version: str) -> Iterator[_Source]:
    """The entry points of our group in one `entry_points.txt`; a damaged one of something else is not our business."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # most have none
        return
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line.strip("[] ")
        elif section == GROUP and line and line[0] not in "#;":
            name, _, reference = (part.strip() for part in line.partition("="))
            yield _Source(name, reference, distribution, version, partial(_load_entry, reference))


def _load_entry(reference: str) -> Any:
    match = re.fullmatch(r"([\w.]+)(?:\s*:\s*([\w.]+))?(?:\s*\[.*\])?", reference)
    if not match:
        raise PluginError(f"its entry point {reference!r} is not written as module or module:object.")
    plugin: Any = importlib.import_module(match.group(1))
    for attribute in filter(None, (match.group(2) or "").split(".")):
        plugin = getattr(plugin, attribute)
    return plugin


def _from_file(path: Path) -> _Source:
    name = f"rerankkit_file_{path.stem}"

    def load() -> Any:
        if not path.is_file():
            raise PluginError(f"plugin file {path.absolute()} does not exist")
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise PluginError(f"plugin file {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pydantic look their module up there
        spec.loader.exec_module(module)
        return module

    try:
        from hashlib import sha256

        digest = sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        digest = ""
    return _Source(path.stem, str(path), str(path), digest, load)


def _misspelt(module: Any) -> str:
    """A word about functions that look like hooks and are none."""
    known = [name for name in vars(HookSpecs) if name.startswith("rerankkit_")]
    for name, value in vars(module).items():
        marked = getattr(value, f"{GROUP}_impl", None)
        hook = (marked or {}).get("specname") or name
        if callable(value) and hook not in known and (marked or name.startswith("rerankkit_")):
            return f"{hook} is not a hook and is never called; {did_you_mean(hook, known)}"
        if hook in known and not marked:
            return f"{hook} lacks the @hookimpl decorator and is never called; add it."
    return ""


def _one_line(error: BaseException) -> str:
    """The error with the place in the plugin where it was raised."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, PluginError) else ""
    text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()) + place


def __getattr__(name: str) -> Any:
    # Here for those who write plugins, but not before they are asked for: pydantic is half the time of a short verb.
    if name not in ("PluginConfig", "describe_settings"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("rerankkit.part_config"), name)
