"""k-means, level by level on residuals. Seeded; the same on every run of one machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 8192
"""Rows whose distances are held at once."""
POINTS_PER_CODE = 256
"""Rows a codebook is fitted on, for each of its codes, when there are more."""
_SEEDS_PER_CODE = 16  # k-means++ looks at a sample: it costs codes x rows distances one after the other


def nearest_codes(points: Tensor, codebook: Tensor) -> Tensor:
    """[S] ids of the code nearest to each point [S, D] in a codebook [C, D]; the lowest id among equals."""
    halves = codebook.square().sum(dim=1) / 2
    # |p - c|^2 / 2 but for |p|^2 / 2, which is the same for all codes
    parts = [torch.addmm(halves, part, codebook.T, alpha=-1).argmin(dim=1) for part in torch.split(points, CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def fit_kmeans(points: Tensor, num_codes: int, iterations: int, rng: np.random.Generator) -> Tensor:
    """A codebook [C, D] for points [S, D]: k-means++ (Arthur & Vassilvitskii 2007), then Lloyd's iterations.

    A code that nobody is nearest to moves to the point that is worst served. With fewer different points than codes,
    codes repeat one another.
    """
    codebook = _spread_seeds(points, num_codes, rng)
    before = None
    for _ in range(iterations):
        ids = nearest_codes(points, codebook)
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


def fit_residual_kmeans(points: Tensor, num_levels: int, num_codes: int, iterations: int, seed: int) -> Tensor:
    """Codebooks [L, C, D]: each level fitted on what the levels before it leave over. Overwrites `points` [S, D]."""
    rng = np.random.default_rng(seed)
    codebooks = []
    for _ in range(num_levels):
        codebook = fit_kmeans(points, num_codes, iterations, rng)
        for part in torch.split(points, CHUNK):
            part -= codebook[nearest_codes(part, codebook)]
        codebooks.append(codebook)
    return torch.stack(codebooks)


def residual_codes(points: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [S, L] of points [S, D] by the nearest code at each level of codebooks [L, C, D]."""
    codes = []
    for codebook in codebooks:
        codes.append(nearest_codes(points, codebook))
        points = points - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


def _spread_seeds(points: Tensor, num_codes: int, rng: np.random.Generator) -> Tensor:
    """k-means++: each further seed is a point, drawn with probability as its squared distance from those before."""
    most = num_codes * _SEEDS_PER_CODE
    if len(points) > most:
        points = points[torch.from_numpy(np.sort(rng.choice(len(points), most, replace=False)))]
    chosen = [int(rng.integers(len(points)))]
    distances = (points - points[chosen[0]]).square().sum(dim=1)
    for _ in range(num_codes - 1):
        reach = distances.double().cumsum(dim=0).numpy()
        if reach[-1] > 0:
            chosen.append(min(int(np.searchsorted(reach, rng.random() * reach[-1], side="right")), len(points) - 1))
        else:
            chosen.append(int(rng.integers(len(points))))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(dim=1))
    return points[chosen].clone()
