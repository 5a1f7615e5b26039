"""What each part of reinforcement is worth: five seeds, arms that share their SFT policy.

    python benchmarks/ablation.py OUT CONFIG [--arms base unconditional ...] [--seeds 11 12 13 14 15] [--plot FILE.svg]

For every seed the config runs once (`base`); each arm starts from a copy of that run and does RL and what follows anew,
with the changes named in ARMS. On the shipped world the seed is also the world's. What is done is not done again. The
table pools the lists of all seeds; off the shipped world, where seeds share users, a user's lists are drawn together.
NDCG@5 of RL less SFT, less the given order and less the base's RL, on the same test users, in points, with paired
bootstrap 95% intervals; beside them the range of the seeds' own means. `--plot` draws identity, first kept and tau of
every step (mean over seeds, a rollout is a sample) for the arms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from rerankkit.math.metrics import ranking_metrics
from rerankkit.stages.compare import load_rankings

ARMS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "conditional": ("reward.0.use=gr2",),
    "unconditional": ("reward.0.use=gr2-unconditional",),
    "free": ("optimizer.constrain=false",),
    "unconditional-free": ("reward.0.use=gr2-unconditional", "optimizer.constrain=false"),
    "no-clip-higher": ("optimizer.clip_high=0.2",),
    "no-dynamic-sampling": ("optimizer.dynamic_sampling=false",),
    "sequence-loss": ('optimizer.aggregate="sequence"',),
    "no-overlong": ("optimizer.overlong_filtering=false", "optimizer.overlong_buffer=0"),
    "rank-only": ("reward.0.use=rank-promotion",),
    "ndcg": ("reward.0.use=ndcg",),
    "group-4": ("optimizer.group_size=4",),
    "group-16": ("optimizer.group_size=16",),
}
REDONE = ("rl", "gate", "rank-rl", "rank-exported")
CURVES = {"identity_rate": "lists as given", "first_kept_rate": "given first kept", "kendall_tau": "tau to the given"}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("out", type=Path)
    asked.add_argument("config", type=Path)
    asked.add_argument("--arms", nargs="+", choices=list(ARMS), default=["base", "unconditional"])
    asked.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13, 14, 15])
    asked.add_argument("--set", nargs="*", default=[], help="overrides for every run, such as candidates.max_test=1500")
    asked.add_argument("--plot", type=Path)
    options = asked.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm in dict.fromkeys(["base", *options.arms]):
            run(options.config, options.out, arm, seed, options.set)
    print(
        "| arm | seeds | lists | RL less SFT | by seed | RL less pre-rank | less base | as given | first kept | tau |"
    )
    print("| --- " * 10 + "|")
    worlds = on_shipped_world(options.config)
    base = [options.out / f"base-{seed}" for seed in options.seeds]
    for arm in options.arms:
        print(row(arm, [options.out / f"{arm}-{seed}" for seed in options.seeds], base, worlds), flush=True)
    if options.plot:
        plot(options.plot, options.out, options.arms, options.seeds)


def run(config: Path, out: Path, arm: str, seed: int, everywhere: Sequence[str]) -> None:
    folder = out / f"{arm}-{seed}"
    if (folder / "report.json").is_file():
        return
    if arm != "base" and not folder.exists():
        shutil.copytree(out / f"base-{seed}", folder)
        for stage in (folder / "stages").iterdir():
            if stage.name.partition("-")[2] in REDONE:
                shutil.rmtree(stage)
        shutil.rmtree(folder / "completions", ignore_errors=True)
        (folder / "report.json").unlink()
        logged = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(line for line in logged if '"stage": "rl"' not in line))
    run_to_report(config, folder, seed, [*everywhere, *ARMS[arm]])


def run_to_report(config: Path, folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Run a config in `folder`, its log beside it; on the shipped world the seed is also the world's."""
    changes = [*overrides, f"seed={seed}"]
    if on_shipped_world(config):
        changes.append(f"data.world_seed={seed}")
    command = [sys.executable, "-m", "rerankkit", "run", str(config), "--out", str(folder), *changes]
    print(f"{folder.name} ...", file=sys.stderr, flush=True)
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def on_shipped_world(config: Path) -> bool:
    return '"world"' in config.read_text()


def ndcg(folder: Path) -> tuple[tuple[str, ...], dict[str, NDArray[np.float64]]]:
    """Ids of the test lists; system -> NDCG@5 of each, in this order."""
    systems = load_rankings(folder / "rankings.parquet")
    scores: dict[str, NDArray[np.float64]] = {}
    for name in ("sft", "rl"):
        users = sorted(systems[name], key=lambda user: user.example_id)
        lists = [[user.relevance[place] for place in user.ranking.order] for user in users]
        scores[name] = ranking_metrics(lists)["NDCG@5"]
    scores["pre-rank"] = ranking_metrics([user.relevance for user in users])["NDCG@5"]
    return tuple(user.example_id for user in users), scores


def row(arm: str, folders: Sequence[Path], base: Sequence[Path], worlds: bool) -> str:
    lists, found = zip(*map(ndcg, folders), strict=True)
    for one, folder in zip(found, base, strict=True):
        one["base"] = ndcg(folder)[1]["rl"]
    pooled = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    rl = [next(line for line in report["rows"] if line["name"] == "rl") for report in reports]
    cells = [arm, str(len(folders)), f"{len(pooled['rl']):,}"]
    ids = np.concatenate([np.array(one) for one in lists])
    users = np.arange(len(ids)) if worlds else np.unique(ids, return_inverse=True)[1]
    for other in ("sft", "pre-rank", "base"):
        mean, low, high = drawn_by_user(pooled["rl"] - pooled[other], users)
        cells.append(f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        if other == "sft":
            each = [100 * float((one["rl"] - one["sft"]).mean()) for one in found]
            cells.append(f"{min(each):+.1f} to {max(each):+.1f}")
    cells += [f"{np.mean([line[key] for line in rl]):.2f}" for key in ("identity_rate", "first_kept_rate")]
    cells.append(f"{np.mean([line['kendall_tau'] for line in rl]):.2f}")
    return "| " + " | ".join(cells) + " |"


def drawn_by_user(values: NDArray[np.float64], users: NDArray[np.int64]) -> tuple[float, float, float]:
    """Mean, and a bootstrap 95% interval of it for which users are drawn, each with all lists it has."""
    total, count = np.bincount(users, values), np.bincount(users).astype(float)
    random = np.random.default_rng(0)
    drawn = [random.integers(len(total), size=len(total)) for _ in range(10_000)]
    low, high = np.quantile([total[some].sum() / count[some].sum() for some in drawn], [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def plot(target: Path, out: Path, arms: Sequence[str], seeds: Sequence[int]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(10, 3), constrained_layout=True)
    for arm in arms:
        series: dict[str, list[list[float]]] = {name: [] for name in CURVES}
        for seed in seeds:
            lines = map(json.loads, (out / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines())
            steps = {line["step"]: line for line in lines if line["stage"] == "rl"}
            for name in CURVES:
                series[name].append([steps[step][name] for step in sorted(steps)])
        for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
            mean = np.mean(series[name], axis=0)
            smooth = np.convolve(mean, np.ones(5) / 5, mode="valid")
            axis.plot(np.arange(len(smooth)) + 3, smooth, label=arm)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("step, mean of five", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
