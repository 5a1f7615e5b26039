"""What becomes of items that a quantizer cannot tell apart: how the last codes of a prefix are dealt out.

A quantizer gives items that are alike the same codes. Each way here takes the nearest codes [n, L] of new items and the
SIDs [M, L] that are given already, and changes last codes, in place, of the new ones only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from rerankkit.errors import DataError

LastLevel: TypeAlias = Literal["nearest", "reassign", "search", "random", "uniform", "sinkhorn"]
OnFull: TypeAlias = Literal["spill", "share", "refuse"]
Codes: TypeAlias = NDArray[np.int64]
Near: TypeAlias = Callable[[NDArray[np.int64], int], NDArray[np.float32]]
"""(rows [k], level) -> [k, C]: for each row, what is left of it before that level against each of the level's codes,
half the squared distance but for a constant of the row."""

_AT_ONCE = 4096
"""Rows whose distances are held at once; a prefix (of a search: a prefix one shorter) with more rows is held whole."""
_STEMS_AT_ONCE = 256
"""Prefixes of a search whose C^2 places are held at once."""
_ALTERNATIVES = 4
"""Second-to-last codes that a search looks at for each item, nearest first."""


@dataclass(frozen=True)
class Settled:
    """What happened to the rows of one call."""

    moved: int
    """Rows whose SID is not their nearest codes'."""
    spilled: int
    """Of these, rows whose prefix had no room left, and that went to the nearest prefix with room."""
    shared: int
    """Rows that found no place of their own and share a SID."""


def settle(
    codes: Codes,
    taken: Codes,
    num_codes: int,
    near: Near,
    *,
    how: LastLevel,
    products: NDArray[np.float32] | None = None,
    on_full: OnFull = "spill",
    random_levels: int = 1,
    seed: int = 0,
) -> Settled:
    """Deal out last codes of `codes` [n, L], in place, beside the SIDs `taken` [M, L].

    - nearest: change nothing.
    - reassign: in every prefix where SIDs collide, the last codes that are free are dealt out anew so that all differ
      and the sum of squared errors is least (a linear assignment).
    - search: the last two codes of those items together. Round after round each takes the cheapest free pair of one of
      its 4 nearest second-to-last codes and any last one; where several ask for one pair, the item with most to lose
      goes first. Not quite the least error, but less than `reassign` can reach, since it may leave the prefix. Needs
      `products` [C, C], of second-to-last with last codes; with one level it is `reassign`.
    - random: the last `random_levels` codes come from a deck of each prefix's own, shuffled by (seed, prefix), so that
      unused ones come first (GR2, 2602.07774).
    - uniform: they are drawn at random, used or not.
    - sinkhorn: in every prefix where SIDs collide, the likeliest code under a transport plan that uses all codes alike
      (LC-Rec, 2311.09049); it separates most, not all.

    A prefix has room for `num_codes ** random_levels` items. What `on_full` says happens to those beyond (reassign,
    search and random): spill: they take a free place under the nearest prefix that has one; share: they keep a place
    that is held already; refuse: DataError.
    """
    first = codes.copy()
    beyond = np.empty(0, dtype=np.int64)
    if how == "uniform":
        _draw(codes, num_codes, random_levels, np.random.default_rng([seed, len(taken)]))
    elif how == "random":
        beyond = _deal(codes, taken, num_codes, random_levels, seed)
    elif how == "search" and codes.shape[1] > 1 and products is not None:
        beyond = _search(codes, taken, num_codes, near, products)
    elif how in ("reassign", "search"):
        beyond = _reassign(codes, taken, num_codes, near)
    elif how == "sinkhorn":
        _sinkhorn(codes, taken, num_codes, near)
    if len(beyond) and on_full == "refuse":
        prefix = codes[beyond[0], : codes.shape[1] - random_levels].tolist()
        raise DataError(
            f"{len(beyond):,} items find their prefix full, the first of them {prefix}: it has room for "
            f"{num_codes**random_levels:,} items. Raise the tokenizer's codes or levels, or set "
            'on_full = "spill" to let them take the nearest prefix with room'
        )
    spilled = 0
    if len(beyond) and on_full == "spill":
        spilled = len(beyond)
        _spill(codes, taken, beyond, num_codes, near, seed if how == "random" else None)
    moved = int((codes != first).any(axis=1).sum())
    return Settled(moved, spilled, _num_shared(codes, taken))


