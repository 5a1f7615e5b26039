"""Writes docs/config.md and docs/reference.md from the code: python docs/generate.py

--check: exit 1 if one of them is not up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from rerankkit import protocols, types
from rerankkit.adapters import COLUMNS
from rerankkit.config import ChosenPart, RunConfig, make_config
from rerankkit.math.metrics import METRICS
from rerankkit.plugins import HookSpecs, PluginConfig, Plugins, describe_settings, load_plugins
from rerankkit.testing.rules import CONTRACT_VERSION, RULES

DOCS = Path(__file__).parent
TOP = {
    "seed": ("`0`", "Every random choice of the run derives from it."),
    "device": ('`"auto"`', "What torch runs on: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."),
    "plugin_files": (
        "`[]`",
        "Single-file plugins to load for this run, beside those installed. Paths are relative "
        "to the current directory, also when a run goes on: go on from the same folder, or write absolute paths.",
    ),
    "trackers": ("`[]`", "Trackers that accelerate knows, such as `tensorboard`; `metrics.jsonl` is always written."),
}
HEAD = """\
# Config reference

<!-- Made by docs/generate.py from the code. Do not edit. -->

A config is TOML (or the `config.json` of a run), one block a stage. Every key has a default unless it says *required*;
an unknown key, at any depth, is an error that names its line. Paths are relative to the current directory. On the
command line `block.key=value` sets a key over the file's; a reward in a list is addressed by its number from 0:
`reward.0.weight=0.5`. Where a block says `use`, the name chooses which of the tables below applies.

## Top level

| key | default | meaning |
| --- | --- | --- |
"""
PART_HEADS = {
    "tokenizer": "Draws the semantic IDs.",
    "teacher": "Writes the reasoning traces.",
    "reward": "Judges rollouts. `[reward]`, or several `[[reward]]` blocks, which are added up; each also takes "
    "`weight` (default `1.0`) and `gate`, a [condition](rewards.md#gates) or a list of them outside of which it is 0.",
    "optimizer": "Improves the policy by reinforcement.",
}


def page() -> str:
    """The whole reference: rerankkit's own blocks, then every part that its own distribution registers."""
    plugins = load_plugins(only="gr2,adapters")
    defaults = make_config({}, plugins)
    hints = get_type_hints(RunConfig)
    assert TOP.keys() == {field.name for field in fields(RunConfig) if not _is_block(hints[field.name])}
    lines = [HEAD + "".join(f"| `{key}` | {default} | {text} |\n" for key, (default, text) in TOP.items())]
    for name, hint in hints.items():
        if name in PART_HEADS:
            lines += _parts(name, plugins, defaults)
        elif name not in TOP:
            lines += _block(name, [hint] if isinstance(hint, type) else list(get_args(hint)))
    return "\n".join(line for line in lines if line)


def _is_block(hint: Any) -> bool:
    kinds = [hint, *get_args(hint)]
    return any(isinstance(kind, type) and issubclass(kind, PluginConfig | ChosenPart) for kind in kinds)


def _block(name: str, variants: list[type[PluginConfig]]) -> Iterator[str]:
    yield f"## [{name}]\n"
    for model in variants:
        use = str(model.model_fields["use"].default) if "use" in model.model_fields else ""
        if use:
            yield f'### {name}: use = "{use}"{" (the default)" if model is variants[0] else ""}\n'
        if _doc(model):
            yield _doc(model) + "\n"
        yield _table(_rows(model, with_use=False))
    yield from _inner_blocks(name, variants)


def _parts(kind: str, plugins: Plugins, defaults: RunConfig) -> Iterator[str]:
    yield f"## [{kind}]\n\n{PART_HEADS[kind]}\n"
    slot = next(slot for slot in plugins.register.slots() if slot.kind == kind)
    chosen = getattr(defaults, kind)
    default = (chosen[0] if isinstance(chosen, tuple) else chosen).spec.name
    shown: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {}
    for part in slot.parts.values():
        yield f'### {kind}: use = "{part.name}"{" (the default)" if part.name == default else ""}\n'
        yield _doc(part.config) + "\n"
        rows = _rows(part.config)
        like, others = shown.setdefault(tuple(rows), (part.name, rows))
        if like == part.name or not rows:
            yield _table(rows)
        else:  # a relative: only what differs
            differ = {key: row for key, row in rows.items() if row != others[key]}
            yield f"The settings of `{like}`{', with these differences:' if differ else '.'}\n"
            yield _table(differ) if differ else ""
    yield from _inner_blocks(kind, [part.config for part in slot.parts.values()])


