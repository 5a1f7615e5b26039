"""`rerankkit compare`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def add_to(verbs: Any) -> None:
    """`rerankkit compare RUN RUN`"""
    parser = verbs.add_parser(
        "compare", help="set two runs side by side", description=compare.__doc__, allow_abbrev=False
    )
    parser.add_argument("a", metavar="RUN_A", type=Path, help="a finished run's folder")
    parser.add_argument("b", metavar="RUN_B", type=Path, help="another one")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    parser.set_defaults(do=compare)


def compare(a: Path, b: Path, as_json: bool) -> None:
    """Set two runs side by side: B minus A on the same test users, with paired 95% intervals."""
    from rerankkit.cli.console import print_comparison
    from rerankkit.errors import RunFolderError
    from rerankkit.stages.compare import compare_runs, load_rankings
    from rerankkit.store import read_json

    reports = []
    for folder in (a, b):
        reports.append(read_json(folder / "report.json"))
        if not reports[-1]:
            raise RunFolderError(f"{folder}: has no report.json; finish it with `rerankkit run`.")
    rankings = [load_rankings(folder / "rankings.parquet") for folder in (a, b)]
    comparison = compare_runs(*reports, *rankings)
    if as_json:
        print(json.dumps(comparison))
    else:
        print_comparison(comparison, str(a), str(b))
