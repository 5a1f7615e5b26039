"""`rerankkit run`"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def add_to(verbs: Any) -> None:
    """`rerankkit run CONFIG [a.b=c ...]`"""
    parser = verbs.add_parser("run", help="run a config, or continue", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a TOML config, or the config.json of a run")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings to change, as block.key=value: sft.epochs=2 data.folder=tables",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="the run folder; by default runs/<the config's name>, or where the config.json lies",
    )
    parser.add_argument("--until", metavar="STAGE", default="", help="the last stage to do, for example sft")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the report (or the dry run) as JSON")
    parser.set_defaults(do=run)


def run(config: Path, overrides: list[str], out: Path | None, until: str, dry_run: bool, as_json: bool) -> None:
    """Run a config from its tables to a report; run it again to continue, or to see that all is done."""
    from rerankkit.cli.console import print_table, progress_bar, stage_line
    from rerankkit.config import load_config, make_config, strings_in
    from rerankkit.errors import ConfigError, did_you_mean
    from rerankkit.plugins import load_plugins
    from rerankkit.run import STAGES
    from rerankkit.store import check_free

    raw, where = load_config(config, overrides)
    plugins = load_plugins(strings_in(raw.get("plugin_files")))
    for plugin in plugins.loaded:
        if plugin.error or plugin.warning:
            print(f"warning: plugin {plugin.name}: {plugin.error or plugin.warning}", file=sys.stderr)
    resolved = make_config(raw, plugins, where)
    if until and until not in STAGES:
        raise ConfigError(f"--until: no stage is named {until!r}; {did_you_mean(until, STAGES)}")
    folder = out or (config.parent if config.name == "config.json" else Path("runs") / config.stem)
    if dry_run:
        from rerankkit.cli.dry_run import describe

        describe(resolved, folder, until, as_json)
        return
    check_free(folder)  # before torch is imported: who must wait should not have to wait to be told
    from rerankkit.run import run as run_pipeline
    from rerankkit.system import prepare

    gc.enable()
    with progress_bar() as progress, prepare(resolved, folder) as (device, track):
        report = run_pipeline(
            resolved,
            folder,
            device=device,
            progress=progress,
            announce=lambda stage, state, seconds: stage_line(stage, state, seconds if state == "done" else None),
            track=track,
            hooks=plugins.hooks,
            until=until,
        )
    if not report:
        print(f"stopped after {until}; run again without --until to go on", file=sys.stderr)
    elif as_json:
        print(json.dumps(report))
    else:
        print_table(report)
        print(f"\nreport: {folder / 'report.html'}")
