"""`rerankkit run`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Argument(help="A TOML config, or the config.json of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, as block.key=value: sft.epochs=2 data.folder=tables")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<config's name> if not given.")] = None,
    until: Annotated[str, typer.Option(help="The last stage to do, for example sft.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or the dry run) as JSON.")] = False,
) -> None:
    """Run a config from its tables to a report; run it again to continue, or to see that all is done."""
    from rerankkit.cli.console import print_table, progress_bar, stage_line
    from rerankkit.config import load_config, make_config
    from rerankkit.errors import ConfigError, did_you_mean
    from rerankkit.plugins import load_plugins
    from rerankkit.run import STAGES

    raw, where = load_config(config, overrides or [])
    files = raw.get("plugin_files", [])
    plugins = load_plugins(files if isinstance(files, list) else [])
    for plugin in plugins.loaded:
        if plugin.error or plugin.warning:
            typer.echo(f"warning: plugin {plugin.name}: {plugin.error or plugin.warning}", err=True)
    resolved = make_config(raw, plugins, where)
    if until and until not in STAGES:
        raise ConfigError(f"--until: no stage is named {until!r}; {did_you_mean(until, STAGES)}")
    name = config.parent.name if config.name == "config.json" else config.stem
    folder = out or Path("runs") / name
    if dry_run:
        from rerankkit.cli.dry_run import describe

        describe(resolved, folder, until, as_json)
        return
    from rerankkit.run import run as run_pipeline
    from rerankkit.system import prepare

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
        typer.echo(f"stopped after {until}; run again without --until to go on", err=True)
    elif as_json:
        typer.echo(json.dumps(report))
    else:
        print_table(report)
        typer.echo(f"\nreport: {folder / 'report.html'}")
