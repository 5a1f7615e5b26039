"""GRPO on rationales: each is judged by the beams that follow it, and only its own tokens are trained."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

import torch
from rerankkit import (
    Failed,
    Outcome,
    Parse,
    RerankExample,
    Reward,
    RewardFn,
    Rollout,
    RunFailed,
    RunInfo,
    Sid,
    StepReport,
)
from rerankkit.lm import (
    Policy,
    SidTrie,
    TokenLogps,
    beam_sids,
    build_trie,
    group_logps,
    load_checkpoint,
    passes,
    save_checkpoint,
)
from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import PRESETS, mean_stats, policy_loss
from rerankkit.math.metrics import kendall_tau
from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import CLOSING, HEAD, OPENING, SEPARATOR, clean_reasoning
from torch import Tensor

from rerankkit_onerec_think.parts import OptimizerConfig
from rerankkit_onerec_think.thoughts import Thought, best_first, rerank_prompts, scores_after, think


@dataclass(frozen=True)
class RationaleOptimizer:
    """A PolicyOptimizer whose reward is a function of the rationale alone: the items after it are not sampled."""

    config: OptimizerConfig

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        """Yields a report a step. Everything drawn in a step depends on (seed, step): a continued run ends the same."""
        c = self.config
        reference = _frozen(policy) if c.kl else None
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        folder = info.work / "checkpoint" if info.work else None
        found = load_checkpoint(folder, policy, optimizer) if folder else None
        done = found[0] if found else 0
        trie = build_trie(_sids(examples), policy) if c.beams_over == "catalogue" else None
        for step in info.progress(range(done + 1, c.steps + 1), total=c.steps - done, what="reinforcing rationales"):
            dice = random.Random(f"{info.seed} onerec-think {step}")
            chosen = dice.sample(list(examples), min(c.prompts_per_step, len(examples)))
            rollouts = self._roll_out(policy, chosen, trie, info, step)
            outcomes = tuple(reward(rollouts))
            learned = self._learn(policy, reference, optimizer, rollouts, outcomes, info)
            yield StepReport(step, {**_described(rollouts, outcomes), **learned}, tuple(rollouts), outcomes)
            if folder and step % c.checkpoint_every == 0 and step < c.steps:
                save_checkpoint(folder, step, policy, optimizer, {})
        policy.model.eval()

    def _roll_out(
        self, policy: Policy, examples: Sequence[RerankExample], trie: SidTrie | None, info: RunInfo, step: int
    ) -> list[Rollout]:
        """Rationales, and after each the items that its beams hold; group after group."""
        c = self.config
        prompts = rerank_prompts(policy, examples)
        thoughts = think(
            policy,
            examples,
            prompts,
            c.group_size,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            info=info,
            salt=f"step {step}",
        )
        rows = [(g, example, thought) for g, example in enumerate(examples) for thought in thoughts[g]]
        beams: list[list[Sid]]
        if trie is None:
            beginnings = [[thought.token_ids] for _, _, thought in rows]
            every = scores_after(policy, [example for _, example, _ in rows], beginnings, "max")
            beams = [
                [example.candidates[i].sid for i in best_first(scores)]
                for (_, example, _), scores in zip(rows, every, strict=True)
            ]
        else:
            asks = [[*prompts[g], *thought.token_ids] for g, _, thought in rows]
            beams = [[sid for sid, _ in found] for found in beam_sids(policy, asks, trie, c.num_beams)]
        return [_rollout(policy, example, t, sids, g) for (g, example, t), sids in zip(rows, beams, strict=True)]

    def _learn(
        self,
        policy: Policy,
        reference: Policy | None,
        optimizer: torch.optim.Optimizer,
        rollouts: Sequence[Rollout],
        outcomes: Sequence[Outcome],
        info: RunInfo,
    ) -> dict[str, float]:
        """Optimizer steps on one batch: GRPO's clipped loss, and a penalty for leaving the reference."""
        c = self.config
        if all(isinstance(outcome, Failed) for outcome in outcomes):
            raise RunFailed(f"reward: no rollout of a step could be judged; first reason: {outcomes[0]}")
        shape = len(rollouts) // c.group_size, c.group_size
        values = torch.tensor([o.value if isinstance(o, Reward) else 0.0 for o in outcomes]).view(shape)
        keep = torch.tensor([isinstance(outcome, Reward) for outcome in outcomes]).view(shape)
        advantages, has_signal = group_advantages(values, keep, "zscore")
        keep &= has_signal[:, None]
        num_groups = float(has_signal.sum())
        if not num_groups:
            # nothing to learn: no pass tells the entropy, but what was sampled does
            chosen = sum(ids is None or len(ids) > 1 for rollout in rollouts for ids in rollout.allowed_ids)
            entropy = -sum(logp for rollout in rollouts for logp in rollout.logps) / max(1, chosen)
            return {"loss": 0.0, "grad_norm": 0.0, "entropy": entropy, "num_groups": 0.0}
        groups = [rollouts[i : i + c.group_size] for i in range(0, len(rollouts), c.group_size)]
        prompts = rerank_prompts(policy, [group[0].example for group in groups])
        sizes = [len(p) + sum(len(r.token_ids) for r in g) for p, g in zip(prompts, groups, strict=True)]
        logs: list[dict[str, float]] = []
        policy.model.train()
        for _ in range(c.updates_per_batch):
            parts = []
            for some in passes(sizes, info.tokens_per_pass):
                asked, said = [prompts[i] for i in some], [groups[i] for i in some]
                kept, share = keep[some].flatten(), advantages[some].flatten()
                loss, stats = self._loss(policy, reference, asked, said, share, kept, float(keep.sum()), info)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                parts.append(stats)
            norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), c.max_grad_norm))
            if not math.isfinite(norm):
                raise RunFailed(
                    f"optimizer: the gradient is {norm}; lower optimizer.learning_rate ({c.learning_rate})."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            logs.append({**mean_stats(parts), "loss": sum(part["loss"] for part in parts), "grad_norm": norm})
        policy.model.eval()
        means = {name: fmean(log[name] for log in logs) for name in _LEARNED}
        # Only before the first update are sampler and trainer the same policy.
        return {**means, "logp_gap": logs[0]["logp_gap"], "num_groups": num_groups}

    def _loss(
        self,
        policy: Policy,
        reference: Policy | None,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Rollout]],
        advantages: Tensor,
        keep: Tensor,
        num_kept: float,
        info: RunInfo,
    ) -> tuple[Tensor, dict[str, float]]:
        """Of one pass: advantages and keep [N], over the batch's `num_kept` rollouts (2402.03300, eq. 3 and 4)."""
        c, device = self.config, policy.device
        advantages, keep = advantages.to(device), keep.to(device)

        def logps_of(one: Policy) -> TokenLogps:
            return group_logps(
                one,
                prompts,
                [[rollout.token_ids for rollout in group] for group in groups],
                temperature=c.temperature,
                entropies=True,
                autocast=torch.bfloat16 if info.precision == "bfloat16" else None,
                allowed=[[rollout.allowed_ids for rollout in group] for group in groups],
            )

        tokens = logps_of(policy)
        free = tokens.weights > 0  # the JSON around a rationale was no choice
        logps, rows = tokens.logps[free], tokens.sequence_ids[free]
        old = torch.tensor([logp for group in groups for r in group for logp in r.logps], device=device)[free]
        settings = replace(PRESETS["grpo"], clip_low=c.clip, clip_high=c.clip)
        loss, stats = policy_loss(logps, old, rows, advantages, settings, keep=keep, denominator=num_kept)
        kl = torch.zeros_like(logps)
        if reference is not None:
            with torch.no_grad():
                known = logps_of(reference).logps[free]
            kl = torch.expm1(known - logps) - (known - logps)
            lengths = torch.bincount(rows, minlength=len(keep))
            loss = loss + c.kl * (kl / lengths[rows])[keep[rows]].sum() / num_kept
        entropies = kl if tokens.entropies is None else tokens.entropies[free]
        logged = {"kl": kl, "entropy": entropies, "logp_gap": (logps - old).abs()}
        return loss, {**stats, "loss": loss.item(), **{name: _mean(value) for name, value in logged.items()}}


