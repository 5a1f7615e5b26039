"""GR2's rewards, by hand and against every probe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.gates import earned, gate
from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, Item, NotApplicable, Parse, Ranking, RerankExample, Reward, Rollout
from rerankkit_gr2.rewards import (
    Auc,
    Citations,
    ExactFirst,
    Format,
    Formula,
    Ndcg,
    RankPromotion,
    ReasoningLength,
    ReciprocalRank,
    TargetLogp,
    gr2,
    gr2_unconditional,
)

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


# graded relevance, by hand: grades 0, 1, 2 in the given order
GRADED = (0.0, 1.0, 2.0)


def test_reciprocal_rank_is_of_the_first_relevant_one() -> None:
    assert value(ReciprocalRank(), SECOND, SAME) == 1 / 2
    assert value(ReciprocalRank(), SECOND, (0, 2, 3, 1)) == 1 / 4
    assert value(ReciprocalRank(), GRADED, (1, 0, 2)) == 1.0
    assert value(ReciprocalRank(), SECOND, (1, 0, 2, 3), Parse.FAILED) == 0.0


def test_auc_counts_pairs_of_unlike_relevance() -> None:
    # the target in place 2 of 4: of its three pairs the two with those behind it are right
    assert value(Auc(), SECOND, SAME) == pytest.approx(2 / 3)
    assert value(Auc(), SECOND, (1, 3, 2, 0)) == 1.0
    # order 1, 2, 0 has grades 1, 2, 0: pairs (1, 2) wrong, (1, 0) right, (2, 0) right
    assert value(Auc(), GRADED, (1, 2, 0)) == pytest.approx(2 / 3)
    assert value(Auc(), GRADED, (0, 1, 2)) == 0.0
    # two relevant of one grade are no pair: 1, 1, 0 has two pairs, in order 0, 2, 1 one of them is right
    assert value(Auc(), (1.0, 1.0, 0.0), (0, 2, 1)) == 1 / 2
    assert value(Auc(), GRADED, (2, 1, 0), Parse.FAILED) == 0.0
    assert isinstance(Auc()([rollout((1.0, 1.0), (0, 1))])[0], NotApplicable)


@given(st.permutations(range(6)), st.integers(0, 5))
def test_auc_of_one_relevant_candidate_is_linear_in_its_place(order: list[int], target: int) -> None:
    relevance = tuple(float(place == target) for place in range(6))
    assert value(Auc(), relevance, tuple(order)) == pytest.approx(1 - order.index(target) / 5)


def test_exact_first_takes_any_of_the_most_relevant() -> None:
    assert value(ExactFirst(), SECOND, (1, 0, 2, 3)) == 1.0
    assert value(ExactFirst(), SECOND, SAME) == 0.0
    assert value(ExactFirst(), GRADED, (1, 2, 0)) == 0.0
    assert value(ExactFirst(), (2.0, 2.0, 1.0), (1, 0, 2)) == 1.0
    assert value(ExactFirst(), FIRST, SAME, Parse.FAILED) == 0.0


def spoken(reasoning: str, num_tokens: int = 60, num_reasoning_tokens: int = 30) -> Rollout:
    row = replace(rollout(SECOND, SAME), reasoning=reasoning, num_reasoning_tokens=num_reasoning_tokens)
    return replace(row, token_ids=tuple(range(num_tokens)))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (40, 1.0), (60, 0.5), (80, 0.0), (500, 0.0)],  # low 10, high 40
)
def test_reasoning_length_is_paid_inside_the_band(count: int, expected: float) -> None:
    assert ReasoningLength(10, 40)([spoken("why", 600, count)]) == [Reward(expected)]


def test_reasoning_length_pays_neither_silence_nor_what_cannot_be_read() -> None:
    unread = replace(spoken("why"), ranking=Ranking(SAME, Parse.FAILED, "no list"))
    assert ReasoningLength(10, 40)([spoken("  "), unread]) == [Reward(0.0), Reward(0.0)]
    assert isinstance(ReasoningLength(10, 40)([rollout(SECOND, SAME)])[0], NotApplicable)


def test_citations_counts_each_cited_sid_once() -> None:
    def cite(*sid: int) -> str:
        return "<|sid_begin|>" + "".join(f"<s_{'ab'[n]}_{code}>" for n, code in enumerate(sid)) + "<|sid_end|>"

    history, candidate, stranger = cite(1, 0), cite(0, 2), cite(5, 5)
    # two of three are the ask's own; the candidate that is cited twice counts once
    said = f"{history} goes with {candidate}, {candidate} not with {stranger}"
    assert Citations()([spoken(said)]) == [Reward(pytest.approx(2 / 3))]
    assert isinstance(Citations()([spoken("nothing cited")])[0], NotApplicable)
    assert Citations(uncited=0.0)([spoken("nothing cited, <s_a_0> is no SID")]) == [Reward(0.0)]


# SIDs (0, 0), (0, 1), (1, 0): first a or b at level one, then, under a, one of two
SIDS = ((0, 0), (0, 1), (1, 0))


def masked(order: Sequence[int], choices: Sequence[tuple[int, float]], target: int = 0) -> Rollout:
    """A record under the mask: each of `choices` was among so many tokens, with this log-probability."""
    items = tuple(Item(f"c{i}", "A thing", sid=sid) for i, sid in enumerate(SIDS))
    relevance = tuple(float(i == target) for i in range(3))
    allowed: list[tuple[int, ...] | None] = [None, (7,)]  # reasoning, and a forced token
    logps = [-3.0, 0.0]
    for among, logp in choices:
        allowed += [tuple(range(among)), (7,)]
        logps += [logp, 0.0]
    return Rollout(
        RerankExample("e", "u", (), items, relevance),
        "text",
        "why",
        Ranking(tuple(order)),
        token_ids=tuple(range(len(logps))),
        logps=tuple(logps),
        allowed_ids=tuple(allowed),
    )


def logp_of(row: Rollout) -> float:
    (outcome,) = TargetLogp()([row])
    assert isinstance(outcome, Reward), outcome
    return outcome.value


def test_target_logp_is_exact_where_the_target_was_chosen_first() -> None:
    # (0, 0) first: branch a with probability 0.5, then 0 of {0, 1} with 0.4; then a (of a, b) with 0.3
    row = masked((0, 1, 2), [(2, math.log(0.5)), (2, math.log(0.4)), (2, math.log(0.3))])
    assert logp_of(row) == pytest.approx(math.log(0.5 * 0.4))


def test_target_logp_follows_luce_where_it_was_chosen_later() -> None:
    # Strengths .2, .3, .5. Chosen: 2 (.5), then 0 of {0, 1}: branch a is forced, code 0 has .2 / .5; then 1, forced.
    row = masked((2, 0, 1), [(2, math.log(0.5)), (2, math.log(0.4))])
    assert logp_of(row) == pytest.approx(math.log(0.2))  # (1 - .5) * .4
    # 1 first (a: .5, then .6), then 0 against 2: (.2 / .7), (1 - .3) * .2 / .7 = .2
    row = masked((1, 0, 2), [(2, math.log(0.5)), (2, math.log(0.6)), (2, math.log(0.2 / 0.7))])
    assert logp_of(row) == pytest.approx(math.log(0.2))


def test_target_logp_has_a_floor_and_says_when_it_cannot_tell() -> None:
    sure = masked((2, 0, 1), [(2, 0.0), (2, math.log(0.4))])  # chose something else with certainty
    assert TargetLogp(floor=-5.0)([sure]) == [Reward(-5.0)]
    free = replace(sure, allowed_ids=())
    unread = replace(sure, ranking=Ranking((0, 1, 2), Parse.FAILED, "no list"))
    assert [type(o) for o in TargetLogp()([free, unread])] == [NotApplicable, NotApplicable]
    other = masked((2, 0, 1), [(3, -1.0), (2, -1.0)])  # three branches where the SIDs have two
    short = masked((2, 0, 1), [(2, -1.0)])
    long = masked((2, 0, 1), [(2, -1.0), (2, -1.0), (2, -1.0)])
    assert all(isinstance(outcome, Failed) for outcome in TargetLogp()([other, short, long]))


@given(st.permutations(range(3)), st.lists(st.floats(0.05, 5.0), min_size=3, max_size=3), st.integers(0, 2))
def test_target_logp_of_a_plackett_luce_policy_is_its_own(order: list[int], strength: list[float], target: int) -> None:
    left, choices = [0, 1, 2], []
    for place in order:
        for level in range(2):
            under = [i for i in left if SIDS[i][:level] == SIDS[place][:level]]
            taken = [i for i in under if SIDS[i][level] == SIDS[place][level]]
            if len({SIDS[i][level] for i in under}) > 1:
                logp = math.log(sum(strength[i] for i in taken) / sum(strength[i] for i in under))
                choices.append((len({SIDS[i][level] for i in under}), logp))
        left.remove(place)
    assert logp_of(masked(order, choices, target)) == pytest.approx(math.log(strength[target] / sum(strength)))


def test_target_logp_reads_what_the_sampler_records() -> None:
    from rerankkit.lm import ask
    from rerankkit.testing import make_example, make_policy
    from rerankkit.types import RunInfo

    rollouts = ask(
        make_policy(), [make_example(0), make_example(4)], group_size=4, max_new_tokens=120, temperature=1.0,
        info=RunInfo(seed=1),
    )  # fmt: skip
    values = [logp_of(row) for row in rollouts]
    assert all(-20.0 <= one < 0.0 for one in values)
