"""The loop behind dapo, grpo, dr-grpo, gspo and cispo, on a policy of a few thousand weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError

from rerankkit.errors import RunFailed
from rerankkit.lm import Policy, adapted, group_logps, groups, reference_of, scratch_policy
from rerankkit.math.losses import PRESETS, LossSettings, policy_loss
from rerankkit.plugins import load_plugins
from rerankkit.stages.watch import measure
from rerankkit.text.prompts import PromptStyle
from rerankkit.types import (
    Failed,
    Item,
    NotApplicable,
    Outcome,
    Ranking,
    RerankExample,
    Reward,
    Rollout,
    RunInfo,
    SidSurface,
    StepReport,
)
from rerankkit_gr2.dapo import GroupOptimizer
from rerankkit_gr2.settings import GroupConfig

PLUGINS = load_plugins(only="gr2")
WORDS = ("red", "blue", "soap", "cream", "brush", "comb")


def item(number: int) -> Item:
    return Item(f"i{number}", f"{WORDS[number % 6]} {WORDS[number % 5]}", sid=(number % 4, number // 4))


EXAMPLES = [
    RerankExample(
        f"e{n}",
        f"u{n}",
        (item(n), item(n + 4)),
        tuple(item(n + k) for k in (5, 6, 7)),
        (0.0, float(n % 2), 1.0 - n % 2),
    )
    for n in range(4)
]


@pytest.fixture(scope="module")
def base() -> Policy:
    """Shared: tests take a copy."""
    corpus = [" ".join(WORDS), '{"explanation": "", "recommendations": ["", ""]}'] * 20
    policy = scratch_policy(corpus, seed=1, hidden_size=32, num_layers=1, num_heads=2, vocab_size=320)
    policy.extend((4, 4), SidSurface(), seed=1)
    policy.style = PromptStyle(fields=("title",), max_history=2, terse=True)
    return policy


@pytest.fixture
def policy(base: Policy) -> Policy:
    return copy.deepcopy(base)


def optimizer(name: str = "dapo", **changes: Any) -> GroupOptimizer:
    """A part as a config would choose it, in the smallest size."""
    small = {"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 60, "learning_rate": 1e-2}
    spec = PLUGINS.part("optimizer", name, "")
    built: GroupOptimizer = spec.build(spec.config(**{**small, "warmup_steps": 0, **changes}), RunInfo())
    return built


def first_is_target(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """1 when the first is the target; two candidates in three are not, so most groups of four vary."""
    return [Reward(float(r.ranking.order[0] == r.example.target_index), {"first": 1.0}) for r in rollouts]


def always(outcome: Outcome) -> Callable[[Sequence[Rollout]], list[Outcome]]:
    return lambda rollouts: [outcome] * len(rollouts)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


def steps(
    policy: Policy, reward: Any, info: RunInfo | None = None, name: str = "dapo", **changes: Any
) -> list[StepReport]:
    """Reports with what a run logs of their rollouts."""
    reports = optimizer(name, **changes).optimize(policy, EXAMPLES, reward, info or RunInfo(seed=3))
    return [replace(report, metrics={**report.metrics, **measure(report)}) for report in reports]


def test_a_step_changes_the_policy_and_reports_what_happened(policy: Policy, base: Policy) -> None:
    first, second = steps(policy, first_is_target)

    assert not same(weights(policy), weights(base)) and not policy.model.training
    assert (first.step, second.step) == (1, 2)
    assert len(first.rollouts) == len(first.outcomes) >= 8
    values = [o.value for o in first.outcomes if isinstance(o, Reward)]
    assert first.metrics["reward"] == pytest.approx(sum(values) / len(values))
    assert first.metrics["rewards/first/mean"] == 1.0 and first.metrics["rewards/failed"] == 0.0
    assert first.metrics["learning_rate"] == 1e-2 and first.metrics["grad_norm"] > 0
    # Before the first update sampler and trainer are one policy: both paths must give the same log-probabilities.
    assert 0 <= first.metrics["logp_gap"] < 1e-4 and abs(first.metrics["ratio_mean"] - 1) < 1e-4
    assert [rollout.group for rollout in first.rollouts] == [i // 4 for i in range(len(first.rollouts))]


def test_free_answers_are_learnt_from_too(policy: Policy, base: Policy) -> None:
    def every_second(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(float(i % 2)) for i, _ in enumerate(rollouts)]

    [report] = steps(policy, every_second, steps=1, constrain=False, overlong_filtering=False)
    assert not same(weights(policy), weights(base))
    assert report.metrics["logp_gap"] < 1e-4 and report.metrics["invalid_rate"] == 1.0


def test_the_time_of_a_step_is_told_in_parts(policy: Policy) -> None:
    [metrics] = [report.metrics for report in steps(policy, first_is_target, steps=1)]
    parts = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
    assert {"prefill", "decode", "rollout", "reward", "forward", "backward", "optimizer", "other"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(metrics["step_time"]) and all(value > 0 for value in parts.values())
    assert metrics["tokens_per_second"] > 0 and metrics["tflops"] > 0


def test_a_gap_between_sampler_and_trainer_stops_the_run(
    policy: Policy, base: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer whose log-probabilities are off by 1/4: the first update is not made."""

    def off(*arguments: Any, **settings: Any) -> Any:
        tokens = group_logps(*arguments, **settings)
        return replace(tokens, logps=tokens.logps - 0.25)

    monkeypatch.setattr(groups, "group_logps", off)
    words = (
        r"first update on its rollouts.* differ by 0\.25 nats a token on average \(0\.25 at most\), more than 0\.2\. "
    )
    with pytest.raises(RunFailed, match=words + "Set policy.precision to float32, or raise optimizer.max_logp_gap"):
        steps(policy, first_is_target, max_logp_gap=0.2)
    assert same(weights(policy), weights(base))
    # with a nucleus of 0.9 the sampler's may be larger by log(1 / 0.9) = 0.105, and 0 is no limit
    for free in ({"max_logp_gap": 0.3, "top_p": 0.9}, {"max_logp_gap": 0.0}):
        [report] = steps(policy, first_is_target, steps=1, **free)
        assert report.metrics["logp_gap"] > 0.2 and report.metrics["logp_gap_max"] >= report.metrics["logp_gap"]


