from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rerankkit import Failed, NotApplicable, Outcome, Reward, Rollout, RunFailed, RunInfo
from rerankkit.lm import Policy, group_logps
from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import PRESETS, policy_loss
from rerankkit.testing import check_imports, check_optimizer, make_example, make_policy
from rerankkit.text.prompts import rerank_messages
from trl import GRPOConfig

from rerankkit_trl.optimizer import TrlOptimizer, trainer_fields
from rerankkit_trl.plugin import TrlConfig

EXAMPLES = [make_example(3), make_example(9)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small(**settings: object) -> TrlOptimizer:
    given = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 100, **settings}
    return TrlOptimizer(TrlConfig.model_validate(given))


def even(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(sum(i % 2 == 0 for i in row.token_ids) / len(row.token_ids), {"share": 0.5}) for row in rollouts]


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.1, "num_iterations": 2, "groups_per_pass": 2, "checkpoint_every": 1},
        {"loss_type": "grpo", "constrain": False, "mask_truncated_completions": False, "checkpoint_every": 1},
    ],
    ids=str,
)
def test_keeps_the_contract(settings: dict[str, object]) -> None:
    check_optimizer(small(**settings))


def test_one_step_takes_the_gradient_that_our_own_loss_has() -> None:
    """TRL's "grpo" on our rollouts against `policy_loss` on the same; TRL adds 1e-4 to the deviation, we 1e-6."""
    policy = make_policy()
    optimizer = small(loss_type="grpo", constrain=False, max_new_tokens=30, mask_truncated_completions=False)
    report = next(optimizer.optimize(policy, EXAMPLES, even, RunInfo()))

    fresh = make_policy()
    groups = [report.rollouts[:2], report.rollouts[2:]]
    prompts = [fresh.prompt_ids(rerank_messages(group[0].example, fresh.surface, fresh.style)) for group in groups]
    tokens = group_logps(fresh, prompts, [[rollout.token_ids for rollout in group] for group in groups])
    rewards = torch.tensor([[even([rollout])[0].value for rollout in group] for group in groups])  # type: ignore[union-attr]
    advantages = group_advantages(rewards, kind="zscore", eps=1e-4).values.flatten()
    loss, _ = policy_loss(tokens.logps, tokens.logps.detach(), tokens.sequence_ids, advantages, PRESETS["grpo"])
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(fresh.model.parameters(), math.inf)

    assert report.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert report.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_forced_tokens_leave_the_loss() -> None:
    """TRL counts the tokens of its loss in completions/mean_length: those that the mask left a choice of."""
    report = next(small().optimize(make_policy(), EXAMPLES, even, RunInfo()))

    chosen = [sum(ids is None or len(ids) > 1 for ids in rollout.allowed_ids) for rollout in report.rollouts]
    assert report.metrics["completions/mean_length"] == pytest.approx(sum(chosen) / 4)
    assert all(count < len(rollout.token_ids) for count, rollout in zip(chosen, report.rollouts, strict=True))
    assert all(rollout.ranking.parse == "ok" for rollout in report.rollouts)


def test_reports_are_ours() -> None:
    report = next(small().optimize(make_policy(), EXAMPLES, even, RunInfo()))

    assert report.metrics["reward"] == pytest.approx(
        sum(outcome.value for outcome in report.outcomes if isinstance(outcome, Reward)) / 4
    )
    names = {"entropy", "grad_norm", "frac_reward_zero_std", "clip_ratio/low_mean"}
    assert names <= {*report.metrics}
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.metrics.values())