def _inner_blocks(name: str, models: list[type[PluginConfig]]) -> Iterator[str]:
    """The tables of blocks within blocks, each once, whichever of the models hold it."""
    found = {(f, tuple(_blocks_in(m.model_fields[f].annotation))) for m in models for f in m.model_fields}
    for field, blocks in sorted(found, key=lambda one: one[0]):
        for block in blocks:
            use = f': use = "{get_args(block.model_fields["use"].annotation)[0]}"' if len(blocks) > 1 else ""
            first = " (the default)" if use and block is blocks[0] else ""
            yield f"### [{name}.{field}]{use}{first}\n"
            if _doc(block):
                yield _doc(block) + "\n"
            yield _table(_rows(block, with_use=not use))


def _rows(model: type[PluginConfig], with_use: bool = True) -> dict[str, str]:
    """key -> its row, for the keys that are values and not blocks."""
    rows = {}
    for row in describe_settings(model):
        field = model.model_fields[row["name"]]
        if _blocks_in(field.annotation) or (row["name"] == "use" and not with_use):
            continue
        default = {"required": "*required*", "null": "left out"}.get(row["default"], f"`{row['default']}`")
        kind = _kind(field.annotation) + _bounds(field.metadata)
        rows[row["name"]] = f"| `{row['name']}` | {kind} | {default} | {row['documentation']} |"
    return rows


def _table(rows: dict[str, str]) -> str:
    if not rows:
        return "No settings.\n"
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows.values()]) + "\n"


def _kind(annotation: Any) -> str:
    """A type in a reader's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f'`"{choice}"`' for choice in arguments)
    if origin is Annotated:
        return _kind(arguments[0]) + _bounds(arguments[1:])
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"table of {_kind(arguments[1])}"
    if origin in (Union, UnionType):
        return _kind(next(argument for argument in arguments if argument is not NoneType))
    return {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}[annotation]


def _bounds(limits: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = {name: getattr(limit, name) for limit in limits for name in words if hasattr(limit, name)}
    if "ge" in found:
        found.pop("gt", None)  # positive, and at least 2: one of them says it
    return "".join(f", {words[name]} {value}" for name, value in found.items())


def _blocks_in(annotation: Any) -> list[type[PluginConfig]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, PluginConfig) else []
    return [block for argument in get_args(annotation) for block in _blocks_in(argument)]


def _doc(model: type[BaseModel]) -> str:
    """The class's own docstring: pydantic's is no use to a reader."""
    text = model.__dict__.get("__doc__") or ""
    return " ".join(text.split())


# --- reference.md --------------------------------------------------------------------------------------------------

REFERENCE_HEAD = """\
# Reference

<!-- Made by docs/generate.py from the code. Do not edit. -->

