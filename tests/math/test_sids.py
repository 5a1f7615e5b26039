from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rerankkit.math import sids as m
from rerankkit.math.sids import (
    equal_rows,
    log_odds,
    nearest_rows,
    neighbour_recall,
    prefix_groups,
    purity,
    sid_scorecard,
    spread_inside,
    squared_error,
)

SMALL = hnp.arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.integers(0, 3))


def points(seed: int, n: int, d: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_by_hand() -> None:
    # items 0 and 1 share a SID: 3 distinct of 4, 2 of 4 own theirs
    card = sid_scorecard(np.array([[0, 0], [0, 0], [0, 1], [1, 0]]), (2, 4))
    assert card["num_items"] == 4
    assert card["distinct_share"] == 0.75
    assert card["own_share"] == 0.5
    assert card["largest_collision"] == 2
    assert card["distinct_prefixes"] == [2, 3]  # 0 with items 0, 1, 2, and 1 with item 3
    assert card["depths"] == [{"sharing": 0.75, "largest": 3}, {"sharing": 0.5, "largest": 2}]
    # both levels hold 3/4 and 1/4: entropy .75 * log2(4/3) + .25 * 2 = .811278
    for level, size in zip(card["levels"], (2, 4), strict=True):
        assert (level["size"], level["used"]) == (size, 2)
        assert level["entropy"] == pytest.approx(0.811278, abs=1e-6)
        assert level["perplexity"] == pytest.approx(2**0.811278, abs=1e-5)
    assert json.loads(json.dumps(card)) == card


def test_all_unique_and_even() -> None:
    card = sid_scorecard(np.array([[a, b] for a in range(4) for b in range(2)]), (4, 2))
    assert card["distinct_share"] == card["own_share"] == card["largest_collision"] == 1
    assert [level["entropy"] for level in card["levels"]] == [2.0, 1.0]


@pytest.mark.parametrize("sids", [np.zeros((0, 2), int), np.zeros((3, 1), int), np.zeros(3, int)])
def test_shapes_are_named(sids: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\[N, L\]"):
        sid_scorecard(sids, (2, 2))


@pytest.mark.parametrize("code", [-1, 2])
def test_a_code_outside_its_codebook_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="codebook"):
        sid_scorecard(np.array([[0, code]]), (2, 2))


@given(SMALL)
def test_groups_are_the_prefixes_numbered_in_order(sids: np.ndarray) -> None:
    groups = prefix_groups(sids)
    for depth in range(1, sids.shape[1] + 1):
        prefixes = [tuple(row[:depth]) for row in sids.tolist()]
        numbers = {prefix: number for number, prefix in enumerate(sorted(set(prefixes)))}
        assert groups[depth - 1].tolist() == [numbers[prefix] for prefix in prefixes]


def test_equal_rows_point_at_the_first_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "CHUNK", 2)
    rows = np.array([[1, 2], [0, 1], [1, 2], [-0.0, 1], [2, 1], [1, 2]], dtype=np.float32)
    assert equal_rows(rows).tolist() == [0, 1, 0, 1, 4, 0]  # minus zero is zero


def test_variance_left_inside_prefixes_by_hand() -> None:
    # x = 0, 2, 10, 12 around their mean 6: 36 + 16 + 16 + 36 = 104. Prefixes {0, 2} and {10, 12} leave 4 times 1;
    # the longer ones {0}, {2}, {10, 12} leave 2 times 1.
    x = np.array([[0], [2], [10], [12]], dtype=np.float32)
    groups = prefix_groups(np.array([[0, 0], [0, 1], [1, 0], [1, 0]]))
    assert spread_inside(x, groups) == pytest.approx([4 / 104, 2 / 104])
    assert spread_inside(np.full((3, 2), 0.1, np.float32), np.zeros((1, 3), np.int64)) is None


@given(SMALL, st.integers(1, 7))
def test_variance_left_inside_prefixes_is_the_same_however_it_is_chunked(sids: np.ndarray, chunk: int) -> None:
    x, groups = points(len(sids), len(sids)) + 3, prefix_groups(sids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "CHUNK", chunk)
        found = spread_inside(x, groups)
    if len(sids) == 1:
        assert found is None
        return
    exact, whole = x.astype(float), np.square(x - x.mean(axis=0, dtype=float)).sum()
    means = [np.stack([exact[row == g].mean(axis=0) for g in row]) for row in groups]
    assert found == pytest.approx([np.square(exact - mean).sum() / whole for mean in means], abs=1e-9)
    assert found == sorted(found, reverse=True) or found == pytest.approx(sorted(found, reverse=True), abs=1e-12)


def test_squared_error_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "CHUNK", 2)
    x = np.array([[0.0], [3.0], [6.0]], dtype=np.float32)  # around 3: 9 + 0 + 9
    others = iter([np.array([[1.0], [3.0]], np.float32), np.array([[4.0]], np.float32)])  # off by 1, 0, 2
    assert squared_error(x, others) == (5.0, 18.0)


