"""Groups of samples from the policy: each prompt is read once, all samples decode together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rerankkit.lm.cache import Branches, Prefill, lowered
from rerankkit.lm.meter import spent_on
from rerankkit.lm.permutation import Allowed, AnswerMask, allowed_table, answer_pieces
from rerankkit.lm.policy import Policy

MAX_ROWS = 128
"""Samples that decode at once."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion."""

    token_ids: tuple[int, ...]
    """Ends with the stop token, unless truncated."""
    logps: tuple[float, ...]
    """log P of each token under the distribution it was drawn from: logits / temperature over the whole vocabulary,
    or what the mask allowed of it, within the nucleus if top_p < 1; at temperature 0, the untempered distribution.
    With top_p = 1 this is what `group_logps(..., temperature=temperature, allowed=...)` gives for the same weights."""
    truncated: bool
    """True when `max_new_tokens`, not a stop token, ended it."""
    allowed: tuple[Allowed, ...] = ()
    """What the mask allowed in place of each token; () without a mask."""


@torch.no_grad()
def roll_out(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    top_p: float = 1.0,
    autocast: torch.dtype | None = None,
    max_rows: int = MAX_ROWS,
    masks: Sequence[AnswerMask] | None = None,
    stops: Sequence[Sequence[int]] = (),
) -> list[list[Sample]]:
    """`group_size` samples of each prompt; `seeds[p]` belongs to `prompts[p]`. Temperature 0 is greedy.

    A sample ends with a stop token of the policy, or as soon as its last tokens are one of `stops`. With `masks`, one a
    prompt, every sample is a finished answer that its prompt's mask allows; `stops` do not go with it. `autocast` is
    the width of the weights while sampling, `lowered`; logits stay float32.

    Sample g of prompt p draws from its own stream, made from (seeds[p], g): it does not depend on the other prompts,
    on `max_rows`, or on `max_new_tokens` beyond its own length (up to rounding of the logits, which a token's chance
    of changing is proportional to). Raises ValueError for an empty prompt or settings out of range, UsageError
    if a sample might outgrow the model's positions.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if temperature < 0 or not 0 < top_p <= 1 or group_size < 1 or max_new_tokens < 1:
        raise ValueError(f"{temperature=} must be >= 0, 0 < {top_p=} <= 1, {group_size=} and {max_new_tokens=} >= 1")
    if masks is not None and (len(masks) != len(prompts) or any(mask.max_tokens > max_new_tokens for mask in masks)):
        longest = max((mask.max_tokens for mask in masks), default=0)
        raise ValueError(f"{len(masks)} masks for {len(prompts)} prompts, answers of {longest} of {max_new_tokens=}")
    if not all(stops) or (stops and masks is not None):
        raise ValueError(
            f"{stops=} must not be empty sequences, and do not go with masks, which end answers themselves"
        )
    policy.check_length(max(map(len, prompts), default=0) + max_new_tokens)
    groups: list[list[Sample]] = [[] for _ in prompts]
    # prompts of like length share a batch, so that little of it is padding
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    width = max(1, max_rows // group_size)
    with training_off(policy), lowered(policy, autocast), spent_on("decode"):
        for start in range(0, len(order), width):
            chosen = order[start : start + width]
            streams = np.stack([_stream(seeds[p], g, max_new_tokens) for p in chosen for g in range(group_size)])
            some = None if masks is None else [masks[p] for p in chosen]
            samples = _decode(
                policy, [prompts[p] for p in chosen], group_size, streams, temperature, top_p, some, stops
            )
            for place, p in enumerate(chosen):
                groups[p] = samples[place * group_size : (place + 1) * group_size]
    return groups


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF: logits [N, V] and uniforms [N] in [0, 1) to ids [N] and their logps [N]."""
    logps = logits.float()
    if temperature not in (0, 1):
        logps = logps / temperature
    if temperature == 0:
        ids = logps.argmax(-1)
        return ids, logps.gather(-1, ids[:, None])[:, 0] - logps.logsumexp(-1)
    if top_p < 1:
        logps = _nucleus(logps.log_softmax(-1), top_p)
    mass = logps.softmax(-1)
    # first the block of tokens, then the token in it: a running sum over a whole vocabulary is most of a draw's cost
    blocks = nn.functional.pad(mass, (0, -mass.shape[-1] % _BLOCK)).view(len(mass), -1, _BLOCK)
    sums = blocks.sum(-1).double().cumsum(-1)
    wanted = uniforms.double() * sums[:, -1]
    block = _place(sums, wanted)
    within = blocks[torch.arange(len(block), device=block.device), block].double().cumsum(-1)
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    ids = block * _BLOCK + _place(within, wanted - before)
    return ids, mass.gather(-1, ids[:, None])[:, 0].log()


_BLOCK = 64


def _place(sums: Tensor, wanted: Tensor) -> Tensor:
    """The first column of running sums [N, W] that exceeds `wanted` [N]."""
    # a hair under the whole mass: rounding must not step past the last column that has any
    wanted = torch.minimum(wanted, sums[:, -1] * (1 - 1e-12))
    return torch.searchsorted(sums, wanted[:, None], right=True)[:, 0]


@contextmanager
def training_off(policy: Policy) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


def _nucleus(logps: Tensor, top_p: float) -> Tensor:
    ordered, ids = logps.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logps).scatter_(-1, ids, ordered).log_softmax(-1)


def _stream(seed: int, member: int, length: int) -> NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, member]))).random(length)


