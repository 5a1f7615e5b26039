"""Log-probabilities of given tokens, with gradients: packed rows, shared prompts, logits only where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rerankkit.lm.policy import Policy
from rerankkit.lm.sequences import TrainSequence

CHUNK = 1024
"""Positions whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-probabilities of K tokens of N sequences, flat, in the order of the sequences and of their tokens."""

    logps: Tensor
    """[K] float32, differentiable."""
    weights: Tensor
    """[K] float32, the loss weight of each token."""
    sequence_ids: Tensor
    """[K] int64, the sequence of each token, counted in the order they were given."""
    num_sequences: int
    entropies: Tensor | None = None
    """[K] float32 in nats, of the whole next-token distribution; no gradient. None unless asked for."""

    def split(self, values: Tensor | None = None) -> tuple[Tensor, ...]:
        """`logps` (or other values [K]) cut into one tensor a sequence."""
        sizes = torch.bincount(self.sequence_ids, minlength=self.num_sequences).tolist()
        return torch.split(self.logps if values is None else values, sizes)

    def padded(self, values: Tensor | None = None, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """`logps` (or other values [K]) as [N, T], and the mask [N, T] of what is real."""
        parts = self.split(values)
        if not parts:
            return self.logps.new_zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool, device=self.logps.device)
        table = pad_sequence(list(parts), batch_first=True, padding_value=fill)
        lengths = torch.tensor([len(part) for part in parts], device=table.device)
        return table, torch.arange(table.shape[1], device=table.device) < lengths[:, None]


def packed_logps(
    policy: Policy,
    rows: Sequence[Sequence[TrainSequence]],
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    autocast: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> TokenLogps:
    """Log-probability of every token with a non-zero weight, at `temperature`; each row holds several sequences.

    Sequences of a row do not see one another and each counts its positions from 0, so the result is that of running
    them one by one. Make rows with `pack`. Sequences are numbered row by row.
    """
    layouts: list[_Layout] = []
    targets: list[int] = []
    weights: list[float] = []
    owners: list[int] = []
    number = 0
    for row in rows:
        layout = _Layout.empty()
        for sequence in row:
            start = len(layout.token_ids)
            layout.add(sequence.token_ids, range(len(sequence)), [start] * len(sequence), block=start, prefix=0)
            for place in range(1, len(sequence)):
                if sequence.weights[place] != 0:
                    layout.reads.append(start + place - 1)
                    targets.append(sequence.token_ids[place])
                    weights.append(sequence.weights[place])
                    owners.append(number)
            number += 1
        layouts.append(layout)
    return _run(policy, layouts, targets, weights, owners, number, temperature, entropies, autocast, chunk)


def group_logps(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    autocast: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> TokenLogps:
    """Log-probability of every completion token at `temperature`; the completions of a group share their prompt.

    `completions[p][g]` continues `prompts[p]`. One row a group: the prompt once, then every completion, which sees the
    prompt and itself. Sequences are numbered group by group; all weights are 1. Raises ValueError for an empty prompt.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but completions for {len(completions)}")
    layouts: list[_Layout] = []
    targets: list[int] = []
    owners: list[int] = []
    number = 0
    for prompt, group in zip(prompts, completions, strict=True):
        if not prompt:
            raise ValueError("an empty prompt: nothing predicts the first token of its completions")
        layout = _Layout.empty()
        layout.add(prompt, range(len(prompt)), [0] * len(prompt), block=0, prefix=0)
        for completion in group:
            start = len(layout.token_ids)
            fed = completion[:-1]  # the last token is only predicted, never read
            layout.add(
                fed, range(len(prompt), len(prompt) + len(fed)), [start] * len(fed), block=start, prefix=len(prompt)
            )
            if completion:
                layout.reads += [len(prompt) - 1, *range(start, start + len(fed))]
            targets += completion
            owners += [number] * len(completion)
            number += 1
        layouts.append(layout)
    weights = [1.0] * len(targets)
    return _run(policy, layouts, targets, weights, owners, number, temperature, entropies, autocast, chunk)


