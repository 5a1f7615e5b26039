"""Rewards by weight: sums worked by hand, and what happens when a part has no value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from rerankkit.errors import RunFailed, UsageError
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
    part = combine([(1.0, "a", Gives(Reward(1.0, {"share": value})))])
    assert part([ROW]) == [Failed(f"a: share {value} is not finite")]


def test_a_value_of_another_kind_is_a_failure_and_an_outcome_of_another_kind_a_bug() -> None:
    none = Reward(None)  # type: ignore[arg-type]
    assert combine([(1.0, "a", Gives(none))])([ROW]) == [Failed("a: value None is no number")]
    with pytest.raises(RunFailed, match=r"reward 'a' returned 0\.5; an outcome is Reward\(value\)"):
        combine([(1.0, "a", Gives(0.5))])([ROW])  # type: ignore[arg-type]


ROWS = [replace(ROW, group=group) for group in (0, 0, 1, 1, 2)]


class Picky:
    """Raises if it is shown a group that it does not like; the others get the size of the batch."""

    def __init__(self, *dislikes: int, error: Exception | None = None) -> None:
        self.dislikes = dislikes
        self.error = error or KeyError("price")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        if any(rollout.group in self.dislikes for rollout in rollouts):
            raise self.error
        return [Reward(float(len(rollouts))) for _ in rollouts]


def test_a_reward_that_raises_fails_the_groups_it_raises_for_and_no_others() -> None:
    total = combine([(1.0, "picky", Picky(1)), (10.0, "b", Gives(*[Reward(1.0)] * 5))])
    first, second, third, fourth, fifth = total(ROWS)
    # whole groups are judged again: two rows of group 0, one of group 2
    assert [first, second] == [Reward(12.0, {"picky": 2.0, "b": 1.0})] * 2
    assert fifth == Reward(11.0, {"picky": 1.0, "b": 1.0})
    assert third == fourth and isinstance(third, Failed)
    assert third.reason.startswith("picky: KeyError: 'price' (test_rewards.py:")


def test_a_reward_that_raises_for_all_stops_the_run_and_is_named() -> None:
    with pytest.raises(RunFailed, match=r"reward 'picky' raised for every group of 5 rollouts.*KeyError: 'price'"):
        combine([(1.0, "picky", Picky(0, 1, 2))])(ROWS)


def test_one_group_alone_is_no_proof_that_a_reward_is_broken() -> None:
    outcomes = combine([(1.0, "picky", Picky(0))])(ROWS[:2])
    assert [type(outcome) for outcome in outcomes] == [Failed, Failed]


@pytest.mark.parametrize("error", [UsageError("no server at localhost"), KeyboardInterrupt()])
def test_what_is_raised_on_purpose_passes(error: Exception) -> None:
    with pytest.raises(type(error)):
        combine([(1.0, "picky", Picky(1, error=error))])(ROWS)


def test_a_wrong_count_for_a_group_names_the_culprit_too() -> None:
    def short(rollouts: Sequence[Rollout]) -> list[Outcome]:
        if len(rollouts) > 2:
            raise ValueError("too many")
        return [Reward(1.0)]

    with pytest.raises(RunFailed, match="reward 'short' returned 1 outcomes for 2 rollouts"):
        combine([(1.0, "short", short)])(ROWS)


def test_a_wrong_count_names_the_culprit() -> None:
    with pytest.raises(RunFailed, match="reward 'a' returned 1 outcomes for 2 rollouts"):
        combine([(1.0, "a", Gives(Reward(1.0)))])([ROW, ROW])


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="different names"):
        combine([(1.0, "a", Gives()), (1.0, "a", Gives())])
