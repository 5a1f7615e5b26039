from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from rerankkit import NotApplicable, Outcome, Reward, Rollout, RunInfo, SidSurface, UsageError
from rerankkit.lm import beam_sids, build_trie, score_continuations
from rerankkit.testing import check_imports, check_optimizer, check_reward, make_example, make_policy, make_rollout
from rerankkit.text.prompts import rerank_messages

from rerankkit_minionerec.optimizer import BeamGroups
from rerankkit_minionerec.plugin import BeamGroupsConfig, RankAwareConfig, rank_aware
from rerankkit_minionerec.reward import RankAware


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the reward ---------------------------------------------------------------------------------------------------


def beams(items: Sequence[int], *, target: int | None = 3, group: int = 0) -> list[Rollout]:
    """A search that found these candidates, best first."""
    example, surface = make_example(target), SidSurface()
    rows = []
    for rank, item in enumerate(items):
        text = '{"explanation": "", "recommendations": ["' + surface.text(example.candidates[item].sid) + '"]}'
        rows.append(replace(make_rollout(example, text=text, group=group), origin="beam", beam_rank=rank))
    return rows


def test_reward_keeps_the_contract() -> None:
    rows = [*beams([1, 3, 5], group=0), *beams([0, 1, 2], group=1), *beams([4, 2], target=None, group=2)]

    check_reward(rank_aware(RankAwareConfig(), RunInfo()), judges_order=False, rollouts=rows)
    check_reward(RankAware(), judges_order=False)  # samples: not applicable, every one


def test_misses_are_punished_by_rank_where_the_target_was_found() -> None:
    """Three beams, the target second. 1/log2(i + 2): 1, 0.63093, 0.5; their sum 2.13093."""
    first, second, third = RankAware()(beams([1, 3, 5]))

    assert isinstance(first, Reward) and first.value == pytest.approx(-1 / 2.13093, abs=1e-5)
    assert second == Reward(1.0, {"hit": 1.0, "penalty": 0.0})
    assert isinstance(third, Reward) and third.value == pytest.approx(-0.5 / 2.13093, abs=1e-5)


def test_a_search_that_missed_has_no_signal() -> None:
    assert RankAware()(beams([1, 5, 0])) == [Reward(0.0, {"hit": 0.0, "penalty": 0.0})] * 3


def test_groups_do_not_meet_and_rows_do_not_count() -> None:
    rows = [*beams([1, 3], group=0), *beams([1, 5], group=1)]
    outcomes = RankAware(hit=2.0, penalty=0.5)(rows)

    assert RankAware(hit=2.0, penalty=0.5)(rows[::-1]) == outcomes[::-1]
    values = [outcome.value for outcome in outcomes if isinstance(outcome, Reward)]
    assert values == pytest.approx([-0.5 * 1 / (1 + 1 / math.log2(3)), 2.0, 0.0, 0.0])


def test_a_sample_has_no_rank() -> None:
    [outcome] = RankAware()([make_rollout(make_example(3), (3, 0, 1, 2, 4, 5, 6, 7, 8, 9))])

    assert isinstance(outcome, NotApplicable)


# --- the optimizer ------------------------------------------------------------------------------------------------


def small(**settings: object) -> BeamGroups:
    given = {"steps": 3, "prompts_per_step": 2, "num_beams": 4, "max_new_tokens": 40, **settings}
    return BeamGroups(BeamGroupsConfig.model_validate(given))


@pytest.mark.parametrize("settings", [{}, {"think": False, "beams_over": "catalogue", "updates_per_batch": 2}], ids=str)
def test_optimizer_keeps_the_contract(settings: dict[str, object]) -> None:
    def target_code(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(float(row.token_ids[-2] % 2)) for row in rollouts]  # something that beams have more or less of

    check_optimizer(small(learning_rate=1e-3, checkpoint_every=1, **settings), target_code)


def test_a_group_is_the_beams_of_one_search() -> None:
    policy, example = make_policy(), make_example(3)
    report = next(small(think=False).optimize(make_policy(), [example], RankAware(), RunInfo()))

    mask = report.rollouts[0].token_ids[: report.rollouts[0].num_reasoning_tokens]
    prompt = policy.prompt_ids(rerank_messages(example, policy.surface, policy.style))
    trie = build_trie([item.sid for item in example.candidates], policy)
    [found] = beam_sids(policy, [[*prompt, *mask]], trie, 4)

    assert policy.decode(mask) == '{"explanation": "", "recommendations": ["'
    assert [rollout.origin for rollout in report.rollouts] == ["beam"] * 4
    assert [rollout.beam_rank for rollout in report.rollouts] == [0, 1, 2, 3]
    items = [example.candidates[rollout.ranking.order[0]].sid for rollout in report.rollouts]
    assert items == [sid for sid, _ in found]


