"""Group-based reinforcement: one loop, of which DAPO, GRPO, Dr. GRPO, GSPO and CISPO are settings."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

import torch

from rerankkit import processes
from rerankkit.errors import RunFailed
from rerankkit.lm import (
    Policy,
    Work,
    accumulate,
    adamw,
    apply_gradients,
    group_logps,
    group_work,
    judged_rollouts,
    load_checkpoint,
    metered,
    needed_flops,
    passes,
    save_checkpoint,
    sharded,
)
from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import LossSettings, loss_denominator, mean_stats, overlong_penalty, policy_loss
from rerankkit.math.metrics import kendall_tau
from rerankkit.math.schedules import learning_rate_at
from rerankkit.protocols import RewardFn
from rerankkit.text.prompts import rerank_messages
from rerankkit.types import Failed, Outcome, Parse, RerankExample, Reward, Rollout, RunInfo, StepReport
from rerankkit_gr2.settings import GroupConfig

Judged = tuple[Rollout, Outcome]
Group = list[Judged]


@dataclass(frozen=True)
class GroupOptimizer:
    """A PolicyOptimizer that compares the rollouts of one prompt with one another."""

    config: GroupConfig
    loss: LossSettings

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        """Yields a report a step. Everything drawn in a step depends on (seed, step): a continued run ends the same."""
        with sharded(policy):
            yield from self._steps(policy, examples, reward, info)
        policy.model.eval()

    def _steps(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        config = self.config
        optimizer = adamw(policy, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        folder = info.work / "checkpoint" if info.work else None
        found = load_checkpoint(folder, policy, optimizer) if folder else None
        done = found[0] if found else 0
        for step in info.progress(range(done + 1, config.steps + 1), total=config.steps - done, what="reinforcing"):
            with metered() as meter:
                groups, every = self._collect(policy, examples, reward, info, step)
                for slot in optimizer.param_groups:
                    slot["lr"] = learning_rate_at(
                        step, config.steps, config.learning_rate, config.warmup_steps, config.schedule
                    )
                prompts = {rollout.group: rollout for rollout, _ in every}
                prompt_ids = {group: _prompt_ids(policy, rollout) for group, rollout in prompts.items()}
                learned = self._learn(policy, optimizer, groups, prompt_ids, info, step)
                for some, training in ((_grouped(every, config.group_size), False), (groups, True)):
                    if not training or "num_updates" in learned:
                        works = (_work(group, prompt_ids) for group in some)
                        meter.flops += sum(needed_flops(policy, work, training=training) for work in works)
            sampled = sum(len(rollout.token_ids) for rollout, _ in every)
            metrics = {**_describe(every), **learned, "num_groups": float(len(groups)), **meter.metrics(sampled)}
            yield StepReport(step, metrics, tuple(r for r, _ in every), tuple(o for _, o in every))
            # After the report: a step that the checkpoint counts as done has been logged.
            if folder and step % config.checkpoint_every == 0 and step < config.steps:
                save_checkpoint(folder, step, policy, optimizer, {})

    def _collect(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo, step: int
    ) -> tuple[list[Group], list[Judged]]:
        """Groups to learn from, and everything that was sampled on the way.

        Dynamic sampling (DAPO, 2503.14476, section 3.2): groups whose rewards are all alike are replaced by groups of
        fresh prompts, at most `max_resampling` times; then the step makes do with what there is.
        """
        config = self.config
        queue = list(examples)
        random.Random(f"{info.seed} reinforce {step}").shuffle(queue)
        groups: list[Group] = []
        every: list[Judged] = []
        for _ in range(config.max_resampling + 1):
            wanted = min(config.prompts_per_step - len(groups), len(queue))
            if wanted <= 0:
                break
            chosen, queue = queue[:wanted], queue[wanted:]
            judged = judged_rollouts(
                policy,
                chosen,
                reward,
                group_size=config.group_size,
                first_group=len(every) // config.group_size,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                info=info,
                salt=f"step {step}",
                constrain=config.constrain,
            )
            every += judged
            fresh = _grouped(judged, config.group_size)
            groups += [group for group in fresh if not config.dynamic_sampling or self._varies(group)]
            if not config.dynamic_sampling:
                break
        _check_outcomes([outcome for _, outcome in every], step)
        return groups, every

    def _learn(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        groups: list[Group],
        prompt_ids: Mapping[int, list[int]],
        info: RunInfo,
        step: int,
    ) -> dict[str, float]:
        """Optimizer steps on the groups, `updates_per_batch` of them, each on its share of the groups."""
        if not groups:
            return {"loss": 0.0, "grad_norm": 0.0}
        config = self.config
        rewards = torch.tensor([[self._shaped(*judged) for judged in group] for group in groups])
        keep = torch.tensor([[self._counts(*judged) for judged in group] for group in groups])
        values, has_signal = group_advantages(rewards, keep, self.loss.advantage)
        keep &= has_signal[:, None]
        shares = [range(i, len(groups), config.updates_per_batch) for i in range(config.updates_per_batch)]
        logs: list[dict[str, float]] = []
        policy.model.train()
        for share in shares:
            if len(share) and bool(keep[list(share)].any()):
                done = self._accumulate(policy, groups, prompt_ids, values, keep, share, info)
                log = _joined(done)
                if not logs:
                    self._check_gap(log, step)
                norm = apply_gradients(policy, optimizer, config.max_grad_norm)
                if not math.isfinite(norm):
                    raise RunFailed(
                        f"optimizer: the gradient is {norm}; lower optimizer.learning_rate ({config.learning_rate})."
                    )
                logs.append({**log, "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]})
        policy.model.eval()
        if not logs:
            return {"loss": 0.0, "grad_norm": 0.0}
        means = {name: fmean(log[name] for log in logs) for name in logs[0]}
        # Only before the first update are sampler and trainer the same policy: any gap there is numerical.
        return {**means, **{k: logs[0][k] for k in ("logp_gap", "logp_gap_max")}, "num_updates": float(len(logs))}

    def _accumulate(
        self,
        policy: Policy,
        groups: list[Group],
        prompt_ids: Mapping[int, list[int]],
        advantages: torch.Tensor,
        keep: torch.Tensor,
        share: range,
        info: RunInfo,
    ) -> list[dict[str, float]]:
        """Add up the gradients of the groups `share`, over the denominator of all of them; logs of the passes.

        `advantages` and `keep` are [P, G]; `prompt_ids` has every group's prompt by its number.
        """
        config, device = self.config, policy.device
        settings = (
            replace(self.loss, constant=float(config.max_new_tokens))
            if self.loss.aggregate == "constant"
            else self.loss
        )
        lengths = [_num_chosen(rollout) for i in share for rollout, _ in groups[i]]
        denominator = loss_denominator(lengths, keep[share].flatten().tolist(), settings)

        def forward(chosen: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
            some = [[rollout for rollout, _ in groups[i]] for i in chosen]
            tokens = group_logps(
                policy,
                [prompt_ids[group[0].group] for group in some],
                [[list(rollout.token_ids) for rollout in group] for group in some],
                temperature=config.temperature,
                entropies=True,
                autocast=torch.bfloat16 if info.precision == "bfloat16" else None,
                allowed=[[rollout.allowed_ids for rollout in group] for group in some],
            )
            old = torch.tensor([logp for group in some for r in group for logp in r.logps], device=device)
            free = tokens.weights > 0  # what the mask forced was no choice: nothing to learn, nothing to count
            logps, old = tokens.logps[free], old[free]
            loss, stats = policy_loss(
                logps,
                old,
                tokens.sequence_ids[free],
                advantages[chosen].flatten().to(device),
                settings,
                keep=keep[chosen].flatten().to(device),
                denominator=denominator,
            )
            gaps = (logps.detach() - old).abs()
            return loss, {
                **stats,
                "loss": loss.item(),
                "num_chosen": float(len(gaps)),
                "entropy": 0.0 if tokens.entropies is None else tokens.entropies[free].sum().item(),
                "logp_gap": gaps.sum().item(),
                "logp_gap_max": gaps.max().item() if len(gaps) else 0.0,
            }

        own = share[processes.rank() :: processes.count()]
        sizes = [len(prompt_ids[groups[i][0][0].group]) + sum(len(r.token_ids) for r, _ in groups[i]) for i in own]
        cut = passes(sizes, info.tokens_per_pass, config.groups_per_pass)
        return accumulate(policy, [[own[i] for i in some] for some in cut], forward, idle=[share[0]])

    def _check_gap(self, log: Mapping[str, float], step: int) -> None:
        """Stop where sampler and trainer disagree about the same weights: what is learnt would be noise."""
        # Within a nucleus the sampler's probabilities are larger, by up to 1 / top_p.
        limit = self.config.max_logp_gap - math.log(self.config.top_p)
        if self.config.max_logp_gap and not log["logp_gap"] <= limit:
            raise RunFailed(
                f"optimizer: before the first update of step {step}, the log-probabilities of the sampler and of the "
                f"trainer differ by {log['logp_gap']:.3g} nats a token on average ({log['logp_gap_max']:.3g} at most), "
                f"more than {limit:.3g}. Set policy.precision to float32, or raise optimizer.max_logp_gap "
                f"({self.config.max_logp_gap}; 0 is no limit)."
            )

    def _shaped(self, rollout: Rollout, outcome: Outcome) -> float:
        """The reward that advantages are made of: the judged value, less the soft penalty for length."""
        if not isinstance(outcome, Reward):
            return 0.0  # left out by `keep`
        limit = self.config.max_new_tokens
        return outcome.value + overlong_penalty(len(rollout.token_ids), limit, self.config.overlong_buffer)

    def _varies(self, group: Group) -> bool:
        """Whether the judged values, before any shaping by length, differ among the rollouts that count."""
        values = [o.value for r, o in group if isinstance(o, Reward) and self._counts(r, o)]
        return len(values) > 1 and max(values) - min(values) > 1e-6

    def _counts(self, rollout: Rollout, outcome: Outcome) -> bool:
        """Whether a rollout takes part: judged, and not cut off (overlong filtering)."""
        return isinstance(outcome, Reward) and not (rollout.truncated and self.config.overlong_filtering)


def _grouped(judged: Sequence[Judged], size: int) -> list[Group]:
    return [list(judged[i : i + size]) for i in range(0, len(judged), size)]


def _prompt_ids(policy: Policy, rollout: Rollout) -> list[int]:
    return policy.prompt_ids(rerank_messages(rollout.example, policy.surface, policy.style))


def _work(group: Group, prompt_ids: Mapping[int, list[int]]) -> Work:
    return group_work(len(prompt_ids[group[0][0].group]), [_num_chosen(rollout) for rollout, _ in group])


def _joined(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What to log about the passes of all processes: sums, means over tokens, the largest gap."""
    means, count = mean_stats(passes), max(1.0, sum(one["num_chosen"] for one in passes))
    return {
        "loss": sum(one["loss"] for one in passes),
        **{name: sum(one[name] for one in passes) / count for name in ("entropy", "logp_gap")},
        "logp_gap_max": max(one["logp_gap_max"] for one in passes),
        "kl": means["approx_kl"],
        **{name: means[name] for name in ("ratio_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")},
    }


