"""The zoo: honest answers of known skill, and exploits whose answers are read as a run would read them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit.gates import gated
from rerankkit.plugins import load_plugins
from rerankkit.protocols import RewardFn
from rerankkit.stages.audit import Audit, ndcg
from rerankkit.testing import make_example
from rerankkit.testing.zoo import (
    PLACES,
    SLIPS,
    Honest,
    Played,
    audit_reward,
    exploits,
    honest_groups,
    make_asks,
    play_zoo,
)
from rerankkit.types import Outcome, Parse, RerankExample, Reward, Rollout, RunInfo, SidSurface

ASKS = make_asks(100)
ZOO = {exploit.name: exploit for exploit in exploits(ASKS)}
SAME = tuple(range(10))


def honest(ask: RerankExample, skill: float = 1.0, seed: int = 0) -> Rollout:
    return Honest(skill).play(ask, random.Random(seed))


def played(name: str, rollout: Rollout) -> Rollout:
    return ZOO[name].play(rollout, random.Random(0))


def test_made_asks_have_their_targets_where_a_pre_ranker_puts_them() -> None:
    places = Counter(ask.target_index for ask in ASKS)
    assert [places[place] for place in range(10)] == [round(100 * share) for share in PLACES]
    assert make_asks(20) == make_asks(20) != make_asks(20, seed=1)
    assert all(len({i.item_id for i in (*ask.history, *ask.candidates)}) == 13 for ask in ASKS)


def test_honest_answers_are_valid_and_cite_a_stranger_now_and_then() -> None:
    rows = [honest(ask, seed=seed) for ask in ASKS for seed in range(10)]
    assert all(row.ranking.parse is Parse.OK for row in rows)
    own = [{item.sid for item in (*row.example.history, *row.example.candidates)} for row in rows]
    strange = fmean(not set(SidSurface().find(row.reasoning)) <= sids for row, sids in zip(rows, own, strict=True))
    assert strange == pytest.approx(SLIPS, abs=0.03)  # 1,000 draws: three standard errors


def test_plackett_luce_by_hand() -> None:
    # strengths log 2 for the target in place 2 (of two), skill log 2 and prior 1: 1 against 2 * 1/2: even odds
    ask = make_example(1, num_candidates=2)
    rows = [Honest(math.log(2)).play(ask, random.Random(seed)) for seed in range(2000)]
    assert fmean(row.ranking.order[0] == 1 for row in rows) == pytest.approx(0.5, abs=0.035)
    [choice] = {
        logp for row in rows for logp, ids in zip(row.logps, row.allowed_ids, strict=True) if ids and len(ids) > 1
    }
    assert choice == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("share", [-0.1, 0.0, 0.3, 1.0])
def test_groups_are_as_good_as_was_asked(share: float) -> None:
    groups = honest_groups(ASKS, share, group_size=4)
    given_order = fmean(ndcg(ask.relevance) for ask in ASKS)
    found = fmean(ndcg([row.example.relevance[i] for i in row.ranking.order]) for group in groups for row in group)
    # 400 answers: one that changes moves the mean by up to 1 / 400
    assert found == pytest.approx(given_order + share * (1 - given_order), abs=0.003)
    assert [{row.group for row in group} for group in groups] == [{i} for i in range(100)]


READ = {
    **dict.fromkeys(["copy", "swap-last-two", "reverse", "random", "popular", "lift-4", "copy-half"], Parse.OK),
    **dict.fromkeys(
        ["no-reasoning", "overlong", "leak", "praise-all", "list-in-reasoning", "control-tokens"], Parse.OK
    ),
    **dict.fromkeys(["names-one", "truncated", "duplicated", "first-repeated", "out-of-list"], Parse.REPAIRED),
    **dict.fromkeys(["strangers-first", "two-lists", "talks-on"], Parse.REPAIRED),
    **dict.fromkeys(["give-up", "empty-list", "rambling"], Parse.FAILED),
}


@pytest.mark.parametrize(("name", "parse"), READ.items())
def test_an_exploit_is_read_as_a_run_would_read_it(name: str, parse: Parse) -> None:
    assert {played(name, honest(ask)).ranking.parse for ask in ASKS[:20]} == {parse}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("copy", SAME),
        ("swap-last-two", (*SAME[:8], 9, 8)),
        ("reverse", SAME[::-1]),
        ("lift-4", (3, 0, 1, 2, *SAME[4:])),
        ("give-up", SAME),
    ],
)
def test_what_an_order_is(name: str, order: tuple[int, ...]) -> None:
    assert {played(name, honest(ask)).ranking.order for ask in ASKS[:5]} == {order}


def test_popular_goes_by_the_counts_given() -> None:
    ask = ASKS[0]
    counts = {item.item_id: float(number) for number, item in enumerate(ask.candidates)}
    [popular] = [exploit for exploit in exploits([ask], counts) if exploit.name == "popular"]
    assert popular.play(honest(ask), random.Random(0)).ranking.order == SAME[::-1]


@pytest.mark.parametrize("name", [name for name, exploit in ZOO.items() if exploit.trick])
def test_a_trick_leaves_the_first_choice_as_it_was(name: str) -> None:
    for ask in ASKS[:10]:
        row = honest(ask)
        told = played(name, row)
        assert told.ranking.order[0] == row.ranking.order[0]
        if told.ranking.parse is Parse.OK:  # and the whole order, and what the sampler chose from
            assert told.ranking.order == row.ranking.order
            assert [c for c in told.allowed_ids if c] == [c for c in row.allowed_ids if c]


def test_tricks_do_what_they_are_called() -> None:
    row = next(r for r in map(honest, ASKS) if r.ranking.order[0] != r.example.target_index)
    sids = [SidSurface().text(item.sid) for item in row.example.candidates]
    assert sids[row.example.target_index or 0] in played("leak", row).reasoning
    assert all(sid in played("praise-all", row).reasoning for sid in sids)
    assert played("no-reasoning", row).reasoning == ""
    assert played("overlong", row).num_reasoning_tokens > 5 * row.num_reasoning_tokens
    assert "<|im_end|>" in played("control-tokens", row).reasoning
    assert played("truncated", row).truncated and played("rambling", row).truncated


def test_the_zoo_takes_lists_of_any_length_and_asks_without_a_target() -> None:
    asks = [make_example(None, num_candidates=2, num_history=0), make_example(0, num_candidates=1), make_example(3)]
    for exploit in exploits(asks):
        for ask in asks:
            row = exploit.play(honest(ask), random.Random(0))
            assert sorted(row.ranking.order) == list(range(len(ask.candidates)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 2**31), st.sampled_from(sorted(ZOO)))
def test_records_are_of_one_piece(ask: int, seed: int, name: str) -> None:
    row = ZOO[name].play(Honest(0.5).play(ASKS[ask], random.Random(seed), group=7), random.Random(seed))
    assert row.group == 7
    assert len(row.token_ids) == len(row.logps)
    assert len(row.allowed_ids) in (0, len(row.token_ids))
    assert 0 <= row.num_reasoning_tokens <= len(row.token_ids)
    assert bool(row.allowed_ids) == (row.ranking.parse is Parse.OK)


# the audit of rewards that ship


def built(name: str) -> RewardFn:
    spec = load_plugins(only="gr2").part("reward", name, "here")
    reward: RewardFn = spec.build(spec.config(), RunInfo())
    return reward


def named(found: Audit) -> set[str]:
    return {finding.name for finding in found.paying}


@pytest.fixture(scope="module")
def zoo() -> Played:
    return play_zoo(make_asks(350))


def test_order_copying_pays_under_the_unconditional_reward(zoo: Played) -> None:
    found = zoo.audit(built("gr2-unconditional"))
    assert named(found) == {"copy", "swap-last-two"} and not found.passed
    assert found.sentences()[0].startswith("copy pays: a policy that hands the given order back has an advantage over")


def test_the_conditional_reward_passes_and_it_is_said_where_copying_still_pays(zoo: Played) -> None:
    found = zoo.audit(built("gr2"))
    assert found.passed and found.judges_order
    [copy] = [finding for finding in found.findings if finding.name == "copy"]
    assert copy.gain_first.positive and copy.gain_elsewhere.value < 0
    told = " ".join(found.sentences())
    assert "copy pays only where the target is given first already, 33% of the asks" in told
    # and where honest answers are worse than the given order: the lowest level, and no other
    assert [level.name for level in found.levels if level.copying.positive] in (["worse"], [])
    assert next(level for level in found.levels if level.name == "as given").copying.value < 0


@pytest.mark.parametrize(
    ("name", "paying"),
    [
        ("rank-promotion", {"copy", "swap-last-two"}),
        ("auc", {"copy", "swap-last-two"}),
        ("ndcg", set()),
        ("reciprocal-rank", set()),
        ("target-logp", set()),
    ],
)
def test_rewards_that_judge_the_order(zoo: Played, name: str, paying: set[str]) -> None:
    found = zoo.audit(built(name))
    assert found.judges_order and named(found) == paying


@pytest.mark.parametrize(
    ("name", "paying"), [("format", set()), ("reasoning-length", set()), ("citations", {"praise-all"})]
)
def test_rewards_that_do_not_judge_the_order_do_not_pass_alone(zoo: Played, name: str, paying: set[str]) -> None:
    found = zoo.audit(built(name))
    assert not found.judges_order and not found.passed and paying <= named(found)
    assert not named(found) & {"copy", "reverse", "random"}


def test_a_gate_against_copies_is_walked_round_by_a_near_copy(zoo: Played) -> None:
    assert named(zoo.audit(gated(built("auc"), ["not-copied"]))) == {"swap-last-two"}


def test_an_audit_is_the_same_twice() -> None:
    asks = make_asks(100, seed=3)
    first, second = (play_zoo(asks, group_size=2).audit(built("gr2")) for _ in range(2))
    assert first.plain() == second.plain()


def leaky(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """Pays a reasoning that names the target, as a judge that is told the answer might."""
    found: list[Outcome] = []
    for row in rollouts:
        sid = SidSurface().text(row.example.candidates[row.example.target_index or 0].sid)
        quality = ndcg([row.example.relevance[place] for place in row.ranking.order])
        found.append(Reward(quality + 0.1 * (sid in row.reasoning)))
    return found


def test_a_judge_that_reads_praise_is_found_out(zoo: Played) -> None:
    assert {"leak", "praise-all"} <= named(zoo.audit(leaky))


def test_the_default_of_a_plugin_author_is_one_line() -> None:
    found = audit_reward(built("ndcg"), make_asks(100))
    assert len(found.findings) == len(ZOO) and found.judges_order