_LEARNED = (
    "loss", "grad_norm", "kl", "entropy", "logp_gap", "ratio_mean", "clip_ratio/low_mean", "clip_ratio/high_mean",
)  # fmt: skip
"""What is logged of an update. Means are over tokens."""


def _mean(values: Tensor) -> float:
    return float(values.detach().mean()) if len(values) else 0.0


def _frozen(policy: Policy) -> Policy:
    """A copy that stays as the policy is now."""
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    return Policy(
        model,
        policy.text_tokenizer,
        style=policy.style,
        surface=policy.surface,
        codebook_sizes=policy.codebook_sizes,
    )


def _sids(examples: Sequence[RerankExample]) -> list[Sid]:
    """Of every item that the lists and their histories hold."""
    return sorted({item.sid for example in examples for item in (*example.history, *example.candidates)})


def _rollout(policy: Policy, example: RerankExample, thought: Thought, beams: Sequence[Sid], group: int) -> Rollout:
    """The rationale, and its beams in place of a list that was written."""
    said = clean_reasoning(thought.text, example, policy.surface)
    text = HEAD + said + OPENING + SEPARATOR.join(map(policy.surface.text, beams)) + CLOSING
    return Rollout(
        example=example,
        text=text,
        reasoning=thought.text,
        ranking=parse_answer(text, example, policy.surface).ranking,
        token_ids=thought.token_ids,
        logps=thought.logps,
        allowed_ids=thought.allowed_ids,
        num_reasoning_tokens=thought.num_reasoning_tokens,
        group=group,
    )


def _described(rollouts: Sequence[Rollout], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What the log says of a step's rollouts, under TRL's names where it has one."""
    groups: dict[int, list[float]] = {}
    parts: dict[str, list[float]] = {}
    for rollout, outcome in zip(rollouts, outcomes, strict=True):
        if isinstance(outcome, Reward):
            groups.setdefault(rollout.group, []).append(outcome.value)
            for name, value in outcome.parts.items():
                parts.setdefault(name, []).append(float(value))
    values = [value for group in groups.values() for value in group]
    return {
        "reward": fmean(values) if values else math.nan,
        "reward_std": fmean(map(pstdev, groups.values())) if groups else math.nan,
        "frac_reward_zero_std": fmean(max(v) - min(v) <= 1e-6 for v in groups.values()) if groups else math.nan,
        **{f"rewards/{name}/mean": fmean(some) for name, some in sorted(parts.items())},
        "rewards/failed": fmean(isinstance(outcome, Failed) for outcome in outcomes),
        "completions/mean_length": fmean(len(rollout.token_ids) for rollout in rollouts),
        "completions/clipped_ratio": fmean(rollout.truncated for rollout in rollouts),
        "identity_rate": fmean(r.ranking.identity and r.ranking.parse is not Parse.FAILED for r in rollouts),
        "kendall_tau": fmean(kendall_tau(rollout.ranking.order) for rollout in rollouts),
    }
