from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from rerankkit.math.metrics import METRICS, kendall_tau, ranking_metrics


def test_one_relevant_candidate_by_hand() -> None:
    # first; fourth; not listed
    values = ranking_metrics([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert list(values) == list(METRICS)
    assert values["R@1"].tolist() == [1, 0, 0]
    assert values["R@3"].tolist() == [1, 0, 0]
    assert values["R@5"].tolist() == [1, 1, 0]
    assert values["NDCG@3"].tolist() == [1, 0, 0]
    assert values["NDCG@5"] == pytest.approx([1, 1 / math.log2(5), 0])
    assert values["MRR"] == pytest.approx([1, 0.25, 0])


def test_graded_relevance_by_hand() -> None:
    values = ranking_metrics([[0, 3, 0, 2]])
    # two relevant: none in the first, one in the first three
    assert values["R@1"].item() == 0
    assert values["R@3"].item() == 0.5
    # DCG@3 = 3/log2(3); ideal 3, 2: 3/1 + 2/log2(3)
    assert values["NDCG@3"].item() == pytest.approx((3 / math.log2(3)) / (3 + 2 / math.log2(3)))
    assert values["NDCG@5"].item() == pytest.approx((3 / math.log2(3) + 2 / math.log2(5)) / (3 + 2 / math.log2(3)))
    assert values["MRR"].item() == 0.5


@pytest.mark.parametrize("highest", [1, 4])
def test_equal_to_trec_eval(highest: int) -> None:
    import ir_measures

    rng = np.random.default_rng(0)
    lists = [rng.integers(0, highest + 1, size=rng.integers(1, 25)) * (rng.random() < 0.9) for _ in range(60)]
    measures = {name: ir_measures.parse_measure(name.replace("NDCG", "nDCG").replace("MRR", "RR")) for name in METRICS}
    qrels = [
        ir_measures.Qrel(f"q{q:02}", f"d{d}", int(rel)) for q, row in enumerate(lists) for d, rel in enumerate(row)
    ]
    run = [
        ir_measures.ScoredDoc(f"q{q:02}", f"d{d}", -float(d)) for q, row in enumerate(lists) for d in range(len(row))
    ]
    ours = ranking_metrics([row.tolist() for row in lists])
    seen = 0
    for value in ir_measures.iter_calc(list(measures.values()), qrels, run):
        name = next(name for name, measure in measures.items() if measure == value.measure)
        assert ours[name][int(value.query_id[1:])] == pytest.approx(value.value, abs=1e-9), (name, value.query_id)
        seen += 1
    assert seen == len(METRICS) * len(lists)


def test_no_lists_give_empty_columns() -> None:
    assert all(values.shape == (0,) for values in ranking_metrics([]).values())
    assert ranking_metrics([[]])["MRR"].tolist() == [0]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_impossible_relevance_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="relevance"):
        ranking_metrics([[1.0, bad]])


def test_tau_by_hand() -> None:
    assert kendall_tau([0, 1, 2, 3]) == 1
    assert kendall_tau([3, 2, 1, 0]) == -1
    # one pair of six inverted: 1 - 2 * 1/6
    assert kendall_tau([1, 0, 2, 3]) == pytest.approx(2 / 3)
    assert kendall_tau([0]) == kendall_tau([]) == 1


@given(st.integers(2, 12).flatmap(lambda n: st.permutations(range(n))))
def test_tau_equals_scipy(order: list[int]) -> None:
    assert kendall_tau(order) == pytest.approx(kendalltau(order, range(len(order))).statistic)


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2]])
def test_tau_of_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="permutation"):
        kendall_tau(order)