What a plugin or a script may rely on, as the code says it. [Compatibility](compatibility.md) tells what may change
when, the [config reference](config.md) has every setting, and [writing a plugin](writing-a-plugin.md) shows the use.
"""
MODULES = {
    "rerankkit": "What plugins and scripts need first.",
    "rerankkit.testing": "For tests of parts.",
    "rerankkit.adapters": "Bridges to other libraries' shapes: [adapters](adapters.md).",
    "rerankkit.lm": "The policy's abilities, for optimizers; importing it imports torch.",
    "rerankkit.math": "Pure functions; import the module you need.",
    "rerankkit.text": "Prompts, answers, the parser; import the module you need.",
    "rerankkit.gates": "Conditions, and rewards that are paid only where one holds: [gates](rewards.md#gates).",
}


def reference() -> str:
    """Hooks, protocols, records, contracts, metrics, columns and public names."""
    return "\n".join(
        [
            REFERENCE_HEAD,
            *_hooks(),
            *_protocols(),
            *_records(),
            *_contracts(),
            *_metrics(),
            *_columns(),
            *_public_names(),
        ]
    )


def _hooks() -> Iterator[str]:
    yield "## Hooks\n\nFunctions of a plugin's module, marked with `@hookimpl`; take only the arguments you need.\n"
    rows = []
    for name, hook in vars(HookSpecs).items():
        if name.startswith("rerankkit_"):
            arguments = ", ".join(f"`{argument}`" for argument in list(inspect.signature(hook).parameters)[1:])
            rows.append((f"`{name}`", arguments, _told(hook)))
    yield _grid(("hook", "arguments", ""), rows)


def _protocols() -> Iterator[str]:
    yield "## Protocols\n\nAn object with these methods is a part; there is no base class.\n"
    for name, protocol in _own_classes(protocols):
        optional = " (optional)" if name in ("Reconstructs", "Tells") else ""
        yield f"### {name}{optional}\n\n{_told(protocol)}\n"
        rows = []
        for method, value in vars(protocol).items():
            if isinstance(value, property):
                rows.append((f"`{method}`", f"`{_shown(value.fget)}`", _told(value)))
            elif inspect.isfunction(value) and (not method.startswith("_") or method == "__call__"):
                rows.append((f"`{method}`", f"`{_shown(value)}`", _told(value)))
        yield _grid(("method", "", ""), rows)


def _records() -> Iterator[str]:
    yield "## Records\n\nFrozen dataclasses that stages and parts exchange, from `rerankkit`.\n"
    for name, record in _own_classes(types):
        if dataclasses.is_dataclass(record):
            yield f"### {name}\n\n{_told(record)}\n"
            about = _under_fields(record)
            rows = [
                (f"`{field.name}`", f"`{field.type}`", _default(field), about.get(field.name, ""))
                for field in dataclasses.fields(record)
            ]
            yield _grid(("field", "type", "default", ""), rows)
        elif issubclass(record, str):  # an enumeration
            yield f"### {name}\n\n{_told(record)}\n"
            about = _under_fields(record)
            members: Any = record
            named = [(f"`{member.name}`", f"`{member.value}`", about.get(member.name, "")) for member in members]
            yield _grid(("member", "value", ""), named)


def _contracts() -> Iterator[str]:
    yield (
        f"## Contracts\n\nVersion {CONTRACT_VERSION}. The rules that `rerankkit.testing` and `rerankkit plugins check` "
        "try each part by.\n"
    )
    for kind, rules in RULES.items():
        yield f"### A {kind}'s rules\n" if kind != "optimizer" else "### An optimizer's rules\n"
        yield _grid(("rule", "what is asked"), [(f"`{rule.__name__}`", _told(rule)) for rule in rules])


def _metrics() -> Iterator[str]:
    yield (
        "## Metrics\n\nOf every row of a report. What an optimizer logs at each step is its own choice: the names "
        "in `StepReport.metrics` go to `metrics.jsonl` as they are.\n"
    )
    about = {
        "R": "relevant items among the first {k} / relevant items in the list",
        "NDCG": "discounted gain of the first {k} / that of the best order; the gain is the relevance",
        "MRR": "1 / rank of the first relevant item",
    }
    rows = [(f"`{name}`", about[name.split("@")[0]].format(k=name.split("@")[-1])) for name in METRICS]
    yield _grid(("metric", "of one list; a row has the mean"), rows)


def _columns() -> Iterator[str]:
    yield "## Columns\n\nWhat the [adapters](adapters.md) tell a foreign reward function about a rollout.\n"
    yield _grid(("column", ""), [(f"`{name}`", text) for name, text in COLUMNS.items()])


def _public_names() -> Iterator[str]:
    yield "## Public names\n"
    for module, about in MODULES.items():
        home = import_module(module)
        yield f"### {module}\n\n{about}\n"
        rows = []
        for name, value in sorted(_offered(home), key=lambda one: one[0].lower()):
            named = inspect.isclass(value) or inspect.isroutine(value)
            rows.append((f"`{name}`", _first(value) if named else ""))
        yield _grid(("name", ""), rows)


def _offered(home: Any) -> Iterator[tuple[str, Any]]:
    """What `__all__` names; of modules without it, and of those in a package without it, what they define."""
    if hasattr(home, "__all__"):
        yield from ((name, getattr(home, name)) for name in home.__all__)
        return
    for inner in iter_modules(getattr(home, "__path__", ())):
        module = import_module(f"{home.__name__}.{inner.name}")
        yield from ((f"{inner.name}.{name}", value) for name, value in _offered(module))
    tree = ast.parse(Path(home.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        target = getattr(node, "name", "") or getattr(getattr(node, "target", None), "id", "")
        if target and not target.startswith("_"):
            yield target, getattr(home, target)


def _own_classes(module: Any) -> Iterator[tuple[str, type]]:
    """The public classes that a module defines, in its order."""
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield name, value


def _told(value: Any) -> str:
    return " ".join((inspect.getdoc(value) or "").split())


def _first(value: Any) -> str:
    """The first sentence or line of the docstring; none for what another library made."""
    if not str(getattr(value, "__module__", "")).startswith("rerankkit"):
        return ""
    lines = (inspect.getdoc(value) or "").split("\n\n")[0]
    return " ".join(lines.split())


def _shown(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "").replace("(self, ", "(").replace("(self)", "()")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        if inspect.isfunction(field.default):
            return "does nothing"
        return f"`{str(field.default) if isinstance(field.default, str) and field.default else repr(field.default)}`"
    return "empty" if field.default_factory is not dataclasses.MISSING else "*required*"


def _under_fields(record: type) -> Mapping[str, str]:
    """Field -> the string literal under it."""
    [tree] = ast.parse(inspect.getsource(record)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in pairwise(tree.body):
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            target = field.target if isinstance(field, ast.AnnAssign) else getattr(field, "targets", [None])[0]
            if isinstance(target, ast.Name):
                found[target.id] = " ".join(text.value.value.split())
    return found


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in cells]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    pages = {"config.md": page(), "reference.md": reference()}
    if "--check" in sys.argv:
        old = [name for name, text in pages.items() if (DOCS / name).read_text(encoding="utf-8") != text]
        print(*old, sep="\n", end="\n" if old else "")
        sys.exit(bool(old))
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
