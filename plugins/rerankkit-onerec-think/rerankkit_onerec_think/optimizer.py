"""GRPO on rationales: each is judged by the beams that follow it, and only its own tokens are trained."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from rerankkit import (
    Failed,
    Outcome,
    RerankExample,
    Reward,
    RewardFn,
    Rollout,
    RunFailed,
    RunInfo,
    Sid,
    StepReport,
    UsageError,
)
from rerankkit.lm import (
    Policy,
    Reference,
    SidTrie,
    adamw,
    beam_sids,
    build_trie,
    reference_of,
    resumable_steps,
    sharded,
    update_on_groups,
    whole_weights,
)
from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import PRESETS
from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import CLOSING, HEAD, OPENING, SEPARATOR, clean_reasoning

from rerankkit_onerec_think.parts import OptimizerConfig
from rerankkit_onerec_think.thoughts import Thought, best_first, rerank_prompts, scores_after, think


@dataclass(frozen=True)
class RationaleOptimizer:
    """A PolicyOptimizer whose reward is a function of the rationale alone: the items after it are not sampled."""

    config: OptimizerConfig

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        """Yields a report a step. Everything drawn in a step depends on (seed, step): a continued run ends the same.

        Raises UsageError for beams over the catalogue where the policy's answers cite places.
        """
        c = self.config
        if c.beams_over == "catalogue" and policy.surface.places:
            raise UsageError(
                'optimizer.beams_over = "catalogue" needs answers by SID, but policy.prompt.cite is "place", and those '
                'name candidates alone; set optimizer.beams_over = "candidates" or policy.prompt.cite = "sid".'
            )
        with reference_of(policy) if c.kl else nullcontext() as reference, sharded(policy):
            optimizer = adamw(policy, lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
            trie = build_trie(_sids(examples), policy) if c.beams_over == "catalogue" else None
            for step in resumable_steps(
                policy, optimizer, c.steps, info, what="reinforcing rationales", checkpoint_every=c.checkpoint_every
            ):
                dice = random.Random(f"{info.seed} onerec-think {step}")
                chosen = dice.sample(list(examples), min(c.prompts_per_step, len(examples)))
                with whole_weights(policy) as hold:
                    rollouts = hold(partial(self._roll_out, policy, chosen, trie, info, step))
                outcomes = tuple(reward(rollouts))
                learned = self._learn(policy, reference, optimizer, rollouts, outcomes, info)
                yield StepReport(step, learned, tuple(rollouts), outcomes)
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
        beams: list[list[str]]
        if trie is None:
            beginnings = [[thought.token_ids] for _, _, thought in rows]
            every = scores_after(policy, [example for _, example, _ in rows], beginnings, "max")
            names = [policy.surface.names(example) for example in examples]
            beams = [[names[g][i] for i in best_first(scores)] for (g, _, _), scores in zip(rows, every, strict=True)]
        else:
            asks = [[*prompts[g], *thought.token_ids] for g, _, thought in rows]
            found = beam_sids(policy, asks, trie, c.num_beams)
            beams = [[policy.surface.text(sid) for sid, _ in some] for some in found]
        return [_rollout(policy, example, t, some, g) for (g, example, t), some in zip(rows, beams, strict=True)]

    def _learn(
        self,
        policy: Policy,
        reference: Reference | None,
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
        groups = [rollouts[i : i + c.group_size] for i in range(0, len(rollouts), c.group_size)]
        learned = update_on_groups(
            policy,
            optimizer,
            groups,
            rerank_prompts(policy, [group[0].example for group in groups]),
            advantages,
            keep,
            replace(PRESETS["grpo"], clip_low=c.clip, clip_high=c.clip, kl_weight=c.kl),
            info=info,
            updates=[range(i, len(groups), c.updates_per_batch) for i in range(c.updates_per_batch)],
            reference=reference,
            temperature=c.temperature,
            max_grad_norm=c.max_grad_norm,
        )
        return {**learned, "num_groups": float(has_signal.sum())}


def _sids(examples: Sequence[RerankExample]) -> list[Sid]:
    """Of every item that the lists and their histories hold."""
    return sorted({item.sid for example in examples for item in (*example.history, *example.candidates)})


def _rollout(policy: Policy, example: RerankExample, thought: Thought, beams: Sequence[str], group: int) -> Rollout:
    """The rationale, and the names of its beams in place of a list that was written."""
    said = clean_reasoning(thought.text, example, policy.surface)
    text = HEAD + said + OPENING + SEPARATOR.join(beams) + CLOSING
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
