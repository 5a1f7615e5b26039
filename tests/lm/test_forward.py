"""Packed equals one by one, shared prompt equals repeated prompt: log-probabilities, entropies and gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rerankkit.errors import UsageError
from rerankkit.lm import Policy, TrainSequence, forward, group_logps, packed_logps, roll_out


def ids(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(300) for _ in range(length)]


def plain(policy: Policy, token_ids: list[int], temperature: float = 1.0) -> Tensor:
    """log P of tokens 1.. by the model's own forward, one sequence alone, no mask."""
    logits = policy.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0] / temperature
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def gradient(policy: Policy, loss: Callable[[], Tensor]) -> Tensor:
    policy.model.zero_grad()
    loss().backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_packed_equals_one_by_one(make, shape) -> None:
    policy, draw = make(**shape), random.Random(1)
    made = [
        TrainSequence(tuple(ids(draw, n)), tuple(draw.choice([0.0, 0.5, 2.0]) for _ in range(n)))
        for n in (5, 1, 9, 7, 3)
    ]
    rows = [[made[0], made[1], made[2]], [made[3], made[4]]]

    def alone() -> Tensor:
        parts = [plain(policy, list(s.token_ids)) * torch.tensor(s.weights[1:]) for s in made if len(s) > 1]
        return torch.cat(parts).sum()

    def packed() -> Tensor:
        result = packed_logps(policy, rows)
        return (result.logps * result.weights).sum()

    result = packed_logps(policy, rows)
    for number, sequence in enumerate(made):
        expected = plain(policy, list(sequence.token_ids)).detach()[[w != 0 for w in sequence.weights[1:]]]
        assert torch.allclose(result.split()[number], expected, atol=1e-5)
    slopes = gradient(policy, alone), gradient(policy, packed)
    assert cosine(*slopes) > 0.9999
    assert torch.allclose(*slopes, atol=1e-3 * float(slopes[0].abs().max()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_shared_prompt_equals_repeated_prompts(make, shape, temperature: float) -> None:
    policy, draw = make(**shape), random.Random(2)
    prompts = [ids(draw, 11), ids(draw, 6)]
    groups = [[ids(draw, n) for n in (4, 1, 0, 6)], [ids(draw, n) for n in (3, 8)]]
    scale = torch.randn(22, generator=torch.Generator().manual_seed(0))

    def repeated() -> Tensor:
        return torch.cat(
            [
                plain(policy, p + c, temperature)[len(p) - 1 :]
                for p, group in zip(prompts, groups, strict=True)
                for c in group
            ]
        )

    def shared() -> Tensor:
        return group_logps(policy, prompts, groups, temperature=temperature).logps

    assert torch.allclose(shared(), repeated(), atol=1e-5)
    slopes = gradient(policy, lambda: (repeated() * scale).sum()), gradient(policy, lambda: (shared() * scale).sum())
    assert cosine(*slopes) > 0.9999
    assert torch.allclose(*slopes, atol=1e-3 * float(slopes[0].abs().max()))


def test_what_completions_begin_with_alike_is_read_once(make, shape) -> None:
    policy = make(**shape)
    prompts = [[5, 6, 7], [8, 9]]
    # all of it; a part, one stops inside the fourth's beginning; nothing, beside one without tokens
    groups = [[[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 3, 9], [1, 2, 3], [1, 2, 7, 7, 7], [1]]]
    groups, prompts = [*groups, [[3, 4], [], [4, 4]]], [*prompts, [1]]
    with counting(policy) as seen:
        shared = group_logps(policy, prompts, groups).logps
    # 3 + 3 | 2 + 1 2 + (3, none of 1 2's own, 7 7) | 1 + 3 + 4; the last token of each is predicted, never read
    assert seen == [3 + 3 + 2 + 2 + 1 + 2 + 1 + 1 + 1]
    repeated = [
        plain(policy, p + c)[len(p) - 1 :] for p, group in zip(prompts, groups, strict=True) for c in group if c
    ]
    assert torch.allclose(shared, torch.cat(repeated), atol=1e-5)


def test_what_nobody_reads_is_not_run(tiny) -> None:
    sequences = [TrainSequence((1, 2, 3, 4, 5), (0.0, 0.0, 1.0, 0.0, 0.0)), TrainSequence((1, 2, 3), (0.0,) * 3)]
    with counting(tiny) as seen:
        logps = packed_logps(tiny, [sequences]).logps
    assert seen == [2]  # tokens 1 and 2, which predict 3
    assert torch.allclose(logps, plain(tiny, [1, 2, 3])[1:], atol=1e-5)


@contextmanager
def counting(policy: Policy) -> Iterator[list[int]]:
    """Tokens of every forward pass."""
    assert group_logps(policy, [[1]], [[[2]]]).num_sequences == 1  # the first pass tries the architecture
    seen: list[int] = []
    table = policy.model.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    yield seen
    hook.remove()


def test_results_are_numbered_and_can_be_padded(tiny) -> None:
    result = group_logps(tiny, [[5, 6], [7]], [[[1, 2], []], [[3]]])
    assert result.sequence_ids.tolist() == [0, 0, 2] and result.num_sequences == 3
    assert [len(part) for part in result.split()] == [2, 0, 1]
    table, real = result.padded(fill=-1.0)
    assert real.tolist() == [[True, True], [False, False], [True, False]]
    assert table[1].tolist() == [-1.0, -1.0] and table[2, 0] == result.logps[2]


def test_entropies_are_those_of_the_whole_distribution(tiny) -> None:
    result = group_logps(tiny, [[5, 6]], [[[1, 2]]], temperature=0.5, entropies=True)
    logps = (tiny.model(input_ids=torch.tensor([[5, 6, 1]])).logits[0] / 0.5).log_softmax(-1)
    expected = -(logps.exp() * logps).sum(-1)[1:].detach()
    assert result.entropies is not None
    assert torch.allclose(result.entropies, expected, atol=1e-4)
    assert 0 < float(expected[0]) < math.log(logps.shape[-1])


@pytest.mark.parametrize("kept", [0, 2**24])
def test_entropies_have_the_gradient_of_the_whole_distribution(
    tiny, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "KEPT_LOGITS", kept)

    def ours() -> Tensor:
        result = group_logps(tiny, [[5, 6]], [[[1, 2, 3]]], temperature=0.5, entropies=True, chunk=2)
        assert result.entropies is not None
        return (result.entropies * torch.tensor([1.0, -2.0, 3.0])).sum() + result.logps[1]

    def plainly() -> Tensor:
        logps = (tiny.model(input_ids=torch.tensor([[5, 6, 1, 2]])).logits[0, 1:] / 0.5).log_softmax(-1)
        return (-(logps.exp() * logps).sum(-1) * torch.tensor([1.0, -2.0, 3.0])).sum() + logps[1, 2]

    expected = gradient(tiny, plainly)
    assert torch.allclose(gradient(tiny, ours), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kept", [0, 2**24])
def test_chunks_do_not_change_logps_or_gradients(tiny, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "KEPT_LOGITS", kept)
    prompts, groups = [[5, 6, 7]], [[[1, 2, 3], [4, 5]]]
    whole = gradient(tiny, lambda: group_logps(tiny, prompts, groups).logps.sum())
    parts = gradient(tiny, lambda: group_logps(tiny, prompts, groups, chunk=2).logps.sum())
    assert torch.allclose(whole, parts, atol=1e-4 * float(whole.abs().max()))
    a, b = (group_logps(tiny, prompts, groups, entropies=True, chunk=c) for c in (100, 2))
    assert torch.allclose(a.logps, b.logps, atol=1e-6) and torch.allclose(a.entropies, b.entropies, atol=1e-6)


def test_bfloat16_is_near_float32_and_gives_float32(make) -> None:
    policy = make()
    for parameter in policy.model.parameters():
        parameter.data.div_(3)
    prompts, groups = [[5, 6, 7]], [[[1, 2, 3], [4, 5]]]
    exact = group_logps(policy, prompts, groups).logps
    rough = group_logps(policy, prompts, groups, autocast=torch.bfloat16).logps
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, atol=0.3)
    rough.sum().backward()


def test_nothing_to_predict_is_nothing(tiny) -> None:
    assert group_logps(tiny, [[1]], [[[]]]).padded()[0].shape == (1, 0)
    assert packed_logps(tiny, [[TrainSequence((1, 2), (1.0, 0.0))]]).logps.shape == (0,)
    assert packed_logps(tiny, []).num_sequences == 0


def test_an_empty_prompt_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        group_logps(tiny, [[]], [[[1]]])


def test_sequences_longer_than_the_model_are_refused(make) -> None:
    policy = make(max_positions=8)
    fits = packed_logps(policy, [[TrainSequence((1,) * 8, (1.0,) * 8)] * 3])  # 24 in the row, 8 in each
    assert fits.logps.shape == (21,)
    with pytest.raises(UsageError, match="a sequence of 9 tokens, but llama has 8 positions"):
        packed_logps(policy, [[TrainSequence((1,) * 9, (1.0,) * 9)]])
    with pytest.raises(UsageError, match="a sequence of 9 tokens"):
        roll_out(policy, [[1] * 5], 1, max_new_tokens=4, temperature=1.0, seeds=[0])
