"""The audit's arithmetic, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from rerankkit.math.metrics import ranking_metrics
from rerankkit.stages.audit import Audit, Finding, Mean, advantage, audit, ndcg
from rerankkit.testing import make_example, make_rollout
from rerankkit.types import Failed, NotApplicable, Outcome, Reward, Rollout

FIRST, SECOND = make_example(0, num_candidates=3), make_example(1, num_candidates=3)
SAME, LIFT, DOWN = (0, 1, 2), (1, 0, 2), (0, 2, 1)


def test_a_mean_counts_only_what_varies_within_a_place() -> None:
    # place 0: 1, 3 (variance 2); place 1: 10, 10 (variance 0). Error: sqrt(2 * 2) / 4
    mean = Mean.of([1.0, 10.0, 3.0, None, 10.0], [0, 1, 0, 0, 1])
    assert mean == Mean(6.0, 0.5, 4)
    assert mean.positive and not Mean(1.0, 0.5, 4).positive and Mean(0.1, 0.0, 4).positive
    assert not Mean(0.0, 0.0, 4).positive
    # a single ask in place 2 varies as the others: pooled (1 * 2 + 1 * 0) / 2 = 1, so sqrt(4 + 0 + 1) / 5
    assert Mean.of([1.0, 10.0, 3.0, 7.0, 10.0], [0, 1, 0, 2, 1]).error == pytest.approx(math.sqrt(5) / 5)
    # no place with two: all in all, variance 8, sqrt(2 * 8) / 2
    assert Mean.of([1.0, 5.0], [0, 1]).error == 2.0 and Mean.of([1.0], [0]).error == 0.0
    none = Mean.of([None], [0])
    assert math.isnan(none.value) and not none.positive


def test_the_advantage_is_that_of_the_optimizer() -> None:
    torch = pytest.importorskip("torch")
    from rerankkit.math.advantages import group_advantages

    rewards = [0.2, -0.1, 0.5, 0.4]
    assert advantage(rewards) == pytest.approx(group_advantages(torch.tensor([rewards])).values[0, -1].item(), abs=1e-4)
    # (0.4 - 0.25) / sqrt((.0025 + .1225 + .0625 + .0225) / 3)
    assert advantage(rewards) == pytest.approx(0.15 / math.sqrt(0.07), abs=1e-5)
    assert advantage([1.0, None, 3.0]) == pytest.approx(1 / math.sqrt(2), abs=1e-5)
    assert advantage([1.0, 1.0]) == 0.0
    assert advantage([1.0, None]) is None and advantage([None, 1.0]) is None


@pytest.mark.parametrize("grades", [(0, 1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 1), (1, 0, 2, 0, 0, 3), (0, 0)])
def test_quality_is_the_report_s_ndcg(grades: Sequence[float]) -> None:
    assert ndcg(grades) == pytest.approx(float(ranking_metrics([grades])["NDCG@5"][0]))


def lifted(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """Rank promotion in places, and a bonus of 1 for a reasoning that begs."""
    found: list[Outcome] = []
    for row in rollouts:
        target = row.example.target_index or 0
        found.append(Reward(target - row.ranking.order.index(target) + float("please" in row.reasoning)))
    return found


def small(reward: Callable[[Sequence[Rollout]], Sequence[Outcome]]) -> Audit:
    """Two asks, groups of two; by level what honest answers do with the target that is given second."""

    def groups(*second: tuple[int, ...]) -> list[list[Rollout]]:
        return [
            [make_rollout(FIRST, SAME, group=0), make_rollout(FIRST, SAME, group=0)],
            [make_rollout(SECOND, order, group=1) for order in second],
        ]

    honest: Mapping[str, list[list[Rollout]]] = {
        "worse": groups(DOWN, SAME),
        "as given": groups(LIFT, DOWN),
        "better": groups(LIFT, LIFT),
    }
    begging = [
        make_rollout(e, o, reasoning="please", group=i) for i, (e, o) in enumerate([(FIRST, SAME), (SECOND, DOWN)])
    ]
    copies = [make_rollout(FIRST, SAME, group=0), make_rollout(SECOND, SAME, group=1)]
    played = [("copy", "hands back", False, copies), ("beg", "begs", True, begging)]
    return audit(reward, honest, played, baseline="as given", better="better")


def test_gains_and_advantages_by_hand() -> None:
    found = small(lifted)

    assert found.first == 0.5 and found.given_ndcg == pytest.approx((1 + 1 / math.log2(3)) / 2)
    # first ask: always 0. Second: moved down -1, as given 0, lifted 1
    assert [level.reward.value for level in found.levels] == [-0.25, 0.0, 0.5]
    beg, copy = found.findings  # what pays comes first
    assert (beg.name, beg.pays, copy.name, copy.pays) == ("beg", True, "copy", False)
    # against the better policy: 0 - 0 and 0 - 1
    assert (copy.reward.value, copy.gain.value) == (0.0, -0.5)
    assert (copy.gain_first.value, copy.gain_elsewhere.value) == (0.0, -1.0)
    # in the groups [0, 0] and [1, 0]: z-scores 0 and -.5 / sqrt(.5)
    assert copy.advantage.value == pytest.approx(-0.5 / math.sqrt(0.5) / 2, abs=1e-5)
    # the same answers, 0 and -1, with 1 more each; in their groups [0, 1] and [1, 0] instead of [0, 0] and [1, -1]
    assert (beg.reward.value, beg.gain.value) == (0.5, 1.0)
    assert beg.advantage.value == pytest.approx(0.5 / math.sqrt(0.5) / 2, abs=1e-5)
    assert beg.lift.value == 0.0
    assert [level.copying.value for level in found.levels] == pytest.approx([0.354, -0.354, -0.354], abs=1e-3)
    told = "beg pays: an answer that begs earns +1.000 (standard error 0.000) over the same answer without."
    assert told in found.sentences()


def test_what_ranks_better_does_not_cheat() -> None:
    def front(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(ndcg([r.example.relevance[i] for i in r.ranking.order])) for r in rollouts]

    groups = [[make_rollout(SECOND, SAME, group=0), make_rollout(SECOND, SAME, group=0)]] * 4
    lift = [make_rollout(SECOND, LIFT, group=0)] * 4
    copies = [make_rollout(SECOND, SAME, group=0)] * 4
    levels = {"as given": groups, "better": groups}
    found = audit(front, levels, [("copy", "", False, copies), ("lift", "", False, lift)],
                  baseline="as given", better="better")  # fmt: skip
    assert [(f.name, f.gain.positive, f.lift.positive, f.pays) for f in found.findings] == [
        ("lift", True, True, False),
        ("copy", False, False, False),
    ]


@pytest.mark.parametrize(("advantage", "said"), [(0.31, "pays: "), (0.21, "may pay, "), (0.19, "None of 1 ")])
def test_where_there_are_too_few_asks_to_say_that_is_said(advantage: float, said: str) -> None:
    # a standard error of .1: sure beyond .3, open beyond .2
    loses = Mean(-1.0, 0.1, 9)
    tried = Mean(advantage, 0.1, 9)
    found = Finding("copy", "copies", False, loses, loses, tried, loses, loses, Mean(0.0, 0.0, 9), 0.0)
    told = Audit(0.5, 0.3, (), (found,), judges_order=True).sentences()
    assert any(said in sentence for sentence in told)
    assert ("may pay" in " ".join(told)) == (advantage == 0.21)


def test_a_reward_that_is_blind_to_order_does_not_pass() -> None:
    found = small(lambda rollouts: [Reward(1.0)] * len(rollouts))
    assert not found.judges_order and not found.paying and not found.passed
    assert found.sentences()[0].startswith("It does not judge the order")


def test_what_cannot_be_judged_leaves_the_means_and_is_told() -> None:
    def picky(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [
            Failed("down") if r.example is SECOND and r.reasoning == "please" else
            NotApplicable("not mine") if r.example is FIRST else Reward(float(r.ranking.order.index(1) == 0))
            for r in rollouts
        ]  # fmt: skip

    found = small(picky)
    beg = next(finding for finding in found.findings if finding.name == "beg")
    assert beg.failed == 0.5 and beg.reward.count == 0 and not beg.pays
    assert "It fails to judge answers of beg (up to 50%): down." in found.sentences()
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert next(f for f in plain["findings"] if f["name"] == "beg")["reward"]["value"] is None
