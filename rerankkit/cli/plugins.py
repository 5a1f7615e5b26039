"""`rerankkit plugins`"""

from __future__ import annotations

import json
from typing import Any


def add_to(verbs: Any) -> None:
    """`rerankkit plugins list` and `rerankkit plugins show PART`"""
    about = "See the parts that are installed, and what each can be told."
    group = verbs.add_parser("plugins", help="see the parts that are installed", description=about, allow_abbrev=False)
    inner = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    listing = inner.add_parser(
        "list", help="list plugins and their parts", description=list_plugins.__doc__, allow_abbrev=False
    )
    showing = inner.add_parser("show", help="show a part's settings", description=show.__doc__, allow_abbrev=False)
    showing.add_argument("name", metavar="PART", help="a part's name, or kind/name where several kinds share it")
    for parser, do in ((listing, list_plugins), (showing, show)):
        parser.add_argument(
            "--file", metavar="FILE", action="append", default=[], help="also load this single-file plugin"
        )
        parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
        parser.set_defaults(do=do)


def list_plugins(file: list[str], as_json: bool) -> None:
    """List plugins and the parts they register; a broken plugin is listed with its error."""
    from dataclasses import asdict

    from rerankkit.plugins import load_plugins

    found = load_plugins(file)
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
                summary = (part.config.__doc__ or "").strip().splitlines()
                print(f"  {part.kind:<10} {part.name:<20} {summary[0] if summary else ''}".rstrip())


def show(name: str, file: list[str], as_json: bool) -> None:
    """Show a part: whose it is, and every setting with its default and meaning."""
    from rerankkit.errors import PluginError, did_you_mean
    from rerankkit.plugins import describe_settings, load_plugins

    found = load_plugins(file)
    kind, _, short = name.rpartition("/")
    parts = [
        p for slot in found.register.slots() for p in slot.parts.values() if p.name == short and kind in ("", p.kind)
    ]
    if not parts:
        broken = [plugin for plugin in found.loaded if plugin.error and plugin.name == name]
        if broken:
            raise PluginError(
                f"plugin {name} ({broken[0].distribution} {broken[0].version}) is broken: {broken[0].error}"
            )
        names = [part.name for slot in found.register.slots() for part in slot.parts.values()]
        raise PluginError(f"no part is named {name!r}; {did_you_mean(name, names)}")
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
