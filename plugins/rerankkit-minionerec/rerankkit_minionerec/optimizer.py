"""GRPO on the beams of one search: nothing of an item is sampled, all beams of a prompt are one group."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

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
    answer_mask,
    beam_sids,
    build_trie,
    group_logps,
    reference_of,
    resumable_steps,
    roll_out,
    sharded,
    update_on_groups,
    whole_weights,
)
from rerankkit.lm.trie import ROOT
from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import PRESETS
from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import CLOSING, HEAD, OPENING, clean_reasoning, rerank_messages

from rerankkit_minionerec.plugin import BeamGroupsConfig


@dataclass(frozen=True)
class BeamGroups:
    """A PolicyOptimizer that learns which of its own best guesses was right."""

    config: BeamGroupsConfig

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        """Yields a report a step. Everything drawn in a step depends on (seed, step): a continued run ends the same.

        Raises UsageError for a search of the catalogue where the policy's answers cite places.
        """
        c = self.config
        if c.beams_over == "catalogue" and policy.surface.places:
            raise UsageError(
                'optimizer.beams_over = "catalogue" needs answers by SID, but policy.prompt.cite is "place", and those '
                'name candidates alone; set optimizer.beams_over = "candidates" or policy.prompt.cite = "sid".'
            )
        with reference_of(policy) if c.kl else nullcontext() as reference, sharded(policy):
            optimizer = adamw(policy, lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
            items = sorted({item.sid for example in examples for item in (*example.history, *example.candidates)})
            catalogue = build_trie(items, policy) if c.beams_over == "catalogue" else None
            for step in resumable_steps(
                policy, optimizer, c.steps, info, what="reinforcing beams", checkpoint_every=c.checkpoint_every
            ):
                dice = random.Random(f"{info.seed} minionerec {step}")
                chosen = dice.sample(list(examples), min(c.prompts_per_step, len(examples)))
                with whole_weights(policy) as hold:
                    rollouts = hold(partial(self._search, policy, chosen, catalogue, info, step))
                outcomes = tuple(reward(rollouts))
                learned = self._learn(policy, reference, optimizer, rollouts, outcomes, info)
                yield StepReport(step, learned, tuple(rollouts), outcomes)
        policy.model.eval()

    def _search(
        self, policy: Policy, examples: Sequence[RerankExample], catalogue: SidTrie | None, info: RunInfo, step: int
    ) -> list[Rollout]:
        """The beams of each example, best first, group after group."""
        prompts = [_prompt_ids(policy, example) for example in examples]
        beginnings = self._beginnings(policy, examples, prompts, info, step)
        rollouts: list[Rollout] = []
        for group, (example, prompt, (said, begun)) in enumerate(zip(examples, prompts, beginnings, strict=True)):
            trie = catalogue or _trie(policy, example)
            [beams] = beam_sids(policy, [[*prompt, *begun]], trie, self.config.num_beams)
            names, spellings = policy.surface.names(example), policy.name_ids(example)
            for rank, (found, _) in enumerate(beams):
                name = policy.surface.text(found) if catalogue else names[found[0]]
                spelling = policy.sid_ids(found) if catalogue else spellings[found[0]]
                rollouts.append(_rollout(policy, example, said, begun, trie, name, spelling, group, rank))
        return _with_logps(policy, rollouts, info)

    def _beginnings(
        self,
        policy: Policy,
        examples: Sequence[RerankExample],
        prompts: Sequence[Sequence[int]],
        info: RunInfo,
        step: int,
    ) -> list[tuple[str, tuple[int, ...]]]:
        """How each answer begins, up to where its first item stands: the rationale, and token ids with it."""
        c = self.config
        ones = [replace(e, candidates=e.candidates[:1], relevance=e.relevance[:1]) for e in examples]
        masks = [answer_mask(policy, one, c.max_new_tokens) for one in ones]
        if not c.think:
            return [("", (*mask.pieces.head, *mask.pieces.opening)) for mask in masks]
        # An answer about one candidate is known as soon as its reasoning has ended: nothing is spent on lists.
        groups = roll_out(
            policy,
            prompts,
            1,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            seeds=[_seed(info.seed, step, example.example_id) for example in examples],
            masks=masks,
            autocast=_autocast(info),
        )
        begun = []
        for one, mask, [sample] in zip(ones, masks, groups, strict=True):
            said = parse_answer(policy.decode(sample.token_ids), one, policy.surface).reasoning
            begun.append((said, sample.token_ids[: -len(mask.spellings[0]) - len(mask.pieces.closing)]))
        return begun

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
            raise RunFailed(f"reward: no beam of a step could be judged; first reason: {outcomes[0]}")
        groups = _grouped(rollouts)
        size = max(map(len, groups))
        rewards, keep = torch.zeros(len(groups), size), torch.zeros(len(groups), size, dtype=torch.bool)
        left = iter(outcomes)
        for p, group in enumerate(groups):  # a list of few items has few beams: the rest of its row stays empty
            for g, outcome in zip(range(len(group)), left, strict=False):
                keep[p, g] = isinstance(outcome, Reward)
                rewards[p, g] = outcome.value if isinstance(outcome, Reward) else 0.0
        advantages, has_signal = group_advantages(rewards, keep, "zscore")
        keep &= has_signal[:, None]
        learned = update_on_groups(
            policy,
            optimizer,
            groups,
            [_prompt_ids(policy, group[0].example) for group in groups],
            advantages,
            keep,
            replace(PRESETS["grpo"], clip_low=c.clip, clip_high=c.clip, kl_weight=c.kl),
            info=info,
            updates=[range(i, len(groups), c.updates_per_batch) for i in range(c.updates_per_batch)],
            reference=reference,
            max_grad_norm=c.max_grad_norm,
        )
        return {**learned, "num_groups": float(has_signal.sum())}


def _with_logps(policy: Policy, rollouts: Sequence[Rollout], info: RunInfo) -> list[Rollout]:
    """With the log-probabilities of the policy as it is: what a search would be, were it drawn."""
    each = []
    with torch.no_grad():
        for group in _grouped(rollouts):
            tokens = group_logps(
                policy,
                [_prompt_ids(policy, group[0].example)],
                [[rollout.token_ids for rollout in group]],
                autocast=_autocast(info),
                allowed=[[rollout.allowed_ids for rollout in group]],
            )
            each += [logps.tolist() for logps in tokens.split()]
    return [replace(rollout, logps=tuple(logps)) for rollout, logps in zip(rollouts, each, strict=True)]


def _trie(policy: Policy, example: RerankExample) -> SidTrie:
    """What the list's items are called in answers, by the first place that is called so."""
    places: dict[tuple[int, ...], Sid] = {}
    for place, spelling in enumerate(policy.name_ids(example)):
        places.setdefault(tuple(spelling), (place,))
    return SidTrie((place, spelling) for spelling, place in places.items())


