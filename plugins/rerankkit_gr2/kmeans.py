"""k-means, level by level on residuals. Seeded; the same on every run of one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 4096
"""Rows whose distances are held at once."""
ROUGH_POINTS_PER_CODE = 64
"""Rows for each code that suffice for finding out roughly where the codes should be."""
POINTS_PER_CODE = 512
"""Rows a codebook is fitted on, for each of its codes, when there are more."""
_FEWEST, _SAMPLE, _ROUGH_ITERATIONS = 4, 20_000, 3
_SEEDS_PER_CODE, _FEWEST_SEEDS = 8, 2048  # k-means++ costs codes x rows distances one after the other


@contextmanager
def fast_products() -> Iterator[None]:
    """float32 matrix products through bfloat16 units, with float32 sums, on processors that have such units.

    Of 384-dimensional text vectors about one in a thousand then takes another of two all but equally near codes; the
    error of reconstruction stays the same to four digits. Elsewhere nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def distances(points: Tensor, codebook: Tensor) -> Tensor:
    """|p - c|^2 / 2 - |p|^2 / 2, [S, C], of points [S, D] and codes [C, D]: in a row the order of the distances."""
    return torch.addmm(codebook.square().sum(dim=1) / 2, points, codebook.T, alpha=-1)


def nearest_codes(points: Tensor, codebook: Tensor) -> Tensor:
    """[S] ids of the code nearest to each point [S, D] in a codebook [C, D]; the lowest id among equals."""
    ids = np.empty(len(points), dtype=np.int64)
    for start in range(0, len(points), CHUNK):
        # numpy's argmin is several times as fast as torch's on a CPU, and promises the lowest
        near = distances(points[start : start + CHUNK], codebook)
        ids[start : start + CHUNK] = near.numpy().argmin(axis=1)
    return torch.from_numpy(ids)


