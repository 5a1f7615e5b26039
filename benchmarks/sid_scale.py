"""Semantic IDs at scale: our tokenizers and their peers on the same vectors, each in a process of its own.

    pip install -c constraints.txt faiss-cpu semantic-id vector-quantize-pytorch      # the peers
    python benchmarks/sid_scale.py --make 1000000 vectors.npy beauty.npy sports.npy   # perturb real vectors
    python benchmarks/sid_scale.py vectors.npy --sizes 10000 100000 1000000 --out results.jsonl

4 levels of 256 codes. One thread. Times are CPU seconds (of the process, so that a busy neighbour counts little),
memory is the peak of the resident set, the mapped input included. `error` is squared error over variance.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEVELS, CODES, CHUNK = 4, 256, 8192
OURS = ("residual-kmeans nearest", "residual-kmeans reassign", "residual-kmeans search", "rqvae random", "rqvae search")
PEERS = ("faiss RQ beam 1", "faiss k-means", "semantic-id RQKMeans", "vector-quantize-pytorch RQ-VAE")


def make(num: int, out: Path, sources: list[Path]) -> None:
    """`num` vectors: those of `sources`, and copies of them pushed along the difference of two others.

    By .1 to .5 of their length; every fiftieth is an exact copy. In random order.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    base = np.concatenate([np.load(source).astype(np.float32) for source in sources])
    made = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=(num, base.shape[1]))
    order = rng.permutation(num)
    for start in range(0, num, CHUNK):
        rows = np.arange(start, min(start + CHUNK, num))
        push = base[rng.integers(len(base), size=len(rows))] - base[rng.integers(len(base), size=len(rows))]
        push /= np.linalg.norm(push, axis=1, keepdims=True) + 1e-9
        length = rng.uniform(0.1, 0.5, (len(rows), 1)).astype(np.float32)
        length[(rows < len(base)) | (rng.random(len(rows)) < 0.02)] = 0
        vectors = base[rows % len(base)] + length * push
        made[order[rows]] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    made.flush()


