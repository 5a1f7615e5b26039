from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from rerankkit import (
    NotApplicable,
    Outcome,
    Pipeline,
    Reward,
    Rollout,
    RunInfo,
    SidSurface,
    Trace,
    TraceFailure,
    UsageError,
)
from rerankkit.lm import Policy, score_continuations
from rerankkit.testing import (
    check_imports,
    check_optimizer,
    check_reward,
    check_teacher,
    make_example,
    make_policy,
    make_rollout,
)
from rerankkit.text.prompts import answer_parts

from rerankkit_onerec_think.__main__ import main
from rerankkit_onerec_think.optimizer import RationaleOptimizer
from rerankkit_onerec_think.parts import (
    OptimizerConfig,
    RolloutBeamConfig,
    SelfRationaleConfig,
    TemplateConfig,
    rollout_beam,
    template,
)
from rerankkit_onerec_think.reward import RolloutBeam
from rerankkit_onerec_think.teachers import SelfRationale, Template, pruned
from rerankkit_onerec_think.thoughts import rerank_prompts, think, think_then_score


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


PLACES = SidSurface(places=10)


def by_place() -> Policy:
    """A tiny policy whose answers cite places."""
    policy = make_policy()
    policy.extend(policy.codebook_sizes, PLACES, 0)
    return policy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy in a folder."""
    folder = tmp_path_factory.mktemp("policy")
    make_policy().save(folder)
    return str(folder)


# --- the reward ---------------------------------------------------------------------------------------------------


def test_reward_keeps_the_contract() -> None:
    check_reward(rollout_beam(RolloutBeamConfig(), RunInfo()))
    check_reward(rollout_beam(RolloutBeamConfig(match="prefix"), RunInfo()))
    check_reward(rollout_beam(RolloutBeamConfig(beams=32), RunInfo()), judges_order=False)


@pytest.mark.parametrize(
    ("beams", "match", "value"),
    [
        # the target is item 9: (0, 1, 1). The answer begins with (0, 0, 0), (0, 0, 3), (0, 0, 1), (0, 1, 0)
        (1, "positional", 1.0),  # (0, ., .)
        (2, "positional", 1.0),
        (3, "positional", 2.0),  # (0, ., 1)
        (3, "prefix", 1.0),  # (0 | 0, 1): the second code ends it
        (4, "prefix", 2.0),  # (0, 1 | 0)
        (10, "positional", 3.0),  # the target itself, the last of the ten
        (10, "prefix", 3.0),
    ],
)
def test_reward_is_what_the_best_of_k_beams_has_in_common(beams: int, match: str, value: float) -> None:
    rollout = make_rollout(make_example(9), (0, 3, 1, 8, 2, 4, 5, 6, 7, 9))

    [outcome] = rollout_beam(RolloutBeamConfig.model_validate({"beams": beams, "match": match}), RunInfo())([rollout])

    assert outcome == Reward(value, {"hit": float(value == 3)})


def test_reward_sees_beams_that_are_not_in_the_list() -> None:
    """Beams over the catalogue: (0, 1, 5) is no candidate, and shares two codes with (0, 1, 1)."""
    text = '{"explanation": "x", "recommendations": ["' + SidSurface().text((0, 1, 5)) + '"]}'

    [near] = RolloutBeam(32)([make_rollout(make_example(9), text=text)])
    [nothing] = RolloutBeam(32)([make_rollout(make_example(9), text="I cannot say.")])
    [targetless] = RolloutBeam(32)([make_rollout(make_example(None))])

    assert near == Reward(2.0, {"hit": 0.0})
    assert nothing == Reward(0.0, {"hit": 0.0})
    assert isinstance(targetless, NotApplicable)


def test_reward_takes_places_for_what_is_there() -> None:
    """The target is item 9, (0, 1, 1); it was asked about with item 8, (0, 1, 0), in place 1 and itself in place 2."""
    reward = RolloutBeam(1, surface=PLACES)
    answer = '{"explanation": "not <c_2>", "recommendations": ["<c_1>", "<c_2>"]}'
    near = make_rollout(make_example(9), text=answer)
    near = replace(near, shown=(8, 9, *range(8)))

    assert reward([near]) == [Reward(2.0, {"hit": 0.0})]
    assert replace(reward, beams=2)([near]) == [Reward(3.0, {"hit": 1.0})]
    assert reward([replace(near, shown=())]) == [Reward(1.0, {"hit": 0.0})]  # as given, place 1 is (0, 0, 0)


# --- teachers -----------------------------------------------------------------------------------------------------


def test_template_keeps_the_contract_and_names_the_path() -> None:
    teacher = template(TemplateConfig(), RunInfo())

    check_teacher(teacher)
    [trace] = teacher.write([make_example(3)], RunInfo())
    assert isinstance(trace, Trace)
    assert "Care / Gel" in trace.reasoning
    assert trace.order == (3, 0, 1, 2, 4, 5, 6, 7, 8, 9)


def test_self_rationale_keeps_the_contract(saved: str) -> None:
    check_teacher(SelfRationale(SelfRationaleConfig(policy=saved, max_new_tokens=40)))
    check_teacher(SelfRationale(SelfRationaleConfig(policy=saved, preset="release", max_new_tokens=40)))


def test_the_hit_filter_keeps_what_leads_to_the_target(saved: str) -> None:
    """With as many beams as candidates everything is a hit; with one, what is kept ranks the target first itself."""
    examples = [make_example(target, example_id=f"e{target}") for target in range(10)]
    lenient = SelfRationale(SelfRationaleConfig(policy=saved, samples=1, beams=10, max_new_tokens=40))
    strict = SelfRationale(SelfRationaleConfig(policy=saved, samples=1, beams=1, max_new_tokens=40))

    everything, some = list(lenient.write(examples, RunInfo())), list(strict.write(examples, RunInfo()))

    assert all(isinstance(answer, Trace) for answer in everything)
    kept = [answer.example_id for answer in some if isinstance(answer, Trace)]
    assert 0 < len(kept) < 10
    reasons = {answer.reason for answer in some if isinstance(answer, TraceFailure)}
    assert reasons == {"the target is not among the best 1 after it"}


def test_presets_fill_in_what_is_not_given() -> None:
    paper, release = SelfRationaleConfig(policy="x"), SelfRationaleConfig(policy="x", preset="release")
    mine = SelfRationaleConfig(policy="x", preset="release", beams=3)

    assert (paper.top_k, paper.samples, paper.beams) == (10, 1, 0)
    assert (release.top_k, release.samples, release.beams) == (10, 2, 5)
    assert (mine.samples, mine.beams) == (2, 3)
    assert SelfRationaleConfig.model_validate(release.model_dump()) == release
    with pytest.raises(ValidationError, match="preset"):
        SelfRationaleConfig.model_validate({"policy": "x", "preset": "papers"})


def test_history_is_pruned_to_what_is_like_the_target() -> None:
    """The target is "Norda Gel 3" by Norda, of Care > Gel. By words in common, counted as often as both have them:

    203 (a Gel of Amaro's), 204 and 207 (Norda's, of other kinds): 2 x 2 + 1 (Care) = 5; all the others: 1.
    """
    example = make_example(3, num_history=8)

    assert [item.item_id for item in pruned(example, 3).history] == ["item203", "item204", "item207"]
    assert [item.item_id for item in pruned(example, 2).history] == ["item204", "item207"]  # of equals the later
    assert pruned(example, 10) == example


# --- thinking -----------------------------------------------------------------------------------------------------


def test_thoughts_depend_on_their_example_alone() -> None:
    policy, examples = make_policy(), [make_example(target) for target in (0, 3, 9)]

    def thoughts(some: Sequence[int]) -> list[list[str]]:
        chosen = [examples[i] for i in some]
        groups = think(
            policy,
            chosen,
            rerank_prompts(policy, chosen),
            2,
            max_new_tokens=40,
            temperature=1.0,
            info=RunInfo(),
            salt="",
        )
        return [[thought.text for thought in group] for group in groups]

    assert thoughts([0, 1, 2])[::-1] == thoughts([2, 1, 0])
    assert thoughts([1]) == [thoughts([0, 1, 2])[1]]


def test_scores_are_those_of_the_answer_that_begins_with_the_thought() -> None:
    policy, example = make_policy(), make_example(3)
    [(ranking, [said])] = think_then_score(policy, [example], 1, max_new_tokens=40)

    prompts = rerank_prompts(policy, [example])
    [[thought]] = think(
        policy, [example], prompts, 1, max_new_tokens=40, temperature=1.0, info=RunInfo(), salt="think then score"
    )
    asks = [[*prompts[0], *thought.token_ids]]
    [expected] = score_continuations(policy, asks, [[policy.sid_ids(item.sid) for item in example.candidates]])

    assert said == thought.text
    assert ranking.order == tuple(sorted(range(10), key=lambda i: -expected[i]))
    assert policy.decode(thought.token_ids).endswith('"recommendations": ["')


def test_candidates_that_are_cited_by_place_are_scored_by_it() -> None:
    policy, example = by_place(), make_example(3)
    [(ranking, _)] = think_then_score(policy, [example], 0)

    beginning = policy.encode('{"explanation": "", "recommendations": ["')
    asks = [[*rerank_prompts(policy, [example])[0], *beginning]]
    [expected] = score_continuations(policy, asks, [[policy.encode(f"<c_{place}>") for place in range(1, 11)]])
    assert ranking.order == tuple(sorted(range(10), key=lambda i: -expected[i]))


def test_without_thoughts_the_answer_begins_with_an_empty_explanation() -> None:
    policy, example = make_policy(), make_example(3)
    [(ranking, [said])] = think_then_score(policy, [example], 0)

    reasoning, listed = answer_parts("", (0,), example, policy.surface)
    beginning = policy.encode(reasoning) + policy.encode(listed.partition("<")[0])
    asks = [[*rerank_prompts(policy, [example])[0], *beginning]]
    [expected] = score_continuations(policy, asks, [[policy.sid_ids(item.sid) for item in example.candidates]])

    assert said == ""
    assert ranking.order == tuple(sorted(range(10), key=lambda i: -expected[i]))


def test_a_finished_run_is_ranked_with_and_without_thinking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "data": {"use": "world", "num_users": 60},
        "candidates": {"use": "knn", "tune": False, "max_test": 30},
        "policy": {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64, "prompt": {"terse": True}},
        "tokenizer": {"use": "residual-kmeans", "levels": 2, "codes": 24},
        "midtrain": {"steps": 1, "tokens_per_step": 100},
        "sft": {"epochs": 1},
    }
    Pipeline(config=config, teacher=Template()).run(tmp_path / "run", until="sft", progress=False)
    (tmp_path / "run" / "stages" / "9-rank-sft").mkdir()  # another stage, whose name ends alike

    main([str(tmp_path / "run"), "--stage", "sft", "--rationales", "0,2", "--users", "3", "--max-new-tokens", "24"])

    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("3 test users whose target is listed; policy of sft")
    assert [row.split("  ")[0].strip() for row in rows] == ["as given", "0 rationales", "2 rationales"]
    assert rows[1].endswith("+0.000 [+0.000, +0.000]")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "run")])
    assert "no finished stage 'rl'" in capsys.readouterr().err


# --- the optimizer ------------------------------------------------------------------------------------------------


def small(**settings: object) -> RationaleOptimizer:
    given = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 40, "num_beams": 4, **settings}
    return RationaleOptimizer(OptimizerConfig.model_validate(given))


def by_first(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """Something that rationales of one length differ in."""
    return [Reward(float(rollout.token_ids[rollout.num_reasoning_tokens // 2])) for rollout in rollouts]


def by_length(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(-float(len(rollout.token_ids))) for rollout in rollouts]


@pytest.mark.parametrize("beams_over", ["candidates", "catalogue"])
def test_optimizer_keeps_the_contract(beams_over: str) -> None:
    check_optimizer(small(beams_over=beams_over, checkpoint_every=1, updates_per_batch=2))


def test_a_group_is_one_prompts_rationales_and_only_they_are_trained() -> None:
    policy = make_policy()
    report = next(small(group_size=3).optimize(policy, [make_example(3), make_example(9)], by_first, RunInfo()))

    assert [rollout.group for rollout in report.rollouts] == [0, 0, 0, 1, 1, 1]
    for rollout in report.rollouts:
        assert len(rollout.ranking.order) == 10 and rollout.ranking.parse == "ok"  # all ten, ranked by their scores
        assert "s_a" not in policy.decode(rollout.token_ids[rollout.num_reasoning_tokens :])  # no item was sampled
        free = [token for token, ids in zip(rollout.token_ids, rollout.allowed_ids, strict=True) if ids is None]
        assert len(free) <= rollout.num_reasoning_tokens + 1  # the one that ends it is chosen, too
    assert {"entropy", "kl", "grad_norm", "logp_gap", "num_groups", "clip_ratio/low_mean"} <= {*report.metrics}
    assert report.metrics["logp_gap"] < 1e-4


def test_beams_of_places_are_named_by_them() -> None:
    report = next(small().optimize(by_place(), [make_example(3)], RolloutBeam(1, surface=PLACES), RunInfo()))

    for rollout in report.rollouts:
        listed = rollout.text.partition('"recommendations": ')[2].strip("[]}").replace('"', "").split(", ")
        assert [f"<c_{place + 1}>" for place in rollout.ranking.order] == listed
        assert rollout.ranking.parse == "ok"
    assert all(isinstance(outcome, Reward) and outcome.value >= 1 for outcome in report.outcomes)  # all begin with 0
    with pytest.raises(UsageError, match='beams_over = "catalogue" needs answers by SID'):
        next(small(beams_over="catalogue").optimize(by_place(), [make_example(3)], by_first, RunInfo()))


def test_the_updates_of_a_batch_are_each_on_their_share() -> None:
    """Group 0 alone has a signal: of two updates, the other's share has nothing to learn, and is left out."""

    def first_only(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(float(i == 0)) for i, _ in enumerate(rollouts)]

    examples = [make_example(3), make_example(9)]

    report = next(small(updates_per_batch=2).optimize(make_policy(), examples, first_only, RunInfo()))

    assert report.metrics["num_updates"] == 1


