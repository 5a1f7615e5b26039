from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from rerankkit import RunInfo, load_plugins
from rerankkit.lm import Policy
from rerankkit.protocols import PolicyOptimizer, RewardFn
from rerankkit.testing import check_optimizer, make_example, make_policy
from rerankkit.types import RerankExample, StepReport


def test_the_tiny_policy_reads_and_writes_made_sids() -> None:
    policy = make_policy()
    item = make_example().candidates[3]

    ids = policy.encode(policy.surface.text(item.sid))

    assert len(ids) == 5  # begin, three codes, end
    assert policy.decode(ids) == policy.surface.text(item.sid)


def dapo(**settings: object) -> PolicyOptimizer:
    spec = load_plugins().part("optimizer", "dapo", "here")
    few = {"steps": 3, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 90, "checkpoint_every": 1}
    built: PolicyOptimizer = spec.build(
        spec.config(**{**few, "overlong_filtering": False, "dynamic_sampling": False, **settings}), RunInfo()
    )
    return built


def test_dapo_passes() -> None:
    check_optimizer(dapo())


def test_too_few_steps_to_try_continuing_are_named() -> None:
    with pytest.raises(AssertionError, match="GroupOptimizer: took 2 steps; build it with more than stop_after=2"):
        check_optimizer(dapo(steps=2))


@dataclass
class Drifting:
    """Adds to one weight each step; `spoil` breaks one rule."""

    spoil: str = ""

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        place = info.work / "step" if info.work and self.spoil != "forgets" else None
        done = int(place.read_text()) if place and place.exists() else 0
        weight = next(policy.model.parameters())
        with torch.no_grad():
            if self.spoil != "lazy":
                weight.fill_(float(done))
            for step in range(done + 1, 4):
                if self.spoil == "forgets" and info.work:
                    weight -= 1.0
                if self.spoil != "lazy":
                    weight += 1.0 if self.spoil != "breaks" else float("nan")
                if place:
                    place.write_text(str(step))
                report = StepReport(step if self.spoil != "skips" else 2 * step, {"loss": 0.0})
                yield replace(report, outcomes=tuple(reward([]))) if self.spoil != "lists" else _unaligned(report)


def _unaligned(report: StepReport) -> StepReport:
    from rerankkit.types import Reward

    return replace(report, outcomes=(Reward(1.0),))


def test_an_honest_optimizer_passes() -> None:
    check_optimizer(Drifting())


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        ("forgets", "stopped after step 2 and continued, it ends with other weights"),
        ("lazy", "the policy's weights did not change"),
        ("breaks", "weights are not finite at the end"),
        ("skips", r"steps are \[2, 4, 6\]; they count up from 1"),
        ("lists", "step 1 reports 0 rollouts and 1 outcomes"),
    ],
)
def test_a_broken_optimizer_is_told_what_is_wrong(spoil: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=f"Drifting: {fault}"):
        check_optimizer(Drifting(spoil))