def ours(method: str, path: Path, num: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(fit and encode, reconstruct) of one of our tokenizers."""
    import numpy as np

    from rerankkit import Catalog, Item
    from rerankkit_gr2.tokenizer import ResidualKMeans, RqVae

    kind, how = method.split()
    # A large catalogue is trained in larger batches: as fast a step, and a steadier one
    tokenizer = ResidualKMeans(last_level=how) if kind == "residual-kmeans" else RqVae(last_level=how, batch_size=1024)
    items = tuple(Item(str(row), "") for row in range(num))
    catalog = Catalog(items, np.load(path, mmap_mode="r")[:num], np.empty((0, 2), dtype=np.int64))

    def run() -> Any:
        tokenizer.fit(catalog)
        return tokenizer.encode(catalog)

    return run, tokenizer.reconstruct


def faiss_peer(method: str, path: Path, num: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """faiss: its residual quantizer, or its k-means level by level."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(1)
    vectors = np.ascontiguousarray(np.load(path, mmap_mode="r")[:num])
    dim = vectors.shape[1]
    if method == "faiss RQ beam 1":
        quantizer = faiss.ResidualQuantizer(dim, LEVELS, 8)
        quantizer.max_beam_size = 1

        def run() -> Any:
            quantizer.train(vectors)
            return quantizer.compute_codes(vectors).astype(np.int64)

        return run, lambda codes: quantizer.decode(codes.astype(np.uint8))
    books: list[Any] = []

    def kmeans() -> Any:
        left, codes = vectors.copy(), []
        for level in range(LEVELS):
            found = faiss.Kmeans(dim, CODES, niter=25, seed=level, max_points_per_centroid=1024)
            found.train(left)
            ids = found.index.search(left, 1)[1][:, 0]
            books.append(found.centroids.copy())
            codes.append(ids)
            left -= found.centroids[ids]
        return np.stack(codes, axis=1)

    return kmeans, lambda codes: sum(book[codes[:, level]] for level, book in enumerate(books))


def semantic_id_peer(method: str, path: Path, num: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """semantic-id's residual k-means, one initialisation."""
    import numpy as np
    from semantic_id import RQKMeans

    vectors = np.ascontiguousarray(np.load(path, mmap_mode="r")[:num])
    model = RQKMeans(n_levels=LEVELS, n_clusters=CODES, random_state=0, n_init=1, max_iter=25)

    def run() -> Any:
        model.fit(vectors)
        return np.asarray(model.encode(vectors, batch_size=CHUNK))

    return run, model.decode


def vq_peer(method: str, path: Path, num: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """vector-quantize-pytorch's ResidualVQ with EMA between an encoder and a decoder as wide as ours."""
    import numpy as np
    import torch
    from torch import nn
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(0)
    vectors = np.load(path, mmap_mode="r")[:num]
    dim = vectors.shape[1]
    encoder = nn.Sequential(nn.Linear(dim, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 32))
    decoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, dim))
    quantizer = ResidualVQ(
        dim=32, num_quantizers=LEVELS, codebook_size=CODES, kmeans_init=True, kmeans_iters=10, decay=0.95,
        threshold_ema_dead_code=2,
    )  # fmt: skip
    centre = torch.from_numpy(vectors[:65536].mean(axis=0))
    scale = float(vectors[:65536].std())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)

    def batch(rows: Any) -> Any:
        return (torch.from_numpy(np.array(vectors[rows])) - centre) / scale

    def run() -> Any:
        rng = np.random.default_rng(0)
        steps, order = min(8000, max(400, 40 * num // 1024)), rng.permutation(num)
        for step in range(steps):
            start = step * 1024 % max(1, num - 1024)
            inputs = batch(order[start : start + 1024])
            quantised, _, losses = quantizer(encoder(inputs))
            loss = (decoder(quantised) - inputs).square().mean() + 0.25 * losses.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        quantizer.eval()
        with torch.inference_mode():
            parts = [quantizer(encoder(batch(slice(i, i + CHUNK))))[1].numpy() for i in range(0, num, CHUNK)]
        return np.concatenate(parts).astype(np.int64)

    def restore(codes: Any) -> Any:
        with torch.inference_mode():
            return (decoder(quantizer.get_output_from_indices(torch.from_numpy(codes))) * scale + centre).numpy()

    return run, restore


def child(method: str, path: Path, num: int) -> dict[str, Any]:
    """Run one method in this process."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    maker = ours if method in OURS else faiss_peer if "faiss" in method else semantic_id_peer
    run, restore = (vq_peer if method.startswith("vector") else maker)(method, path, num)
    imported = resource.getrusage(resource.RUSAGE_SELF)
    codes = run()
    done = resource.getrusage(resource.RUSAGE_SELF)
    vectors = np.load(path, mmap_mode="r")[:num]
    mean = vectors.mean(axis=0, dtype=np.float64)
    error = variance = 0.0
    for start in range(0, num, CHUNK):
        part = vectors[start : start + CHUNK]
        error += float(np.square(part - restore(codes[start : start + CHUNK])).sum())
        variance += float(np.square(part - mean).sum())
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    seconds = done.ru_utime + done.ru_stime - imported.ru_utime - imported.ru_stime
    return {
        "method": method,
        "n": num,
        "cpu_seconds": round(seconds, 1),
        "items_per_second": round(num / seconds),
        "error": round(error / variance, 4),
        "distinct": round(len(counts) / num, 5),
        "own": round(float((counts == 1).sum()) / num, 5),
        "peak_mib": done.ru_maxrss // 1024,
        "before_mib": imported.ru_maxrss // 1024,
        "input_mib": vectors.nbytes // 2**20,
    }


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("sources", type=Path, nargs="*")
    parser.add_argument("--make", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=540, help="seconds for one run; a slower one is said to be so")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    a = parser.parse_args()
    if a.make:
        make(a.make, a.vectors, a.sources)
        return
    if a.child:
        print(json.dumps(child(a.child, a.vectors, a.sizes[0])))
        return
    one = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for size in a.sizes:
        for _ in range(a.repeats):
            for method in a.methods:
                call = [sys.executable, __file__, str(a.vectors), "--sizes", str(size), "--child", method]
                try:
                    done = subprocess.run(call, env=one, capture_output=True, text=True, timeout=a.timeout)
                    failed = {"method": method, "n": size, "error": done.stderr.strip()[-300:]}
                    line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else json.dumps(failed)
                except subprocess.TimeoutExpired:
                    line = json.dumps({"method": method, "n": size, "error": f"stopped after {a.timeout} s"})
                print(line, flush=True)
                if a.out:
                    with a.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
