"""Attention that pays for what is seen: packed sequences, a prompt shared by a group, one set of keys for G samples.

The model stays the one from transformers. Its attention function is replaced through `AttentionInterface`; a keyword
argument of the forward pass, `layout`, says which place sees which, and without it the function is plain SDPA.

A softmax over two sets of keys is the mean of the two softmaxes, weighted by the sums of their exponentials (Milakov &
Gimelshein 2018, section 3). So what is shared is attended to by all at once and merged with what is each one's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rerankkit.lm.policy import Policy, quiet

NAME = "rerankkit"
"""What the attention function is called in a model's config while it is in memory; it is not saved."""

_SDPA: Any = sdpa_attention_forward
_CPU: Any = torch.ops.aten
_SHORT = 512
"""Queries up to which the backward kernel is faster in float32: in bfloat16 it takes 8 times as long for 57 of them."""


class Attends(Protocol):
    """What may be passed as `layout`."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Queries [B, H, T, D] on keys and values [B, K, S, D], K dividing H, to outputs [B, T, H, D]."""


@dataclass(frozen=True, slots=True)
class Part:
    """Places `start` to `stop` of a row. They see places `shared[0]` to `shared[1]`, all of them, and one another."""

    start: int
    stop: int
    shared: tuple[int, int] = (0, 0)
    mask: Tensor | None = None
    """[L, L] bool: which of its own places each place sees; None is each up to itself."""

    def moved(self, by: int) -> Part:
        """The same, `by` places further on."""
        first, last = self.shared
        return Part(self.start + by, self.stop + by, (first + by, last + by), self.mask)


