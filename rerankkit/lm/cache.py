"""A key/value cache for decoding: one allocation, rows that can leave or change places without copying the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rerankkit.lm.policy import Policy


class _Layer(DynamicLayer):  # type: ignore[misc,no-untyped-call,unused-ignore]  # transformers types in part
    """One layer's keys and values [N, heads, S, D], filled up to `length`; only the first `rows` rows are in use."""

    def __init__(self, keys: Tensor, values: Tensor, row_ids: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.length = keys.shape[2]
        self.rows = len(row_ids)
        self.all_keys = _copied(keys, row_ids, room)
        self.all_values = _copied(values, row_ids, room)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new places, and give back everything so far, as views."""
        end = self.length + key_states.shape[2]
        self.all_keys[: self.rows, :, self.length : end] = key_states
        self.all_values[: self.rows, :, self.length : end] = value_states
        self.length = end
        return self.all_keys[: self.rows, :, :end], self.all_values[: self.rows, :, :end]

    def get_seq_length(self) -> int:
        """Places filled so far."""
        return self.length

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copy rows `source` over rows `target`, then use the first `rows` only."""
        if len(source):
            self.all_keys[target, :, : self.length] = self.all_keys[source, :, : self.length]
            self.all_values[target, :, : self.length] = self.all_values[source, :, : self.length]
        self.rows = rows


class DecodeCache(Cache):  # type: ignore[misc,unused-ignore]
    """What `Prefill.fork` makes; decode steps write into it in place."""

    layers: list[Any]

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copy rows over others, in every layer, then use the first `rows` only."""
        for layer in self.layers:
            layer.move(source, target, rows)


class Prefill:
    """Prompts run once: their keys and values, and the hidden state [P, H] that predicts what follows each.

    Prompts are padded on the left, so that every continuation starts at the same place of the cache.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for an empty prompt. Call it without gradients."""
        if not all(prompts):
            raise ValueError("an empty prompt: nothing predicts the first token of its continuation")
        self.device = policy.device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.width = max(len(prompt) for prompt in prompts)
        rows = [[policy.pad_id] * (self.width - len(prompt)) + list(prompt) for prompt in prompts]
        token_ids = torch.tensor(rows, device=self.device)
        places = torch.arange(self.width, device=self.device)
        position_ids = places - (self.width - self.lengths)[:, None]  # [P, S], negative on padding
        self.real = position_ids >= 0
        keep = (places[:, None] >= places) & self.real[:, None, :]
        keep |= torch.eye(self.width, dtype=torch.bool, device=self.device)  # a softmax over nothing is NaN
        self._cache: Any = DynamicCache()
        self.hidden: Tensor = policy.decoder(
            input_ids=token_ids,
            position_ids=position_ids.clamp(min=0),
            attention_mask=keep[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def fork(self, row_ids: Sequence[int], room: int) -> tuple[DecodeCache, Tensor]:
        """A cache whose row i continues prompt `row_ids[i]`, with `room` places to fill, and its mask [N, S + room]."""
        rows = torch.tensor(row_ids, device=self.device)
        cache = DecodeCache(layers=[_Layer(layer.keys, layer.values, rows, room) for layer in self._cache.layers])
        tail = torch.ones(len(rows), room, dtype=torch.bool, device=self.device)
        return cache, torch.cat([self.real[rows], tail], dim=1)


def _copied(states: Tensor, row_ids: Tensor, room: int) -> Tensor:
    _, heads, length, size = states.shape
    table = states.new_empty(len(row_ids), heads, length + room, size)
    table[:, :, :length] = states[row_ids]
    return table
