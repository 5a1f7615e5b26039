"""How encoding grows: SIDs for 10,000 to 1,000,000 new items by tokenizers fitted on the first 100,000.

    python benchmarks/sid_growth.py vectors.npy --plot docs/images/sid-growth.svg

`vectors.npy` as `sid_scale.py --make` writes it. CPU seconds of `encode`, assignment of last codes included, medians of
`--repeats` passes over all sizes in turn. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rerankkit import Catalog, Item
from rerankkit_gr2.tokenizer import ResidualKMeans, RqVae

MAKERS = {
    "residual-kmeans, reassign": lambda: ResidualKMeans(),
    "residual-kmeans, search": lambda: ResidualKMeans(last_level="search"),
    "rqvae, random last level": lambda: RqVae(),
}
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
FITTED = 100_000


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    vectors = np.load(a.vectors, mmap_mode="r")
    nobody = np.empty((0, 2), dtype=np.int64)
    items = tuple(Item(f"new {row}", "") for row in range(len(vectors)))
    old = Catalog(tuple(Item(f"old {row}", "") for row in range(FITTED)), vectors[:FITTED], nobody)
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in MAKERS.items():
            tokenizer = make()
            tokenizer.fit(old)
            (Path(scratch) / name).mkdir()
            tokenizer.save(Path(scratch) / name)
        for _ in range(a.repeats):
            for size in a.sizes:
                for name, make in MAKERS.items():
                    tokenizer = make()
                    tokenizer.load(Path(scratch) / name)
                    catalog = Catalog(items[:size], vectors[:size], nobody)
                    started = time.process_time()
                    tokenizer.encode(catalog)
                    seconds.setdefault((name, size), []).append(time.process_time() - started)
    lines: dict[str, list[tuple[int, float]]] = {}
    for (name, size), found in seconds.items():
        middle = statistics.median(found)
        lines.setdefault(name, []).append((size, middle))
        record = {
            "tokenizer": name,
            "items": size,
            "cpu_seconds": round(middle, 2),
            "runs": [round(x, 2) for x in found],
        }
        print(json.dumps({**record, "microseconds_an_item": round(1e6 * middle / size, 1)}), flush=True)
    if a.plot:
        draw(a.plot, lines)


def draw(path: Path, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Seconds over items, both axes logarithmic, beside what is exactly linear."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rerankkit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    sizes = [size for size, _ in next(iter(lines.values()))]
    base = min(points[0][1] for points in lines.values())
    axes.loglog(sizes, [base * size / sizes[0] for size in sizes], "--", color="grey", linewidth=1, label="linear")
    axes.set(xlabel="new items", ylabel="CPU seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
