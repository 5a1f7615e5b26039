"""`rerankkit rank`"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import typer

EPILOG = """\b
A line of FILE:
  {"id": "u1", "history": ["i7", "i2"], "candidates": ["i9", "i4", "i5"]}
and its answer:
  {"id": "u1", "ranking": ["i4", "i9", "i5"], "order": [1, 0, 2], "parse": "ok",
   "problem": "", "identity": false, "reasoning": "...", "cited": {}, "unknown": []}
An item that the run does not know, for --unknown text:
  {"item_id": "new", "title": "Travel comb", "categories": ["Hair"]}
"""


def rank(
    run: Annotated[Path, typer.Option(metavar="DIR", help="A trained run's folder; its tables are not needed.")],
    asks: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSONL, a list a line: history (item ids, oldest first), candidates (item ids as the pre-ranker gave "
            "them) and, if you like, id and scores. - is stdin.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the answers go, written whole; by default stdout.")
    ] = None,
    policy: Annotated[
        Literal["exported", "rl", "sft", "mid-train"],
        typer.Option(help="exported is what the run's gate chose, or else the last one trained."),
    ] = "exported",
    unknown: Annotated[
        Literal["refuse", "text", "last"],
        typer.Option(
            help="What becomes of items that the run does not know. refuse: an error. text: they are ranked by the "
            "title (and what else) that they are given with. last: they go behind the others.",
        ),
    ] = "refuse",
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Lists ranked at once. [default: the run's]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest answer; long lists need more. [default: the run's]")
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Rank lists that a run has never seen; answers are JSONL, in the order of the asks."""
    from rerankkit import processes
    from rerankkit.cli.console import progress_bar
    from rerankkit.errors import UsageError
    from rerankkit.stages.rank_asks import Ranker, config_of, find_policy, read_asks
    from rerankkit.store import write_text
    from rerankkit.system import prepare

    if processes.launched()[1] > 1:
        raise UsageError("rank: works in one process; split the asks into files, and start one for each.")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UsageError(f"--out {out}: cannot be written; name a file in a folder that is there.")
    read = read_asks(asks)
    find_policy(run, policy)  # before torch is imported
    gc.enable()
    with progress_bar() as progress, prepare(config_of(run, device=device), run) as (found, _):
        ranker = Ranker.load(
            run, policy, device=found, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
        )
        started = perf_counter()
        answers = ranker.rank(read, unknown)
        seconds = perf_counter() - started
    text = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
    if out is None:
        sys.stdout.write(text)
    else:
        try:
            write_text(out, text)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written ({error.strerror}).") from error
    lists = "1 list" if len(answers) == 1 else f"{len(answers):,} lists"
    same = sum(answer.identity for answer in answers) / len(answers)
    unread = sum(answer.parse != "ok" for answer in answers)
    print(
        f"{lists} ranked by {ranker.name} of {run}, {len(answers) / seconds:.1f} a second; "
        f"{same:.0%} left in the given order, {unread:,} not well formed",
        file=sys.stderr,
    )