def _rollout(
    policy: Policy,
    example: RerankExample,
    said: str,
    begun: tuple[int, ...],
    trie: SidTrie,
    name: str,
    spelling: Sequence[int],
    group: int,
    rank: int,
) -> Rollout:
    """A beam as an answer that names one item. Nobody chose the rest of the list: it stays as given."""
    nodes = [ROOT]
    for token_id in spelling:
        nodes.append(trie.step(nodes[-1], token_id))
    choices = [tuple(trie.next_ids(node).tolist()) for node, _ in pairwise(nodes)]
    text = HEAD + clean_reasoning(said, example, policy.surface) + OPENING + name + CLOSING
    return Rollout(
        example=example,
        text=text,
        reasoning=said,
        ranking=parse_answer(text, example, policy.surface).ranking,
        token_ids=(*begun, *spelling),
        allowed_ids=(*((token_id,) for token_id in begun), *choices),
        num_reasoning_tokens=len(begun),
        group=group,
        origin="beam",
        beam_rank=rank,
    )


def _grouped(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return list(groups.values())


def _prompt_ids(policy: Policy, example: RerankExample) -> list[int]:
    return policy.prompt_ids(rerank_messages(example, policy.surface, policy.style))


def _seed(*key: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def _autocast(info: RunInfo) -> torch.dtype | None:
    return torch.bfloat16 if info.precision == "bfloat16" else None