def test_it_learns_what_is_rewarded(policy: Policy) -> None:
    reports = steps(policy, first_is_target, steps=15, prompts_per_step=4, group_size=8, learning_rate=2e-2)
    rewards = [report.metrics["reward"] for report in reports]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_off_policy_and_counts_what_it_clips(policy: Policy, base: Policy, name: str) -> None:
    reports = steps(policy, first_is_target, name=name, updates_per_batch=2, group_size=6, dynamic_sampling=False)
    assert not same(weights(policy), weights(base))
    updated = [r.metrics for r in reports if r.metrics.get("num_updates") == 2]
    assert updated
    for metrics in updated:
        assert all(math.isfinite(value) for value in metrics.values())
        assert 0 <= metrics["clip_ratio/low_mean"] <= 1 and 0 <= metrics["clip_ratio/high_mean"] <= 1
        assert metrics["ratio_mean"] != 1.0 and metrics["kl"] > 0  # the second update is on the first one's policy
        assert metrics["logp_gap"] < 1e-4  # measured before the first


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_weight": 0.3, "updates_per_batch": 2, "shuffle_candidates": True, "entropy_weight": 0.01},
        {"dynamic_sampling": False, "advantage": "batch", "pass_at_k": 2, "schedule": "cosine", "weight_decay": 0.1},
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    base: Policy, tmp_path: Path, stop_after: int, settings: dict[str, Any]
) -> None:
    whole, broken, resumed = (copy.deepcopy(base) for _ in range(3))
    plan: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "learning_rate": 3e-2, **settings}
    expected = steps(whole, first_is_target, RunInfo(seed=5, work=tmp_path / "a"), **plan)
    info = RunInfo(seed=5, work=tmp_path / "b")

    running = optimizer(**plan).optimize(broken, EXAMPLES, first_is_target, info)
    seen = [next(running).step for _ in range(stop_after)]
    del running
    rest = steps(resumed, first_is_target, info, **plan)

    assert seen == list(range(1, stop_after + 1))
    # The checkpoint of step 2 is written only when step 2 has been reported and the next is asked for.
    assert [report.step for report in rest] == ([3, 4] if stop_after == 3 else [1, 2, 3, 4])
    assert same(weights(resumed), weights(whole)) and not same(weights(whole), weights(base))
    assert rest[-1].rollouts == expected[-1].rollouts
    timed = ("time/", "step_time", "tokens_per_second", "tflops")
    for key in [key for key in expected[-1].metrics if not key.startswith(timed)]:
        assert rest[-1].metrics[key] == expected[-1].metrics[key], key  # the distance from the reference, for one


