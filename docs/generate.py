"""Writes docs/config.md and docs/reference.md from the code: python docs/generate.py

--check: exit 1 if one of them is not up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from textwrap import dedent
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
    "rerankkit.gates": "Conditions, and rewards that are paid only where one holds: [gates](rewards.md#gates).",
    "rerankkit.math": "",  # of these two the modules inside are public
    "rerankkit.text": "",
}
HANDED_OUT = {
    "rerankkit.plugins": ("plugins.Slot", "plugins.PartSpec", "plugins.Plugins", "plugins.LoadedPlugin"),
    "rerankkit.stages.rank_asks": ("stages.rank_asks.Ask", "stages.rank_asks.Answer", "stages.rank_asks.Unknown"),
    "rerankkit.testing.records": ("testing.records.MadeWorld",),
    "rerankkit.testing.zoo": ("stages.audit.Audit", "stages.audit.Level", "stages.audit.Finding"),
    "rerankkit.lm.meter": ("lm.meter.Meter",),
    "rerankkit.lm.permutation": ("lm.permutation.Allowed",),
}
"""What the public names of a module give and take, and nobody needs to import."""


def reference() -> str:
    """Hooks, protocols, records, contracts, metrics, columns and public names."""
    sections = (_hooks, _protocols, _records, _contracts, _metrics, _columns, _public_names)
    return "\n".join([REFERENCE_HEAD, *(text for section in sections for text in section() if text)])


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
        yield _grid(("method", "", ""), _method_rows(protocol))


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
            methods = _method_rows(record)
            yield _grid(("method", "", ""), methods) if methods else ""
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
    yield (
        "## Public names\n\n"
        "Import them from the module in the heading. Each has its docstring's first paragraph, and what it raises; "
        "Python's `help` has the rest. A class shown without arguments takes its fields. What is listed under *they "
        "give and take* is not to be imported.\n"
    )
    for module, about in MODULES.items():
        home: Any = import_module(module)
        if hasattr(home, "__all__"):
            yield f"### {module}\n\n{about}\n"
            yield from _by_origin(module, home.__all__)
        elif not hasattr(home, "__path__"):
            yield from _module(module, about)
        else:
            for inner in iter_modules(home.__path__):
                yield from _module(f"{module}.{inner.name}", _first(import_module(f"{module}.{inner.name}")))


def _module(module: str, about: str) -> Iterator[str]:
    """What a module without `__all__` defines, in its order."""
    tree = _tree(module)
    names = [getattr(node, "name", "") or getattr(getattr(node, "target", None), "id", "") for node in tree.body]
    yield f"### {module}\n\n{about}\n"
    yield "".join(_entry(module, name) for name in names if name and not name.startswith("_"))


def _by_origin(module: str, names: Sequence[str]) -> Iterator[str]:
    """What a package gathers: the module that defines a name says what its neighbours are about."""
    origins = {name: _origin(module, name) for name in names}
    above = {name for home in (protocols, types) for name, kind in _own_classes(home)}
    for origin in sorted(set(origins.values())):
        inside = [name for name in names if origins[name] == origin]
        entries = [_entry(origin, name) for name in inside if name not in above]
        linked = [f"[`{name}`](#{name.lower()})" for name in inside if name in above]
        yield f"{_first(import_module(origin))}\n"
        yield f"Above: {', '.join(linked)}.\n" if linked else ""
        yield "".join(entries)
        if origin in HANDED_OUT:
            yield "They give and take:\n"
            yield "".join(_entry(*f"rerankkit.{path}".rsplit(".", 1)) for path in HANDED_OUT[origin])


def _origin(module: str, name: str) -> str:
    """The module that defines what `module` offers under this name."""
    tree = _tree(module)
    blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.If))]  # if TYPE_CHECKING
    for node in (node for block in blocks for node in block):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _origin(str(node.module), name)
    return module


def _entry(module: str, name: str) -> str:
    """A name, as one would type it, and what it is; below a class its fields and methods."""
    value = getattr(import_module(module), name)
    if inspect.isclass(value):
        init = vars(value).get("__init__") if not dataclasses.is_dataclass(value) else None
        made = _typed(init).removesuffix(" -> None") if inspect.isfunction(init) else ""
        about = f"{_first(value)} {_first(init) if made else ''}".strip()
        inner = [_item(shown, told) for shown, told in [*_fields(value), *_methods(value)]]
        return _item(name + made, about) + "".join(f"  {line}\n" for line in "".join(inner).splitlines())
    if inspect.isroutine(value):
        return _item(name + _typed(value), _first(value))
    return _item(*_constant(module, name))


def _item(shown: str, about: str) -> str:
    return f"- `{shown}`" + (f"\\\n  {about}\n" if about else "\n")


def _constant(module: str, name: str) -> tuple[str, str]:
    """An alias with what it stands for, any other constant with its type; and the string under it."""
    body = _tree(module).body
    for node, text in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value:
            alias = ast.unparse(node.annotation) == "TypeAlias"
            shown = f"{name} = {ast.unparse(node.value)}" if alias else f"{name}: {ast.unparse(node.annotation)}"
            return shown.replace("'", '"'), _string(text)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return name, _string(text)
    raise LookupError(f"{module} defines no {name}")


def _fields(kind: type) -> Iterator[tuple[str, str]]:
    """Fields of a class and of rerankkit's own classes that it builds on, as they are typed."""
    for owner in _owners(kind):
        about = _under_fields(owner)
        source = inspect.getsource(owner)
        [tree] = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and not (name := ast.unparse(node.target)).startswith("_"):
                shown = " ".join((ast.get_source_segment(source, node) or "").split())
                shown = re.sub(r"field\( ?default_factory=(?:lambda: (.+?)|(\w+)) ?\)$", r"\1\2()", shown)
                if owner is kind or name in about:
                    yield shown.replace("dict()", "{}").replace(")()", ")"), about.get(name, "")


