"""Log-probabilities of given tokens, with gradients: packed rows, shared prompts, logits only where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rerankkit.lm.permutation import Allowed, allowed_table, answer_pieces
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
    """[K] float32, the loss weight of each token; 0 for tokens that a mask forced."""
    sequence_ids: Tensor
    """[K] int64, the sequence of each token, counted in the order they were given."""
    num_sequences: int
    entropies: Tensor | None = None
    """[K] float32 in nats, of the next-token distribution (under the mask, if any); no gradient. None unless asked."""

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
    allowed: Sequence[Sequence[Sequence[Allowed]]] | None = None,
) -> TokenLogps:
    """Log-probability of every completion token at `temperature`; the completions of a group share their prompt.

    `completions[p][g]` continues `prompts[p]`. One row a group: the prompt once, then every completion, which sees the
    prompt and itself. Sequences are numbered group by group; all weights are 1. Raises ValueError for an empty prompt.

    `allowed[p][g]` is what a mask allowed in place of each token of `completions[p][g]` (`Sample.allowed`), empty for
    one sampled without a mask. Logps and entropies are then those of the masked policy: a forced token has logp 0, no
    gradient and weight 0.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but completions for {len(completions)}")
    layouts: list[_Layout] = []
    targets: list[int] = []
    owners: list[int] = []
    options: list[Allowed] = []
    number = 0
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError("an empty prompt: nothing predicts the first token of its completions")
        layout = _Layout.empty()
        layout.add(prompt, range(len(prompt)), [0] * len(prompt), block=0, prefix=0)
        for g, completion in enumerate(group):
            seen = (allowed[p][g] if allowed is not None else ()) or [_ANY] * len(completion)
            if len(seen) != len(completion):
                raise ValueError(f"{len(completion)} tokens but {len(seen)} allowed, completion {g} of prompt {p}")
            start = len(layout.token_ids)
            last = max((i for i, option in enumerate(seen) if option is None or len(option) != 1), default=0)
            fed = completion[:last]  # the last token to choose is only predicted, never read; nor what it forces
            layout.add(
                fed, range(len(prompt), len(prompt) + len(fed)), [start] * len(fed), block=start, prefix=len(prompt)
            )
            places = [len(prompt) - 1, *range(start, start + len(fed))]
            layout.reads += (places + [0] * len(completion))[: len(completion)]  # nothing is read for forced tokens
            targets += completion
            owners += [number] * len(completion)
            options += seen
            number += 1
        layouts.append(layout)
    weights = [0.0 if option is not None and len(option) == 1 else 1.0 for option in options]
    return _run(policy, layouts, targets, weights, owners, number, temperature, entropies, autocast, chunk, options)


_ANY: tuple[int, ...] = ()
"""Stands for the whole vocabulary: no mask."""


def _masked_logps(
    policy: Policy,
    hidden: Tensor,
    target_ids: Tensor,
    options: Sequence[Allowed],
    temperature: float,
    entropies: bool,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """As `token_logps`, each target under what its option allows; hidden states of forced targets are not used."""
    device = policy.device
    logps = 0 * hidden[:, 0].float()  # with a gradient, of 0, even if nothing was chosen
    spread = torch.zeros(len(options), device=device) if entropies else None
    any_ids = [i for i, option in enumerate(options) if option == _ANY]
    free = [i for i, option in enumerate(options) if option is None]
    several = [(i, option) for i, option in enumerate(options) if option is not None and len(option) > 1]
    barred = answer_pieces(policy).barred(policy) if free else None
    narrow = allowed_table([option for _, option in several], device) if several else None
    for places, bar, among in ((any_ids, None, None), (free, barred, None), ([i for i, _ in several], None, narrow)):
        if not places:
            continue
        index = torch.tensor(places, device=device)
        ids = target_ids[index]
        if among is not None:
            ids = (among[0] == ids[:, None]).int().argmax(-1)
        some, entropy = token_logps(policy, hidden[index], ids, temperature, entropies, chunk, barred=bar, narrow=among)
        logps = logps.index_copy(0, index, some)
        if spread is not None and entropy is not None:
            spread[index] = entropy
    return logps, spread


def token_logps(
    policy: Policy,
    hidden: Tensor,
    target_ids: Tensor,
    temperature: float,
    entropies: bool,
    chunk: int,
    *,
    barred: Tensor | None = None,
    narrow: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log P(target) at `temperature` from hidden states [K, H] and ids [K]; the [K, V] logits never exist at once.

    `barred` [V] bool takes ids out of the distribution. `narrow` leaves only the ids of a table [K, W] in it, as far
    as its mask [K, W] says that they are real; targets are then columns of the table.
    """
    many = len(hidden) > chunk and torch.is_grad_enabled()

    def part(states: Tensor, ids: Tensor, *among: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.logits(states).float() / temperature
        if barred is not None:
            logits = logits.masked_fill(barred, _FAR)
        if among:
            logits = logits.gather(-1, among[0]).masked_fill(~among[1], _FAR)
        total = logits.logsumexp(-1)
        logps = logits.gather(-1, ids[:, None])[:, 0] - total
        if not entropies:
            return logps, logps.detach()
        with torch.no_grad():
            spread = total - ((logits - total[:, None]).exp() * logits).sum(-1)
        return logps, spread

    parts = []
    for inputs in zip(*(torch.split(x, chunk) for x in (hidden, target_ids, *(narrow or ()))), strict=True):
        # recomputing a chunk's logits in the backward pass is what keeps the others from being stored
        parts.append(checkpoint(part, *inputs, use_reentrant=False) if many else part(*inputs))
    logps = torch.cat([p[0] for p in parts])
    return logps, torch.cat([p[1] for p in parts]) if entropies else None


_FAR = -1e30
"""The logit of what may not come: -inf would make 0 * inf of the entropy."""


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
    options: Sequence[Allowed] | None = None,
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
        if options is None or all(option == _ANY for option in options):
            logps, spread = token_logps(policy, states, target_ids, temperature, entropies, chunk)
        else:
            logps, spread = _masked_logps(policy, states, target_ids, options, temperature, entropies, chunk)
    return TokenLogps(logps, weight, owner, num_sequences, spread)


def block_mask(blocks: Tensor, prefixes: Tensor) -> Tensor:
    """Which place sees which, [B, T, T]: the same block up to itself, and the row's first `prefixes` places.

    Both arguments are [B, T]. Every place sees at least itself, padding too: a softmax over nothing is NaN.
    """
    places = torch.arange(blocks.shape[1], device=blocks.device)
    own = (blocks[:, :, None] == blocks[:, None, :]) & (places[:, None] >= places)
    shared = places[None, None, :] < prefixes[:, :, None]
    return own | shared