def group_ids(codes: Codes) -> NDArray[np.int64]:
    """[n] numbers that are equal where rows of `codes` [n, d] are."""
    sizes = [int(column.max(initial=0)) + 1 for column in codes.T]
    groups = np.zeros(len(codes), dtype=np.int64)
    if math.prod(sizes) < 2**62:
        for size, column in zip(sizes, codes.T, strict=True):
            groups = groups * size + column
        return np.unique(groups, return_inverse=True)[1]
    for size, column in zip(sizes, codes.T, strict=True):  # numbered anew at each level, or the product overflows
        groups = np.unique(groups * size + column, return_inverse=True)[1]
    return groups


def _num_shared(codes: Codes, taken: Codes) -> int:
    groups = group_ids(np.concatenate([taken, codes]))
    return int((np.bincount(groups)[groups[len(taken) :]] > 1).sum()) if len(codes) else 0


def _draw(codes: Codes, num_codes: int, levels: int, rng: np.random.Generator) -> None:
    codes[:, -levels:] = rng.integers(num_codes, size=(len(codes), levels))


def _deal(codes: Codes, taken: Codes, num_codes: int, levels: int, seed: int) -> NDArray[np.int64]:
    """Give each row the next card of its prefix's deck; rows for which there was none keep a used one.

    The deck of a prefix is (start + i * stride) mod C^levels, i = 0, 1, ...: start and a stride without common divisor
    are drawn by hashing (seed, prefix), so every code is as likely, none comes twice, and no deck has to be stored.
    """
    size = num_codes**levels
    prefixes = codes[:, :-levels]
    groups = group_ids(np.concatenate([taken[:, :-levels], prefixes]))
    held, new = groups[: len(taken)], groups[len(taken) :]
    start, stride = _decks(prefixes, size, seed)
    turn = _turns(new)
    order, held_order = np.argsort(new, kind="stable"), np.argsort(held, kind="stable")
    both = np.intersect1d(new, held)  # prefixes that hold items already: skip what these have
    ends = [np.searchsorted(of, both, side) for of in (new[order], held[held_order]) for side in ("left", "right")]
    for low, high, held_low, held_high in zip(*ends, strict=True):
        rows = order[low:high]
        used = _joined(taken[held_order[held_low:held_high], -levels:], num_codes)
        deck = (start[rows[0]] + stride[rows[0]] * np.arange(min(size, len(used) + len(rows)))) % size
        free = np.flatnonzero(~np.isin(deck, used))
        turn[rows] = np.concatenate([free, np.arange(size, size + len(rows))])[: len(rows)]
    cards = (start + stride * (turn % size)) % size
    for level in range(levels):
        codes[:, -1 - level] = cards // num_codes**level % num_codes
    return np.flatnonzero(turn >= size)


