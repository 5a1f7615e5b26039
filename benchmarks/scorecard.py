"""Time and peak memory of a scorecard: python benchmarks/scorecard.py ITEMS.parquet N VECTORS.npy

The N x 384 vectors are MiniLM's of the table's own item texts (kept in VECTORS.npy for the next time), repeated with
noise until there are N, some exactly: near and exact duplicates, as in a large catalogue. SIDs are four levels of 256
codes, by ranks of random projections of the vectors: no tokenizer's time is in the measurement.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np

from rerankkit.data.embed import embed, item_text
from rerankkit.data.tables import read_items
from rerankkit.stages.scorecard import make_scorecard
from rerankkit.types import Catalog, Item


def main(table: str, num_items: int, vectors: Path) -> None:
    import torch

    torch.set_num_threads(1)
    frame, _ = read_items(table)
    texts = [Item(str(r.item_id), str(r.title), tuple(r.categories), brand=str(r.brand)) for r in frame.itertuples()]
    if not vectors.exists():
        np.save(vectors, embed([item_text(item) for item in texts], "sentence-transformers"))
    base = np.load(vectors)
    rng = np.random.default_rng(0)
    points = np.empty((num_items, base.shape[1]), dtype=np.float32)
    rows = rng.integers(0, len(base), num_items)
    for start in range(0, num_items, 10_000):
        part = slice(start, start + 10_000)
        noise = rng.standard_normal((len(rows[part]), base.shape[1])).astype(np.float32)
        exact = rng.random(len(rows[part])) < 0.02
        points[part] = base[rows[part]] + 0.01 * np.where(exact[:, None], 0, noise)
    scores = points @ rng.standard_normal((base.shape[1], 4)).astype(np.float32)
    codes = np.stack([np.argsort(np.argsort(column)) * 256 // num_items for column in scores.T], axis=1)
    items = tuple(
        Item(f"i{n}", f"{texts[row].title} {n % 97}", texts[row].categories, brand=texts[row].brand)
        for n, row in enumerate(rows.tolist())
    )
    catalog = Catalog(items, points, np.empty((0, 2), dtype=np.int64))
    del scores, noise

    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    started = time.perf_counter()
    card = make_scorecard(codes, (256,) * 4, catalog, seed=0)
    seconds = time.perf_counter() - started
    print(f"{num_items:,} x {points.shape[1]}: {seconds:.1f} s")
    print(
        f"input {points.nbytes / 2**20:,.0f} MiB, resident before {before:,.0f} MiB, peak {resident('VmHWM'):,.0f} MiB"
    )
    print({key: card[key] for key in ("own_share", "equal", "neighbours", "inside", "depths", "purity")})


def resident(field: str = "VmRSS") -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at the most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
