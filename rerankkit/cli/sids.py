"""`rerankkit sids`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at a run's semantic IDs.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keep `report` a verb of its own while it is the only one."""


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder whose sids stage is done, or was stopped.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as a page of its own.")] = None,
) -> None:
    """Show how good a run's SIDs are: uniqueness, use of codes, neighbours, categories, what codes mean."""
    from rerankkit.cli.console import print_scorecard
    from rerankkit.errors import UsageError
    from rerankkit.stages.scorecard import load_scorecard
    from rerankkit.store import write_text

    card = load_scorecard(run)
    if html is not None:
        from rerankkit.stages.render import render_scorecard

        try:
            write_text(html, render_scorecard(card))
        except OSError as error:
            raise UsageError(f"--html {html}: cannot be written ({error.strerror}).") from error
    if as_json:
        print(json.dumps(card))
    else:
        print_scorecard(card)
        if html is not None:
            print(f"\npage: {html}")
