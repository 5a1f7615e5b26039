"""Ranking metrics, one number per example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RECALL_DEPTHS = (1, 3, 5, 10)
NDCG_DEPTHS = (3, 5, 10)
METRICS = (*(f"R@{k}" for k in RECALL_DEPTHS), *(f"NDCG@{k}" for k in NDCG_DEPTHS), "MRR")
"""The names that `ranking_metrics` returns, in the order of a report's columns."""


def ranking_metrics(relevance_lists: Sequence[Sequence[float]]) -> dict[str, NDArray[np.float64]]:
    """R@k, NDCG@k and MRR [N] of N lists, each holding the relevance of its candidates in the order they were ranked.

    A candidate is relevant when its relevance is above 0, and every relevant one must be listed:

        R@k     relevant in the first k / relevant in the list
        DCG@k   sum over ranks i = 1..k of gain_i / log2(i + 1)    (Järvelin & Kekäläinen 2002, trec_eval's discount)
        NDCG@k  DCG@k / DCG@k of the list sorted by relevance
        MRR     1 / rank of the first relevant one, not cut off    (Voorhees 1999)

    The gain is the relevance itself, as in trec_eval; for 2^g - 1 pass that as relevance. Lists may differ in length;
    one without any relevant candidate scores 0 throughout. Raises ValueError for negative or non-finite relevance.
    """
    gains = _padded(relevance_lists)  # [N, C]
    if not (np.isfinite(gains).all() and (gains >= 0).all()):
        raise ValueError("relevance must be finite and not negative")
    relevant = gains > 0
    hits = relevant.cumsum(axis=1)
    discounted = (gains / np.log2(np.arange(gains.shape[1]) + 2)).cumsum(axis=1)
    ideal = (-np.sort(-gains, axis=1) / np.log2(np.arange(gains.shape[1]) + 2)).cumsum(axis=1)
    values = [_ratio(hits[:, k - 1], hits[:, -1]) for k in RECALL_DEPTHS]
    values += [_ratio(discounted[:, k - 1], ideal[:, k - 1]) for k in NDCG_DEPTHS]
    values += [relevant.any(axis=1) / (relevant.argmax(axis=1) + 1.0)]
    return dict(zip(METRICS, values, strict=True))


def kendall_tau(order: Sequence[int]) -> float:
    """Kendall's tau between a permutation of 0..n-1 and the identity: 1 the given order, -1 its reverse.

    1 - 4 * inversions / (n * (n - 1)), Kendall 1938; 1 for n < 2. Raises ValueError if `order` is no permutation.
    """
    given = np.asarray(order, dtype=np.int64)
    num = given.size
    if given.ndim != 1 or not np.array_equal(np.sort(given), np.arange(num)):
        raise ValueError(f"order must be a permutation of 0..{num - 1}, not {order!r}")
    if num < 2:
        return 1.0
    inversions = int(np.triu(given[:, None] > given[None, :]).sum())
    return 1.0 - 4.0 * inversions / (num * (num - 1))


def _padded(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """[N, C] with zeros at the end; C at least the deepest cut-off, so that slices at k need no bounds."""
    width = max([*RECALL_DEPTHS, *NDCG_DEPTHS, *(len(row) for row in rows)])
    out = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _ratio(part: NDArray[np.float64 | np.int64], whole: NDArray[np.float64 | np.int64]) -> NDArray[np.float64]:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(whole.shape), where=whole > 0)