def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    streams: NDArray[np.float64],
    temperature: float,
    top_p: float,
    masks: Sequence[AnswerMask] | None,
    stops: Sequence[Sequence[int]],
) -> list[Sample]:
    device = policy.device
    total, room = streams.shape
    owners = np.repeat(np.arange(len(prompts)), group_size)
    guide = None if masks is None else _Guide(policy, [masks[owner] for owner in owners.tolist()])
    # what every answer begins with is read with the prompt
    heads = [()] * len(prompts) if guide is None else [guide.states[p * group_size].forced for p in range(len(prompts))]
    with spent_on("prefill"):
        prefill = Prefill(policy, [[*prompt, *head] for prompt, head in zip(prompts, heads, strict=True)])
    counts = np.array([len(heads[owner]) for owner in owners.tolist()])  # tokens so far
    token_ids = np.zeros((total, room), dtype=np.int64)
    logps = np.zeros((total, room), dtype=np.float32)
    stopped = np.zeros(total, dtype=bool)
    rows = np.arange(total)  # the sample that each row of the batch works on
    if guide is not None:
        for row, owner in enumerate(owners.tolist()):
            token_ids[row, : counts[row]] = heads[owner]
            guide.skip(row)
        stopped = np.array([state.settled for state in guide.states])  # a list of one candidate
        rows = rows[~stopped]
    branches = Branches(prefill, owners[rows].tolist(), room)
    lengths = torch.from_numpy(np.array([len(prompt) for prompt in prompts])[owners]).to(device)
    uniforms = torch.from_numpy(streams).to(device)
    ends = torch.tensor(sorted(policy.stop_ids), device=device)
    hidden = prefill.hidden[torch.from_numpy(owners[rows]).to(device)]
    while len(rows):
        row_ids = torch.from_numpy(rows).to(device)
        places = counts[rows]
        some = uniforms[row_ids, torch.from_numpy(places).to(device)]
        if guide is None:
            ids, chosen = draw(policy.logits(hidden), some, temperature, top_p)
        else:
            ids, chosen = guide.draw(rows, hidden, some, temperature, top_p)
        token_ids[rows, places] = ids.cpu().numpy()
        logps[rows, places] = chosen.float().cpu().numpy()
        counts[rows] += 1
        if guide is None:
            done = torch.isin(ids, ends).cpu().numpy()
            for stop in stops:
                long = counts[rows] >= len(stop)
                last = token_ids[rows[:, None], np.maximum(counts[rows][:, None] - len(stop) + np.arange(len(stop)), 0)]
                done |= long & (last == np.array(stop)).all(1)
        else:
            done = guide.advance(rows, token_ids[rows, places].tolist())
        stopped[rows[done]] = True
        if guide is not None:
            for row in rows[done].tolist():  # the rest of its answer is known: it needs no model
                rest = guide.states[row].forced
                token_ids[row, counts[row] : counts[row] + len(rest)] = rest
                counts[row] += len(rest)
        done |= counts[rows] == room
        if done.all():
            break
        if done.any():
            alive = branches.leave(done)
            rows, ids = rows[alive], ids[torch.from_numpy(alive).to(device)]
            row_ids = torch.from_numpy(rows).to(device)
        positions = lengths[row_ids] + torch.from_numpy(counts[rows] - 1).to(device)
        hidden = branches.step(ids[:, None], positions[:, None])[:, 0]
    return [
        Sample(
            tuple(token_ids[i, :n].tolist()),
            tuple(logps[i, :n].tolist()),
            not stopped[i],
            () if guide is None else tuple(guide.seen[i]),
        )
        for i, n in enumerate(counts)
    ]


class _Guide:
    """The masks of N samples, and how far each sample is in its own."""

    def __init__(self, policy: Policy, masks: Sequence[AnswerMask]) -> None:
        self.policy = policy
        self.masks = masks
        self.states = [mask.start() for mask in masks]
        self.seen: list[list[Allowed]] = [[] for _ in masks]
        self.barred = answer_pieces(policy).barred(policy)

    def draw(
        self, rows: NDArray[np.int64], hidden: Tensor, uniforms: Tensor, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """As `draw`, for the samples `rows`, of which hidden states [N, H] are given; logits only where needed."""
        options = [self.masks[row].allowed(self.states[row]) for row in rows.tolist()]
        for row, option in zip(rows.tolist(), options, strict=True):
            self.seen[row].append(option)
        device = hidden.device
        ids = torch.tensor([option[0] if option else 0 for option in options], device=device)
        logps = torch.zeros(len(rows), device=device)
        free = torch.tensor([i for i, option in enumerate(options) if option is None], dtype=torch.long, device=device)
        if len(free):
            logits = self.policy.logits(hidden[free]).float().masked_fill(self.barred, -torch.inf)
            ids[free], logps[free] = draw(logits, uniforms[free], temperature, top_p)
        several = [(i, option) for i, option in enumerate(options) if option and len(option) > 1]
        if several:
            table, real = allowed_table([option for _, option in several], device)
            choosing = torch.tensor([i for i, _ in several], device=device)
            logits = self.policy.logits(hidden[choosing]).float().gather(-1, table).masked_fill(~real, -torch.inf)
            places, logps[choosing] = draw(logits, uniforms[choosing], temperature, top_p)
            ids[choosing] = table.gather(-1, places[:, None])[:, 0]
        return ids, logps

    def skip(self, row: int) -> None:
        """Step over what is forced."""
        state = self.states[row]
        self.seen[row] += [(token_id,) for token_id in state.forced]
        self.states[row] = state._replace(forced=())

    def advance(self, rows: NDArray[np.int64], token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """Step the samples `rows`; True for each whose rest is now known (it counts as seen)."""
        done = np.zeros(len(rows), dtype=bool)
        for place, (row, token_id) in enumerate(zip(rows.tolist(), token_ids, strict=True)):
            state = self.states[row] = self.masks[row].advance(self.states[row], token_id)
            if state.settled:
                done[place] = True
                self.seen[row] += [(rest,) for rest in state.forced]
        return done