def _decks(prefixes: Codes, size: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and stride [n] of each row's deck."""
    # splitmix64 (Steele et al. 2014) over the prefix; uint64 wraps around, as it should
    state = np.full(len(prefixes), seed, dtype=np.uint64)
    for column in prefixes.T.astype(np.uint64):
        state = _mixed(state + column + np.uint64(1))
    strides = np.arange(1, min(size, 1 << 16) + 1)
    strides = strides[np.gcd(strides, size) == 1]
    start = (_mixed(state + np.uint64(1)) % np.uint64(size)).astype(np.int64)
    return start, strides[(_mixed(state + np.uint64(2)) % np.uint64(len(strides))).astype(np.int64)]


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _turns(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] how many rows of the same group come before each row."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    turns = np.empty(len(groups), dtype=np.int64)
    turns[order] = np.arange(len(groups)) - np.repeat(first, np.diff(first, append=len(groups)))
    return turns


def _joined(codes: Codes, num_codes: int) -> NDArray[np.int64]:
    """The columns of [n, m] as digits of one number [n]."""
    joined: NDArray[np.int64] = codes @ num_codes ** np.arange(codes.shape[1] - 1, -1, -1)
    return joined


def _contested(codes: Codes, taken: Codes) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, NDArray[np.int64]]]:
    """The rows of prefixes in which a new SID collides, prefix by prefix; where each begins; last codes held there."""
    both = np.concatenate([taken, codes])
    prefixes = group_ids(both[:, :-1])
    whole = group_ids(np.column_stack([prefixes, both[:, -1]]))
    colliding = np.bincount(whole)[whole] > 1
    colliding[: len(taken)] = False
    open_ = np.zeros(prefixes.max(initial=-1) + 1, dtype=bool)
    open_[prefixes[colliding]] = True
    new = prefixes[len(taken) :]
    rows = np.flatnonzero(open_[new])
    rows = rows[np.argsort(new[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(new[rows], prepend=-1))
    held_rows = np.flatnonzero(open_[prefixes[: len(taken)]])
    held_rows = held_rows[np.argsort(prefixes[held_rows], kind="stable")]
    parts = np.split(held_rows, np.flatnonzero(np.diff(prefixes[held_rows])) + 1) if len(held_rows) else []
    held = {int(prefixes[part[0]]): taken[part, -1] for part in parts}
    return rows, starts, {i: held[g] for i, g in enumerate(new[rows[starts]].tolist()) if g in held}


def _reassign(codes: Codes, taken: Codes, num_codes: int, near: Near) -> NDArray[np.int64]:
    last, every = codes.shape[1] - 1, np.arange(num_codes)
    rows, starts, held = _contested(codes, taken)
    ends = np.append(starts[1:], len(rows))
    beyond = []
    group = 0
    while group < len(starts):
        upto = max(group + 1, int(np.searchsorted(ends, starts[group] + _AT_ONCE, side="right")))
        some = rows[starts[group] : ends[upto - 1]]
        costs = near(some, last).astype(np.float64)
        offset = starts[group]
        for g in range(group, upto):
            owners, cost = some[starts[g] - offset : ends[g] - offset], costs[starts[g] - offset : ends[g] - offset]
            if g in held:
                free = np.delete(every, held[g])
                who, what = linear_sum_assignment(cost[:, free])
                what = free[what]
            else:
                who, what = linear_sum_assignment(cost)
            codes[owners[who], -1] = what
            if len(who) < len(owners):
                beyond.append(np.delete(owners, who))
        group = upto
    return np.concatenate(beyond) if beyond else np.empty(0, dtype=np.int64)


def _search(codes: Codes, taken: Codes, num_codes: int, near: Near, products: NDArray[np.float32]) -> NDArray[np.int64]:
    last = codes.shape[1] - 1
    rows, _, _ = _contested(codes, taken)
    if not len(rows):
        return rows
    stems = group_ids(np.concatenate([taken, codes])[:, : last - 1])
    held, new = stems[: len(taken)], stems[len(taken) :]
    rows = rows[np.argsort(new[rows], kind="stable")]
    settled = np.ones(len(codes), dtype=bool)
    settled[rows] = False
    kept = np.concatenate([taken, codes[settled]])
    kept_stems = np.concatenate([held, new[settled]])
    order = np.argsort(kept_stems, kind="stable")
    kept, kept_stems = kept[order, last - 1 :], kept_stems[order]
    starts = np.append(np.flatnonzero(np.diff(new[rows], prepend=-1)), len(rows))
    beyond = []
    group = 0
    while group < len(starts) - 1:
        upto = int(np.searchsorted(starts, starts[group] + _AT_ONCE, side="right")) - 1
        upto = min(max(group + 1, upto), group + _STEMS_AT_ONCE)
        some = rows[starts[group] : starts[upto]]
        those, local = np.unique(new[some], return_inverse=True)
        used = np.zeros((len(those), num_codes, num_codes), dtype=bool)
        around = slice(*np.searchsorted(kept_stems, [those[0], those[-1] + 1]))
        owner = np.searchsorted(those, kept_stems[around])
        among = those[np.minimum(owner, len(those) - 1)] == kept_stems[around]
        used[owner[among], kept[around][among, 0], kept[around][among, 1]] = True
        # |r - c - d|^2 / 2 = (|c|^2 / 2 - rc) + (|d|^2 / 2 - rd) + cd, but for |r|^2 / 2
        above, below = near(some, last - 1), near(some, last) - products[codes[some, last - 1]]
        width = min(_ALTERNATIVES, num_codes)
        wide = np.argpartition(above, width - 1, axis=1)[:, :width]
        costs = np.take_along_axis(above, wide, axis=1)[:, :, None] + below[:, None, :] + products[wide]
        pairs, lost = _take_turns(costs.reshape(len(some), -1), wide, local, used)
        codes[some, last - 1], codes[some, last] = np.divmod(pairs, num_codes)
        beyond.append(some[lost])
        group = upto
    return np.concatenate(beyond)


def _take_turns(
    costs: NDArray[np.float32], wide: NDArray[np.int64], local: NDArray[np.int64], used: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A pair (as one number) for each row of `costs` [k, W * C], and which rows found none and keep their first wish.

    In each round every row without a pair asks for its cheapest; of those who ask for the same free one, it goes to the
    row whose next choice is the most expensive by comparison. Overwrites `costs` and `used` [S, C, C].
    """
    size = used.shape[-1]
    places = used.reshape(-1)
    wish = costs.argmin(axis=1)
    first = wide[np.arange(len(costs)), wish // size] * size + wish % size
    pairs, lost = first.copy(), np.zeros(len(costs), dtype=bool)
    active = np.arange(len(costs))
    while len(active):
        asked = wish[active]
        pair = wide[active, asked // size] * size + asked % size
        place = local[active] * size * size + pair
        cost = costs[active, asked]
        lost[active[np.isinf(cost)]] = True
        costs[active, asked] = np.inf
        wish[active] = costs[active].argmin(axis=1)
        with np.errstate(invalid="ignore"):  # inf - inf, of rows that have asked for everything
            regret = costs[active, wish[active]] - cost
        free = np.flatnonzero(~places[place] & ~lost[active])
        free = free[np.lexsort((active[free], -regret[free], place[free]))]
        won = free[np.flatnonzero(np.diff(place[free], prepend=-1))]
        places[place[won]] = True
        pairs[active[won]] = pair[won]
        waiting = ~lost[active]
        waiting[won] = False
        active = active[waiting]
    pairs[lost] = first[lost]
    return pairs, lost


def _sinkhorn(codes: Codes, taken: Codes, num_codes: int, near: Near, sharpness: float = 0.003) -> None:
    """Sinkhorn-Knopp on distances scaled to [-1, 1], 50 rounds, as LC-Rec does for items that collide."""
    rows, starts, held = _contested(codes, taken)
    for group, some in enumerate(np.split(rows, starts[1:])):
        free = np.delete(np.arange(num_codes), held.get(group, []))
        if not len(some) or not len(free):
            continue
        if len(some) == 1:  # a plan for one item is all codes alike
            codes[some, -1] = free[near(some, codes.shape[1] - 1)[0, free].argmin()]
            continue
        cost = near(some, codes.shape[1] - 1)[:, free].astype(np.float64)
        cost -= cost.min(axis=1, keepdims=True)  # the row's own constant, which `near` leaves open
        middle, reach = (cost.max() + cost.min()) / 2, (cost.max() - cost.min()) / 2
        logits = -(cost - middle) / ((reach or 1.0) * sharpness)
        for _ in range(50):
            logits -= np.logaddexp.reduce(logits, axis=0, keepdims=True)
            logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        codes[some, -1] = free[logits.argmax(axis=1)]


def _spill(codes: Codes, taken: Codes, beyond: NDArray[np.int64], num_codes: int, near: Near, seed: int | None) -> None:
    """Each row of `beyond` takes a free place under the nearest prefix with room, one row after the other.

    It keeps as many of its first codes as it can, and below them takes the nearest code that has room, level by level;
    the last one, with a seed, from the deck of the prefix where it ends.
    """
    levels = codes.shape[1]
    if num_codes**levels >= 2**63:
        raise DataError(
            f'{len(beyond):,} items find their prefix full, and on_full = "spill" cannot count {num_codes} ** {levels} '
            'SIDs; lower the tokenizer\'s levels, or set on_full = "share"'
        )
    weights = num_codes ** np.arange(levels - 1, -1, -1)
    settled = np.ones(len(codes), dtype=bool)
    settled[beyond] = False
    held = np.unique(np.concatenate([taken, codes[settled]]) @ weights)

    def room(prefix: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which next codes [C] have a place left below them."""
        depth = len(prefix)
        edges = prefix @ weights[:depth] + weights[depth] * np.arange(num_codes + 1)
        below: NDArray[np.bool_] = np.diff(np.searchsorted(held, edges)) < weights[depth]
        return below

    for done, row in enumerate(beyond.tolist()):
        kept = next((depth for depth in range(levels - 2, -1, -1) if room(codes[row, :depth]).any()), None)
        if kept is None:
            raise DataError(
                f"all {num_codes**levels:,} SIDs are given, and {len(beyond) - done:,} more items need one; raise the "
                "tokenizer's codes or levels"
            )
        for level in range(kept, levels):
            free = room(codes[row, :level])
            if level == levels - 1 and seed is not None:
                start, stride = _decks(codes[[row], :-1], num_codes, seed)
                deck = (start + stride * np.arange(num_codes)) % num_codes
                codes[row, level] = deck[free[deck]][0]
            else:
                codes[row, level] = np.where(free, near(np.array([row]), level)[0], np.inf).argmin()
        key = codes[row] @ weights
        held = np.insert(held, np.searchsorted(held, key), key)