def test_dynamic_sampling_replaces_groups_without_signal_and_then_makes_do(policy: Policy, base: Policy) -> None:
    asked: list[list[str]] = []

    def only_e1_varies(rollouts: Sequence[Rollout]) -> list[Outcome]:
        asked.append(sorted({r.example.example_id for r in rollouts}))
        return [Reward(float(i % 2) if r.example.example_id == "e1" else 1.0) for i, r in enumerate(rollouts)]

    [report] = steps(policy, only_e1_varies, steps=1, max_resampling=5)

    # Two prompts a step: after each round only what is missing is asked, nobody twice, until all four are spent.
    assert len(asked[0]) == 2 and sorted(chain.from_iterable(asked)) == ["e0", "e1", "e2", "e3"]
    assert report.metrics["num_groups"] == 1.0 and len(report.rollouts) == 16
    assert report.metrics["frac_reward_zero_std"] == 0.75
    assert not same(weights(policy), weights(base))


def test_resampling_stops_at_its_limit(policy: Policy) -> None:
    for limit, prompts in ((0, 1), (1, 2), (2, 3)):
        [report] = steps(policy, always(Reward(1.0)), steps=1, prompts_per_step=1, max_resampling=limit)
        assert len(report.rollouts) == 4 * prompts


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("outcome", [Reward(0.5), NotApplicable("no price")])
def test_without_variance_nothing_is_learnt(policy: Policy, base: Policy, outcome: Outcome, dynamic: bool) -> None:
    reports = steps(policy, always(outcome), dynamic_sampling=dynamic)
    assert same(weights(policy), weights(base))
    assert [report.metrics["loss"] for report in reports] == [0.0, 0.0]
    assert ("reward" in reports[0].metrics) == isinstance(outcome, Reward)


def test_more_failures_than_the_budget_stop_the_run(policy: Policy, base: Policy) -> None:
    def one_in(number: int) -> Callable[[Sequence[Rollout]], list[Outcome]]:
        return lambda rollouts: [
            Failed("no answer") if i % number == 0 else Reward(float(i)) for i in range(len(rollouts))
        ]

    words = "4 of the 8 rollouts of step 1 could not be judged, more than optimizer.max_failed = 0.2 allows; first "
    with pytest.raises(RunFailed, match=words + "reason: no answer. Mend the reward, or raise optimizer.max_failed."):
        steps(policy, one_in(2))
    with pytest.raises(RunFailed, match="16 of the 16 rollouts of step 1 could not be judged"):
        steps(policy, always(Failed("server is down")), max_failed=0.99)
    assert same(weights(policy), weights(base))
    [report] = steps(policy, one_in(2), steps=1, max_failed=0.5)  # no more than allowed
    assert report.metrics["rewards/failed"] == 0.5 and report.metrics["reward"] == 4.0  # the mean of 1, 3, 5, 7
    with pytest.raises(ValidationError, match="max_failed"):
        optimizer(max_failed=1.0)


def test_what_has_no_reward_leaves_its_group(policy: Policy) -> None:
    """Not as 0: with it in, the group below would vary; and a group of one is none."""

    def first_of_four(rest: Outcome) -> Callable[[Sequence[Rollout]], list[Outcome]]:
        return lambda rollouts: [Reward(1.0) if i % 4 == 0 else rest for i, _ in enumerate(rollouts)]

    for rest in (NotApplicable("no price"), Failed("timeout")):
        [report] = steps(policy, first_of_four(rest), steps=1, max_failed=0.8)
        assert report.metrics["num_groups"] == 0.0 and report.metrics["reward"] == 1.0
    assert report.metrics["rewards/failed"] == 0.75