@dataclass(frozen=True)
class Layout:
    """One row [1, T] that `parts` cover without gap or overlap."""

    parts: Sequence[Part]
    _made: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_places(self) -> int:
        """T."""
        return self.parts[-1].stop if self.parts else 0

    @property
    def sharing(self) -> list[tuple[int, int, int, int]]:
        """Start and stop of each run of places that share, and start and stop of what they share."""
        runs = [(shared, list(parts)) for shared, parts in groupby(self.parts, key=lambda part: part.shared)]
        return [(parts[0].start, parts[-1].stop, *shared) for shared, parts in runs if shared[0] < shared[1]]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Attends`; B is 1."""
        query, key, value = autocast_states(query, key, value)
        if query.device.type == "cpu":
            out: Tensor = _TwoPart.apply(query, key, value, self, scale)  # type: ignore[no-untyped-call]
            return out
        if query.device.type == "cuda" and all(part.mask is None for part in self.parts):
            return _flex(query, key, value, self.block_mask(query.device), scale).transpose(1, 2)
        gqa = query.shape[1] != key.shape[1]
        bias = self.bias(query.dtype, query.device)
        out = nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2)

    def keep(self, device: torch.device) -> Tensor:
        """Which place sees which, [T, T] bool."""
        keep = torch.zeros(self.num_places, self.num_places, dtype=torch.bool, device=device)
        for part in self.parts:
            rows = keep[part.start : part.stop]
            own = rows[:, part.start : part.stop]
            own |= torch.ones_like(own).tril() if part.mask is None else part.mask.to(device)
            rows[:, part.shared[0] : part.shared[1]] = True
        return keep

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`keep` as [1, 1, T, T], 0 or -inf; made once."""
        key = dtype, device
        if key not in self._made:
            keep = self.keep(device)[None, None]
            self._made[key] = torch.zeros(keep.shape, dtype=dtype, device=device).masked_fill_(~keep, -torch.inf)
        bias: Tensor = self._made[key]
        return bias

    def block_mask(self, device: torch.device) -> BlockMask:
        """`keep` as FlexAttention wants it, without the [T, T] matrix; parts with masks of their own are beyond it."""
        if device not in self._made:
            lengths = torch.tensor([part.stop - part.start for part in self.parts], device=device)
            number = torch.arange(len(self.parts), device=device).repeat_interleave(lengths)
            first, last = (torch.tensor([p.shared[i] for p in self.parts], device=device)[number] for i in (0, 1))

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (number[q] == number[k]) & (k <= q) | (k >= first[q]) & (k < last[q])

            self._made[device] = create_block_mask(sees, None, None, self.num_places, self.num_places, device)
        made: BlockMask = self._made[device]
        return made


class _TwoPart(torch.autograd.Function):
    """Parts on their own keys, runs of parts on what they share, merged; nothing that is hidden is computed.

    Backward: the gradient of a softmax over all keys falls apart by keys, given the *merged* output and log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        q, k, v = _by_kv_head(query, key, value)
        heads, times, places, size = q.shape
        out = q.new_empty(places, heads, times, size).permute(1, 2, 0, 3)
        total = q.new_empty(heads, times, places, dtype=torch.float32)
        for start, stop, first, last, mask in _pieces(layout, q):
            own = slice(start, stop)
            some, lse = attend_part(q[:, :, own], k[:, :, first:last], v[:, :, first:last], scale, mask, start == first)
            if start == first:
                out[:, :, own], total[:, :, own] = some, lse
            else:
                out[:, :, own], total[:, :, own] = merge(out[:, :, own], total[:, :, own], some, lse)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.layout, ctx.scale = layout, scale
        return out.permute(2, 0, 1, 3).flatten(1, 2)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, total = ctx.saved_tensors
        q, k, v = _by_kv_head(query, key, value)
        heads, times, places, size = q.shape
        grad = grad.reshape(places, heads, times, size).permute(1, 2, 0, 3)
        shapes = (heads, times, size), (heads, size), (heads, size)
        grad_q, grad_k, grad_v = (torch.empty(places, *shape, device=q.device).movedim(0, -2) for shape in shapes)
        for start, stop, first, last, mask in _pieces(ctx.layout, q):
            own, seen = slice(start, stop), slice(first, last)
            states: tuple[Tensor, ...] = grad[:, :, own], q[:, :, own], k[:, :, seen], v[:, :, seen], out[:, :, own]
            if stop - start <= _SHORT:
                states, mask = tuple(x.float() for x in states), mask if mask is None else mask.float()
            some_q, some_k, some_v = _CPU._scaled_dot_product_flash_attention_for_cpu_backward(
                *states, total[:, :, own], 0.0, mask is None and start == first, attn_mask=mask, scale=ctx.scale
            )
            for whole, part in (
                (grad_q[:, :, own], some_q),
                (grad_k[:, seen], some_k.sum(1)),
                (grad_v[:, seen], some_v.sum(1)),
            ):
                if start == first:  # parts come first and cover every place
                    whole.copy_(part)
                else:
                    whole.add_(part)
        return (
            grad_q.flatten(0, 1)[None].to(query.dtype),
            grad_k[None].to(key.dtype),
            grad_v[None].to(value.dtype),
            None,
            None,
        )


def _pieces(layout: Layout, like: Tensor) -> list[tuple[int, int, int, int, Tensor | None]]:
    """Queries from, to, keys from, to and the mask among them: each part on itself, then runs on what they share."""
    key = "pieces", like.dtype
    if key not in layout._made:
        own = [(part.start, part.stop, part.start, part.stop, _additive(part.mask, like)) for part in layout.parts]
        layout._made[key] = own + [(*run, None) for run in layout.sharing]
    pieces: list[tuple[int, int, int, int, Tensor | None]] = layout._made[key]
    return pieces


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return like.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)


def _by_kv_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, H, T, D] and twice [1, K, T, D] as three views [K, H / K, T, D]: keys are not copied for grouped queries."""
    heads, times = key.shape[1], query.shape[1] // key.shape[1]
    k, v = (x[0, :, None].expand(-1, times, -1, -1) for x in (key, value))
    return query.view(heads, times, *query.shape[2:]), k, v


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, T, D] on [B, H, S, D]: outputs, and the log-sum-exp [B, H, T] float32 to merge them by.

    `mask` is additive, broadcast to [B, H, T, S]; it stands in for `causal`. Gradients do not pass.
    """
    if query.device.type == "cpu":
        out, lse = _CPU._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal and mask is None, attn_mask=mask, scale=scale
        )
        return out, lse
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    elif causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One attention over the keys of two: outputs [..., D] and their log-sum-exps [...]."""
    weight = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(out.float(), other.float(), weight).to(out.dtype), torch.logaddexp(lse, other_lse)


def autocast_states(*states: Tensor) -> tuple[Tensor, ...]:
    """What autocast would do, if it is on: rotary embeddings leave queries and keys wider than values."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in states)


_COMPILED: list[Callable[..., Tensor]] = []


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    if query.device.type == "cuda" and not _COMPILED:
        _COMPILED.append(torch.compile(flex_attention, dynamic=True))
    run: Any = _COMPILED[0] if query.device.type == "cuda" else flex_attention
    out: Tensor = run(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Attends | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What models call, by transformers' convention. Raises NotImplementedError for what layouts cannot honour."""
    if layout is None:
        out, _ = _SDPA(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
        return out, None
    odd = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if odd or dropout or value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(f"{dropout=}, {odd}, heads of {query.shape[-1]} and {value.shape[-1]}")
    return layout.attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


transformers.AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def run_decoder(policy: Policy, token_ids: Tensor, position_ids: Tensor, layout: Attends, cache: Any = None) -> Tensor:
    """Hidden states [B, T, H] of token ids [B, T] under a layout. Only if `takes_layouts(policy)`."""
    states: Tensor = policy.decoder(
        input_ids=token_ids,
        position_ids=position_ids,
        # transformers hands a 4-D mask on as it is, and builds one of its own, [T, T], where there is none
        attention_mask=torch.zeros(1, 1, 1, 1, device=token_ids.device),
        past_key_values=cache,
        use_cache=cache is not None,
        layout=layout,
    ).last_hidden_state
    return states


_TAKES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_DROPPING: WeakSet[nn.Module] = WeakSet()


def takes_layouts(policy: Policy) -> bool:
    """Whether the policy's model can run under a `Layout`; found out by trying, once, with a warning if it cannot.

    The model is switched to the attention function of this module, which serves every other use of it as well.
    """
    decoder, config = policy.decoder, policy.model.config
    if getattr(config, "attention_dropout", 0) and policy.model.training:
        if decoder not in _DROPPING:
            _DROPPING.add(decoder)
            warnings.warn(
                f"{config.model_type}: its config has attention_dropout = {config.attention_dropout}, for which "
                "training takes dense masks, at several times the time and memory; and in RL the trainer is then not "
                "the policy that was sampled. Set it to 0 in the model's config.json.",
                stacklevel=3,
            )
        return False
    if decoder not in _TAKES:
        _TAKES[decoder] = _try(policy)
        if not _TAKES[decoder]:
            warnings.warn(
                f"{config.model_type}: its attention cannot be replaced through transformers' AttentionInterface. "
                "Results are the same, but prompts are copied for every sample and masks are dense, which costs "
                "several times the time and memory.",
                stacklevel=3,
            )
    if _TAKES[decoder] and config._attn_implementation != NAME:
        policy.model.set_attn_implementation(NAME)
    return _TAKES[decoder]


@torch.no_grad()
def _try(policy: Policy) -> bool:
    """Run two short sequences under a layout and one by one: the same hidden states?"""
    model, decoder = policy.model, policy.decoder
    before, training = model.config._attn_implementation, model.training
    model.eval()
    ids = torch.arange(7, device=policy.device) % model.get_input_embeddings().weight.shape[0]
    layout = Layout([Part(0, 3), Part(3, 5, (0, 3)), Part(5, 7, (0, 3))])
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=policy.device)
    alone = ids[:5], ids[[0, 1, 2, 5, 6]]
    try:
        with quiet(), torch.autocast(policy.device.type, enabled=False):
            first, second = (decoder(input_ids=x[None], use_cache=False).last_hidden_state[0] for x in alone)
            wanted = torch.cat([first, second[3:]]).float()
            model.set_attn_implementation(NAME)
            got = run_decoder(policy, ids[None], position_ids, layout)[0].float()
        # of weights that are no numbers, the loss will tell
        limit = 1e-3 if first.dtype == torch.float32 else 0.05
        error = float((got - wanted).norm() / wanted.norm()) if wanted.isfinite().all() else 0.0
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        error, limit = torch.inf, 0.0
    finally:
        model.train(training)
    same = not error > limit  # no number, of weights beyond all bounds, says nothing about the architecture
    if not same:
        with quiet():
            model.set_attn_implementation(before)
    return same