def test_only_what_the_trie_left_open_is_trained() -> None:
    """Candidates 0 to 9 are (0, 0, 0) to (0, 0, 7), (0, 1, 0), (0, 1, 1): begin, the first code and end are forced."""
    report = next(small().optimize(make_policy(), [make_example(3)], RankAware(), RunInfo()))

    for rollout in report.rollouts:
        open_places = [len(ids or ()) for ids in rollout.allowed_ids if ids is None or len(ids) > 1]
        second = rollout.example.candidates[rollout.ranking.order[0]].sid[1]
        assert open_places == [2, (8, 2)[second]]
        assert sum(logp != 0 for logp in rollout.logps) == 2
    assert report.metrics["logp_gap"] < 1e-4


def test_probabilities_are_those_among_what_can_be_found() -> None:
    """Over all candidates as beams they sum to one, and stand in the ratios of the scores within the vocabulary."""
    policy, example = make_policy(), make_example(3)
    report = next(small(num_beams=10, think=False).optimize(make_policy(), [example], RankAware(), RunInfo()))

    totals = [math.fsum(rollout.logps) for rollout in report.rollouts]
    assert math.fsum(map(math.exp, totals)) == pytest.approx(1.0, abs=1e-5)
    begun = report.rollouts[0].token_ids[: report.rollouts[0].num_reasoning_tokens]
    prompt = policy.prompt_ids(rerank_messages(example, policy.surface, policy.style))
    sids = [example.candidates[rollout.ranking.order[0]].sid for rollout in report.rollouts]
    twins = [i for i, sid in enumerate(sids) if sid[1] == 0]  # these share all choices but the last
    [scores] = score_continuations(policy, [[*prompt, *begun]], [[policy.sid_ids(sid)[:-1] for sid in sids]])
    assert totals[twins[0]] - totals[twins[1]] == pytest.approx(scores[twins[0]] - scores[twins[1]], abs=1e-4)


def test_places_are_searched_where_answers_cite_them() -> None:
    policy, example = make_policy(), make_example(3)
    policy.extend(policy.codebook_sizes, SidSurface(places=10), 0)
    prompt = policy.prompt_ids(rerank_messages(example, policy.surface, policy.style))
    begun = policy.encode('{"explanation": "", "recommendations": ["')
    places = [policy.encode(f"<c_{place}>") for place in range(1, 11)]
    [scores] = score_continuations(policy, [[*prompt, *begun]], [places])
    best = sorted(range(10), key=lambda i: -scores[i])[:4]

    report = next(small(think=False).optimize(policy, [example], RankAware(), RunInfo()))

    assert [rollout.ranking.order[0] for rollout in report.rollouts] == best
    assert [list(rollout.token_ids) for rollout in report.rollouts] == [[*begun, *places[i]] for i in best]
    with pytest.raises(UsageError, match='beams_over = "catalogue" needs answers by SID'):
        next(small(beams_over="catalogue").optimize(policy, [example], RankAware(), RunInfo()))


def test_the_updates_of_a_batch_are_each_on_their_share() -> None:
    """Group 0 alone has a signal: of two updates, the other's share has nothing to learn, and is left out."""

    def first_only(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(float(i == 0)) for i, _ in enumerate(rollouts)]

    examples = [make_example(3), make_example(9)]

    report = next(small(updates_per_batch=2).optimize(make_policy(), examples, first_only, RunInfo()))

    assert report.metrics["num_updates"] == 1


def test_learns_which_guess_was_right() -> None:
    policy, examples = make_policy(), [make_example(target) for target in (1, 4)]
    optimizer = small(steps=30, num_beams=10, think=False, learning_rate=3e-3, kl=0.0)

    places = []
    for report in optimizer.optimize(policy, examples, RankAware(), RunInfo()):
        hits = [
            rollout.beam_rank
            for rollout, outcome in zip(report.rollouts, report.outcomes, strict=True)
            if isinstance(outcome, Reward) and outcome.parts["hit"]
        ]
        places.append(sum(hits) / len(hits))

    assert places[-1] < places[0]
    assert places[-1] <= 1.0


# --- the package --------------------------------------------------------------------------------------------------


def test_imports_only_what_is_public_and_nothing_heavy_to_register() -> None:
    check_imports("rerankkit_minionerec", "torch", "numpy", "transformers")