def _methods(kind: type) -> Iterator[tuple[str, str]]:
    """`name(arguments) -> result` of every public method, `name: type` of every property; and what each does."""
    found: dict[str, Any] = {name: value for owner in _owners(kind) for name, value in vars(owner).items()}
    for name, value in found.items():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
        hidden = name.startswith(("_", "test_")) and name != "__call__"
        if not inspect.isfunction(function) or hidden or name in getattr(kind, "__dataclass_fields__", ()):
            continue
        shown = _typed(function)
        if isinstance(value, property | cached_property):
            shown = f"{name}: {shown.partition(' -> ')[2]}"
        elif isinstance(value, classmethod | staticmethod):
            shown = f"{kind.__name__}.{name}{shown}"
        else:
            shown = name + shown
        yield shown, _told(function)


def _method_rows(kind: type) -> list[tuple[str, str, str]]:
    rows = []
    for shown, told in _methods(kind):
        name, _, rest = re.split(r"(: |(?=\())", shown, maxsplit=1)
        rows.append((f"`{name}`", f"`{rest}`", told))
    return rows


def _owners(kind: type) -> list[type]:
    return [owner for owner in reversed(kind.__mro__) if owner.__module__.startswith("rerankkit")]


def _typed(function: Any) -> str:
    """Arguments and result on one line, as the source has them, but for a constant its value.

    A context manager is called what it is.
    """
    inner = inspect.unwrap(function)
    lines = dedent(inspect.getsource(inner)).splitlines()
    [tree] = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef)
    header = " ".join(" ".join(lines[tree.lineno - 1 : tree.body[0].lineno - 1]).split())
    shown = header[header.index("(") :].removesuffix(":").replace("( ", "(").replace(", )", ")").replace(" )", ")")
    values = inner.__globals__
    shown = re.sub(r"(?<= = )[A-Z][A-Z_]+\b", lambda found: repr(values[found[0]]), shown)
    if inspect.isgeneratorfunction(inner) and not inspect.isgeneratorfunction(function):
        shown = shown.replace("-> Iterator[", "-> ContextManager[")
    return re.sub(r"^\((self|cls)(, )?", "(", shown)


def _tree(module: str) -> ast.Module:
    return ast.parse(Path(str(import_module(module).__file__)).read_text(encoding="utf-8"))


def _own_classes(module: Any) -> Iterator[tuple[str, type]]:
    """The public classes that a module defines, in its order."""
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield name, value


def _told(value: Any) -> str:
    return " ".join((value.__doc__ or "").split())


def _first(value: Any) -> str:
    """The first paragraph of the docstring, and of the rest what is raised."""
    first, _, rest = inspect.cleandoc(value.__doc__ or "").partition("\n\n")
    raised = re.findall(r"(?:^|(?<=[.:] ))Raises .+?\.(?= |$)", " ".join(rest.split()))
    return " ".join([*first.split(), *raised])


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
        target = field.target if isinstance(field, ast.AnnAssign) else getattr(field, "targets", [None])[0]
        if isinstance(target, ast.Name) and _string(text):
            found[target.id] = _string(text)
    return found


def _string(node: ast.AST | None) -> str:
    """The string that stands alone in a statement, on one line."""
    value = getattr(getattr(node, "value", None), "value", None) if isinstance(node, ast.Expr) else None
    return " ".join(value.split()) if isinstance(value, str) else ""


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
