"""`rerankkit status`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which stages of a run are done, which is under way, and who is at work on it."""
    from dataclasses import asdict

    from rerankkit.cli.console import duration
    from rerankkit.run import STAGES
    from rerankkit.store import holder_of, read_status

    stages, holder = {stage.name: stage for stage in read_status(run)}, holder_of(run)
    finished = (run / "report.json").exists()
    if as_json:
        rows = [asdict(stage) for stage in stages.values()]
        print(json.dumps({"run": str(run), "stages": rows, "report": finished, "holder": holder}))
        return
    for name in STAGES:
        found = stages.get(name)
        state = found.state if found else "to do"
        detail = duration(found.seconds) if found and found.seconds is not None else ""
        detail = f"step {found.step}" if found and found.step is not None else detail
        print(f"{state:<11}{name:<16}{detail}".rstrip())
    print(f"{'done' if finished else 'to do':<11}report")
    if holder:
        print(f"at work: process {holder['pid']} on {holder['host']}")
    elif not finished:
        print("nobody is at work on it; `rerankkit run` with its config.json goes on from here")
