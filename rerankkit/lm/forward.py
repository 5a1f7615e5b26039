"""Log-probabilities of given tokens, with gradients: packed rows, shared prompts, logits only where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rerankkit.lm.attention import Layout, Part, run_decoder, takes_layouts
from rerankkit.lm.permutation import Allowed, allowed_table, answer_pieces
from rerankkit.lm.policy import Policy
from rerankkit.lm.sequences import TrainSequence

CHUNK = 256
"""Positions whose logits exist at once: few enough that with a small vocabulary they stay in a CPU's cache."""

KEPT_LOGITS = 2**24
"""More logits than these are not kept for the backward pass but computed again: 64 MiB in float32."""


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
    """[K] float32 in nats, differentiable: of what each token was chosen from (under the mask, if any); None unless
    asked."""

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
    made: list[Row] = []
    targets: list[int] = []
    weights: list[float] = []
    owners: list[int] = []
    number = 0
    for row in rows:
        made.append(Row())
        for sequence in row:
            policy.check_length(len(sequence))
            wanted = [place for place in range(1, len(sequence)) if sequence.weights[place] != 0]
            # what comes after the last place that is read is seen by nobody
            fed = sequence.token_ids[: wanted[-1] if wanted else 0]
            start = made[-1].add(fed, range(len(fed)))
            made[-1].reads += [start + place - 1 for place in wanted]
            targets += [sequence.token_ids[place] for place in wanted]
            weights += [sequence.weights[place] for place in wanted]
            owners += [number] * len(wanted)
            number += 1
    return row_logps(policy, made, targets, weights, owners, number, temperature, entropies, autocast, chunk)


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
    prompt and itself; what all of them begin with counts as prompt. Sequences are numbered group by group; all weights
    are 1. Raises ValueError for an empty prompt.

    `allowed[p][g]` is what a mask allowed in place of each token of `completions[p][g]` (`Sample.allowed`), empty for
    one sampled without a mask. Logps and entropies are then those of the masked policy: a forced token has logp 0, no
    gradient and weight 0.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but completions for {len(completions)}")
    made: list[Row] = []
    targets: list[int] = []
    owners: list[int] = []
    options: list[Allowed] = []
    number = 0
    for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if not prompt:
            raise ValueError("an empty prompt: nothing predicts the first token of its completions")
        seen = [
            list((allowed[p][g] if allowed is not None else ()) or [_ANY] * len(completion))
            for g, completion in enumerate(group)
        ]
        for g, (completion, some) in enumerate(zip(group, seen, strict=True)):
            if len(some) != len(completion):
                raise ValueError(f"{len(completion)} tokens but {len(some)} allowed, completion {g} of prompt {p}")
        # the last token to choose is only predicted, never read; nor what it forces
        fed = [completion[: _last_choice(some)] for completion, some in zip(group, seen, strict=True)]
        common = _common_start([list(tokens) for tokens in fed if tokens])
        row = Row()
        policy.check_length(len(prompt) + max(map(len, fed), default=0))
        start = len(prompt) + len(common)
        shared = (0, start)
        row.add([*prompt, *common], range(start))
        for completion, some, tokens in zip(group, seen, fed, strict=True):
            own = tokens[len(common) :]
            start = row.add(own, range(shared[1], shared[1] + len(own)), shared)
            places = [*range(len(prompt) - 1, shared[1]), *range(start, len(row.token_ids))]
            row.reads += (places[: len(tokens) + 1] + [0] * len(completion))[: len(completion)]  # forced: never read
            targets += completion
            owners += [number] * len(completion)
            options += some
            number += 1
        made.append(row)
    weights = [0.0 if option is not None and len(option) == 1 else 1.0 for option in options]
    return row_logps(policy, made, targets, weights, owners, number, temperature, entropies, autocast, chunk, options)


_ANY: tuple[int, ...] = ()
"""Stands for the whole vocabulary: no mask."""


def _common_start(lists: Sequence[list[int]]) -> list[int]:
    """The longest list that all of `lists` begin with; none if there are none."""
    if not lists:
        return []
    low, high = min(lists), max(lists)  # in the order of a dictionary the outermost two differ first
    return low[: next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))]


def _last_choice(allowed: Sequence[Allowed]) -> int:
    return max((i for i, option in enumerate(allowed) if option is None or len(option) != 1), default=0)


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
    """log P(target) at `temperature` from hidden states [K, H] and ids [K]; more than KEPT_LOGITS never exist at once.

    `barred` [V] bool takes ids out of the distribution. `narrow` leaves only the ids of a table [K, W] in it, as far
    as its mask [K, W] says that they are real; targets are then columns of the table.
    """
    many = len(hidden) > chunk and len(hidden) * policy.num_logits > KEPT_LOGITS and torch.is_grad_enabled()

    def part(states: Tensor, ids: Tensor, *among: Tensor) -> tuple[Tensor, Tensor]:
        scores = policy.logits(states).float()
        if barred is not None:
            scores = scores.masked_fill(barred, _FAR)
        if among:
            scores = scores.gather(-1, among[0]).masked_fill(~among[1], _FAR)
        chosen: tuple[Tensor, Tensor] = _Chosen.apply(scores, ids, temperature, entropies)  # type: ignore[no-untyped-call]
        return chosen

    parts = []
    for inputs in zip(*(torch.split(x, chunk) for x in (hidden, target_ids, *(narrow or ()))), strict=True):
        # recomputing a chunk's logits in the backward pass is what keeps the others from being stored
        parts.append(checkpoint(part, *inputs, use_reentrant=False) if many else part(*inputs))
    logps = torch.cat([p[0] for p in parts])
    return logps, torch.cat([p[1] for p in parts]) if entropies else None


