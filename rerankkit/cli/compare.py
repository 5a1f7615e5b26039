"""`rerankkit compare`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A finished run's folder.")],
    b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Set two runs side by side: B minus A on the same test users, with paired 95% intervals."""
    from rerankkit.cli.console import print_comparison
    from rerankkit.errors import RunFolderError
    from rerankkit.stages.compare import compare_runs, load_rankings
    from rerankkit.store import read_json

    reports = []
    for folder in (a, b):
        reports.append(read_json(folder / "report.json"))
        if not reports[-1]:
            why = "is damaged" if (folder / "report.json").exists() else "is not there"
            raise RunFolderError(f"{folder}: report.json {why}; finish the run with `rerankkit run`.")
    rankings = [load_rankings(folder / "rankings.parquet") for folder in (a, b)]
    comparison = compare_runs(*reports, *rankings)
    if as_json:
        print(json.dumps(comparison))
    else:
        print_comparison(comparison, str(a), str(b))