def balanced_codes(points: Tensor, codebook: Tensor) -> Tensor:
    """[S] ids such that all codes have equally many points, or one more: each in turn takes the nearest that are left.

    OneRec's balanced k-means (Deng et al. 2025, 2502.18965, algorithm 1). Holds [S, C] distances.
    """
    near = distances(points, codebook).numpy()
    ids = np.empty(len(points), dtype=np.int64)
    left = np.arange(len(points))
    for code in range(len(codebook)):
        room = -(-len(left) // (len(codebook) - code))
        if len(left) > room:
            order = np.argpartition(near[left, code], room - 1)
            ids[left[order[:room]]], left = code, left[order[room:]]
        else:
            ids[left], left = code, left[:0]
    return torch.from_numpy(ids)


def fit_kmeans(
    points: Tensor, num_codes: int, iterations: int, rng: np.random.Generator, *, balanced: bool = False
) -> Tensor:
    """A codebook [C, D] for points [S, D]: Lloyd's iterations from the better of two starts.

    Where there are more than 128 points a code, the starts look at a part of them only. A code that nobody is nearest
    to moves to the point that is worst served. With fewer different points than codes, codes repeat one another.
    `balanced` gives each code equally many points in every iteration.
    """
    rough = points[:: max(1, len(points) // (num_codes * ROUGH_POINTS_PER_CODE))]
    starts = [
        _lloyd(rough, start(rough, num_codes, rng), _ROUGH_ITERATIONS, False) for start in (_progressive, _spread)
    ]
    best = min(starts, key=lambda start: float((rough - start[nearest_codes(rough, start)]).square().sum()))
    return _lloyd(points, best, iterations, balanced)


def _progressive(points: Tensor, num_codes: int, rng: np.random.Generator) -> Tensor:
    """Where to start: k-means along the first 4 principal directions, from there along 8, and so on up to half of all.

    faiss's residual quantizer starts so. Good for text vectors: in a few directions clusters are found that in all of
    them are hidden by what only tells single points apart.
    """
    dims = points.shape[1]
    codebook = points[torch.from_numpy(rng.choice(len(points), num_codes, replace=len(points) < num_codes))]
    if dims < 2 * _FEWEST:
        return codebook
    some = points[:: max(1, len(points) // _SAMPLE)]
    some = some - some.mean(dim=0)
    turn = torch.linalg.eigh(some.T @ some).eigenvectors.flip(1)  # [D, D], the longest axis first
    turned, codebook = points @ turn, codebook @ turn
    width = _FEWEST
    while width < dims:
        few = turned[:, :width].contiguous()
        ids = nearest_codes(few, _lloyd(few, codebook[:, :width].contiguous(), _ROUGH_ITERATIONS, False))
        counts = torch.bincount(ids, minlength=num_codes)
        means = torch.zeros_like(codebook).index_add_(0, ids, turned) / counts.clamp(min=1)[:, None]
        codebook = torch.where(counts[:, None] > 0, means, codebook)
        width *= 2
    start: Tensor = codebook @ turn.T
    return start


def _lloyd(points: Tensor, codebook: Tensor, iterations: int, balanced: bool) -> Tensor:
    before, num_codes = None, len(codebook)
    for _ in range(iterations):
        ids = balanced_codes(points, codebook) if balanced else nearest_codes(points, codebook)
        if before is not None and torch.equal(ids, before):
            break
        before = ids
        counts = torch.bincount(ids, minlength=num_codes)
        sums = torch.zeros_like(codebook).index_add_(0, ids, points)
        codebook = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook)
        empty = (counts == 0).nonzero().squeeze(1)
        if len(empty):
            errors = (points - codebook[ids]).square().sum(dim=1)
            worst = errors.topk(min(len(empty), len(points)))
            moved = worst.indices[worst.values > 0]
            codebook[empty[: len(moved)]] = points[moved]
    return codebook


def sample_rows(num_rows: int, num_codes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The rows to fit codebooks on, ascending: all, or a sample where there are more than `POINTS_PER_CODE` a code."""
    rows = np.arange(num_rows)
    most = num_codes * POINTS_PER_CODE
    return np.sort(rng.choice(rows, most, replace=False)) if num_rows > most else rows


def fit_residual_kmeans(
    points: Tensor, num_levels: int, num_codes: int, iterations: int, seed: int, *, balanced: bool = False
) -> Tensor:
    """Codebooks [L, C, D]: each level fitted on what the levels before it leave over. Overwrites `points` [S, D]."""
    rng = np.random.default_rng(seed)
    codebooks = []
    for _ in range(num_levels):
        codebook = fit_kmeans(points, num_codes, iterations, rng, balanced=balanced)
        for part in torch.split(points, CHUNK):
            part -= codebook[nearest_codes(part, codebook)]
        codebooks.append(codebook)
    return torch.stack(codebooks)


def residual_codes(points: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [S, L] of points [S, D] by the nearest code at each level of codebooks [L, C, D]. Overwrites `points`."""
    codes = torch.empty(len(points), len(codebooks), dtype=torch.long)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = nearest_codes(points, codebook)
        if level + 1 < len(codebooks):
            for part, ids in zip(torch.split(points, CHUNK), torch.split(codes[:, level], CHUNK), strict=True):
                part -= codebook[ids]
    return codes


def _spread(points: Tensor, num_codes: int, rng: np.random.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): a point far from the seeds so far is the likelier next seed.

    Good where there are clean clusters, and few points.
    """
    most = max(num_codes * _SEEDS_PER_CODE, _FEWEST_SEEDS)
    if len(points) > most:
        points = points[torch.from_numpy(np.sort(rng.choice(len(points), most, replace=False)))]
    chosen = [int(rng.integers(len(points)))]
    norms, near = points.square().sum(dim=1), torch.full((len(points),), torch.inf)
    while True:
        last = points[chosen[-1]]
        near = torch.minimum(near, (norms - 2 * (points @ last) + last.square().sum()).clamp(min=0))
        near[chosen[-1]] = 0  # rounding must not draw a point again
        if len(chosen) == num_codes:
            return points[chosen].clone()
        reach = near.double().cumsum(dim=0).numpy()
        if reach[-1] > 0:
            chosen.append(min(int(np.searchsorted(reach, rng.random() * reach[-1], side="right")), len(points) - 1))
        else:
            chosen.append(int(rng.integers(len(points))))