def token_logps(
    policy: Policy, hidden: Tensor, target_ids: Tensor, temperature: float, entropies: bool, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """log P(target) at `temperature` from hidden states [K, H] and ids [K]; the [K, V] logits never exist at once."""
    many = len(hidden) > chunk and torch.is_grad_enabled()

    def part(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.logits(states).float() / temperature
        total = logits.logsumexp(-1)
        logps = logits.gather(-1, ids[:, None])[:, 0] - total
        if not entropies:
            return logps, logps.detach()
        with torch.no_grad():
            spread = total - ((logits - total[:, None]).exp() * logits).sum(-1)
        return logps, spread

    parts = []
    for states, ids in zip(torch.split(hidden, chunk), torch.split(target_ids, chunk), strict=True):
        # recomputing a chunk's logits in the backward pass is what keeps the others from being stored
        parts.append(checkpoint(part, states, ids, use_reentrant=False) if many else part(states, ids))
    logps = torch.cat([p[0] for p in parts])
    return logps, torch.cat([p[1] for p in parts]) if entropies else None


def casting(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """Matrix products in `autocast` (bfloat16, say) where it is given."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


@dataclass(slots=True)
class _Layout:
    """One row to be. A token sees its own block up to itself, and the row's first `prefix` tokens."""

    token_ids: list[int]
    position_ids: list[int]
    blocks: list[int]
    prefixes: list[int]
    reads: list[int]
    """Places whose hidden state predicts a target, in order of the targets."""

    @classmethod
    def empty(cls) -> _Layout:
        return cls([], [], [], [], [])

    def add(
        self, token_ids: Sequence[int], position_ids: Sequence[int], blocks: Sequence[int], *, block: int, prefix: int
    ) -> None:
        self.token_ids += token_ids
        self.position_ids += position_ids
        self.blocks += [block] * len(token_ids)
        self.prefixes += [prefix] * len(token_ids)


def _run(
    policy: Policy,
    layouts: Sequence[_Layout],
    targets: Sequence[int],
    weights: Sequence[float],
    owners: Sequence[int],
    num_sequences: int,
    temperature: float,
    entropies: bool,
    autocast: torch.dtype | None,
    chunk: int,
) -> TokenLogps:
    device = policy.device
    target_ids = torch.tensor(targets, dtype=torch.long, device=device)
    weight = torch.tensor(weights, dtype=torch.float32, device=device)
    owner = torch.tensor(owners, dtype=torch.long, device=device)
    if not targets:
        nothing = torch.zeros(0, device=device)
        return TokenLogps(nothing, weight, owner, num_sequences, nothing if entropies else None)
    policy.check_length(1 + max(max(layout.position_ids, default=0) for layout in layouts))
    length = max(len(layout.token_ids) for layout in layouts)

    def table(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long, device=device)

    token_ids = table([layout.token_ids for layout in layouts], policy.pad_id)
    position_ids = table([layout.position_ids for layout in layouts], 0)
    keep = block_mask(table([x.blocks for x in layouts], -1), table([x.prefixes for x in layouts], 0))
    # additive, once: from a boolean mask every layer would make, and keep for its backward pass, a copy of its own
    bias = torch.zeros(keep.shape, dtype=autocast or policy.model.dtype, device=device).masked_fill_(~keep, -torch.inf)
    places = [row * length + read for row, layout in enumerate(layouts) for read in layout.reads]
    with casting(device, autocast):
        hidden = policy.decoder(
            input_ids=token_ids, position_ids=position_ids, attention_mask=bias[:, None], use_cache=False
        ).last_hidden_state
        states = hidden.flatten(0, 1)[torch.tensor(places, device=device)]
        logps, spread = token_logps(policy, states, target_ids, temperature, entropies, chunk)
    return TokenLogps(logps, weight, owner, num_sequences, spread)


def block_mask(blocks: Tensor, prefixes: Tensor) -> Tensor:
    """Which place sees which, [B, T, T]: the same block up to itself, and the row's first `prefixes` places.

    Both arguments are [B, T]. Every place sees at least itself, padding too: a softmax over nothing is NaN.
    """
    places = torch.arange(blocks.shape[1], device=blocks.device)
    own = (blocks[:, :, None] == blocks[:, None, :]) & (places[:, None] >= places)
    shared = places[None, None, :] < prefixes[:, :, None]
    return own | shared