def _num_chosen(rollout: Rollout) -> int:
    """Tokens that the policy chose: all but those that a mask forced."""
    forced = sum(ids is not None and len(ids) == 1 for ids in rollout.allowed_ids)
    return len(rollout.token_ids) - forced


def _check_outcomes(outcomes: Sequence[Outcome], step: int) -> None:
    failed = [outcome.reason for outcome in outcomes if isinstance(outcome, Failed)]
    if failed and len(failed) == len(outcomes):
        raise RunFailed(f"reward: every rollout of step {step} could not be judged; first reason: {failed[0]}")


def _describe(judged: Sequence[Judged]) -> dict[str, float]:
    """What the log says of a step's rollouts, before any is dropped. Names as in TRL where TRL has one."""
    rollouts = [rollout for rollout, _ in judged]
    rewards = [outcome for _, outcome in judged if isinstance(outcome, Reward)]
    groups: dict[int, list[float]] = {}
    for rollout, outcome in judged:
        if isinstance(outcome, Reward):
            groups.setdefault(rollout.group, []).append(outcome.value)
    parts: dict[str, list[float]] = {}
    for outcome in rewards:
        for name, value in outcome.parts.items():
            parts.setdefault(name, []).append(value)
    count = len(rollouts)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    return {
        "reward": fmean(outcome.value for outcome in rewards) if rewards else math.nan,
        "reward_std": fmean(pstdev(values) for values in groups.values()) if groups else math.nan,
        "frac_reward_zero_std": fmean(max(v) - min(v) <= 1e-6 for v in groups.values()) if groups else math.nan,
        **{f"rewards/{name}/mean": fmean(values) for name, values in sorted(parts.items())},
        "rewards/failed": sum(isinstance(outcome, Failed) for _, outcome in judged) / count,
        "completions/mean_length": fmean(lengths),
        "completions/clipped_ratio": sum(rollout.truncated for rollout in rollouts) / count,
        "identity_rate": sum(r.ranking.identity and r.ranking.parse is not Parse.FAILED for r in rollouts) / count,
        "first_kept_rate": sum(r.ranking.order[0] == 0 for r in rollouts) / count,
        "kendall_tau": fmean(kendall_tau(r.ranking.order) for r in rollouts),
        "invalid_rate": sum(r.ranking.parse is not Parse.OK for r in rollouts) / count,
    }