def test_rollouts_without_a_reward_leave_their_group() -> None:
    """Group 0 has no say at all, and group 1 differs: only its prompt moves the policy."""

    def some(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [(NotApplicable("no"), Failed("broken"))[i] if i < 2 else Reward(float(i)) for i in range(len(rollouts))]

    report = next(small().optimize(make_policy(), EXAMPLES, some, RunInfo()))

    assert report.metrics["reward"] == 2.5
    assert report.metrics["grad_norm"] > 0


def test_the_reference_is_where_rl_began_even_after_a_stop(tmp_path: Path) -> None:
    optimizer = small(beta=0.5, learning_rate=1e-2, checkpoint_every=1)
    undisturbed = [report.metrics["kl"] for report in optimizer.optimize(make_policy(), EXAMPLES, even, RunInfo())]
    first = optimizer.optimize(make_policy(), EXAMPLES, even, RunInfo(work=tmp_path))
    next(first)
    next(first)  # asking for the second step saves the first
    first.close()  # type: ignore[attr-defined]

    continued = {
        r.step: r.metrics["kl"] for r in optimizer.optimize(make_policy(), EXAMPLES, even, RunInfo(work=tmp_path))
    }

    assert undisturbed[0] == pytest.approx(0.0, abs=1e-6)
    assert undisturbed[1] > 1e-4
    assert continued == {2: undisturbed[1], 3: undisturbed[2]}


def test_stops_where_it_is_told_to_and_leaves_the_model_as_it_was() -> None:
    policy = make_policy()
    forward, pad, source = policy.model.forward, policy.model.config.pad_token_id, policy.model.config.name_or_path
    steps = small(beta=0.1).optimize(policy, EXAMPLES, even, RunInfo())
    next(steps)
    held = weights(policy)
    steps.close()  # type: ignore[attr-defined]

    assert all(torch.equal(held[name], tensor) for name, tensor in weights(policy).items())
    assert policy.model.forward == forward
    assert (policy.model.config.pad_token_id, policy.model.config.name_or_path) == (pad, source)


def test_the_trainer_stands_still_while_a_report_is_looked_at() -> None:
    """What a gate or a watch saves at a report is the policy of that step."""
    import time

    policy = make_policy()
    steps = small(learning_rate=1e-2).optimize(policy, EXAMPLES, even, RunInfo())
    for _ in range(2):
        next(steps)
        held = weights(policy)
        time.sleep(0.5)
        assert all(torch.equal(held[name], tensor) for name, tensor in weights(policy).items())


def test_what_breaks_inside_comes_out() -> None:
    def broken(rollouts: Sequence[Rollout]) -> list[Outcome]:
        raise KeyError("no such item")

    def failed(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Failed("the judge is away")] * len(rollouts)

    with pytest.raises(KeyError, match="no such item"):
        list(small().optimize(make_policy(), EXAMPLES, broken, RunInfo()))
    with pytest.raises(RunFailed, match="the judge is away"):
        list(small().optimize(make_policy(), EXAMPLES, failed, RunInfo()))


def test_every_field_of_grpo_is_set(tmp_path: Path) -> None:
    """What GRPOConfig has beyond TrainingArguments is set, but for what another field has turned off."""
    own: set[str] = set()
    for base in GRPOConfig.__mro__:
        if base.__module__.startswith("trl."):
            own |= set(getattr(base, "__annotations__", {}))
    fields = trainer_fields(TrlConfig(), RunInfo(), 3, tmp_path)
    idle = re.compile(
        r"vllm_|sapo_|vespo_|entropy_(coef_|target)|ref_model_|log_completions_hub|num_completions_to_print"
        r"|log_unique|transformers_continuous_batching_config|use_transformers_paged|_VALID|lr_scheduler_kwargs"
        r"|torch_empty_cache|gradient_checkpointing"
    )

    assert {name for name in own - set(fields) if not idle.match(name)} == set()
    assert set(fields) <= {each.name for each in dataclasses.fields(GRPOConfig)}


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="groups_per_pass is 3, no divisor of prompts_per_step"):
        TrlConfig(prompts_per_step=8, groups_per_pass=3)


def test_imports_only_what_is_public_and_nothing_heavy_to_register() -> None:
    check_imports("rerankkit_trl", "torch", "numpy", "trl", "transformers")