def test_groups_that_vary_only_by_what_is_filtered_out_are_replaced(policy: Policy) -> None:
    config = optimizer(overlong_filtering=True).config
    loop = GroupOptimizer(config, optimizer().loss)
    whole = Rollout(EXAMPLES[0], "", "", Ranking((0, 1, 2)))
    short = replace(whole, truncated=True)
    assert loop._varies([(whole, Reward(1.0)), (whole, Reward(0.0))])
    assert not loop._varies([(whole, Reward(1.0)), (whole, Reward(1.0)), (short, Reward(0.0))])
    unfiltered = GroupOptimizer(config.model_copy(update={"overlong_filtering": False}), loop.loss)
    assert unfiltered._varies([(whole, Reward(1.0)), (short, Reward(0.0))])


def test_dynamic_sampling_looks_at_what_was_judged_and_not_at_length(policy: Policy) -> None:
    """Answers of unlike lengths under a soft penalty, and a length reward in the whole: both always vary."""

    def judged(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(1 - len(r.token_ids) / 50, {"hit": 1.0, "brevity": -len(r.token_ids) / 50}) for r in rollouts]

    plan = {"steps": 1, "max_new_tokens": 300, "group_size": 8, "overlong_buffer": 300}
    [report] = steps(policy, always(Reward(1.0)), **plan)
    assert len({len(rollout.token_ids) for rollout in report.rollouts[:8]}) > 1  # so the shaped rewards vary
    assert report.metrics["num_groups"] == 0 and report.metrics["frac_reward_zero_std"] == 1
    [report] = steps(policy, judged, **plan)
    assert report.metrics["num_groups"] == 2 and report.metrics["frac_reward_zero_std"] == 0
    [report] = steps(policy, judged, **plan, filter_on="hit")
    assert report.metrics["num_groups"] == 0 and report.metrics["frac_reward_zero_std"] == 1
    with pytest.raises(
        RunFailed, match=r"filter_on: 'hits' is no part of the reward; known: brevity, hit. Did you mean 'hit'"
    ):
        steps(policy, judged, **plan, filter_on="hits")


def test_why_groups_do_not_vary_by_hand() -> None:
    loop = optimizer()
    rollout = Rollout(EXAMPLES[0], "", "", Ranking((0, 1, 2)))
    cut_off = replace(rollout, truncated=True)
    varied, best, worst, between = (
        [(rollout, Reward(v)) for v in values] for values in ((0, 1), (1, 1), (0, 0), (0.5, 0.5))
    )
    unjudged = [(rollout, Reward(1.0)), (rollout, NotApplicable("no price"))]
    filtered = [(rollout, Reward(1.0)), (cut_off, Reward(0.0))]
    shares = loop._without_variance([varied, best, best, worst, between, unjudged, filtered, varied])
    assert shares == {
        "frac_reward_zero_std": 6 / 8,
        "frac_zero_std/all_best": 2 / 8,
        "frac_zero_std/all_worst": 1 / 8,
        "frac_zero_std/all_same": 1 / 8,
        "frac_zero_std/unjudged": 2 / 8,
    }
    # one value in the whole step: nobody can say whether it is the best or the worst there is
    assert loop._without_variance([best, best])["frac_zero_std/all_same"] == 1
    assert loop._without_variance([unjudged])["frac_zero_std/unjudged"] == 1