class _Chosen(torch.autograd.Function):
    """log_softmax(scores / temperature) at one id a row, and entropies; [K, V] and [K] to [K] and [K]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ids: Tensor, temperature: float, entropies: bool) -> tuple[Tensor, Tensor]:
        logps = (scores if temperature == 1 else scores / temperature).log_softmax(-1)
        chosen = logps.gather(-1, ids[:, None])[:, 0]
        spread = -(logps.exp() * logps).sum(-1) if entropies else torch.zeros_like(chosen)
        ctx.save_for_backward(logps, ids, spread)
        ctx.set_materialize_grads(False)  # most losses leave the entropies alone
        ctx.temperature = temperature
        return chosen, spread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_spread: Tensor | None) -> tuple[Tensor, None, None, None]:
        logps, ids, spread = ctx.saved_tensors
        grad = torch.zeros_like(spread) if grad is None else grad
        scale = (grad / ctx.temperature)[:, None]
        slopes = logps.exp().mul_(-scale)
        if grad_spread is not None:  # dH / d score = -p (log p + H) / temperature; p is 0 where log p is far below
            slopes -= logps.exp() * (logps + spread[:, None]) * (grad_spread / ctx.temperature)[:, None]
        return slopes.scatter_add_(-1, ids[:, None], scale), None, None, None


_FAR = -1e30
"""The logit of what may not come: -inf would make 0 * inf of the entropy."""


def casting(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """Matrix products in `autocast` (bfloat16, say) where it is given."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


@dataclass(slots=True)
class Row:
    """One row to be."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    """Places whose hidden state predicts a target, in order of the targets."""

    def add(
        self,
        token_ids: Sequence[int],
        position_ids: Iterable[int],
        shared: tuple[int, int] = (0, 0),
        mask: Tensor | None = None,
    ) -> int:
        """Append a part of as many positions as tokens, see `Part`; returns the place where it begins."""
        start = len(self.token_ids)
        if token_ids:
            self.token_ids += token_ids
            self.position_ids += position_ids
            self.parts.append(Part(start, len(self.token_ids), shared, mask))
        return start


def row_logps(
    policy: Policy,
    rows: Sequence[Row],
    targets: Sequence[int],
    weights: Sequence[float],
    owners: Sequence[int],
    num_sequences: int,
    temperature: float = 1.0,
    entropies: bool = False,
    autocast: torch.dtype | None = None,
    chunk: int = CHUNK,
    options: Sequence[Allowed] | None = None,
) -> TokenLogps:
    """What the public functions of this module share: a target, weight and owner for each place that the rows read."""
    device = policy.device
    target_ids = torch.tensor(targets, dtype=torch.long, device=device)
    weight = torch.tensor(weights, dtype=torch.float32, device=device)
    owner = torch.tensor(owners, dtype=torch.long, device=device)
    if not targets:
        nothing = torch.zeros(0, device=device)
        return TokenLogps(nothing, weight, owner, num_sequences, nothing if entropies else None)
    with casting(device, autocast):
        states = _hidden(policy, rows, autocast)
        if options is None or all(option == _ANY for option in options):
            logps, spread = token_logps(policy, states, target_ids, temperature, entropies, chunk)
        else:
            logps, spread = _masked_logps(policy, states, target_ids, options, temperature, entropies, chunk)
    return TokenLogps(logps, weight, owner, num_sequences, spread)


def _hidden(policy: Policy, rows: Sequence[Row], autocast: torch.dtype | None) -> Tensor:
    """Hidden states [K, H] at the places that the rows read, row after row."""
    device = policy.device
    shares = takes_layouts(policy)
    length = 0 if shares else max(len(row.token_ids) for row in rows)
    token_ids: list[int] = []
    position_ids: list[int] = []
    parts: list[list[Part]] = []
    reads: list[int] = []
    for row in rows:
        start = len(token_ids)
        spare = max(0, length - len(row.token_ids))
        token_ids += row.token_ids + [policy.pad_id] * spare
        position_ids += row.position_ids + [0] * spare
        reads += [start + place for place in row.reads]
        padding = [Part(length - spare, length)] if spare else []
        parts.append([part.moved(start) for part in row.parts] if shares else row.parts + padding)
    ids, positions = (torch.tensor(x, device=device) for x in (token_ids, position_ids))
    if shares:  # all rows are one
        layout = Layout([part for some in parts for part in some])
        hidden = run_decoder(policy, ids[None], positions[None], layout)
    else:
        bias = torch.cat([Layout(some).bias(autocast or policy.model.dtype, device) for some in parts])
        hidden = policy.decoder(
            input_ids=ids.view(-1, length),
            position_ids=positions.view(-1, length),
            attention_mask=bias,
            use_cache=False,
        ).last_hidden_state
    return hidden.flatten(0, 1)[torch.tensor(reads, device=device)]
