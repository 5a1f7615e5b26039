"""Keys and values for decoding: a prompt's are held once, however many rows continue it; each row has its own tail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rerankkit.lm.attention import Layout, Part, attend_part, autocast_states, merge, run_decoder, takes_layouts
from rerankkit.lm.policy import Policy

PREFILL_TOKENS = 4096
"""Prompt tokens that run at once, a longer prompt alone: bounds what is held beside the cache."""


class Prefill:
    """Prompts run once: keys and values [P, K, S, D] of each layer, padded on the right, and what predicts the next.

    `hidden` [P, H] is the state at each prompt's last token.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for an empty prompt. Call it without gradients."""
        if not all(prompts):
            raise ValueError("an empty prompt: nothing predicts the first token of its continuation")
        self.policy = policy
        self.shares = takes_layouts(policy)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        hidden = []
        start = 0
        while start < len(prompts):
            stop, total = start + 1, len(prompts[start])
            while stop < len(prompts) and total + len(prompts[stop]) <= PREFILL_TOKENS:
                total += len(prompts[stop])
                stop += 1
            hidden.append(self._run(prompts, start, stop) if self.shares else self._run_padded(prompts, start, stop))
            start = stop
        self.hidden = torch.cat(hidden).to(policy.model.get_output_embeddings().weight.dtype)

    def _run(self, prompts: Sequence[Sequence[int]], start: int, stop: int) -> Tensor:
        """Prompts `start` to `stop` in one row, no padding."""
        device = self.policy.device
        ends = np.cumsum([0, *map(len, prompts[start:stop])]).tolist()
        layout = Layout([Part(first, last) for first, last in pairwise(ends)])
        flat = torch.tensor([token for prompt in prompts[start:stop] for token in prompt], device=device)
        places = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts[start:stop]])
        cache: Any = DynamicCache()
        hidden = run_decoder(self.policy, flat[None], places[None], layout, cache)[0]
        states = [autocast_states(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self._make_room(states, len(prompts))
        for layer, (key, value) in enumerate(states):
            for row, (first, last) in enumerate(pairwise(ends), start):
                self.keys[layer][row, :, : last - first] = key[:, first:last]
                self.values[layer][row, :, : last - first] = value[:, first:last]
        return hidden[torch.tensor(ends[1:], device=device) - 1]

    def _run_padded(self, prompts: Sequence[Sequence[int]], start: int, stop: int) -> Tensor:
        device, width = self.policy.device, max(map(len, prompts[start:stop]))
        rows = [[*prompt, *[self.policy.pad_id] * (width - len(prompt))] for prompt in prompts[start:stop]]
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        cache: Any = DynamicCache()
        hidden = self.policy.decoder(
            input_ids=torch.tensor(rows, device=device),
            position_ids=torch.arange(width, device=device).expand(len(rows), width),
            attention_mask=causal.expand(len(rows), 1, width, width),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        states = [autocast_states(layer.keys, layer.values) for layer in cache.layers]
        self._make_room([(key[0], value[0]) for key, value in states], len(prompts))
        for layer, (key, value) in enumerate(states):
            self.keys[layer][start:stop, :, :width] = key
            self.values[layer][start:stop, :, :width] = value
        last: Tensor = hidden[torch.arange(len(rows), device=device), self.lengths[start:stop] - 1]
        return last

    def _make_room(self, states: Sequence[tuple[Tensor, ...]], num_prompts: int) -> None:
        if not self.keys:
            width = int(self.lengths.max())
            for held, which in ((self.keys, 0), (self.values, 1)):
                shapes = [(pair[which].shape[0], width, pair[which].shape[2]) for pair in states]
                held += [states[0][which].new_zeros(num_prompts, *shape) for shape in shapes]


class Branches:
    """N rows, each continuing one prompt of a `Prefill`, decoding in step; `owners[i]` is the prompt of row i."""

    def __init__(self, prefill: Prefill, owners: Sequence[int], room: int) -> None:
        self.policy, self.shares = prefill.policy, prefill.shares
        self.owners = np.asarray(owners, dtype=np.int64)
        self.keys, self.values = list(prefill.keys), list(prefill.values)
        self.lengths = prefill.lengths
        self.wide = self.policy.model.get_output_embeddings().weight.dtype
        self._bias: Tensor | None = None
        self.cache: Any = Cache(layers=[_Tail(len(owners), room) for _ in self.keys])
        self._arrange()

    def step(self, token_ids: Tensor, position_ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Hidden states [N, W, H] of one more token for each row, or of W more, ids and positions [N, W].

        A token sees its prompt and, of its row's tail so far and the W new places, what `keep` [N, W, t + W] says;
        everything by default, which suits W = 1.
        """
        if self.shares:
            self._bias = None if keep is None else self._additive(keep[:, None])
            hidden = run_decoder(self.policy, token_ids, position_ids, self, self.cache)
        else:
            num, width = token_ids.shape
            filled = self.cache.get_seq_length()
            owners = torch.from_numpy(self.owners).to(token_ids.device)
            seen = (self._places < self.lengths[:, None])[owners, None].expand(num, width, -1)
            own = token_ids.new_ones(num, width, filled + width, dtype=torch.bool) if keep is None else keep
            for layer, keys, values in zip(self.cache.layers, self.keys, self.values, strict=True):
                layer.before = keys[owners], values[owners]
            hidden = self.policy.decoder(
                input_ids=token_ids,
                position_ids=position_ids,
                attention_mask=torch.cat([seen, own], dim=-1)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        return hidden.to(self.wide)

    def leave(self, done: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Let rows go; rows from the end take their places. Returns which old row each remaining place now holds."""
        remaining = int((~done).sum())
        places = np.arange(remaining)
        holes = places[done[:remaining]]
        movers = remaining + np.flatnonzero(~done[remaining:])
        places[holes] = movers
        source, target = (torch.from_numpy(x).to(self.policy.device) for x in (movers, holes))
        for layer in self.cache.layers:
            layer.move(source, target, remaining)
        self.owners = self.owners[places]
        self._arrange()
        return places

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Attends`: all rows of a prompt are queries of one product with its keys; then each its own tail."""
        layer: Any = module.layer_idx
        query, key, value = autocast_states(query, key, value)
        num, heads, width, size = query.shape
        kv_heads = key.shape[1]
        q = query.reshape(num, kv_heads, -1, size)  # the queries of a group of heads, W each
        bias = self._bias
        if bias is not None and heads != kv_heads:
            bias = bias[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
        own, own_lse = attend_part(q, key, value, scale, bias)
        many = q.shape[2]
        spread = q if self._slots is None else q[self._slots]
        # [P, K, rows * many, D]
        folded = spread.view(len(self.lengths), -1, *q.shape[1:]).transpose(1, 2).flatten(2, 3)
        out, lse = attend_part(folded, self.keys[layer], self.values[layer], scale, self._hidden_padding(q))
        out, lse = (x.reshape(*x.shape[:2], -1, many, *x.shape[3:]).transpose(1, 2).flatten(0, 1) for x in (out, lse))
        if self._row_slots is not None:
            out, lse = out[self._row_slots], lse[self._row_slots]
        merged, _ = merge(own, own_lse, out, lse)
        return merged.reshape(num, heads, width, size).transpose(1, 2)

    def _arrange(self) -> None:
        """Where the rows of each prompt are: `_slots` [P * G] lists them, G the most of any; None if they lie so."""
        num_prompts = len(self.lengths)
        live = np.unique(self.owners)
        if self.shares and len(live) <= num_prompts // 2:  # halving keeps what is copied below what was held
            device = self.lengths.device
            chosen = torch.from_numpy(live).to(device)
            width = int(self.lengths[chosen].max()) if len(live) else 0
            self.keys = [keys[chosen, :, :width] for keys in self.keys]
            self.values = [values[chosen, :, :width] for values in self.values]
            self.lengths = self.lengths[chosen]
            self.owners = np.searchsorted(live, self.owners)
            num_prompts = len(live)
        width = self.keys[0].shape[2]
        self._places = torch.arange(width, device=self.lengths.device)
        self._padded = bool((self.lengths < width).any())
        self._padding: Tensor | None = None
        self._slots: Tensor | None = None
        self._row_slots: Tensor | None = None
        counts = np.bincount(self.owners, minlength=num_prompts)
        most = int(counts.max(initial=0))
        if not np.array_equal(self.owners, np.repeat(np.arange(num_prompts), most)):
            order = np.argsort(self.owners, kind="stable")
            ranks = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            row_slots = np.empty(len(order), dtype=np.int64)
            row_slots[order] = self.owners[order] * most + ranks
            slots = np.zeros(num_prompts * most, dtype=np.int64)  # a slot without a row repeats row 0, for nobody
            slots[row_slots] = np.arange(len(order))
            self._slots, self._row_slots = (torch.from_numpy(x).to(self.lengths.device) for x in (slots, row_slots))

    def _hidden_padding(self, like: Tensor) -> Tensor | None:
        if self._padded and self._padding is None:
            keep = self._places < self.lengths[:, None]
            self._padding = like.new_zeros(keep.shape).masked_fill_(~keep, -torch.inf)[:, None, None]
        return self._padding

    def _additive(self, keep: Tensor) -> Tensor:
        return torch.zeros(keep.shape, dtype=self.keys[0].dtype, device=keep.device).masked_fill_(~keep, -torch.inf)


class _Tail(DynamicLayer):  # type: ignore[misc,no-untyped-call,unused-ignore]  # transformers types in part
    """One layer's keys and values [N, K, room, D], filled up to `length`; only the first `rows` rows are in use."""

    def __init__(self, rows: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.rows, self.room, self.length = rows, room, 0
        self.before: tuple[Tensor, Tensor] | None = None
        """What a model that cannot share is given in front of the tails, a copy for each row."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new places, and give back everything so far, as views."""
        new = autocast_states(key_states, value_states)
        if not self.length:
            num, heads, _, _ = new[0].shape
            self.all_keys, self.all_values = (x.new_empty(num, heads, self.room, x.shape[3]) for x in new)
            self.is_initialized = True
        end = self.length + key_states.shape[2]
        self.all_keys[: self.rows, :, self.length : end] = new[0]
        self.all_values[: self.rows, :, self.length : end] = new[1]
        self.length = end
        keys, values = self.all_keys[: self.rows, :, :end], self.all_values[: self.rows, :, :end]
        if self.before is None:
            return keys, values
        return torch.cat([self.before[0], keys], dim=2), torch.cat([self.before[1], values], dim=2)

    def get_seq_length(self) -> int:
        """Places filled so far."""
        return self.length

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copy rows `source` over rows `target`, then use the first `rows` only."""
        if len(source) and self.length:
            self.all_keys[target, :, : self.length] = self.all_keys[source, :, : self.length]
            self.all_values[target, :, : self.length] = self.all_values[source, :, : self.length]
        self.rows = rows


@contextmanager
def lowered(policy: Policy, dtype: torch.dtype | None) -> Iterator[None]:
    """The model's weights in `dtype` for a while, embeddings and output layer apart; None changes nothing.

    Decoding multiplies by every weight for a few rows at a time, so the weights' width is most of its cost; autocast
    would cast them, and every activation, at every step. The weights themselves are not touched.
    """
    embedding, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    apart = {id(parameter) for layer in (embedding, head) for parameter in layer.parameters()}
    changed = [p for p in policy.model.parameters() if p.dtype == torch.float32 and id(p) not in apart]
    if dtype is None or dtype == torch.float32 or not changed:
        yield
        return
    before = [parameter.data for parameter in changed]
    hook = embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    try:
        for parameter in changed:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        hook.remove()
        for parameter, data in zip(changed, before, strict=True):
            parameter.data = data


def bfloat16_pays(device: torch.device) -> bool:
    """Whether decoding in bfloat16 is faster: on a CPU, only if it multiplies bfloat16 in hardware (AMX, AVX-512)."""
    if device.type != "cpu":
        return True
    able = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