def test_a_reward_for_short_rationales_shortens_them() -> None:
    policy = make_policy()
    optimizer = small(steps=30, prompts_per_step=2, group_size=8, learning_rate=3e-3, max_new_tokens=60, kl=0.0)
    lengths = [
        sum(len(rollout.token_ids) for rollout in report.rollouts) / len(report.rollouts)
        for report in optimizer.optimize(policy, [make_example(3), make_example(9)], by_length, RunInfo())
    ]

    assert sum(lengths[-3:]) < 0.8 * sum(lengths[:3])


def test_kl_is_zero_at_the_start_and_holds_the_policy_back() -> None:
    def run(kl: float) -> tuple[list[float], Policy]:
        policy = make_policy()
        optimizer = small(steps=6, group_size=4, learning_rate=3e-3, kl=kl)
        reports = list(optimizer.optimize(policy, [make_example(3), make_example(9)], by_first, RunInfo()))
        return [report.metrics["kl"] for report in reports], policy

    free, held = run(1e-9)[0], run(10.0)[0]

    assert math.isclose(free[0], 0.0, abs_tol=1e-6) and math.isclose(held[0], 0.0, abs_tol=1e-6)
    assert held[-1] < 0.5 * free[-1]


def test_groups_without_difference_change_nothing() -> None:
    policy = make_policy()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    reports = list(small().optimize(policy, [make_example(3)], lambda rows: [Reward(1.0)] * len(rows), RunInfo()))

    assert [report.metrics["num_groups"] for report in reports] == [0.0] * 3
    assert all(report.metrics["entropy"] > 1 for report in reports)  # nats a token, of random weights
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())


# --- the package --------------------------------------------------------------------------------------------------


def test_imports_only_what_is_public_and_nothing_heavy_to_register() -> None:
    check_imports("rerankkit_onerec_think", "torch", "numpy", "pydantic")
