"""`rerankkit plugins`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="See the parts that are installed and what each can be told; write and check your own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Files = Annotated[list[str] | None, typer.Option("--file", metavar="FILE", help="Also load this single-file plugin.")]


@app.command("list")
def list_plugins(file: Files = None, as_json: Json = False) -> None:
    """List plugins and the parts they register; a broken plugin is listed with its error."""
    from dataclasses import asdict

    from rerankkit.plugins import load_plugins

    found = load_plugins(file or [])
    parts = [part for slot in found.register.slots() for part in slot.parts.values()]
    if as_json:
        rows = [
            {"kind": p.kind, "name": p.name, "plugin": p.plugin, "distribution": p.distribution, "version": p.version}
            for p in parts
        ]
        print(json.dumps({"plugins": [asdict(plugin) for plugin in found.loaded], "parts": rows}))
        return
    for plugin in found.loaded:
        state = f"broken: {plugin.error}" if plugin.error else f"warning: {plugin.warning}" if plugin.warning else ""
        print(f"{plugin.name}  {plugin.distribution} {plugin.version}  {state}".rstrip())
        for part in parts:
            if part.plugin == plugin.name and not plugin.error:
                print(f"  {part.kind:<10} {part.name:<20} {part.summary}".rstrip())


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="PART", help="A part's name, or kind/name where several share it.")],
    file: Files = None,
    as_json: Json = False,
) -> None:
    """Show a part: whose it is, and every setting with its default and meaning."""
    from rerankkit.errors import PluginError, did_you_mean
    from rerankkit.plugins import describe_settings, load_plugins

    found = load_plugins(file or [])
    kind, _, short = name.rpartition("/")
    parts = [
        p for slot in found.register.slots() for p in slot.parts.values() if p.name == short and kind in ("", p.kind)
    ]
    if not parts:
        broken = [plugin for plugin in found.loaded if plugin.error and plugin.name == name]
        if broken:
            raise PluginError(f"plugin {name} ({broken[0].distribution}) is not in order: {broken[0].error}")
        names = [part.name for slot in found.register.slots() for part in slot.parts.values()]
        raise PluginError(f"no part is named {name!r}; {did_you_mean(name, names)}{found.not_in_order()}")
    shown: list[dict[str, Any]] = []
    for part in parts:
        shown.append(
            {
                "kind": part.kind,
                "name": part.name,
                "plugin": part.plugin,
                "distribution": part.distribution,
                "version": part.version,
                "documentation": " ".join((part.config.__doc__ or "").split()),
                "settings": describe_settings(part.config),
            }
        )
    if as_json:
        print(json.dumps(shown[0] if len(shown) == 1 else shown))
        return
    for one in shown:
        print(f"{one['kind']} {one['name']}  ({one['plugin']}, {one['distribution']} {one['version']})")
        print(f"{one['documentation']}\n")
        for setting in one["settings"]:
            print(f"  {setting['name']} = {setting['default']}    {setting['type']}")
            if setting["documentation"]:
                print(f"      {setting['documentation']}")


@app.command("new")
def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="tokenizer, teacher, reward or optimizer.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What configs will call it, such as short-answers.")],
    single: Annotated[bool, typer.Option("--file", help="Only one file, for `plugin_files` in a config.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write it into.")] = Path(),
) -> None:
    """Write a new plugin that works: a package with tests, or a single file. Then change it.

    The package holds pyproject.toml with the entry point, the part with its settings, tests on the contract of its
    kind, a CI file, a README and py.typed; its tests, mypy --strict and ruff pass as they are.
    """
    from rerankkit.testing.scaffold import block, make_file, make_plugin

    if single:
        written = make_file(kind, name, out)
        print(f"{written}\n\n$ rerankkit plugins check {name} --file {written}\n\nand in a config:\n")
        print(f'plugin_files = ["{written}"]\n\n{block(kind)}\nuse = "{name}"')
        return
    written = make_plugin(kind, name, out)
    for file in sorted(file for file in written.rglob("*") if file.is_file()):
        print(file)
    print(f"\n$ pip install -e '{written}[dev]'\n$ cd {written} && pytest && mypy\n$ rerankkit plugins check {name}")


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A plugin, or one of its parts (kind/name if in doubt).")],
    file: Files = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, for parts that need one or are slow without."),
    ] = None,
    known: Annotated[
        list[str] | None,
        typer.Option("--known", metavar="[PART.]RULE=REASON", help="A rule that a part cannot keep, and why."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try everything that can be tried of a plugin, and print a report for a pull request.

    It is loaded, its hooks and settings are looked over, registering is timed, and each part is built with its default
    settings and put through the contract of its kind. Exit code 0: in order; 1: not; 2: the call can be mended, say by
    a setting that has no default.
    """
    from rerankkit.cli.console import progress_bar
    from rerankkit.errors import UsageError
    from rerankkit.testing.examine import examine

    declared: dict[str, str] = {}
    for one in known or []:
        rule, equals, reason = one.partition("=")
        if not equals or not reason.strip():
            raise UsageError(f"--known {one}: write it as RULE=REASON; a failure without a reason is just a failure.")
        declared[rule.strip()] = reason.strip()
    with progress_bar() as bar:
        found = examine(name, file or [], settings or [], declared, bar)
    print(json.dumps(found.as_dict()) if as_json else found.markdown())
    raise typer.Exit(found.exit_code)
