"""Think-then-score on a finished run, with and without thinking: `python -m rerankkit_onerec_think RUN`."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from rerankkit import RerankExample, RerankkitError, RunFolderError, RunInfo, SidMap
from rerankkit.data.dataset import Dataset
from rerankkit.data.lists import CandidateLists
from rerankkit.lm import Policy
from rerankkit.math.metrics import ranking_metrics
from rerankkit.math.statistics import paired_bootstrap

from rerankkit_onerec_think.thoughts import think_then_score

SHOWN = ("R@1", "R@5", "NDCG@5", "MRR")
BATCH = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each number of rationales, and the difference in NDCG@5 to the row that thinks nothing."""
    parser = argparse.ArgumentParser(prog="python -m rerankkit_onerec_think", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--stage", default="rl", help="the stage whose policy is asked: rl, sft or midtrain")
    parser.add_argument("--rationales", default="0,1,4", help="how many are sampled for a list, row by row")
    parser.add_argument("--aggregate", choices=["max", "mean"], default="max", help="how they are merged")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest rationale")
    parser.add_argument("--users", type=int, default=0, help="only so many test users; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        policy = Policy.load(stage(given.run, given.stage))
        examples = test_examples(given.run)[: given.users or None]
    except RerankkitError as error:
        parser.exit(2, f"error: {error}\n")
    given_order = [example.relevance for example in examples]
    rows: list[tuple[str, list[tuple[float, ...]], float]] = [("as given", given_order, 0.0)]
    for num in map(int, given.rationales.split(",")):
        start, ranked = time.perf_counter(), []
        for first in range(0, len(examples), BATCH):
            some = examples[first : first + BATCH]
            answers = think_then_score(
                policy,
                some,
                num,
                aggregate=given.aggregate,
                max_new_tokens=given.max_new_tokens,
                info=RunInfo(seed=given.seed),
            )
            ranked += [tuple(e.relevance[i] for i in r.order) for e, (r, _) in zip(some, answers, strict=True)]
        rows.append((f"{num} rationales", ranked, (time.perf_counter() - start) / len(examples)))
    metrics = [ranking_metrics(ranked) for _, ranked, _ in rows]
    print(
        f"{len(examples)} test users whose target is listed; policy of {given.stage}; {given.aggregate} over rationales"
    )
    print(f"{'':14}" + "".join(f"{name:>8}" for name in SHOWN) + "   s/list  NDCG@5 less the first that was scored")
    for (name, _, seconds), row in zip(rows, metrics, strict=True):
        means = "".join(f"{row[metric].mean():8.3f}" for metric in SHOWN)
        gap = paired_bootstrap(row["NDCG@5"], metrics[1]["NDCG@5"], seed=given.seed)
        print(f"{name:14}{means}{seconds:9.3f}  {gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")


def test_examples(run: Path) -> list[RerankExample]:
    """The asks of a run's own table: test users whose target is among the candidates."""
    lists, dataset = CandidateLists.load(stage(run, "candidates")), Dataset.load(stage(run, "data"))
    return lists.examples(SidMap.load(stage(run, "sids")).attach(dataset.items), "test", only_with_target=True)


def stage(run: Path, name: str) -> Path:
    """The folder of a finished stage. Raises RunFolderError if there is none."""
    found = [path for path in run.glob("stages/*") if re.fullmatch(rf"\d+-{re.escape(name)}", path.name)]
    if len(found) != 1:
        raise RunFolderError(f"{run}: holds no finished stage {name!r}; give a run folder, and finish the run first.")
    return found[0]


if __name__ == "__main__":
    main()
