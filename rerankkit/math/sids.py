"""How good a set of semantic IDs is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class LevelUse(TypedDict):
    """How evenly one level's codes are used."""

    size: int
    """Codes there are."""
    used: int
    """Codes that any item has."""
    entropy: float
    """Of the code's distribution over items, in bits; at most log2(size)."""
    perplexity: float
    """2 ** entropy: as many equally used codes would be as uncertain."""


class SidScorecard(TypedDict):
    """Plain numbers: goes into a report or JSON as it is."""

    num_items: int
    distinct_share: float
    """Different SIDs / items."""
    own_share: float
    """Items whose SID nobody else holds / items."""
    largest_collision: int
    """Items that share the most crowded SID; 1 when all are unique."""
    distinct_prefixes: list[int]
    """Different prefixes of length 1..L."""
    levels: list[LevelUse]


def sid_scorecard(sids: NDArray[np.integer], codebook_sizes: Sequence[int]) -> SidScorecard:
    """Uniqueness and code use of the SIDs [N, L] of N items.

    GR2 (Liang et al. 2026) asks for 99% uniqueness without defining it, so both readings are given: distinct and own.
    Raises ValueError if there is no item, or a code lies outside its codebook.
    """
    sids = np.asarray(sids)
    if sids.ndim != 2 or sids.shape[0] == 0 or sids.shape[1] != len(codebook_sizes):
        raise ValueError(f"sids must be [N, L] with N > 0 and L = {len(codebook_sizes)}, not {sids.shape}")
    if not ((sids >= 0) & (sids < np.asarray(codebook_sizes))).all():
        raise ValueError(f"a code lies outside its codebook: sizes {tuple(codebook_sizes)}, highest {sids.max(axis=0)}")
    num_items, num_levels = sids.shape
    _, holders = np.unique(sids, axis=0, return_counts=True)
    return {
        "num_items": num_items,
        "distinct_share": len(holders) / num_items,
        "own_share": float((holders == 1).sum() / num_items),
        "largest_collision": int(holders.max()),
        "distinct_prefixes": [len(np.unique(sids[:, : depth + 1], axis=0)) for depth in range(num_levels)],
        "levels": [_level_use(sids[:, level], size) for level, size in enumerate(codebook_sizes)],
    }


def _level_use(codes: NDArray[np.integer], size: int) -> LevelUse:
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    entropy = max(0.0, float(-(share * np.log2(share)).sum()))
    return {"size": size, "used": len(counts), "entropy": entropy, "perplexity": float(2**entropy)}
