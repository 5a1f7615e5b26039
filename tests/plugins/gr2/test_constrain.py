"""DAPO under the permutation mask: every answer is readable, and forced tokens are no part of what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch

from rerankkit.lm import groups
from rerankkit.math.losses import PRESETS, loss_denominator, policy_loss
from rerankkit.testing import make_example, make_policy
from rerankkit.types import Parse, Reward, Rollout, RunInfo
from rerankkit_gr2.dapo import GroupOptimizer
from rerankkit_gr2.settings import DapoConfig


def first(rollouts: Sequence[Rollout]) -> list[Reward]:
    return [Reward(float(rollout.ranking.order[0])) for rollout in rollouts]


@pytest.mark.parametrize("constrain", [True, False])
def test_a_step_counts_what_was_chosen(constrain: bool) -> None:
    config = DapoConfig(
        steps=1, prompts_per_step=2, group_size=4, max_new_tokens=100, temperature=0.7, dynamic_sampling=False,
        overlong_filtering=False, constrain=constrain,
    )  # fmt: skip
    with (
        patch.object(groups, "loss_denominator", wraps=loss_denominator) as denominator,
        patch.object(groups, "policy_loss", wraps=policy_loss) as loss,
    ):
        examples = [make_example(example_id="a"), make_example(example_id="b")]
        reward = first if constrain else (lambda rollouts: [Reward(float(i)) for i in range(len(rollouts))])
        (report,) = GroupOptimizer(config, PRESETS["dapo"]).optimize(make_policy(), examples, reward, RunInfo())

    counted = [sum(ids is None or len(ids) > 1 for ids in r.allowed_ids) for r in report.rollouts]
    lengths = counted if constrain else [len(rollout.token_ids) for rollout in report.rollouts]
    assert sorted(denominator.call_args.args[0]) == sorted(lengths)
    logps, old, sequence_ids = loss.call_args.args[:3]
    assert len(logps) == len(old) == sum(lengths)
    assert sorted(torch.bincount(sequence_ids).tolist()) == sorted(lengths)
    assert report.metrics["logp_gap"] < 1e-5 and report.metrics["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert {rollout.ranking.parse is Parse.OK for rollout in report.rollouts} == {constrain}
    if constrain:
        assert all(n < len(r.token_ids) for n, r in zip(counted, report.rollouts, strict=True))
        assert not any(rollout.truncated for rollout in report.rollouts) and (logps < 0).all()
