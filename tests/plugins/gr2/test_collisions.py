from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rerankkit.errors import DataError
from rerankkit_gr2.collisions import Settled, group_ids, settle

NONE = np.empty((0, 2), dtype=np.int64)


def forbidden(rows: Any, level: int) -> Any:
    raise AssertionError("distances are not needed")


def deal(
    codes: list[list[int]], taken: list[list[int]] | None = None, num_codes: int = 4, near: Any = forbidden, **how: Any
) -> tuple[list[list[int]], Settled]:
    table = np.array(codes, dtype=np.int64)
    settled = settle(table, np.array(taken or np.empty((0, table.shape[1])), dtype=np.int64), num_codes, near, **how)
    return table.tolist(), settled


def costs(*rows: list[float]) -> Any:
    """Distances of every row to the last codes, by hand."""
    table = np.array(rows, dtype=np.float32)
    return lambda some, level: table[some]


def test_groups_are_rows_that_are_equal() -> None:
    assert group_ids(np.array([[1, 2], [0, 9], [1, 2], [1, 0]])).tolist() == [2, 0, 2, 1]
    wide = np.full((2, 12), 2**40)  # the product of the sizes is far beyond int64
    wide[1, 11] -= 1
    assert len(set(group_ids(wide).tolist())) == 2


def test_nearest_changes_nothing_and_counts_who_shares() -> None:
    codes, settled = deal([[0, 1], [0, 1], [1, 1]], [[1, 1]], how="nearest")
    assert codes == [[0, 1], [0, 1], [1, 1]]
    assert settled == Settled(moved=0, spilled=0, shared=3)


def test_reassignment_touches_only_prefixes_that_collide() -> None:
    # prefix 0: both want code 0; (0 -> 0, 1 -> 1) costs 0 + .5, (0 -> 1, 1 -> 0) costs .9 + .1
    near = costs([0, 0.9, 2, 3], [0.1, 0.5, 2, 3], [9, 9, 9, 9])
    codes, settled = deal([[0, 0], [0, 0], [1, 3]], how="reassign", near=near)
    assert codes == [[0, 0], [0, 1], [1, 3]]
    assert settled == Settled(moved=1, spilled=0, shared=0)


def test_reassignment_leaves_alone_what_is_taken() -> None:
    codes, settled = deal([[0, 1]], [[0, 1], [0, 2]], how="reassign", near=costs([5, 0, 1, 4]))
    assert codes == [[0, 3]] and settled == Settled(1, 0, 0)
    codes, _ = deal([[0, 3]], [[0, 1], [0, 2]], how="reassign", near=forbidden)  # its code is free: nobody asks
    assert codes == [[0, 3]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reassignment_is_unique_and_of_least_cost(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 4))
    held = data.draw(st.lists(st.integers(0, 3), unique=True, max_size=4 - num))
    table = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=num, max_size=num)), float
    )
    codes = np.stack([np.zeros(num, int), table.argmin(axis=1)], axis=1)
    before = codes.copy()
    settle(codes, np.array([[0, code] for code in held] or NONE), 4, lambda rows, level: table[rows], how="reassign")
    free = [code for code in range(4) if code not in held]
    assert len(set(codes[:, 1].tolist()) | set(held)) == num + len(held)
    if len({*before[:, 1].tolist(), *held}) < num + len(held):
        best = min(sum(table[i, c] for i, c in enumerate(order)) for order in itertools.permutations(free, num))
        assert table[np.arange(num), codes[:, 1]].sum() == pytest.approx(best)


def searched(points: NDArray[np.float64], codebooks: NDArray[np.float64], taken: Any = ()) -> Any:
    """Nearest codes of points [n, D] in codebooks [2, C, D], settled by `search`; squared errors; what happened."""
    halves = np.square(codebooks).sum(axis=2) / 2
    codes = np.empty((len(points), 2), dtype=np.int64)
    codes[:, 0] = (halves[0] - points @ codebooks[0].T).argmin(axis=1)
    near_second = halves[1] - (points - codebooks[0][codes[:, 0]]) @ codebooks[1].T
    codes[:, 1] = near_second.argmin(axis=1)
    before = codes.copy()

    def near(rows: NDArray[np.int64], level: int) -> NDArray[np.float32]:
        left = points[rows] - (codebooks[0][before[rows, 0]] if level else 0)
        return (halves[level] - left @ codebooks[level].T).astype(np.float32)

    held = np.array(taken, dtype=np.int64).reshape(-1, 2)
    products = (codebooks[0] @ codebooks[1].T).astype(np.float32)
    settled = settle(codes, held, codebooks.shape[1], near, how="search", products=products)
    return before, codes, np.square(points - codebooks[0][codes[:, 0]] - codebooks[1][codes[:, 1]]).sum(axis=1), settled


