"""Reinforcement: the optimizer improves the fine-tuned policy under the reward (GR2, stage 3b)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rerankkit import processes
from rerankkit.config import Lora
from rerankkit.errors import RunFailed
from rerankkit.protocols import PolicyOptimizer, RewardFn
from rerankkit.stages.rewards import combine
from rerankkit.stages.training import adapting
from rerankkit.stages.watch import Alarm, Watcher, measure, watch_facts
from rerankkit.stages.wording import plain
from rerankkit.store import STOPPED_RL, link_tree, read_metrics, write_json, write_text
from rerankkit.types import Reward, RunInfo, StepReport

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.lm import Policy
    from rerankkit.stages.sids import SidMap
    from rerankkit.store import RunFolder


@dataclass(frozen=True)
class Reinforced:
    """RL's policy at its end, and those that were kept on the way."""

    policy: Policy
    kept: Path | None = None
    """A folder of `step-NNNNN` folders, each a saved policy."""

    def save(self, folder: Path) -> None:
        """The policy, and the others in `kept/`."""
        self.policy.save(folder)
        if self.kept is not None and self.kept.is_dir():
            link_tree(self.kept, folder / "kept", leave_out=("*.tmp",))


def _log(report: StepReport, info: RunInfo) -> None:
    info.log({"step": report.step, **report.metrics, **measure(report)})


def reinforce(
    optimizer: PolicyOptimizer,
    rewards: Sequence[tuple[float, str, RewardFn]],
    dataset: Dataset,
    sids: SidMap,
    lists: CandidateLists,
    policy: Policy,
    lora: Lora | None = None,
    keep_every: int = 0,
    *,
    info: RunInfo,
    watch: Callable[[StepReport, RunInfo], None] = _log,
) -> Reinforced:
    """Run the optimizer over the training lists that hold their target; every step goes to `watch`, which logs it.

    `rewards` are (weight, name, reward); the optimizer sees their weighted sum. Every process runs the whole loop: an
    optimizer that does not share its work does the same steps in each. Every `keep_every` steps the policy is kept as
    it is; the last step's is what the stage returns.
    """
    kept = info.work / "kept" if info.work and keep_every else None
    last = 0
    examples = lists.examples(sids.attach(dataset.items), "train", only_with_target=True)
    if not examples:
        raise RunFailed(
            "optimizer: no training list holds its target; raise candidates.size or candidates.earlier_steps, or "
            "choose another pre-ranker."
        )
    with adapting(policy, lora, info):
        for report in optimizer.optimize(policy, examples, combine(rewards), info):
            watch(report, info)
            last = report.step
            if kept is not None and last % keep_every == 0:
                _keep(policy, kept / f"step-{last:05d}")
    if kept is not None and processes.is_main():
        shutil.rmtree(kept / f"step-{last:05d}", ignore_errors=True)
    return Reinforced(policy, kept)


def _keep(policy: Policy, folder: Path) -> None:
    from rerankkit.lm import save_snapshot

    aside = folder.with_suffix(".tmp")
    if processes.is_main():
        for leftover in (aside, folder):  # of a run that was killed after this step, and does it again
            shutil.rmtree(leftover, ignore_errors=True)
    save_snapshot(policy, aside)
    if processes.is_main():
        aside.rename(folder)


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


def watching(reinforce: Callable[..., Reinforced], folder: RunFolder) -> Callable[..., Reinforced]:
    """`reinforce` under the watch: the main process logs, saves each step's rollouts and tells plugins' hooks.

    A rule that fires is told at once; one that stops the run leaves `watch.json` and `watch.html` in the run folder.
    """
    settings = folder.config.watch
    watchers: list[Watcher] = []

    def look(report: StepReport, info: RunInfo) -> None:
        if not watchers:  # what a killed run did from here on is done again, and the watch must not count it twice
            watchers.append(Watcher.begin(settings, folder.path, report.step))
        report = replace(report, metrics={**report.metrics, **watchers[0].measure(report)})
        record = {"step": report.step, **report.metrics}
        info.log(record)
        save_completions(folder.path / "completions", report)
        if folder.hooks is not None:
            folder.hooks.rerankkit_step(stage="rl", report=report)
        alarms = watchers[0].look(record)
        for alarm in alarms:
            folder.warn("rl", f"step {alarm.step}: {alarm.sentence} ({alarm.rule})")
        if fatal := [alarm for alarm in alarms if alarm.action == "stop"]:
            _stop(folder, fatal)

    def watch(report: StepReport, info: RunInfo) -> None:
        # The main process decides for all: one that stops alone would leave the others waiting.
        processes.decide(lambda: look(report, info))

    return partial(reinforce, watch=watch)


def _stop(folder: RunFolder, fatal: Sequence[Alarm]) -> None:
    """End the run with what the watch saw, on a page and as JSON."""
    from rerankkit.stages.render import render_watch

    metrics = read_metrics(folder.path)
    facts = plain(watch_facts(metrics, folder.config.watch))
    data, page = (folder.path / name for name in STOPPED_RL)
    write_json(data, facts)
    write_text(page, render_watch(facts, metrics))
    said = "; ".join(f"{alarm.sentence} (watch.rules.{alarm.rule})" for alarm in fatal)
    raise RunFailed(
        f"watch: reinforcement was stopped at step {fatal[0].step}: {said}. What led there is in {page} and "
        f"completions/. To go on all the same, set watch.rules.{fatal[0].rule}=warn; to begin again, change the "
        "optimizer or the reward."
    )
