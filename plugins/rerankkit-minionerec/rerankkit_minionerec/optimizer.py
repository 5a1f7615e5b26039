"""GRPO on the beams of one search: nothing of an item is sampled, all beams of a prompt are one group."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, pstdev

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
)
from rerankkit.lm import (
    Policy,
    SidTrie,
    TokenLogps,
    answer_mask,
    beam_sids,
    build_trie,
    group_logps,
    load_checkpoint,
    passes,
    roll_out,
    save_checkpoint,
)
from rerankkit.lm.trie import ROOT
from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import PRESETS, mean_stats, policy_loss
from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import CLOSING, HEAD, OPENING, clean_reasoning, rerank_messages
from torch import Tensor

from rerankkit_minionerec.plugin import BeamGroupsConfig

_LEARNED = (
    "loss", "grad_norm", "kl", "entropy", "logp_gap", "ratio_mean", "clip_ratio/low_mean", "clip_ratio/high_mean",
)  # fmt: skip
"""What is logged of an update. Means are over tokens."""


@dataclass(frozen=True)
class BeamGroups:
    """A PolicyOptimizer that learns which of its own best guesses was right."""

    config: BeamGroupsConfig

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
        items = sorted({item.sid for example in examples for item in (*example.history, *example.candidates)})
        catalogue = build_trie(items, policy) if c.beams_over == "catalogue" else None
        for step in info.progress(range(done + 1, c.steps + 1), total=c.steps - done, what="reinforcing beams"):
            dice = random.Random(f"{info.seed} minionerec {step}")
            chosen = dice.sample(list(examples), min(c.prompts_per_step, len(examples)))
            rollouts = self._search(policy, chosen, catalogue, info, step)
            outcomes = tuple(reward(rollouts))
            learned = self._learn(policy, reference, optimizer, rollouts, outcomes, info)
            yield StepReport(step, {**_described(rollouts, outcomes), **learned}, tuple(rollouts), outcomes)
            if folder and step % c.checkpoint_every == 0 and step < c.steps:
                save_checkpoint(folder, step, policy, optimizer, {})
        policy.model.eval()

    def _search(
        self, policy: Policy, examples: Sequence[RerankExample], catalogue: SidTrie | None, info: RunInfo, step: int
    ) -> list[Rollout]:
        """The beams of each example, best first, group after group."""
        prompts = [_prompt_ids(policy, example) for example in examples]
        beginnings = self._beginnings(policy, examples, prompts, info, step)
        rollouts: list[Rollout] = []
        for group, (example, prompt, (said, begun)) in enumerate(zip(examples, prompts, beginnings, strict=True)):
            trie = catalogue or build_trie([item.sid for item in example.candidates], policy)
            [beams] = beam_sids(policy, [[*prompt, *begun]], trie, self.config.num_beams)
            rollouts += [
                _rollout(policy, example, said, begun, trie, sid, group, rank) for rank, (sid, _) in enumerate(beams)
            ]
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
        reference: Policy | None,
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
        num_groups = float(has_signal.sum())
        if not num_groups:
            return {"loss": 0.0, "grad_norm": 0.0, "num_groups": 0.0}  # no pass was made that would tell more
        prompts = [_prompt_ids(policy, group[0].example) for group in groups]
        sizes = [len(p) + sum(len(r.token_ids) for r in g) for p, g in zip(prompts, groups, strict=True)]
        logs: list[dict[str, float]] = []
        policy.model.train()
        for _ in range(c.updates_per_batch):
            parts = []
            for some in passes(sizes, info.tokens_per_pass):
                kept = torch.cat([keep[i, : len(groups[i])] for i in some])
                share = torch.cat([advantages[i, : len(groups[i])] for i in some])
                asked, said = [prompts[i] for i in some], [groups[i] for i in some]
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
        # Only before the first update are searcher and trainer the same policy.
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
        """Of one pass: advantages and keep [N], over the batch's `num_kept` beams (2402.03300, eq. 3 and 4)."""
        c, device = self.config, policy.device
        tokens = _logps(policy, prompts, groups, info)
        free = tokens.weights > 0  # the codes that the trie left a choice of
        logps, rows = tokens.logps[free], tokens.sequence_ids[free]
        old = torch.tensor([logp for group in groups for r in group for logp in r.logps], device=device)[free]
        settings = replace(PRESETS["grpo"], clip_low=c.clip, clip_high=c.clip)
        advantages, keep = advantages.to(device), keep.to(device)
        loss, stats = policy_loss(logps, old, rows, advantages, settings, keep=keep, denominator=num_kept)
        kl = torch.zeros_like(logps)
        if reference is not None:
            with torch.no_grad():
                known = _logps(reference, prompts, groups, info).logps[free]
            kl = torch.expm1(known - logps) - (known - logps)
            lengths = torch.bincount(rows, minlength=len(keep))
            loss = loss + c.kl * (kl / lengths[rows])[keep[rows]].sum() / num_kept
        entropies = kl if tokens.entropies is None else tokens.entropies[free]
        logged = {"kl": kl, "entropy": entropies, "logp_gap": (logps - old).abs()}
        means = {name: float(values.detach().mean()) if len(values) else 0.0 for name, values in logged.items()}
        return loss, {**stats, "loss": loss.item(), **means}


def _logps(
    policy: Policy, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Rollout]], info: RunInfo
) -> TokenLogps:
    """Of every token under what the trie allowed in its place."""
    return group_logps(
        policy,
        prompts,
        [[rollout.token_ids for rollout in group] for group in groups],
        entropies=True,
        autocast=_autocast(info),
        allowed=[[rollout.allowed_ids for rollout in group] for group in groups],
    )


def _with_logps(policy: Policy, rollouts: Sequence[Rollout], info: RunInfo) -> list[Rollout]:
    """With the log-probabilities of the policy as it is: what a search would be, were it drawn."""
    groups = _grouped(rollouts)
    with torch.no_grad():
        each = [
            logps.tolist()
            for group in groups
            for logps in _logps(policy, [_prompt_ids(policy, group[0].example)], [group], info).split()
        ]
    return [replace(rollout, logps=tuple(logps)) for rollout, logps in zip(rollouts, each, strict=True)]


def _rollout(
    policy: Policy,
    example: RerankExample,
    said: str,
    begun: tuple[int, ...],
    trie: SidTrie,
    sid: Sid,
    group: int,
    rank: int,
) -> Rollout:
    """A beam as an answer that names one item. Nobody chose the rest of the list: it stays as given."""
    spelling = policy.sid_ids(sid)
    nodes = [ROOT]
    for token_id in spelling:
        nodes.append(trie.step(nodes[-1], token_id))
    choices = [tuple(trie.next_ids(node).tolist()) for node, _ in pairwise(nodes)]
    text = HEAD + clean_reasoning(said, example, policy.surface) + OPENING + policy.surface.text(sid) + CLOSING
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


def _frozen(policy: Policy) -> Policy:
    """A copy that stays as the policy is now."""
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    return Policy(
        model, policy.text_tokenizer, style=policy.style, surface=policy.surface, codebook_sizes=policy.codebook_sizes
    )


def _described(rollouts: Sequence[Rollout], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What the log says of a step's beams, under TRL's names where it has one."""
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
        "first_kept_rate": fmean(rollout.ranking.order[0] == 0 for rollout in rollouts if rollout.beam_rank == 0),
    }