def test_purity_by_hand() -> None:
    # group 0 holds labels 5, 5, 1 (best 2 of 3), group 1 holds 1, 5 (1 of 2), group 2 holds 0: 4 of 6
    assert purity(np.array([0, 0, 1, 0, 1, 2]), np.array([5, 5, 1, 1, 5, 0])) == pytest.approx(4 / 6)


def test_nearest_are_exact_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = points(0, 50)
    unit = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    like = unit @ unit.T
    np.fill_diagonal(like, -2)
    queries = np.array([3, 17, 49])
    for chunk in (7, 16, 64):
        monkeypatch.setattr(m, "CHUNK", chunk)
        assert nearest_rows(x, queries, 5).tolist() == np.argsort(-like[queries], axis=1)[:, :5].tolist()


def test_of_equally_near_the_first_are_taken_and_zero_is_like_nothing() -> None:
    x = np.array([[1, 0], [2, 0], [3, 0], [0, 0], [-1, 0], [4, 0]], dtype=np.float32)
    assert nearest_rows(x, np.array([1, 4]), 3).tolist() == [[0, 2, 5], [3, 0, 1]]  # from -1: 0 is cosine 0, others -1


def test_neighbour_recall_by_hand() -> None:
    sids = np.array([[0, 0], [0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]])
    groups = prefix_groups(sids)
    # Item 0, three neighbours. By SID item 1 (both codes) is in for sure; items 2, 3, 4 share one code and compete for
    # the two places left, each with chance 2/3.
    #   neighbours 1, 2, 5: 1 + 2/3 + 0 of 3 = 5/9;  neighbours 2, 3, 4: 3 * 2/3 = 2 of 3
    asked = np.array([0, 0])
    assert neighbour_recall(groups, asked, np.array([[1, 2, 5], [2, 3, 4]])) == pytest.approx([5 / 9, 2 / 3])
    # Five neighbours: items 1 to 4 are in, items 5 and 6 share nothing and compete for one place: 1 + 1 + 1/2 of 5.
    found = neighbour_recall(groups, asked[:1], np.array([[1, 2, 3, 4, 5]]))
    assert found == pytest.approx([(4 + 1 / 2) / 5])
    # Item 5: only item 6 shares its first code; with one neighbour, tied with nobody, it is right or wrong.
    assert neighbour_recall(groups, np.array([5, 5]), np.array([[6], [0]])).tolist() == [1.0, 0.0]


@given(SMALL.filter(lambda sids: len(sids) > 2), st.integers(1, 10), st.integers(0, 99))
def test_neighbour_recall_is_what_random_tie_breaking_gives_on_average(sids: np.ndarray, k: int, seed: int) -> None:
    k, rng = min(k, len(sids) - 1), np.random.default_rng(seed)
    neighbours = rng.permutation(np.arange(1, len(sids)))[:k]
    [found] = neighbour_recall(prefix_groups(sids), np.array([0]), neighbours[None])
    common = [int(np.logical_and.accumulate(row == sids[0]).sum()) for row in sids]
    chances = []  # of each item to be among the k: count who is ahead of it, and who is level with it
    for row in neighbours:
        ahead = sum(c > common[row] for c in common[1:])
        level = sum(c == common[row] for c in common[1:])
        chances.append(min(1.0, max(0.0, (k - ahead) / level)))
    assert found == pytest.approx(sum(chances) / k)
    assert 0 <= found <= 1


def test_sids_without_meaning_keep_neighbours_at_chance() -> None:
    x, sids = points(1, 3000), np.random.default_rng(2).integers(0, 8, (3000, 3))
    queries = np.arange(0, 3000, 2)
    recall = neighbour_recall(prefix_groups(sids), queries, nearest_rows(x, queries, 10)).mean()
    assert recall == pytest.approx(10 / 2999, abs=0.0015)  # about three standard errors


def test_log_odds_by_hand() -> None:
    # In 3 of 4 titles here, 1 of 8 there: log(3.5 / 1.5) - log(1.5 / 7.5) = 2.4567;
    # standard error sqrt(1/3.5 + 1/1.5 + 1/1.5 + 1/7.5) = 1.3238; a word in half of both tells nothing.
    scores = log_odds(np.array([3, 2]), 4, np.array([1, 4]), 8)
    assert scores == pytest.approx([2.4567 / 1.3238, 0.0], abs=1e-3)


def test_memory_is_chunks_and_a_few_numbers_an_item() -> None:
    x = points(3, 20_000, 64)  # 5 MB
    groups = prefix_groups(np.random.default_rng(0).integers(0, 16, (20_000, 4)))
    tracemalloc.start()
    equal_rows(x), spread_inside(x, groups), nearest_rows(x, np.arange(200), 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * m.CHUNK * max(200, 64) * 4 + 100 * len(x)
