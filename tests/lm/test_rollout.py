from __future__ import annotations

import random
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rerankkit.lm import Policy, group_logps, roll_out
from rerankkit.lm.rollout import draw

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22, 23, 24, 25, 26, 27], [30]]
SETTINGS = {"max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture
def stops(tiny) -> Policy:
    """A fifth of the vocabulary ends a sample, so that samples end at different times."""
    with patch.object(Policy, "stop_ids", frozenset(range(0, 400, 5))):
        yield tiny


def test_logps_are_what_the_trainer_recomputes(make, shape) -> None:
    policy = make(**shape)
    for temperature in (1.0, 0.7):
        groups = roll_out(policy, PROMPTS, 3, max_new_tokens=9, temperature=temperature, seeds=[1, 2, 3, 4])
        again = group_logps(
            policy, PROMPTS, [[s.token_ids for s in group] for group in groups], temperature=temperature
        )
        drawn = torch.tensor([logp for group in groups for sample in group for logp in sample.logps])
        assert torch.allclose(again.logps, drawn, atol=1e-4)


def test_samples_do_not_depend_on_the_batch(stops) -> None:
    together = roll_out(stops, PROMPTS, 4, **SETTINGS, seeds=[1, 2, 3, 4])
    assert len({len(s.token_ids) for group in together for s in group}) > 3  # they do end at different times
    for place, prompt in enumerate(PROMPTS):
        alone = roll_out(stops, [prompt], 4, **SETTINGS, seeds=[place + 1])[0]
        assert [s.token_ids for s in alone] == [s.token_ids for s in together[place]]
    small = roll_out(stops, PROMPTS, 4, **SETTINGS, seeds=[1, 2, 3, 4], max_rows=4)
    assert [s.token_ids for g in small for s in g] == [s.token_ids for g in together for s in g]
    fewer = roll_out(stops, PROMPTS, 2, **SETTINGS, seeds=[1, 2, 3, 4])
    assert [g[1].token_ids for g in fewer] == [g[1].token_ids for g in together]
    shorter = roll_out(stops, PROMPTS, 4, max_new_tokens=3, temperature=1.0, seeds=[1, 2, 3, 4])
    assert [s.token_ids for g in shorter for s in g] == [s.token_ids[:3] for g in together for s in g]


def test_the_same_seed_repeats_exactly_and_another_does_not(tiny) -> None:
    a, b, c = (roll_out(tiny, PROMPTS, 2, **SETTINGS, seeds=[s] * 4) for s in (7, 7, 8))
    assert a == b and a != c
    assert a[0][0].token_ids != a[0][1].token_ids


def test_stop_tokens_end_samples_and_the_limit_truncates(stops) -> None:
    for group in roll_out(stops, PROMPTS, 8, **SETTINGS, seeds=[1, 2, 3, 4]):
        for sample in group:
            *inner, last = sample.token_ids
            assert not set(inner) & stops.stop_ids and len(sample.logps) == len(sample.token_ids)
            assert sample.truncated is (last not in stops.stop_ids)
            assert not sample.truncated or len(sample.token_ids) == 12


def test_greedy_is_what_transformers_generates(tiny) -> None:
    with patch.object(Policy, "stop_ids", frozenset([10**6])):
        groups = roll_out(tiny, PROMPTS, 1, max_new_tokens=10, temperature=0, seeds=[0] * 4)
    for prompt, (sample,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        whole = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, min_new_tokens=10,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert sample.token_ids == tuple(whole[0, len(prompt) :].tolist()) and sample.truncated


def test_first_tokens_follow_the_models_distribution(tiny) -> None:
    """Chi-square over the ten likeliest first tokens and the rest, 4,000 samples."""
    probabilities = tiny.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].detach().softmax(-1)
    groups = roll_out(tiny, PROMPTS[:1] * 40, 100, max_new_tokens=1, temperature=1.0, seeds=list(range(40)))
    counts = Counter(sample.token_ids[0] for group in groups for sample in group)
    top = probabilities.topk(10).indices.tolist()
    expected = [4000 * float(probabilities[i]) for i in top]
    observed = [counts[i] for i in top]
    expected.append(4000 - sum(expected))
    observed.append(4000 - sum(observed))
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 5)
    assert chi_square < 29.6  # 0.1% point of chi-square with 10 degrees of freedom


def test_whole_samples_follow_the_distribution_that_generate_samples(tiny) -> None:
    """A vocabulary of 5 and 3 tokens: all 125 samples, 6,000 of ours and of `generate`, against exact chances."""
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(LlamaForCausalLM(config).eval(), tiny.text_tokenizer)
        for parameter in policy.model.parameters():
            parameter.data.mul_(5 if parameter.ndim == 2 else 1)
        prompt = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            samples = torch.cartesian_prod(*[torch.arange(5)] * 3)
            whole = torch.cat([prompt.expand(125, 4), samples], dim=1)
            logps = policy.model(input_ids=whole).logits[:, 3:6].log_softmax(-1)
            expected = 6000 * logps.gather(-1, samples[:, :, None]).sum((1, 2)).exp()
        with patch.object(Policy, "stop_ids", frozenset()):
            groups = roll_out(policy, prompt.tolist() * 60, 100, max_new_tokens=3, temperature=1.0, seeds=range(60))
        theirs = policy.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=3,
            num_return_sequences=6000, eos_token_id=None, pad_token_id=0,
        )[:, 4:]  # fmt: skip
    ours = torch.tensor([sample.token_ids for group in groups for sample in group])
    assert float(expected.max()) > 4 * float(expected.min())  # chances that differ
    for drawn in (ours, theirs):
        observed = torch.bincount(drawn @ torch.tensor([25, 5, 1]), minlength=125)
        rare = expected < 5
        cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([observed[~rare], observed[rare].sum()[None]])
        degrees = int((cells > 0).sum()) - 1
        chi_square = float(((counts - cells) ** 2 / cells)[cells > 0].sum())
        assert chi_square < degrees + 3.1 * (2 * degrees) ** 0.5 + 10  # beyond the 0.1% point


