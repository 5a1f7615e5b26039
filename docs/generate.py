"""Writes docs/config.md from the code: python docs/generate.py (--check: exit 1 if it is not up to date)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from rerankkit.config import ChosenPart, RunConfig, make_config
from rerankkit.plugins import PluginConfig, Plugins, describe_settings, load_plugins

TARGET = Path(__file__).parent / "config.md"
TOP = {
    "seed": ("`0`", "Every random choice of the run derives from it."),
    "device": ('`"auto"`', "What torch runs on: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."),
    "plugin_files": ("`[]`", "Single-file plugins to load for this run, beside those installed."),
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
    plugins = load_plugins(only="gr2")
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


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != page())
    TARGET.write_text(page(), encoding="utf-8")
