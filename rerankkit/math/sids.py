"""How good a set of semantic IDs is.

Everything here runs over a million items in bounded memory: points [N, D] are read in chunks and never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

CHUNK = 2048
"""Points held, and compared with all queries, at once."""


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


class DepthUse(TypedDict):
    """How the items fall into prefixes of one length."""

    sharing: float
    """Items whose prefix somebody else has / items."""
    largest: int
    """Items of the most crowded prefix."""


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
    depths: list[DepthUse]
    """For prefixes of length 1..L; the last are whole SIDs."""


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
    holders = [np.bincount(groups) for groups in prefix_groups(sids)]
    num_items = len(sids)
    return {
        "num_items": num_items,
        "distinct_share": len(holders[-1]) / num_items,
        "own_share": float((holders[-1] == 1).sum() / num_items),
        "largest_collision": int(holders[-1].max()),
        "distinct_prefixes": list(map(len, holders)),
        "levels": [_level_use(sids[:, level], size) for level, size in enumerate(codebook_sizes)],
        "depths": [
            {"sharing": float(counts[counts > 1].sum() / num_items), "largest": int(max(counts))} for counts in holders
        ],
    }


def _level_use(codes: NDArray[np.integer], size: int) -> LevelUse:
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    entropy = max(0.0, float(-(share * np.log2(share)).sum()))
    return {"size": size, "used": len(counts), "entropy": entropy, "perplexity": float(2**entropy)}


def prefix_groups(sids: NDArray[np.integer]) -> NDArray[np.int64]:
    """[L, N] for SIDs [N, L]: which prefix of length 1..L an item has, numbered from 0 in the order of the SIDs.

    Numbers of longer prefixes refine those of shorter ones, so that one sort by the last row sorts by all.
    """
    order = np.lexsort(sids.T[::-1])
    ordered = sids[order]
    changes = np.logical_or.accumulate(ordered[1:] != ordered[:-1], axis=1)
    groups = np.zeros(sids.shape[::-1], dtype=np.int64)
    groups[:, order[1:]] = np.cumsum(changes, axis=0).T
    return groups


def equal_rows(points: NDArray[np.float32]) -> NDArray[np.int64]:
    """[N]: for each of the points [N, D] the first row that holds exactly the same numbers, its own if none before."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2**63, points.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(points), dtype=np.uint64)
    for rows, part in _chunks(points):
        bits = (part + np.float32(0)).view(np.uint32) * np.uint64(0x9E3779B97F4A7C15)  # + 0: -0.0 equals 0.0
        hashes[rows] = (bits ^ bits >> np.uint64(32)) @ weights
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    same = first[group]
    suspects = np.flatnonzero(same != np.arange(len(points)))
    for start in range(0, len(suspects), CHUNK):  # equal hashes do not prove equal points
        some = suspects[start : start + CHUNK]
        same[some] = np.where((points[some] == points[same[some]]).all(axis=1), same[some], some)
    return same


def spread_inside(points: NDArray[np.float32], groups: NDArray[np.int64]) -> list[float] | None:
    """Share of the variance of points [N, D] that is left inside prefixes of length 1..L, for `prefix_groups` [L, N].

    sum_i |x_i - m_i|^2 / sum_i |x_i - m|^2, where m_i is the mean of the items with the prefix of item i and m that of
    all: the least error that any reconstruction from that prefix can have. None where all points are equal.
    """
    counts = [np.bincount(row) for row in groups]
    mean = np.add.reduce([part.sum(axis=0, dtype=np.float64) for _, part in _chunks(points)]) / len(points)
    order = np.argsort(groups[-1], kind="stable")
    # sum_i |x_i - m_i|^2 = sum_i |x_i|^2 - sum_g |S_g|^2 / n_g, with S_g the sum over a prefix's items, x centred.
    total = 0.0
    between = np.zeros(len(groups))
    unfinished = [(-1, mean)] * len(groups)  # at each depth the prefix, and its sum so far, that a chunk's end cuts
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        sums = points[rows] - mean
        total += float(np.einsum("nd,nd->", sums, sums))
        for depth in reversed(range(len(groups))):  # sums of longer prefixes add up to those of shorter ones
            numbers = groups[depth, rows]
            starts = np.flatnonzero(np.diff(numbers, prepend=-1))
            # A product with a matrix of ones: np.add.reduceat is several times slower on short runs.
            ends = np.append(starts, len(rows))
            sums, rows = csr_array((np.ones(len(rows)), np.arange(len(rows)), ends)) @ sums, rows[starts]
            numbers, whole = numbers[starts], sums.copy()
            number, so_far = unfinished[depth]
            if number == numbers[0]:
                whole[0] += so_far
            elif number >= 0:
                between[depth] += so_far @ so_far / counts[depth][number]
            unfinished[depth] = (int(numbers[-1]), whole[-1])
            between[depth] += (np.einsum("nd,nd->n", whole[:-1], whole[:-1]) / counts[depth][numbers[:-1]]).sum()
    for depth, (number, so_far) in enumerate(unfinished):
        between[depth] += so_far @ so_far / counts[depth][number]
    # What rounding leaves of equal points is not a variance.
    if total <= 1e-12 * float(mean @ mean) * len(points):
        return None
    return [float(left) for left in np.clip(1 - between / total, 0, 1)]


