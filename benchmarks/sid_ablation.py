"""GR2's six switches of the RQ-VAE, on and off in every combination, and the ways to answer collisions.

    python benchmarks/sid_ablation.py PATH/TO/beauty vectors.npy grid --out grid.jsonl
    python benchmarks/sid_ablation.py PATH/TO/beauty vectors.npy collisions
    python benchmarks/sid_ablation.py --summary grid.jsonl

`vectors.npy` holds a text embedding for each row of items.parquet (all-MiniLM-L6-v2 of title, categories and brand,
say). Pairs for the contrastive loss are neighbours in training histories. 4 levels of 256 codes, one thread, seed 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SWITCHES: dict[str, tuple[Any, Any]] = {
    "kmeans_init": (True, False),
    "ema": ("residuals", "off"),
    "diversity": (0.01, 0.0),
    "dead_code_reset": (50, 0),
    "contrastive": (0.1, 0.0),
    "last_level": ("random", "nearest"),
}
PAPER = {
    "ema": (97.5, 31.3),
    "last_level": (83.0, 54.0),
    "diversity": 0.6,
    "dead_code_reset": -4.0,
    "contrastive": -13.2,
}
"""What readers of the paper note: averages with and without, or the difference, in per cent of SIDs that are unique."""


def catalog_of(folder: Path, vectors: Path) -> Any:
    """Items, their vectors, and who follows whom in training."""
    import numpy as np
    import pandas as pd

    from rerankkit import Catalog, Item

    items = pd.read_parquet(folder / "items.parquet", columns=["item_id"])["item_id"].tolist()
    rows = {item_id: row for row, item_id in enumerate(items)}
    table = pd.read_parquet(folder / "interactions.parquet")
    table = table[table["split"] == "train"].sort_values(["user_id", "position"], kind="stable")
    places, users = table["item_id"].map(rows).to_numpy(), table["user_id"].to_numpy()
    together = users[1:] == users[:-1]
    pairs = np.stack([places[:-1][together], places[1:][together]], axis=1)
    return Catalog(tuple(Item(str(item_id), "") for item_id in items), np.load(vectors), pairs)


def measured(tokenizer: Any, catalog: Any) -> dict[str, Any]:
    """Uniqueness, error and CPU seconds of a fit."""
    started = time.process_time()
    tokenizer.fit(catalog)
    codes = tokenizer.encode(catalog)
    return {**judged(tokenizer, codes, catalog), "cpu_seconds": round(time.process_time() - started, 1)}


def judged(tokenizer: Any, codes: Any, catalog: Any) -> dict[str, Any]:
    """Uniqueness and error of SIDs."""
    import numpy as np

    counts = np.unique(codes, axis=0, return_counts=True)[1]
    variance = np.square(catalog.embeddings - catalog.embeddings.mean(axis=0)).sum()
    return {
        "distinct": len(counts) / len(codes),
        "own": float((counts == 1).sum() / len(codes)),
        "prefixes_of_3": len(np.unique(codes[:, :3], axis=0)) / len(codes),
        "error": float(np.square(catalog.embeddings - tokenizer.reconstruct(codes)).sum() / variance),
    }


def grid(catalog: Any, out: Path) -> None:
    """All 2^6 combinations; the last level is dealt out at export, so each net serves both of its ways."""
    import numpy as np

    from rerankkit_gr2.collisions import settle
    from rerankkit_gr2.tokenizer import RqVae

    done = {json.loads(line)["key"] for line in out.read_text().splitlines()} if out.exists() else set()
    names = [name for name in SWITCHES if name != "last_level"]
    for values in itertools.product(*(SWITCHES[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        key = "".join("+" if value == SWITCHES[name][0] else "-" for name, value in chosen.items())
        if key + "+" in done:
            continue
        tokenizer = RqVae(**chosen, last_level="nearest")
        nearest = measured(tokenizer, catalog)
        codes = tokenizer.encode(catalog)
        nobody = np.empty((0, 4), dtype=np.int64)
        settle(codes, nobody, 256, lambda rows, level: rows, how="random", on_full="share")  # measures no distance
        for sign, how, found in (("-", "nearest", nearest), ("+", "random", judged(tokenizer, codes, catalog))):
            record = {"key": key + sign, **chosen, "last_level": how, **found}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


def collisions(catalog: Any) -> None:
    """Each answer to collisions, of both tokenizers."""
    from rerankkit_gr2.tokenizer import ResidualKMeans, RqVae

    ways = ("nearest", "reassign", "search", "random", "uniform", "sinkhorn")
    tried: Sequence[tuple[str, Any]] = [
        *((f"residual-kmeans {how}", ResidualKMeans(last_level=how)) for how in ways),
        ("residual-kmeans balanced, nearest", ResidualKMeans(last_level="nearest", balanced=True)),
        ("residual-kmeans balanced, reassign", ResidualKMeans(last_level="reassign", balanced=True)),
        *((f"rqvae {how}", RqVae(last_level=how)) for how in ways),
        ("rqvae ema of the optimizer, nearest", RqVae(last_level="nearest", ema="optimizer")),
        ("rqvae last two random", RqVae(last_level="random", random_levels=2)),
    ]
    for name, tokenizer in tried:
        print(json.dumps({"name": name, **measured(tokenizer, catalog)}), flush=True)


def summary(path: Path) -> None:
    """Averages with and without each switch, in per cent of distinct SIDs, as a Markdown table."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    print(f"{len(records)} of {2 ** len(SWITCHES)} combinations\n")
    print("| switch | distinct, with | without | own, with | without | error, with | without | paper |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for place, name in enumerate(SWITCHES):
        halves = [[r for r in records if (r["key"][place] == "+") is on] for on in (True, False)]
        cells = [
            f"{scale * sum(r[what] for r in half) / len(half):.{digits}f}"
            for what, scale, digits in (("distinct", 100, 1), ("own", 100, 1), ("error", 1, 3))
            for half in halves
        ]
        print(f"| `{name}` | {' | '.join(cells)} | {PAPER.get(name, '')} |")
    both = [r for r in records if r["ema"] == "residuals" and r["last_level"] == "random"]
    print(f"\nEMA and random last level together: {100 * min(r['distinct'] for r in both):.2f}% distinct at the least")


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("vectors", type=Path, nargs="?")
    parser.add_argument("what", choices=("grid", "collisions"), nargs="?")
    parser.add_argument("--out", type=Path, default=Path("grid.jsonl"))
    parser.add_argument("--summary", type=Path)
    a = parser.parse_args()
    if a.summary:
        summary(a.summary)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    catalog = catalog_of(a.folder, a.vectors)
    if a.what == "grid":
        grid(catalog, a.out)
    else:
        collisions(catalog)


if __name__ == "__main__":
    main()
