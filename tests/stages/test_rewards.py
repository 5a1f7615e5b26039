"""Rewards by weight: sums worked by hand, and what happens when a part has no value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from rerankkit.errors import RunFailed
from rerankkit.stages.rewards import combine
from rerankkit.types import Failed, Item, NotApplicable, Outcome, Ranking, RerankExample, Reward, Rollout

ROW = Rollout(RerankExample("e", "u", (), (Item("a", "A"),), (1.0,)), "", "", Ranking((0,)))


class Gives:
    """Answers with these outcomes, whatever it is shown."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = outcomes

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Outcome]:
        return self.outcomes


def test_weighted_sum_with_named_parts() -> None:
    total = combine([(1.0, "gr2", Gives(Reward(0.5, {"rank": 0.3}))), (-0.1, "length", Gives(Reward(2.0)))])
    # 1 * .5 - .1 * 2 = .3; the log holds what each part said, unweighted
    assert total([ROW]) == [Reward(pytest.approx(0.3), {"gr2": 0.5, "gr2/rank": 0.3, "length": 2.0})]


def test_what_is_not_applicable_is_left_out() -> None:
    none = NotApplicable("no target")
    total = combine([(1.0, "a", Gives(none, none)), (2.0, "b", Gives(Reward(0.25), none))])
    assert total([ROW, ROW]) == [Reward(0.5, {"b": 0.25}), NotApplicable("a: no target; b: no target")]


def test_one_failed_part_fails_the_row() -> None:
    total = combine([(1.0, "a", Gives(Failed("down"))), (1.0, "b", Gives(Reward(1.0)))])
    assert total([ROW]) == [Failed("a: down")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_a_failure(value: float) -> None:
    assert combine([(0.0, "a", Gives(Reward(value)))])([ROW]) == [Failed(f"a: value {value} is not finite")]


def test_a_wrong_count_names_the_culprit() -> None:
    with pytest.raises(RunFailed, match="reward 'a' returned 1 outcomes for 2 rollouts"):
        combine([(1.0, "a", Gives(Reward(1.0)))])([ROW, ROW])


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="different names"):
        combine([(1.0, "a", Gives()), (1.0, "a", Gives())])