def squared_error(points: NDArray[np.float32], others: Iterator[NDArray[np.float32]]) -> tuple[float, float]:
    """(sum |x - x^|^2, sum |x - mean|^2) of points [N, D]; `others` yields the x^ of `CHUNK` rows each, in order."""
    mean = np.add.reduce([part.sum(axis=0, dtype=np.float64) for _, part in _chunks(points)]) / len(points)
    error = total = 0.0
    for (_, part), other in zip(_chunks(points), others, strict=True):
        error += float(np.square(part - other.astype(np.float64)).sum())
        total += float(np.square(part - mean).sum())
    return error, total


def purity(groups: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of items whose label [N] is the commonest one of their group [N]; the more groups, the higher by chance."""
    num_labels = int(labels.max()) + 1
    pairs, counts = np.unique(groups * num_labels + labels, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs // num_labels, prepend=-1))
    return float(np.maximum.reduceat(counts, starts).sum() / len(labels))


def nearest_rows(points: NDArray[np.float32], queries: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """[Q, k]: the rows of points [N, D] most like each of the rows `queries` [Q] by cosine, nearest first.

    Exact, without the query itself, k < N; of equally near rows the lower ones, as far as rounding lets them be equal.
    A zero vector is like nothing: its cosine counts as 0.
    """
    asked = _unit(points[queries])
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = np.full((len(queries), k), -1, dtype=np.int64)
    for rows, part in _chunks(points):
        like = asked @ _unit(part).T
        inside = (queries >= rows.start) & (queries < rows.start + len(part))
        like[inside, queries[inside] - rows.start] = -np.inf
        if not rows.start and len(part) > k:  # no bar yet: pass only what can be among the k of this chunk
            bar = np.partition(like, -k, axis=1)[:, -k]
            hits = (like >= bar[:, None]) & (like > -np.inf)
        else:
            hits = like > best[:, -1:]
        who, what = np.divmod(np.flatnonzero(hits), len(part))  # much faster than np.nonzero of two dimensions
        if not len(who):
            continue
        changed = np.unique(who)
        owner = np.concatenate([np.repeat(changed, k), who])
        values = np.concatenate([best[changed].ravel(), like[who, what]])
        where = np.concatenate([found[changed].ravel(), what + rows.start])
        order = np.lexsort((where, -values, owner))
        place = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
        kept = order[place < k]
        best[changed], found[changed] = values[kept].reshape(-1, k), where[kept].reshape(-1, k)
    return found


def neighbour_recall(
    groups: NDArray[np.int64], queries: NDArray[np.int64], neighbours: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[Q]: how many of each query's k nearest neighbours [Q, k] are among its k nearest by SID, as a share of k.

    Nearness by SID is the length of the common prefix. At some length b it cannot choose: `longer` others share more
    than b codes with the query, `tied` exactly b, and longer < k <= longer + tied. The k - longer places left go to the
    tied at random, so the expected recall is

        (hits_longer + hits_tied * (k - longer) / tied) / k

    with hits_* the neighbours in each. By chance it is k / (N - 1). `groups` [L, N] are `prefix_groups`.
    """
    num_levels, num_items = groups.shape
    k = neighbours.shape[1]
    counts = [np.bincount(row)[row[queries]] - 1 for row in groups]  # others with the query's prefix of length 1..L
    sharing = np.stack([np.full(len(queries), num_items - 1), *counts, np.zeros(len(queries), dtype=np.int64)])
    common = (groups[:, neighbours] == groups[:, queries][:, :, None]).sum(axis=0)  # [Q, k]: length of common prefix
    boundary = num_levels - (sharing[num_levels::-1] >= k).argmax(axis=0)  # [Q]
    columns = np.arange(len(queries))
    longer = sharing[boundary + 1, columns]
    tied = sharing[boundary, columns] - longer
    hits_longer = (common > boundary[:, None]).sum(axis=1)
    hits_tied = (common == boundary[:, None]).sum(axis=1)
    recall: NDArray[np.float64] = (hits_longer + hits_tied * (k - longer) / tied) / k
    return recall


def log_odds(
    inside: NDArray[np.int64], num_inside: int, outside: NDArray[np.int64], num_outside: int
) -> NDArray[np.float64]:
    """[W]: how much likelier each word is inside than outside, in standard errors.

    `inside` and `outside` [W] count the titles with the word, of `num_inside` and `num_outside`. Half a title is added
    to every count, so that a word nobody uses outside is not infinitely telling; dividing the log-odds ratio by its
    standard error keeps rare words from winning (Monroe, Colaresi & Quinn 2008, without their prior).
    """
    a, b = inside + 0.5, num_inside - inside + 0.5
    c, d = outside + 0.5, num_outside - outside + 0.5
    scores: NDArray[np.float64] = (np.log(a / b) - np.log(c / d)) / np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return scores


def _chunks(points: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    for start in range(0, len(points), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, np.asarray(points[rows], dtype=np.float32)


def _unit(points: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.sqrt(np.square(points, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.asarray(points / np.where(norms > 0, norms, 1), dtype=np.float32)