def test_every_step_logs_the_same_things(policy: Policy) -> None:
    judged = iter([Reward(1.0), Reward(1.0), Reward(1.0), None])

    def third_time_lucky(rollouts: Sequence[Rollout]) -> list[Outcome]:
        outcome = next(judged)
        return [outcome or Reward(float(i)) for i in range(len(rollouts))]

    plan = {
        "steps": 2,
        "max_resampling": 2,
        "prompts_per_step": 1,
        "max_logp_gap": 1.0,
        "kl_weight": 0.1,
        "clip_dual": 3.0,
    }
    nothing, something = steps(policy, third_time_lucky, **plan)
    assert (nothing.metrics["num_updates"], something.metrics["num_updates"]) == (0, 1)
    kept = {name for name in something.metrics if not name.startswith("time/")}
    assert kept == {name for name in nothing.metrics if not name.startswith("time/")}
    wanted = {"entropy", "kl", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean", "logp_gap", "reward_std"}
    assert wanted <= kept and all(math.isfinite(value) for value in nothing.metrics.values())
    # the same policy, by what was drawn and by the whole distribution
    assert nothing.metrics["entropy"] == pytest.approx(something.metrics["entropy"], rel=0.5)
    assert abs(nothing.metrics["kl"]) < 1e-6  # measured, and nothing has moved yet


def test_the_kl_term_holds_the_policy_to_where_it_began(base: Policy) -> None:
    ends = {}
    for weight in (1e-9, 3.0):
        policy = copy.deepcopy(base)
        reports = steps(policy, first_is_target, steps=8, kl_weight=weight, dynamic_sampling=False)
        first, *_, ends[weight] = [report.metrics["kl"] for report in reports]
        assert abs(first) < 1e-6  # before the first update they are the same
    assert ends[1e-9] > 0.05 and ends[3.0] < 0.5 * ends[1e-9]


def test_with_adapters_the_reference_is_the_policy_without_them(base: Policy, tmp_path: Path) -> None:
    pytest.importorskip("peft")

    def said(policy: Policy) -> torch.Tensor:
        return group_logps(policy, [[7, 8, 9]], [[[20, 21, 22, 23]]]).logps

    plan: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "learning_rate": 5e-2, "kl_weight": 0.01}
    ends = []
    for name, stops in (("a", False), ("b", True)):
        info = RunInfo(seed=3, work=tmp_path / name)
        if stops:
            broken = copy.deepcopy(base)
            with adapted(broken, 1, rank=4, alpha=8):
                running = optimizer(**plan).optimize(broken, EXAMPLES, first_is_target, info)
                assert [next(running).step for _ in range(3)] == [1, 2, 3]
                del running
        policy = copy.deepcopy(base)
        with adapted(policy, 1, rank=4, alpha=8):
            before = {name for name, p in policy.model.named_parameters() if p.requires_grad}
            reports = steps(policy, first_is_target, info, **plan)
            assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == before
            with reference_of(policy) as reference:
                logps = reference(said)
                assert torch.equal(logps, said(base)) and not torch.equal(logps, said(policy))
        ends.append((weights(policy), reports[-1].metrics["kl"]))
        assert reports[-1].metrics["kl"] > 1e-4
        if not stops:
            assert abs(reports[0].metrics["kl"]) < 1e-6
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_the_entropy_bonus_keeps_answers_open(base: Policy) -> None:
    ends = []
    for weight in (0.0, 0.5):
        policy = copy.deepcopy(base)
        reports = steps(policy, first_is_target, steps=8, entropy_weight=weight, dynamic_sampling=False)
        ends.append(reports[-1].metrics["entropy"] - reports[0].metrics["entropy"])
    assert ends[1] > ends[0] + 0.02


def test_shuffled_prompts_are_learnt_from_as_they_were_shown(policy: Policy) -> None:
    plan = {"steps": 3, "shuffle_candidates": True, "dynamic_sampling": False, "prompts_per_step": 4}
    reports = steps(policy, first_is_target, **plan)
    shown = [{r.example.example_id: r.shown for r in report.rollouts} for report in reports]
    assert all(sorted(order) == [0, 1, 2] for orders in shown for order in orders.values())
    assert len({order for orders in shown for order in orders.values()}) > 2  # by example and by step
    assert any(shown[0][name] != shown[1][name] for name in shown[0])
    for report in reports:
        assert report.metrics["logp_gap"] < 1e-4  # the trainer reads the prompt that the sampler read
        assert all(rollout.example in EXAMPLES for rollout in report.rollouts)  # rewards see the given order
        copied = [rollout.ranking.order == rollout.shown for rollout in report.rollouts]
        assert report.metrics["identity_rate"] == sum(copied) / len(copied)


