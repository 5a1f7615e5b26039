"""Other methods against GR2 at equal budgets: the same policy, data, steps and samples, several seeds.

    pip install ./plugins/rerankkit-onerec-think ./plugins/rerankkit-minionerec
    python benchmarks/rivals.py OUT [--configs GR2.toml RIVAL.toml ...] [--think NAME ...] [--seeds 11 12 13 14 15]
                                    [--set OVERRIDE ...]

For every seed each config is run to its report in OUT/NAME-SEED, where NAME is the config's (quickstart, onerec-think,
minionerec, unless others are given; the first is the one that all are compared with). On the shipped world the seed is
also the world's. What is done is not done again. The runs that `--think` names (the first two, unless given) are also
ranked by think-then-score of their RL policy: log P(candidate | ask, rationale) without a rationale, with one, and by
the largest of four. GR2's are, so that what an answer is made of is not taken for what a policy has learnt.

The first table has budgets: means over the seeds of what was trained, and wall-clock minutes up to the RL policy. The
second one pools the lists of all seeds; off the shipped world, where seeds share users, a user's lists are drawn
together. Differences in NDCG@5 are on the same lists, in points, with paired bootstrap 95% intervals; beside each the
range of the seeds' own means.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from ablation import drawn_by_user, on_shipped_world, run_to_report
from numpy.typing import NDArray

from rerankkit.math.metrics import ranking_metrics
from rerankkit.stages.compare import load_rankings

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"
RATIONALES = (0, 1, 4)
SHOWN = ("R@1", "R@5", "NDCG@5")
BATCH = 32

Orders = Mapping[str, tuple[int, ...]]
Scores = Mapping[str, NDArray[np.float64]]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("out", type=Path)
    default = [EXAMPLES / f"{name}.toml" for name in ("quickstart", "onerec-think", "minionerec")]
    asked.add_argument("--configs", nargs="+", type=Path, default=default, help="GR2's first")
    asked.add_argument("--think", nargs="*", help="names of runs that also think, then score; else the first two")
    asked.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15])
    asked.add_argument("--set", nargs="*", default=[], help="overrides for every run, such as candidates.max_test=1500")
    options = asked.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = [config.stem for config in options.configs]
    options.think = names[:2] if options.think is None else options.think
    if unknown := [name for name in options.think if name not in names]:
        sys.exit(f"--think {unknown[0]}: no such run; the configs are {', '.join(names)}.")
    for seed in options.seeds:
        for config in options.configs:
            run(config, options.out, seed, options.set)
    folders = {name: [options.out / f"{name}-{seed}" for seed in options.seeds] for name in names}
    print("| run | mid-training steps | traces | SFT steps | RL steps | rollouts a step | RL updates | minutes |")
    print("| --- " * 8 + "|")
    for name in names:
        print(budget(name, folders[name]), flush=True)

    lists = [relevance(folder) for folder in folders[names[0]]]
    found: dict[str, tuple[list[Scores], float]] = {}
    for name in names:
        for folder, wanted in zip(folders[name], lists, strict=True):
            if relevance(folder) != wanted:
                sys.exit(f"{folder} has other test lists than the run of {names[0]}: give all runs the same overrides.")
        answers: dict[str, list[tuple[Orders, float]]] = {
            f"{name}, {stage}": [written(folder, stage) for folder in folders[name]] for stage in ("sft", "rl")
        }
        for num in RATIONALES if name in options.think else ():
            answers[f"{name}, rl, scored after {num} rationale{'s' * (num != 1)}"] = [
                scored(folder, num, seed) for folder, seed in zip(folders[name], options.seeds, strict=True)
            ]
        for row, each in answers.items():
            metrics = [score(orders, wanted) for (orders, _), wanted in zip(each, lists, strict=True)]
            found[row] = metrics, float(np.mean([seconds for _, seconds in each]))
    given = [score({i: tuple(range(len(row))) for i, row in wanted.items()}, wanted) for wanted in lists]
    shared: NDArray[np.intp] | None = None
    if not on_shipped_world(options.configs[0]):
        _, shared = np.unique([i for wanted in lists for i in wanted], return_inverse=True)

    print(f"\n{len(lists)} seeds, {sum(map(len, lists)):,} test lists whose target is listed")
    print(
        f"| answers | {' | '.join(SHOWN)} | NDCG@5 less pre-rank | by seed | less {names[0]}, rl | by seed | s/list |"
    )
    print("| --- " * (len(SHOWN) + 6) + "|")
    print(f"| pre-rank | {' | '.join(means(given))} | | | | | |")
    for row, (metrics, seconds) in found.items():
        cells = [row, *means(metrics)]
        cells += difference(metrics, given, shared)
        against = found[f"{names[0]}, rl"][0]
        cells += ["", ""] if metrics is against else difference(metrics, against, shared)
        print("| " + " | ".join([*cells, f"{seconds:.3f}"]) + " |", flush=True)


def run(config: Path, out: Path, seed: int, everywhere: Sequence[str]) -> None:
    folder = out / f"{config.stem}-{seed}"
    if not (folder / "report.json").is_file():
        run_to_report(config, folder, seed, everywhere)


def budget(name: str, folders: Sequence[Path]) -> str:
    rows = []
    for folder in folders:
        config, manifest = (json.loads((folder / f"{kind}.json").read_text()) for kind in ("config", "manifest"))
        logged = {(line["stage"], line["step"]): line for line in map(json.loads, (folder / "metrics.jsonl").open())}
        rl = config["optimizer"]
        of_a_group = rl.get("group_size") or rl["num_beams"]
        minutes = sum(manifest["stages"][stage] for stage in ("sids", "midtrain", "traces", "sft", "rl")) / 60
        rows.append(
            [
                config["midtrain"]["steps"] + config["midtrain"].get("new_tokens", {}).get("steps", 0),
                len((stage(folder, "traces") / "traces.jsonl").read_text().splitlines()),
                sum(kind == "sft" for kind, _ in logged),
                sum(kind == "rl" for kind, _ in logged),
                rl["prompts_per_step"] * of_a_group,
                sum(line.get("num_updates", 0.0) for (kind, _), line in logged.items() if kind == "rl"),
                minutes,
            ]
        )
    *counts, minutes = np.mean(rows, axis=0)
    return f"| {name} | " + " | ".join(f"{count:,.0f}" for count in counts) + f" | {minutes:.1f} |"


def relevance(folder: Path) -> Mapping[str, tuple[float, ...]]:
    """Of every test list, in the given order."""
    users = load_rankings(folder / "rankings.parquet")["rl"]
    return {user.example_id: user.relevance for user in sorted(users, key=lambda user: user.example_id)}


def written(folder: Path, name: str) -> tuple[Orders, float]:
    """The lists that the policy of `name` wrote, and seconds a list."""
    users = load_rankings(folder / "rankings.parquet")[name]
    seconds: float = json.loads((folder / "manifest.json").read_text())["stages"][f"rank-{name}"]
    return {user.example_id: user.ranking.order for user in users}, seconds / len(users)


def scored(folder: Path, num: int, seed: int) -> tuple[Orders, float]:
    """Orders by think-then-score, kept in the run's folder, and seconds a list."""
    from rerankkit_onerec_think.__main__ import test_examples
    from rerankkit_onerec_think.thoughts import think_then_score

    from rerankkit import RunInfo
    from rerankkit.lm import Policy

    kept = folder / f"think-then-score-{num}.json"
    policy_of = json.loads((folder / "manifest.json").read_text())["fingerprints"]["rl"]
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    if known.get("policy") != policy_of:
        print(f"{folder.name}, {num} rationales ...", file=sys.stderr, flush=True)
        policy, examples, start = Policy.load(stage(folder, "rl")), test_examples(folder), time.perf_counter()
        orders: dict[str, tuple[int, ...]] = {}
        for first in range(0, len(examples), BATCH):
            some = examples[first : first + BATCH]
            answers = think_then_score(policy, some, num, info=RunInfo(seed=seed))
            orders |= {example.example_id: ranking.order for example, (ranking, _) in zip(some, answers, strict=True)}
        known = {"policy": policy_of, "seconds": (time.perf_counter() - start) / len(examples), "orders": orders}
        kept.write_text(json.dumps(known))
    return {example_id: tuple(order) for example_id, order in known["orders"].items()}, known["seconds"]


def stage(folder: Path, name: str) -> Path:
    [found] = [path for path in (folder / "stages").iterdir() if path.name.partition("-")[2] == name]
    return found


def score(orders: Orders, lists: Mapping[str, tuple[float, ...]]) -> Scores:
    return ranking_metrics([[row[place] for place in orders[i]] for i, row in lists.items()])


def means(each: Sequence[Scores]) -> list[str]:
    return [f"{np.concatenate([one[metric] for one in each]).mean():.3f}"[1:] for metric in SHOWN]


def difference(each: Sequence[Scores], other: Sequence[Scores], shared: NDArray[np.intp] | None) -> list[str]:
    """The interval, and the range of the seeds' means; `shared`: each list's user, where seeds share them."""
    a, b = (np.concatenate([one["NDCG@5"] for one in some]) for some in (each, other))
    mean, low, high = drawn_by_user(a - b, np.arange(len(a)) if shared is None else shared)
    seeds = [100 * float((one["NDCG@5"] - two["NDCG@5"]).mean()) for one, two in zip(each, other, strict=True)]
    interval = f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return [interval, f"{min(seeds):+.1f} to {max(seeds):+.1f}"]


if __name__ == "__main__":
    main()
