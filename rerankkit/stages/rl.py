"""Reinforcement: the optimizer improves the fine-tuned policy under the reward (GR2, stage 3b)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rerankkit import processes
from rerankkit.config import Lora
from rerankkit.errors import RunFailed
from rerankkit.protocols import PolicyOptimizer, RewardFn
from rerankkit.stages.rewards import combine
from rerankkit.stages.training import adapting
from rerankkit.types import Reward, RunInfo, StepReport

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.lm import Policy
    from rerankkit.stages.sids import SidMap
    from rerankkit.store import RunFolder


def reinforce(
    optimizer: PolicyOptimizer,
    rewards: Sequence[tuple[float, str, RewardFn]],
    dataset: Dataset,
    sids: SidMap,
    lists: CandidateLists,
    policy: Policy,
    lora: Lora | None = None,
    *,
    info: RunInfo,
    watch: Callable[[StepReport], None] = lambda report: None,
) -> Policy:
    """Run the optimizer over the training lists that hold their target; every step goes to `watch`.

    `rewards` are (weight, name, reward); the optimizer sees their weighted sum. Every process runs the whole loop: an
    optimizer that does not share its work does the same steps in each.
    """
    examples = lists.examples(sids.attach(dataset.items), "train", only_with_target=True)
    if not examples:
        raise RunFailed(
            "optimizer: no training list holds its target; raise candidates.size or candidates.earlier_steps, or "
            "choose another pre-ranker."
        )
    with adapting(policy, lora, info):
        for report in optimizer.optimize(policy, examples, combine(rewards), info):
            info.log({"step": report.step, **report.metrics})
            watch(report)
    return policy


def save_completions(folder: Path, report: StepReport) -> None:
    """What the policy said in a step and how it was judged: `completions/step-00017.parquet`, one row a rollout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not report.rollouts:
        return
    rows = [
        {
            "step": report.step,
            "group": rollout.group,
            "example_id": rollout.example.example_id,
            "text": rollout.text,
            "reasoning": rollout.reasoning,
            "order": list(rollout.ranking.order),
            "parse": str(rollout.ranking.parse),
            "num_tokens": len(rollout.token_ids),
            "truncated": rollout.truncated,
            "reward": outcome.value if isinstance(outcome, Reward) else None,
            "why_none": "" if isinstance(outcome, Reward) else outcome.reason,
        }
        for rollout, outcome in zip(report.rollouts, report.outcomes, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    aside = folder / f"step-{report.step:05d}.parquet.tmp"
    pq.write_table(pa.Table.from_pylist(rows), aside)
    aside.replace(folder / f"step-{report.step:05d}.parquet")


def watching(reinforce: Callable[..., Policy], folder: RunFolder) -> Callable[..., Policy]:
    """`reinforce`; the main process also saves each step's rollouts in the run folder and tells the plugins' hooks."""

    def watch(report: StepReport) -> None:
        if not processes.is_main():
            return
        save_completions(folder.path / "completions", report)
        if folder.hooks is not None:
            folder.hooks.rerankkit_step(stage="rl", report=report)

    return partial(reinforce, watch=watch)