def test_stop_sequences_end_samples(tiny) -> None:
    plain = roll_out(tiny, PROMPTS, 2, **SETTINGS, seeds=[1, 2, 3, 4])
    stop = plain[0][1].token_ids[3:5]
    single = plain[2][0].token_ids[6:7]
    cut = roll_out(tiny, PROMPTS, 2, **SETTINGS, seeds=[1, 2, 3, 4], stops=[stop, single])

    def until(token_ids: tuple[int, ...]) -> tuple[int, ...]:
        ends = [
            i
            for i in range(1, len(token_ids) + 1)
            if any(i >= len(s) and token_ids[i - len(s) : i] == s for s in (stop, single))
        ]
        return token_ids[: ends[0]] if ends else token_ids

    for before, after in zip(plain, cut, strict=True):
        for a, b in zip(before, after, strict=True):
            assert b.token_ids == until(a.token_ids) and b.truncated == (a.truncated and len(b.token_ids) == 12)
    assert len(cut[0][1].token_ids) <= 5 and not cut[0][1].truncated
    with pytest.raises(ValueError, match="must not be empty sequences"):
        roll_out(tiny, PROMPTS, 2, **SETTINGS, seeds=[1] * 4, stops=[[]])


def test_drawing_by_hand() -> None:
    # probabilities 0.5 0.2 0.3: a uniform below 0.5 is token 0, below 0.7 token 1, else token 2
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(4, 3)
    ids, logps = draw(logits, torch.tensor([0.49, 0.51, 0.69, 0.71]), 1.0)
    assert ids.tolist() == [0, 1, 1, 2]
    assert torch.allclose(logps.exp(), torch.tensor([0.5, 0.2, 0.2, 0.3]))
    # nucleus 0.6 keeps 0.5 and 0.3: renormalized 0.625 and 0.375, in the order of the vocabulary
    ids, logps = draw(logits, torch.tensor([0.62, 0.63, 0.0, 0.9999]), 1.0, top_p=0.6)
    assert ids.tolist() == [0, 2, 0, 2]
    assert torch.allclose(logps.exp(), torch.tensor([0.625, 0.375, 0.625, 0.375]))
    # temperature 0.5 squares: 0.25 0.04 0.09 over 0.38
    _, logps = draw(logits[:1], torch.tensor([0.0]), 0.5)
    assert float(logps.exp()) == pytest.approx(0.25 / 0.38, abs=1e-6)


def test_a_token_without_mass_is_never_drawn() -> None:
    for place in (0, 63, 64, 130):  # of a vocabulary that is drawn from in blocks
        logits = torch.full((2, 131), -torch.inf)
        logits[:, place] = 3.0
        assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)[0].tolist() == [place] * 2


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 99), st.floats(0, 1, exclude_max=True))
def test_drawing_is_the_inverse_of_the_running_sum(size: int, seed: int, uniform: float) -> None:
    logits = 4 * torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    ids, logps = draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)
    sums = logits[0].double().softmax(-1).cumsum(-1)
    i = int(ids)
    assert (sums[i - 1] if i else 0.0) - 1e-6 <= uniform <= sums[i] + 1e-6
    assert logps.item() == pytest.approx(logits[0].log_softmax(-1)[i].item(), abs=1e-5)


def test_bfloat16_rolls_out(tiny) -> None:
    groups = roll_out(tiny, PROMPTS, 2, **SETTINGS, seeds=[1, 2, 3, 4], autocast=torch.bfloat16)
    assert all(sample.token_ids for group in groups for sample in group)


def test_the_model_is_left_as_it_was(make) -> None:
    policy = make()
    policy.model.train()
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    roll_out(policy, PROMPTS, 2, **SETTINGS, seeds=[1, 2, 3, 4])
    assert policy.model.training
    assert all(torch.equal(before[k], v) for k, v in policy.model.state_dict().items())


def test_bad_settings_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="4 prompts but 1 seeds"):
        roll_out(tiny, PROMPTS, 2, **SETTINGS, seeds=[1])
    with pytest.raises(ValueError, match="temperature=-1"):
        roll_out(tiny, PROMPTS, 2, max_new_tokens=2, temperature=-1, seeds=[1] * 4)
    with pytest.raises(ValueError, match="empty prompt"):
        roll_out(tiny, [[]], 2, **SETTINGS, seeds=[1])


def test_many_shapes_of_batches(tiny) -> None:
    """Lengths, groups and stops drawn at random: logps always recompute."""
    dice = random.Random(0)
    for _ in range(8):
        prompts = [[dice.randrange(300) for _ in range(dice.randint(1, 20))] for _ in range(dice.randint(1, 5))]
        with patch.object(Policy, "stop_ids", frozenset(dice.sample(range(400), 40))):
            groups = roll_out(
                tiny, prompts, dice.randint(1, 4), **SETTINGS, seeds=list(range(len(prompts))), max_rows=6
            )
        again = group_logps(tiny, prompts, [[s.token_ids for s in group] for group in groups])
        drawn = torch.tensor([logp for group in groups for sample in group for logp in sample.logps])
        assert torch.allclose(again.logps, drawn, atol=1e-4)
