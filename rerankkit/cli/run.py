"""`rerankkit run`"""

from __future__ import annotations

import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML config, or the config.json of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings to change, as block.key=value: sft.epochs=2 data.folder=tables"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The run folder; by default runs/<the config's name>, or where the config.json lies."
        ),
    ] = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The last stage to do, for example sft.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or the dry run) as JSON.")] = False,
) -> None:
    """Run a config from its tables to a report; run it again to continue, or to see that all is done."""
    from rerankkit import processes
    from rerankkit.cli.console import announce, print_table, progress_bar
    from rerankkit.config import find_plugins, load_config, make_config
    from rerankkit.errors import ConfigError, did_you_mean
    from rerankkit.run import STAGES
    from rerankkit.store import check_free

    main = processes.launched()[0] == 0  # the one of several processes that speaks
    raw, where = load_config(config, overrides or [])
    if not raw and main:
        print(f"note: {config} sets nothing; every setting has its default", file=sys.stderr)
    plugins = find_plugins(raw, where)
    for plugin in plugins.loaded:
        if main and (plugin.error or plugin.warning):
            print(f"warning: plugin {plugin.name}: {plugin.error or plugin.warning}", file=sys.stderr)
    resolved = make_config(raw, plugins, where)
    if until and until not in STAGES:
        raise ConfigError(f"--until: no stage is named {until!r}; {did_you_mean(until, STAGES)}")
    folder = out or (config.parent if config.name == "config.json" else Path("runs") / config.stem)
    if dry_run and not main:
        return
    if dry_run:
        from rerankkit.cli.dry_run import describe

        describe(resolved, folder, until, as_json)
        return
    if main:
        check_free(folder)  # before torch is imported: who must wait should not have to wait to be told
    if main and (warning := processes.launcher_warning()):
        print(f"warning: {warning}", file=sys.stderr)
    from rerankkit.run import run as run_pipeline
    from rerankkit.system import prepare

    gc.enable()
    try:
        with progress_bar() if main else nullcontext() as progress, prepare(resolved, folder) as (device, track):
            report = run_pipeline(
                resolved,
                folder,
                device=device,
                progress=progress,
                announce=announce,
                track=track,
                hooks=plugins.hooks,
                until=until,
            )
    except KeyboardInterrupt:
        if main:
            print("interrupted; run the same command again to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    processes.leave()
    if not main:
        return
    if not report:
        print(f"stopped after {until}; run again without --until to go on", file=sys.stderr)
    elif as_json:
        print(json.dumps(report))
    else:
        print_table(report)
        print(f"\nreport: {folder / 'report.html'}")
