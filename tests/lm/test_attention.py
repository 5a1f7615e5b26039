"""Layouts against the dense mask that they stand for: outputs and gradients, on every path there is."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rerankkit.lm import Policy, TrainSequence, group_logps, packed_logps, roll_out, score_continuations
from rerankkit.lm.attention import NAME, Layout, Part, _flex, attend_part, merge, takes_layouts


def group(prompt: int, lengths: list[int], start: int = 0) -> list[Part]:
    parts, shared = [Part(start, start + prompt)], (start, start + prompt)
    for length in lengths:
        parts.append(Part(parts[-1].stop, parts[-1].stop + length, shared))
    return parts


def states(num: int, heads: int, kv_heads: int, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # as models hand them over: [1, T, H, D] in memory
    q, k, v = (torch.randn(1, num, h, size, generator=generator).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def dense(layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    return scaled_dot_product_attention(q, k, v, layout.keep(q.device), scale=scale).transpose(1, 2)


def test_what_sees_what_by_hand() -> None:
    # a prompt of 2 and its completions of 2 and 1; then a sequence of 2 of which each place sees only itself
    parts = [*group(2, [2, 1]), Part(5, 7, mask=torch.eye(2, dtype=torch.bool))]
    assert Layout(parts).keep(torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert Layout(parts).sharing == [(2, 5, 0, 2)]


GROUPS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=4)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]), st.integers(0, 9), st.booleans())
def test_parts_and_merging_equal_the_dense_mask(groups, heads: tuple[int, int], seed: int, masked: bool) -> None:
    parts: list[Part] = []
    for prompt, lengths in groups:
        parts += group(prompt, lengths, parts[-1].stop if parts else 0)
    if masked:
        sees = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
        shared = (0, min(2, parts[-1].stop))  # not into itself
        parts.append(Part(parts[-1].stop, parts[-1].stop + 4, shared, sees | torch.eye(4, dtype=torch.bool)))
    layout = Layout(parts)
    inputs = states(layout.num_places, *heads, seed=seed)
    weight = torch.randn(1, layout.num_places, heads[0], 8, generator=torch.Generator().manual_seed(seed))
    ours, wanted = layout.attend(torch.nn.Identity(), *inputs, 0.3), dense(layout, *inputs, 0.3)
    assert torch.allclose(ours, wanted, atol=2e-6)
    slopes = [torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, wanted)]
    for got, expected in zip(*slopes, strict=True):
        assert torch.allclose(got, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(deadline=None, max_examples=30)
@given(GROUPS)
def test_flex_attention_is_given_the_same_mask(groups) -> None:
    """Eager FlexAttention on the CPU; compiled, it is what CUDA runs."""
    parts: list[Part] = []
    for prompt, lengths in groups:
        parts += group(prompt, lengths, parts[-1].stop if parts else 0)
    layout = Layout(parts)
    q, k, v = (x.detach() for x in states(layout.num_places, 4, 2, size=16))
    got = _flex(q, k, v, layout.block_mask(q.device), 0.3).transpose(1, 2)
    assert torch.allclose(got, dense(layout, q, k, v, 0.3), atol=2e-6)


def test_the_dense_mask_stands_in_where_there_is_nothing_better() -> None:
    layout = Layout([*group(3, [2, 4]), Part(9, 11)])
    bias = layout.bias(torch.float32, torch.device("cpu"))
    assert bias.shape == (1, 1, 11, 11) and bias is layout.bias(torch.float32, torch.device("cpu"))
    assert torch.equal(bias[0, 0] == 0, layout.keep(torch.device("cpu")))


@pytest.mark.parametrize("how", ["all", "causal", "mask"])
def test_a_part_without_a_kernel_of_its_own(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in states(6, 4, 4))
    mask = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) if how == "mask" else None
    fast, lse = attend_part(q, k, v, 0.3, mask, how == "causal")

    class Elsewhere(Tensor):
        device = torch.device("meta")  # type: ignore[assignment]

    plain, other = attend_part(q.as_subclass(Elsewhere), k, v, 0.3, mask, how == "causal")
    assert torch.allclose(fast, plain.as_subclass(Tensor), atol=1e-6)
    assert torch.allclose(lse, other.as_subclass(Tensor), atol=1e-6)


def test_two_sets_of_keys_merge_into_one() -> None:
    q, k, v = (x.detach() for x in states(9, 4, 4))
    whole, lse = attend_part(q, k, v, 0.5)
    halves = [attend_part(q, k[:, :, part], v[:, :, part], 0.5) for part in (slice(0, 2), slice(2, 9))]
    merged, total = merge(*halves[0], *halves[1])
    assert torch.allclose(merged, whole, atol=1e-6) and torch.allclose(total, lse, atol=1e-6)
    # by hand: weights e^1 and e^2 on values 0 and 1
    out, total = merge(torch.zeros(1), torch.tensor(1.0), torch.ones(1), torch.tensor(2.0))
    assert out.item() == pytest.approx(0.7310586) and total.item() == pytest.approx(2.3132617)


def test_bfloat16_stays_near() -> None:
    layout = Layout([*group(40, [30, 30]), Part(100, 130)])
    inputs = [x.detach() for x in states(130, 4, 2, size=16)]
    exact = layout.attend(torch.nn.Identity(), *inputs, 0.25)
    rough = layout.attend(torch.nn.Identity(), *(x.bfloat16() for x in inputs), 0.25)
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).abs().max()) < 0.02


def test_a_layout_survives_gradient_checkpointing(make) -> None:
    slopes = []
    for checkpointing in (False, True):
        policy = make(num_kv_heads=2)
        policy.model.train()
        if checkpointing:
            before_5 = policy.model.gradient_checkpointing_enable  # what transformers called it
            getattr(policy.model, "activation_checkpointing_enable", before_5)({"use_reentrant": False})
        group_logps(policy, [[5, 6, 7]], [[[1, 2, 3], [4, 5, 6, 7]]]).logps.sum().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert torch.allclose(*slopes, atol=1e-5 * float(slopes[0].abs().max()))


def test_the_model_takes_layouts_again_after_somebody_switched_it_back(make) -> None:
    policy = make()
    before = group_logps(policy, [[5, 6, 7]], [[[1, 2, 3], [4, 5]]]).logps
    assert policy.model.config._attn_implementation == NAME
    policy.model.set_attn_implementation("sdpa")
    assert torch.allclose(group_logps(policy, [[5, 6, 7]], [[[1, 2, 3], [4, 5]]]).logps, before, atol=1e-6)


def test_every_other_use_of_the_model_stays_what_it_was(make) -> None:
    policy = make()
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]])
    settings = {"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), "do_sample": False, "max_new_tokens": 8}
    before = policy.model.generate(ids, pad_token_id=0, eos_token_id=None, **settings)
    logits = policy.model(ids[:1]).logits
    assert takes_layouts(policy)
    assert torch.equal(policy.model.generate(ids, pad_token_id=0, eos_token_id=None, **settings), before)
    assert torch.equal(policy.model(ids[:1]).logits, logits)


def test_the_attention_is_not_saved(make, tmp_path) -> None:
    policy = make()
    assert takes_layouts(policy)
    policy.save(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert Policy.load(tmp_path).model.config._attn_implementation == "sdpa"


@pytest.fixture
def stubborn(tiny) -> Policy:
    """A rotary architecture whose attention does not go through the interface."""
    config = transformers.FalconConfig(
        vocab_size=tiny.model.get_input_embeddings().num_embeddings, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, alibi=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(transformers.FalconForCausalLM(config).eval(), tiny.text_tokenizer)
    for parameter in policy.model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return policy


def test_an_architecture_that_cannot_share_falls_back_with_one_warning(stubborn) -> None:
    prompts, groups = [[5, 6, 7, 8], [9]], [[[1, 2, 3], [1, 4]], [[7], [8, 9]]]
    with pytest.warns(UserWarning, match="falcon: its attention cannot be replaced") as caught:
        shared = group_logps(stubborn, prompts, groups).logps
    assert len(caught) == 1 and stubborn.model.config._attn_implementation == "sdpa"
    sequences = [p + c for p, group in zip(prompts, groups, strict=True) for c in group]
    rows = [[TrainSequence(tuple(s), (1.0,) * len(s)) for s in sequences]]
    packed = packed_logps(stubborn, rows)
    plain = [
        stubborn.model(input_ids=torch.tensor([s])).logits[0].log_softmax(-1)[range(len(s) - 1), s[1:]]
        for s in sequences
    ]
    assert torch.allclose(packed.logps, torch.cat(plain), atol=1e-5)
    ends = [part[-len(c) :] for part, c in zip(plain, [c for group in groups for c in group], strict=True)]
    assert torch.allclose(shared, torch.cat(ends), atol=1e-5)
    samples = roll_out(stubborn, prompts, 3, max_new_tokens=6, temperature=1.0, seeds=[1, 2])
    again = group_logps(stubborn, prompts, [[s.token_ids for s in group] for group in samples])
    assert torch.allclose(again.logps, torch.tensor([x for g in samples for s in g for x in s.logps]), atol=1e-4)
    scores = score_continuations(stubborn, prompts, groups)
    assert torch.allclose(torch.tensor(scores).flatten(), torch.stack([e.sum() for e in ends]), atol=1e-4)


def test_dropout_of_attention_is_warned_of_once_and_only_in_training(make) -> None:
    policy = make()
    policy.model.config.attention_dropout = 0.1
    rows = [[TrainSequence((1, 2, 3), (0.0, 1.0, 1.0))]]
    packed_logps(policy, rows)  # not in training: no warning, which would be an error here
    policy.model.train()
    with pytest.warns(UserWarning, match=r"llama: its config has attention_dropout = 0\.1") as caught:
        packed_logps(policy, rows)
    packed_logps(policy, rows)  # a second one would be an error
    assert len(caught) == 1 and not takes_layouts(policy)
    policy.model.eval()
    assert takes_layouts(policy)
