"""GR2's rewards, by hand and against every probe."""

from __future__ import annotations

import itertools
import math

import pytest

from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, NotApplicable, Parse, Reward
from rerankkit_gr2.rewards import Format, Formula, Ndcg, RankPromotion, earned, gate, gr2, gr2_unconditional

from .conftest import rollout

SECOND = (0.0, 1.0, 0.0, 0.0)  # the target was second of four
FIRST = (1.0, 0.0, 0.0, 0.0)
SAME = (0, 1, 2, 3)


def value(reward: RewardFn, relevance: tuple[float, ...], order: tuple[int, ...], parse: Parse = Parse.OK) -> float:
    (outcome,) = reward([rollout(relevance, order, parse)])
    assert isinstance(outcome, Reward)
    return outcome.value


@pytest.mark.parametrize(
    ("relevance", "order", "expected"),
    [
        (SECOND, (1, 0, 2, 3), 0.25),  # 2nd -> 1st: (1 - 0) / 4
        (SECOND, SAME, 0.0),
        (SECOND, (0, 2, 3, 1), -0.5),  # 2nd -> 4th: (1 - 3) / 4
        (FIRST, (3, 2, 1, 0), -0.75),
    ],
)
def test_rank_promotion(relevance: tuple[float, ...], order: tuple[int, ...], expected: float) -> None:
    assert value(RankPromotion(), relevance, order) == expected
    assert value(RankPromotion(), relevance, order, Parse.REPAIRED) == expected


def test_an_unreadable_answer_is_below_every_readable_one() -> None:
    worst = min(value(gr2(), FIRST, order) for order in itertools.permutations(range(4)))
    assert value(gr2(), FIRST, SAME, Parse.FAILED) == value(RankPromotion(), FIRST, SAME, Parse.FAILED) == -1 < worst


# R = R_rank + 0.2 R_fmt where earned, else R_rank, in a list of four
@pytest.mark.parametrize(
    ("relevance", "order", "parse", "conditional", "unconditional"),
    [
        (SECOND, (1, 0, 2, 3), Parse.OK, 0.45, 0.45),  # promoted: .25 + .2
        (SECOND, SAME, Parse.OK, 0.0, 0.2),  # copied: this is the hack that only the second pays
        (SECOND, (0, 2, 3, 1), Parse.OK, -0.5, -0.3),
        (FIRST, (0, 3, 2, 1), Parse.OK, 0.2, 0.2),  # first, and stays first
        (FIRST, (1, 0, 2, 3), Parse.OK, -0.25, -0.05),
        (SECOND, (1, 0, 2, 3), Parse.REPAIRED, 0.25, 0.25),  # promoted, but no format bonus
        (FIRST, SAME, Parse.REPAIRED, 0.0, 0.0),
        (FIRST, SAME, Parse.FAILED, -1.0, -1.0),
    ],
)
def test_conditional_and_unconditional(
    relevance: tuple[float, ...], order: tuple[int, ...], parse: Parse, conditional: float, unconditional: float
) -> None:
    assert value(gr2(), relevance, order, parse) == pytest.approx(conditional)
    assert value(gr2_unconditional(), relevance, order, parse) == pytest.approx(unconditional)


def test_the_condition_and_the_terms_are_logged() -> None:
    copied, promoted = gr2()([rollout(SECOND, SAME), rollout(SECOND, (1, 0, 2, 3))])
    assert isinstance(copied, Reward) and isinstance(promoted, Reward)
    assert copied.parts == {"rank": 0.0, "bonus": 0.0, "condition": 0.0, "format": 1.0}
    assert promoted.parts == {"rank": 0.25, "bonus": 1.0, "condition": 1.0, "format": 1.0}


def test_the_settings_count() -> None:
    assert value(gr2(0.5, -2.0), SECOND, (1, 0, 2, 3)) == 0.75
    assert value(gr2(0.5, -2.0), SECOND, SAME, Parse.FAILED) == -2.0


def test_without_a_target_nothing_about_rank_applies() -> None:
    none = rollout((0.0, 0.0), (1, 0))
    for reward in (RankPromotion(), gr2(), gr2_unconditional(), Ndcg(5)):
        assert isinstance(reward([none])[0], NotApplicable)
    assert Format()([none]) == [Reward(1.0)]
    assert not earned(none)


def test_ndcg_by_hand() -> None:
    # grades 0, 1, 2 have gains 0, 1, 3; order 1, 2, 0: 1/log2(2) + 3/log2(3); ideal: 3/log2(2) + 1/log2(3)
    graded = (0.0, 1.0, 2.0)
    assert value(Ndcg(3), graded, (1, 2, 0)) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert value(Ndcg(1), graded, (1, 2, 0)) == pytest.approx(1 / 3)
    assert value(Ndcg(3), graded, (2, 1, 0)) == 1.0
    assert value(Ndcg(3), graded, (2, 1, 0), Parse.FAILED) == 0.0


@pytest.mark.parametrize("relevance", [FIRST, SECOND, (0.0, 0.0, 0.0, 1.0)])
@pytest.mark.parametrize("reward", [RankPromotion(), gr2(), gr2_unconditional(), Ndcg(10)])
def test_the_gold_answer_is_never_beaten(reward: RewardFn, relevance: tuple[float, ...]) -> None:
    target = relevance.index(1.0)
    gold = value(reward, relevance, (target, *(i for i in SAME if i != target)))
    for order in itertools.permutations(range(4)):
        for parse in (Parse.OK, Parse.REPAIRED):
            assert value(reward, relevance, order, parse) <= gold
            if order[0] != target:
                assert value(reward, relevance, order, parse) < gold
    assert value(reward, relevance, SAME, Parse.FAILED) < gold


def test_row_order_and_company_do_not_matter() -> None:
    rows = [rollout(SECOND, order) for order in itertools.permutations(range(4))] + [rollout((0.0, 0.0), (0, 1))]
    for reward in (RankPromotion(), Format(), Ndcg(3), gr2(), gr2_unconditional()):
        assert list(reward(rows[::-1]))[::-1] == list(reward(rows)) == [reward([row])[0] for row in rows]
        assert list(reward([])) == []


def test_a_gate_passes_on_what_is_no_reward() -> None:
    class Broken:
        def __call__(self, rollouts: object) -> list[Failed]:
            return [Failed("server")]

    broken = gate(lambda _: True, Broken())
    assert broken([rollout(FIRST, SAME)]) == [Failed("server")]
    # failed outweighs not applicable: the row must be counted
    both = Formula(((1.0, "rank", RankPromotion()), (1.0, "broken", broken)))
    assert both([rollout((0.0, 0.0), (0, 1))]) == [Failed("server")]