def test_a_search_may_leave_the_prefix() -> None:
    # first codes 0 and 1, second ones 0 and 10. Two points at .4: both nearest to (0, 0), at .16. The other place under
    # that prefix, 0 + 10, costs 92.16; 1 + 0 costs .36.
    codebooks = np.array([[[0.0], [1.0]], [[0.0], [10.0]]])
    before, codes, errors, settled = searched(np.array([[0.4], [0.4]]), codebooks)
    assert before.tolist() == [[0, 0], [0, 0]]
    assert codes.tolist() == [[0, 0], [1, 0]] and errors.tolist() == pytest.approx([0.16, 0.36])
    assert settled == Settled(moved=1, spilled=0, shared=0)
    # where (1, 0) is held already, 0 + 10 is nearer than 1 + 10
    _, codes, _, _ = searched(np.array([[0.4], [0.4]]), codebooks, taken=[[1, 0]])
    assert codes.tolist() == [[0, 0], [0, 1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 3))
def test_a_search_is_unique_and_moves_only_those_that_collide(seed: int, num: int, old: int) -> None:
    rng = np.random.default_rng(seed)
    codebooks = rng.standard_normal((2, 4, 3)) * np.array([2.0, 1.0])[:, None, None]
    points = np.repeat(rng.standard_normal((num, 3)), rng.integers(1, 3, num), axis=0)[:13]
    taken = np.stack(np.unravel_index(rng.choice(16, old, replace=False), (4, 4)), axis=1)
    before, codes, _, settled = searched(points, codebooks, taken)
    assert len(np.unique(np.concatenate([taken, codes]), axis=0)) == len(taken) + len(codes)  # 16 places, 16 at most
    assert settled.shared == 0
    everybody = np.concatenate([taken, before]).tolist()
    crowded = {row[0] for row in everybody if everybody.count(row) > 1 and row in before.tolist()}
    alone = np.array([row[0] not in crowded for row in before.tolist()])
    assert np.array_equal(codes[alone], before[alone])


def test_a_search_costs_less_than_reassignment() -> None:
    rng = np.random.default_rng(0)
    codebooks = rng.standard_normal((2, 16, 4)) * np.array([2.0, 1.0])[:, None, None]
    points = rng.standard_normal((120, 4))
    before, _, errors, _ = searched(points, codebooks)
    halves, stayed = np.square(codebooks[1]).sum(axis=1) / 2, before.copy()
    left = points - codebooks[0][before[:, 0]]
    settle(stayed, NONE, 16, lambda rows, level: halves - left[rows] @ codebooks[1].T, how="reassign")
    within = np.square(points - codebooks[0][stayed[:, 0]] - codebooks[1][stayed[:, 1]]).sum()
    assert errors.sum() < within


@settings(max_examples=60, deadline=None)
@given(
    num_codes=st.integers(1, 12),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    old=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(1, 2),
)
def test_random_codes_are_unused_ones_first(
    num_codes: int, counts: list[int], old: int, seed: int, levels: int
) -> None:
    size = num_codes**levels
    prefixes = np.repeat(np.arange(len(counts)), counts)
    codes = np.zeros((len(prefixes), 1 + levels), dtype=np.int64)
    codes[:, 0] = prefixes
    taken = np.zeros((min(old, size), 1 + levels), dtype=np.int64)  # all of prefix 0
    taken[:, 1:] = np.stack(np.unravel_index(np.arange(len(taken)), (num_codes,) * levels), axis=1)
    order = np.random.default_rng(seed).permutation(len(codes))
    codes = codes[order]
    settle(codes, taken, num_codes, forbidden, how="random", on_full="share", random_levels=levels, seed=seed)
    assert ((codes >= 0) & (codes[:, :1] >= 0)).all() and (codes[:, 1:] < num_codes).all()
    assert np.array_equal(codes[:, 0], prefixes[order])
    everybody = np.concatenate([taken, codes])
    for prefix in range(len(counts)):
        mine = everybody[everybody[:, 0] == prefix]
        assert len(np.unique(mine, axis=0)) == min(len(mine), size)  # none twice while one is left


def test_random_codes_are_spread_and_depend_on_the_seed() -> None:
    def drawn(seed: int) -> NDArray[np.int64]:
        codes = np.zeros((20_000, 2), dtype=np.int64)
        codes[:, 0] = np.arange(20_000)  # each alone under its prefix
        settle(codes, NONE, 16, forbidden, how="random", seed=seed)
        return codes[:, 1]

    counts = np.bincount(drawn(0), minlength=16)
    # 1,250 expected in each of 16 cells: chi-square with 15 degrees of freedom is above 37.7 once in a thousand
    assert np.square(counts - 1250).sum() / 1250 < 37.7
    assert np.array_equal(drawn(0), drawn(0)) and (drawn(0) == drawn(1)).mean() < 0.08


