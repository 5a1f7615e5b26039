"""Everything that can be said of a plugin without its author: `rerankkit plugins check` prints what `examine` finds."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from pydantic import BaseModel

from rerankkit import __version__
from rerankkit.config import make_config, overridden
from rerankkit.errors import ConfigError, PluginError, RerankkitError, UsageError, did_you_mean
from rerankkit.part_config import PluginConfig, describe_settings
from rerankkit.plugins import HookSpecs, LoadedPlugin, PartSpec, Plugins, load_plugins
from rerankkit.testing.rules import CONTRACT_VERSION, RULES, TRIALS, Verdict, judge
from rerankkit.types import RunInfo

HEAVY = ("torch", "transformers", "numpy", "pandas", "pyarrow", "datasets", "sklearn", "scipy", "accelerate")
"""What no plugin may import to register: every `rerankkit` command would pay for it."""
QUICK = 100
"""Milliseconds of processor time that registering may take, pydantic's own import not counted."""
FEW_STEPS = 3
"""Steps that an optimizer is tried for, however many its settings ask for."""

_MEASURE = """
import json, sys, time
import rerankkit.part_config
from rerankkit.plugins import load_plugins
files, only, heavy = json.loads(sys.argv[1])
before, start = set(sys.modules), time.process_time()
load_plugins(files, only)
took = time.process_time() - start
print(json.dumps({"ms": 1000 * took, "heavy": sorted(set(heavy) & (set(sys.modules) - before))}))
"""


