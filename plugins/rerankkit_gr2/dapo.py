"""Group-based reinforcement: one loop, of which DAPO, GRPO, Dr. GRPO, GSPO and CISPO are settings."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from rerankkit.errors import RunFailed, did_you_mean
from rerankkit.lm import (
    Policy,
    Reference,
    Work,
    adamw,
    group_work,
    judged_rollouts,
    metered,
    needed_flops,
    prompt_of,
    reference_of,
    resumable_steps,
    sharded,
    update_on_groups,
)
from rerankkit.math.advantages import SAME, group_advantages, pass_at_k_bonus
from rerankkit.math.losses import LossSettings, overlong_penalty
from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, Outcome, RerankExample, Reward, Rollout, RunInfo, StepReport
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
        """Yields a report a step. Everything drawn in a step depends on (seed, step): a continued run ends the same.

        The reference of the KL term is the policy as it is handed over, which is where a continued run begins, too.
        """
        with reference_of(policy) if self.config.kl_weight else nullcontext() as reference, sharded(policy):
            yield from self._steps(policy, reference, examples, reward, info)
        policy.model.eval()

    def _steps(
        self,
        policy: Policy,
        reference: Reference | None,
        examples: Sequence[RerankExample],
        reward: RewardFn,
        info: RunInfo,
    ) -> Iterator[StepReport]:
        config = self.config
        optimizer = adamw(policy, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        for step in resumable_steps(
            policy,
            optimizer,
            config.steps,
            info,
            what="reinforcing",
            checkpoint_every=config.checkpoint_every,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
        ):
            with metered() as meter:
                groups, every = self._collect(policy, examples, reward, info, step)
                prompts = {rollout.group: rollout for rollout, _ in every}
                prompt_ids = {
                    group: prompt_of(policy, rollout.example, rollout.shown) for group, rollout in prompts.items()
                }
                learned = self._learn(policy, reference, optimizer, groups, every, prompt_ids, info)
                spent = [(_grouped(every, config.group_size), False)]
                if learned["num_updates"]:
                    spent += [(groups, True), *([(groups, False)] if reference else [])]
                for some, training in spent:
                    works = (_work(group, prompt_ids) for group in some)
                    meter.flops += sum(needed_flops(policy, work, training=training) for work in works)
            sampled = sum(len(rollout.token_ids) for rollout, _ in every)
            metrics = {
                **self._without_variance(_grouped(every, config.group_size)),
                **learned,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "num_groups": float(len(groups)),
                **meter.metrics(sampled),
            }
            yield StepReport(step, metrics, tuple(r for r, _ in every), tuple(o for _, o in every))

    def _collect(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo, step: int
    ) -> tuple[list[Group], list[Judged]]:
        """Groups to learn from, and everything that was sampled on the way.

        Dynamic sampling (DAPO, 2503.14476, section 3.2): groups whose rewards are all alike, before any penalty for
        length, are replaced by groups of fresh prompts, at most `max_resampling` times; then the step makes do with
        what there is.
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
                shuffle=config.shuffle_candidates,
            )
            every += judged
            fresh = _grouped(judged, config.group_size)
            groups += [group for group in fresh if not config.dynamic_sampling or self._varies(group)]
            if not config.dynamic_sampling:
                break
        self._check_outcomes([outcome for _, outcome in every], step)
        return groups, every

    def _learn(
        self,
        policy: Policy,
        reference: Reference | None,
        optimizer: torch.optim.Optimizer,
        groups: list[Group],
        every: list[Judged],
        prompt_ids: Mapping[int, list[int]],
        info: RunInfo,
    ) -> dict[str, float]:
        """Optimizer steps on the groups, `updates_per_batch` of them, each on its share; what to log about them.

        Where there is nothing to learn from, that is told of `every` rollout.
        """
        config = self.config
        rewards = torch.tensor([[self._shaped(*judged) for judged in group] for group in groups])
        keep = torch.tensor([[self._counts(*judged) for judged in group] for group in groups], dtype=torch.bool)
        if groups:
            values, has_signal = group_advantages(rewards, keep, self.loss.advantage)
            keep &= has_signal[:, None]
            if config.pass_at_k:
                values = values + config.pass_at_k_weight * pass_at_k_bonus(values, config.pass_at_k, keep)
        if not keep.any():
            groups = _grouped(every, config.group_size)
            values = torch.zeros(len(groups), config.group_size)
            keep = values > 0
        return update_on_groups(
            policy,
            optimizer,
            [[rollout for rollout, _ in group] for group in groups],
            [prompt_ids[group[0][0].group] for group in groups],
            values,
            keep,
            self.loss,
            info=info,
            updates=[range(i, len(groups), config.updates_per_batch) for i in range(config.updates_per_batch)],
            reference=reference,
            temperature=config.temperature,
            max_grad_norm=config.max_grad_norm,
            # Within a nucleus the sampler's probabilities are larger, by up to 1 / top_p.
            max_logp_gap=(config.max_logp_gap or math.inf) - math.log(config.top_p),
            groups_per_pass=config.groups_per_pass,
        )

    def _check_outcomes(self, outcomes: Sequence[Outcome], step: int) -> None:
        """Stop where too much could not be judged, or where the part to filter on is not there."""
        failed = [outcome.reason for outcome in outcomes if isinstance(outcome, Failed)]
        if len(failed) / len(outcomes) > self.config.max_failed:
            raise RunFailed(
                f"reward: {len(failed)} of the {len(outcomes)} rollouts of step {step} could not be judged, more than "
                f"optimizer.max_failed = {self.config.max_failed:g} allows; first reason: {failed[0]}. Mend the "
                "reward, or raise optimizer.max_failed."
            )
        parts = {name for outcome in outcomes if isinstance(outcome, Reward) for name in outcome.parts}
        if self.config.filter_on and parts and self.config.filter_on not in parts:
            name = self.config.filter_on
            raise RunFailed(f"optimizer.filter_on: {name!r} is no part of the reward; {did_you_mean(name, parts)}")

    def _shaped(self, rollout: Rollout, outcome: Outcome) -> float:
        """The reward that advantages are made of: the judged value, less the soft penalty for length."""
        if not isinstance(outcome, Reward):
            return 0.0  # left out by `keep`
        limit = self.config.max_new_tokens
        return outcome.value + overlong_penalty(len(rollout.token_ids), limit, self.config.overlong_buffer)

    def _raw(self, group: Group) -> list[float]:
        """What the rollouts that count were judged to be worth, before any penalty for length."""
        name = self.config.filter_on
        rewards = [o for r, o in group if isinstance(o, Reward) and self._counts(r, o)]
        return [o.parts[name] if name else o.value for o in rewards if not name or name in o.parts]

    def _varies(self, group: Group) -> bool:
        """Whether these differ: whether there is something to be learnt from the group."""
        values = self._raw(group)
        return len(values) > 1 and max(values) - min(values) > SAME

    def _without_variance(self, groups: Sequence[Group]) -> dict[str, float]:
        """The share of groups that do not vary, and why: `frac_zero_std/*` add up to `frac_reward_zero_std`.

        Best and worst are those of the step; with a single value in all of it, nobody can say which it is.
        """
        raw = [self._raw(group) for group in groups]
        best, worst = (pick((value for values in raw for value in values), default=0.0) for pick in (max, min))
        why = dict.fromkeys(("all_best", "all_worst", "all_same", "unjudged"), 0)
        for group, values in zip(groups, raw, strict=True):
            if self._varies(group):
                continue
            ends = [("all_best", best), ("all_worst", worst)] if best - worst > SAME else []
            reasons = [name for name, end in ends if values and abs(values[0] - end) <= SAME]
            why["unjudged" if len(values) < 2 else reasons[0] if reasons else "all_same"] += 1
        shares = {f"frac_zero_std/{name}": number / len(groups) for name, number in why.items()}
        return {"frac_reward_zero_std": sum(why.values()) / len(groups), **shares}

    def _counts(self, rollout: Rollout, outcome: Outcome) -> bool:
        """Whether a rollout takes part: judged, and not cut off (overlong filtering)."""
        return isinstance(outcome, Reward) and not (rollout.truncated and self.config.overlong_filtering)


def _grouped(judged: Sequence[Judged], size: int) -> list[Group]:
    return [list(judged[i : i + size]) for i in range(0, len(judged), size)]


def _work(group: Group, prompt_ids: Mapping[int, list[int]]) -> Work:
    return group_work(len(prompt_ids[group[0][0].group]), [rollout.num_chosen for rollout, _ in group])