def test_later_items_take_the_next_cards() -> None:
    whole = np.zeros((6, 2), dtype=np.int64)
    settle(whole, NONE, 8, forbidden, how="random", seed=3)
    later = np.zeros((3, 2), dtype=np.int64)
    settle(later, whole[:3].copy(), 8, forbidden, how="random", seed=3)
    assert np.array_equal(later, whole[3:])


def test_uniform_codes_may_collide() -> None:
    codes = np.zeros((64, 2), dtype=np.int64)
    settled = settle(codes, NONE, 64, forbidden, how="uniform", seed=0)
    # of 64 draws from 64 about 64 (1 - 1/64)^63 = 24 are alone, so about 40 share
    assert 30 < settled.shared < 50


def test_sinkhorn_separates_equal_wishes_unequal_in_strength() -> None:
    # both want code 0; row 1 has the nearer second choice, so it is the one that goes
    codes, settled = deal([[0, 0], [0, 0]], how="sinkhorn", near=costs([0, 0.9, 2, 3], [0, 0.1, 2, 3]))
    assert codes == [[0, 0], [0, 1]] and settled.shared == 0
    # exact copies stay together: nothing tells them apart
    codes, settled = deal([[0, 0], [0, 0]], how="sinkhorn", near=costs([0, 1, 2, 3], [0, 1, 2, 3]))
    assert settled.shared == 2


def near_prefixes(rows: NDArray[np.int64], level: int) -> NDArray[np.float32]:
    """Prefix 0 is nearest, then 1, and so on; last codes likewise."""
    return np.tile(np.arange(2, dtype=np.float32), (len(rows), 1))


@pytest.mark.parametrize("how", ["reassign", "random"])
def test_beyond_a_full_prefix_the_nearest_with_room(how: Any) -> None:
    codes, settled = deal([[0, 0]] * 3, num_codes=2, how=how, near=near_prefixes)
    assert sorted(codes[:2]) == [[0, 0], [0, 1]] and codes[2][0] == 1
    assert settled.spilled == 1 and settled.shared == 0
    with pytest.raises(DataError, match=r"all 4 SIDs are given, and 1 more items need one"):
        deal([[0, 0]] * 5, num_codes=2, how=how, near=near_prefixes)
    with pytest.raises(DataError, match=r"1 items find their prefix full, the first of them \[0\]: .* room for 2"):
        deal([[0, 0]] * 3, num_codes=2, how=how, near=near_prefixes, on_full="refuse")
    _, settled = deal([[0, 0]] * 3, num_codes=2, how=how, near=near_prefixes, on_full="share")
    assert settled.spilled == 0 and settled.shared == 2


def test_spilling_respects_what_stands_under_the_next_prefix() -> None:
    taken = [[0, 0], [0, 1], [1, 0]]
    codes, _ = deal([[0, 0]], taken, num_codes=2, how="reassign", near=near_prefixes)
    assert codes == [[1, 1]]


@pytest.mark.parametrize("how", ["reassign", "random"])
def test_beyond_a_full_stem_the_nearest_stem_with_room(how: Any) -> None:
    # 4 SIDs begin with 0, and 6 items want to: two of them go to 1, the nearest first code with room
    codes, settled = deal([[0, 0, 0]] * 6, num_codes=2, how=how, near=near_prefixes)
    assert len({tuple(row) for row in codes}) == 6 and settled == Settled(settled.moved, 4, 0)
    assert [row[0] for row in codes].count(1) == 2
    everywhere = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), axis=1).tolist()
    codes, _ = deal([[0, 0, 0]], everywhere[:-1], num_codes=2, how=how, near=near_prefixes)
    assert codes == [[1, 1, 1]]  # the one place that is left


def test_sinkhorn_leaves_alone_what_is_taken() -> None:
    codes, settled = deal([[0, 1]], [[0, 1], [0, 2]], how="sinkhorn", near=costs([5, 0, 1, 4]))
    assert codes == [[0, 3]] and settled.shared == 0


def test_later_items_of_many_prefixes() -> None:
    rng = np.random.default_rng(0)
    held, new = np.unique(rng.integers(8, size=(300, 3)), axis=0), rng.integers(8, size=(100, 3))
    settle(new, held, 16, forbidden, how="random", seed=5)
    both = np.concatenate([held, new])
    assert len(np.unique(both, axis=0)) == len(both)