def test_a_bonus_for_the_best_of_k_is_added_to_the_advantage(policy: Policy) -> None:
    with patch.object(groups, "policy_loss", wraps=policy_loss) as loss:
        steps(
            policy, lambda rollouts: [Reward(float(i % 4 == 0)) for i in range(len(rollouts))], steps=1,
            advantage="centred", pass_at_k=2, pass_at_k_weight=0.5, overlong_filtering=False,
        )  # fmt: skip
    # rewards 1, 0, 0, 0: centred .75 and -.25; the first adds 1 to any other: 2, at a weight of a half
    assert loss.call_args.args[3].tolist() == pytest.approx([1.75, -0.25, -0.25, -0.25] * 2)


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong, words in (
        ({"clip_dual": 1.28}, r"clip_dual is 1.28; it must lie above 1 \+ clip_high = 1.28"),
        ({"clip_dual": 3.0, "surrogate": "weighted"}, "bounds surrogate"),
        ({"pass_at_k": 1}, "pass_at_k is 1; it lies between 2 and group_size = 4"),
        ({"pass_at_k": 5}, "pass_at_k is 5; it lies between 2 and group_size = 4"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"ratio": "none", "updates_per_batch": 2}, 'ratio is "none" and updates_per_batch 2: from the second update'),
    ):
        with pytest.raises(ValidationError, match=words):
            optimizer(**wrong)


def test_the_soft_penalty_lowers_long_answers_only() -> None:
    # Limit 60, buffer 20: nothing up to 40 tokens, -1 at 60, so 50 tokens cost 10/20.
    loop = optimizer(overlong_buffer=20)
    rollout = Rollout(EXAMPLES[0], "", "", Ranking((0, 1, 2)))
    shaped = [loop._shaped(replace(rollout, token_ids=(0,) * n), Reward(1.0)) for n in (10, 40, 50, 60)]
    assert shaped == [1.0, 1.0, 0.5, 0.0]


def test_the_rate_warms_up(policy: Policy) -> None:
    reports = steps(policy, first_is_target, steps=3, warmup_steps=2, dynamic_sampling=False)
    rates = [r.metrics["learning_rate"] for r in reports if "learning_rate" in r.metrics]
    assert set(rates) <= {0.5e-2, 1e-2} and rates == sorted(rates)


def test_a_gradient_that_is_no_number_stops_the_run(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1e30)
    with pytest.raises(RunFailed, match=r"gradient is (nan|inf); lower optimizer\.learning_rate"):
        steps(policy, lambda rollouts: [Reward(float(i % 2)) for i, _ in enumerate(rollouts)])


def test_fewer_examples_than_prompts_are_enough(policy: Policy) -> None:
    [report] = list(optimizer(steps=1, prompts_per_step=9).optimize(policy, EXAMPLES[:2], first_is_target, RunInfo()))
    assert len(report.rollouts) == 8


def test_settings_of_the_class_choose_the_loss() -> None:
    for name, preset in PRESETS.items():
        built = optimizer(name)
        assert isinstance(built.config, GroupConfig)
        assert built.loss == replace(preset, constant=60)  # max_new_tokens
    every = {
        "advantage": "leave-one-out", "ratio": "none", "surrogate": "clipped", "clip_low": 0.3, "clip_high": 0.5,
        "clip_dual": 3.0, "aggregate": "constant", "kl_weight": 0.1, "kl_estimator": "k2", "entropy_weight": 0.2,
    }  # fmt: skip
    for name in PRESETS:
        assert optimizer(name, **every).loss == LossSettings(**every, constant=60)
    kinds = {name: (optimizer(name).loss.ratio, optimizer(name).loss.aggregate) for name in PRESETS}
    assert kinds == {
        "dapo": ("token", "token"),
        "grpo": ("token", "sequence"),
        "dr-grpo": ("token", "constant"),
        "gspo": ("sequence", "sequence"),
        "cispo": ("token", "token"),
    }