@dataclass(frozen=True)
class PartReport:
    """One part, and what became of each check."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    checks: tuple[Verdict, ...]
    lacks: str = ""
    """What must be given with `--set` before it can be built."""


@dataclass(frozen=True)
class PluginReport:
    """A plugin, and what became of each check."""

    plugin: LoadedPlugin
    checks: tuple[Verdict, ...]
    parts: tuple[PartReport, ...] = field(default=())

    def count(self, *states: str) -> int:
        """Checks that ended in one of these states."""
        every = [*self.checks, *(check for part in self.parts for check in part.checks)]
        return sum(check.state in states for check in every)

    @property
    def exit_code(self) -> int:
        """1: something is broken; 2: something could not be tried for want of settings; else 0."""
        if self.count("broken", "mended"):
            return 1
        return 2 if any(part.lacks for part in self.parts) else 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        shown = ("rule", "says", "state", "note")

        def rows(checks: Iterable[Verdict]) -> list[dict[str, str]]:
            return [{key: getattr(check, key) for key in shown} for check in checks]

        return {
            "plugin": asdict(self.plugin),
            "rerankkit": __version__,
            "contract": CONTRACT_VERSION,
            "checks": rows(self.checks),
            "parts": [
                {"kind": p.kind, "name": p.name, "settings": p.settings, "lacks": p.lacks, "checks": rows(p.checks)}
                for p in self.parts
            ],
            "exit_code": self.exit_code,
        }

    def markdown(self) -> str:
        """The report, ready for a pull request."""
        whose = self.plugin
        lines = [f"## Plugin {whose.name}", ""]
        lines.append(
            f"{whose.distribution or 'not installed'} {whose.version} (`{whose.module}`), on rerankkit {__version__}, "
            f"contract {CONTRACT_VERSION}, Python {platform.python_version()}"
        )
        lines += ["", *_table(self.checks)]
        for part in self.parts:
            settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in part.settings.items())
            lines += ["", f"### {part.kind} `{part.name}`", ""]
            lines += [f"Tried with {settings or 'no settings'}.", ""] if not part.lacks else [f"{part.lacks}", ""]
            lines += _table(part.checks)
        names = {"kept": "kept", "broken": "broken", "mended": "declared broken but kept", "known": "known failures"}
        counts = {**names, "not tried": "not tried"}
        said = ", ".join(f"{number} {word}" for state, word in counts.items() if (number := self.count(state)))
        verdict = {0: "in order", 1: "not in order", 2: "not fully tried: give the settings it lacks"}[self.exit_code]
        lines += ["", f"**{verdict}**: {said}", ""]
        rules = {rule.__name__ for part in self.parts for rule in RULES[part.kind]}
        if any(check.rule in rules and check.state == "broken" for part in self.parts for check in part.checks):
            lines += ["What a part cannot keep can be declared, with the reason: `--known RULE=REASON`.", ""]
        return "\n".join(lines)


def examine(
    name: str,
    files: Sequence[str] = (),
    settings: Sequence[str] = (),
    known: Mapping[str, str] | None = None,
    progress: Callable[..., Iterator[Any]] = lambda items, total=None, what="": iter(items),
) -> PluginReport:
    """Try the plugin `name`, or the one that registers the part of that name (`kind/name`), and then only that part.

    `settings` are `key=value`, for every part that has such a key. `known` is `rule` (or `part.rule`) -> why it cannot
    be kept. Raises UsageError for names, settings and rules that are not there.
    """
    known = known or {}
    plugins = load_plugins(files)
    plugin, parts = _found(name, plugins, files)
    if not plugin.error:
        rules = {rule.__name__ for part in parts for rule in RULES[part.kind]}
        rules |= {f"{part.name}.{rule.__name__}" for part in parts for rule in RULES[part.kind]}
        for rule in known:
            if rule not in rules:
                raise UsageError(f"--known {rule}: no part here has such a rule; {did_you_mean(rule, rules)}")
    with redirect_stdout(sys.stderr):  # a part that prints would spoil the report
        checks = tuple(_of_plugin(plugin, parts, list(files)))
        if plugin.error:
            return PluginReport(plugin, checks)
        settings = list(settings)
        _check_settings_exist(parts, settings)
        reports = tuple(_of_part(part, plugins, settings, known) for part in progress(parts, len(parts), "parts"))
    return PluginReport(plugin, checks, reports)


def _found(name: str, plugins: Plugins, files: Sequence[str]) -> tuple[LoadedPlugin, list[PartSpec[Any]]]:
    every = [part for slot in plugins.register.slots() for part in slot.parts.values()]
    for plugin in plugins.loaded:
        if plugin.name == name:
            return plugin, [part for part in every if part.plugin == name]
    kind, _, short = name.rpartition("/")
    parts = [part for part in every if part.name == short and kind in ("", part.kind)]
    if not parts:
        names = [*(plugin.name for plugin in plugins.loaded), *(part.name for part in every)]
        hint = did_you_mean(name, names) + ("" if files else " Install it, or load a single file with --file.")
        raise PluginError(f"no plugin and no part is named {name!r}; {hint}{plugins.not_in_order()}")
    if len({part.plugin for part in parts}) > 1:
        choices = " or ".join(f"{part.kind}/{part.name}" for part in parts)
        raise PluginError(f"several plugins have a part named {short!r}; say {choices}.")
    [plugin] = [plugin for plugin in plugins.loaded if plugin.name == parts[0].plugin]
    return plugin, parts


def _of_plugin(plugin: LoadedPlugin, parts: Sequence[PartSpec[Any]], files: list[str]) -> Iterator[Verdict]:
    says = "It is imported and registers its parts without an error."
    if plugin.error:
        yield Verdict("loads", says, "broken", plugin.error)
        return
    yield Verdict("loads", says, "kept", f"{len(parts)} parts" if len(parts) != 1 else "1 part")
    known = [hook for hook in vars(HookSpecs) if hook.startswith("rerankkit_")]
    says = f"Every function named rerankkit_* is one of {', '.join(known)}, and is marked with @hookimpl."
    yield Verdict("hooks", says, "broken" if plugin.warning else "kept", plugin.warning)
    own = [file for file in files if file == plugin.distribution]
    asked = json.dumps([own, "" if own else plugin.name, HEAVY])
    measure = [sys.executable, "-c", _MEASURE, asked]
    runs = [json.loads(subprocess.run(measure, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    heavy = ", ".join(runs[0]["heavy"])
    says = "Registering imports nothing heavy."
    note = f"imports {heavy}: move that into `build` or below, or register with `lazy`" if heavy else ""
    yield Verdict("light", says, "broken" if heavy else "kept", note)
    took = min(run["ms"] for run in runs)
    says = f"Registering takes less than {QUICK} ms of processor time."
    yield Verdict("quick", says, "broken" if took >= QUICK else "kept", f"{took:.0f} ms")


def _check_settings_exist(parts: Sequence[PartSpec[Any]], settings: Sequence[str]) -> None:
    fields = sorted({field for part in parts for field in part.config.model_fields})
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write it as key=value.")
        if key.split(".")[0] not in fields:
            raise UsageError(f"--set {setting}: no part here has such a setting; {did_you_mean(key, fields)}")


def _of_part(part: PartSpec[Any], plugins: Plugins, settings: list[str], known: Mapping[str, str]) -> PartReport:
    try:
        config = part.config
    except Exception as error:  # a lazy part's module
        note = f"{type(error).__name__}: {error}"
        return PartReport(part.kind, part.name, {}, (Verdict("settings", "They can be imported.", "broken", note),))
    own = [setting for setting in settings if setting.split("=")[0].split(".")[0] in config.model_fields]
    checks = [_documented(part), _sound(config)]
    try:
        block = overridden({part.kind: {"use": part.name}}, [f"{part.kind}.{setting}" for setting in own])
        chosen = getattr(make_config(block, plugins), part.kind)
    except ConfigError as error:
        lacks = " ".join(str(error).split())
        if "missing" in lacks:
            advice = f"Not tried: {lacks} Give it with --set KEY=VALUE."
            return PartReport(part.kind, part.name, {}, tuple(checks), advice)
        raise
    chosen = chosen[0] if isinstance(chosen, tuple) else chosen
    shown = chosen.config.model_dump(mode="json")
    says = "It is built from its settings."
    try:
        built = chosen.build(RunInfo())
    except RerankkitError as error:  # a key or a server that is not here
        checks.append(Verdict("builds", says, "not tried", str(error)))
        return PartReport(part.kind, part.name, shown, tuple(checks))
    except Exception as error:
        checks.append(Verdict("builds", says, "broken", f"{type(error).__name__}: {error}"))
        return PartReport(part.kind, part.name, shown, tuple(checks))
    checks.append(Verdict("builds", says, "kept"))
    trial = TRIALS[part.kind](built, **({"max_steps": FEW_STEPS} if part.kind == "optimizer" else {}))
    own_known = {rule.removeprefix(f"{part.name}."): reason for rule, reason in known.items()}
    checks += _once_each(judge(rule, trial, own_known) for rule in RULES[part.kind])
    return PartReport(part.kind, part.name, shown, tuple(checks))


def _once_each(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """The verdicts; a fault that stops several rules is told once, and leaves the others not tried."""
    told: dict[str, str] = {}
    for verdict in verdicts:
        if verdict.state == "broken" and verdict.note in told:
            yield replace(verdict, state="not tried", note=f"for the same reason as `{told[verdict.note]}`")
        else:
            told.setdefault(verdict.note, verdict.rule)
            yield verdict


def _documented(part: PartSpec[Any]) -> Verdict:
    """A summary, and a sentence under every setting, those of inner blocks too."""
    bare = [] if part.summary or (part.config.__doc__ or "").strip() else ["the part itself"]
    for model in _models(part.config):
        where = "" if model is part.config else f"{model.__name__}."
        if issubclass(model, PluginConfig):
            bare += [
                f"{where}{row['name']}"
                for row in describe_settings(model)
                if not row["documentation"] and row["name"] != "use"
            ]
    note = f"a string is missing under {', '.join(bare)}, or a line of a function's docstring" if bare else ""
    says = "The part and each of its settings say what they are."
    return Verdict("documented", says, "broken" if bare else "kept", note)


def _sound(config: type[PluginConfig]) -> Verdict:
    """Unknown keys refused at every depth, and settings that come back from JSON as they were."""
    says = "Unknown keys are refused at every depth; settings come back from JSON as they were."
    loose = [model.__name__ for model in _models(config) if model.model_config.get("extra") != "forbid"]
    if loose:
        note = f"{', '.join(loose)} lets unknown keys through; derive it from PluginConfig"
        return Verdict("settings", says, "broken", note)
    required = [name for name, setting in config.model_fields.items() if setting.is_required()]
    if required:
        return Verdict("settings", says, "kept", f"required: {', '.join(required)}")
    try:
        default = config()
        same = config.model_validate(json.loads(default.model_dump_json())) == default
    except (ValueError, TypeError) as error:
        return Verdict("settings", says, "broken", f"the defaults are refused: {' '.join(str(error).split())}")
    note = "" if same else "the defaults differ once they have been written as JSON and read again"
    return Verdict("settings", says, "kept" if same else "broken", note)


def _models(config: type[BaseModel]) -> list[type[BaseModel]]:
    """The class and those of the blocks inside it."""
    found: list[type[BaseModel]] = []

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found:
            found.append(annotation)
            for inner in annotation.model_fields.values():
                visit(inner.annotation)
        for argument in get_args(annotation):
            visit(argument)

    visit(config)
    return found


_WORDS = {"kept": "kept", "broken": "**broken**", "known": "known failure", "mended": "**kept after all**"}


def _table(checks: Iterable[Verdict]) -> list[str]:
    rows = [
        f"| `{check.rule}` | {_WORDS.get(check.state, check.state)} | {_cell(check.note or check.says)} |"
        for check in checks
    ]
    return ["| check | result | |", "| --- | --- | --- |", *rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
