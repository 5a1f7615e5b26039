"""Groups of samples from the policy: each prompt is read once, all samples decode together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rerankkit.lm.cache import DecodeCache, Prefill
from rerankkit.lm.forward import casting
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
) -> list[list[Sample]]:
    """`group_size` samples of each prompt; `seeds[p]` belongs to `prompts[p]`. Temperature 0 is greedy.

    With `masks`, one a prompt, every sample is a finished answer that its prompt's mask allows.

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
    policy.check_length(max(map(len, prompts), default=0) + max_new_tokens)
    training = policy.model.training
    policy.model.eval()
    groups: list[list[Sample]] = [[] for _ in prompts]
    # prompts of like length share a batch, so that little of it is padding
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    width = max(1, max_rows // group_size)
    try:
        for start in range(0, len(order), width):
            chosen = order[start : start + width]
            streams = np.stack([_stream(seeds[p], g, max_new_tokens) for p in chosen for g in range(group_size)])
            with casting(policy.device, autocast):
                some = None if masks is None else [masks[p] for p in chosen]
                samples = _decode(policy, [prompts[p] for p in chosen], group_size, streams, temperature, top_p, some)
            for place, p in enumerate(chosen):
                groups[p] = samples[place * group_size : (place + 1) * group_size]
    finally:
        policy.model.train(training)
    return groups


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF: logits [N, V] and uniforms [N] in [0, 1) to ids [N] and their logps [N]."""
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = logps.argmax(-1)
        return ids, logps.gather(-1, ids[:, None])[:, 0]
    if top_p < 1:
        logps = _nucleus(logps, top_p)
    mass = logps.double().exp().cumsum(-1)
    # a hair under the whole mass: rounding must not step past the last token that has any
    wanted = uniforms.double() * mass[:, -1] * (1 - 1e-12)
    ids = torch.searchsorted(mass, wanted[:, None], right=True)
    return ids[:, 0], logps.gather(-1, ids)[:, 0]


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
) -> list[Sample]:
    device = policy.device
    total, room = streams.shape
    owners = np.repeat(np.arange(len(prompts)), group_size)
    prefill = Prefill(policy, prompts)
    cache, keep = prefill.fork(owners.tolist(), room)
    lengths = prefill.lengths[torch.from_numpy(owners).to(device)]
    uniforms = torch.from_numpy(streams).to(device)
    stops = torch.tensor(sorted(policy.stop_ids), device=device)
    token_ids = np.zeros((total, room), dtype=np.int64)
    logps = np.zeros((total, room), dtype=np.float32)
    counts = np.full(total, room)
    stopped = np.zeros(total, dtype=bool)
    guide = None if masks is None else _Guide(policy, [masks[owner] for owner in owners.tolist()])
    rows = np.arange(total)  # the sample that each row of the batch works on
    hidden = prefill.hidden[torch.from_numpy(owners).to(device)]
    for step in range(room):
        row_ids = torch.from_numpy(rows).to(device)
        if guide is None:
            ids, chosen = draw(policy.logits(hidden), uniforms[row_ids, step], temperature, top_p)
        else:
            ids, chosen = guide.draw(rows, hidden, uniforms[row_ids, step], temperature, top_p)
        token_ids[rows, step] = ids.cpu().numpy()
        logps[rows, step] = chosen.float().cpu().numpy()
        if guide is None:
            done = torch.isin(ids, stops).cpu().numpy()
        else:
            done = guide.advance(rows, token_ids[rows, step].tolist())
        counts[rows[done]] = step + 1
        stopped[rows[done]] = True
        if guide is not None:
            for row in rows[done].tolist():  # the rest of its answer is known: it needs no model
                rest = guide.states[row].forced
                token_ids[row, step + 1 : step + 1 + len(rest)] = rest
                counts[row] += len(rest)
        if done.all() or step + 1 == room:
            break
        if done.any():
            alive = _compact(cache, keep, done)
            rows, ids = rows[alive], ids[torch.from_numpy(alive).to(device)]
            row_ids = torch.from_numpy(rows).to(device)
        hidden = policy.decoder(
            input_ids=ids[:, None],
            position_ids=(lengths[row_ids] + step)[:, None],
            attention_mask=keep[: len(rows), None, None, : prefill.width + step + 1],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
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

    def advance(self, rows: NDArray[np.int64], token_ids: Sequence[int]) -> NDArray[np.bool_]:
        """Step the samples `rows`; True for each whose rest is now known (it counts as seen)."""
        done = np.zeros(len(rows), dtype=bool)
        for place, (row, token_id) in enumerate(zip(rows.tolist(), token_ids, strict=True)):
            state = self.states[row] = self.masks[row].advance(self.states[row], token_id)
            if state.settled:
                done[place] = True
                self.seen[row] += [(rest,) for rest in state.forced]
        return done


def _compact(cache: DecodeCache, keep: Tensor, done: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Fill the places of finished rows with rows from the end; returns which old row each remaining place now holds."""
    remaining = int((~done).sum())
    places = np.arange(remaining)
    holes = places[done[:remaining]]
    movers = remaining + np.flatnonzero(~done[remaining:])
    places[holes] = movers
    source, target = (torch.from_numpy(x).to(keep.device) for x in (movers, holes))
    keep[target] = keep[source]
    cache.move(source, target, remaining)
    return places
