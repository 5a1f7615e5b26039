from __future__ import annotations

import random
from collections import Counter
from unittest.mock import patch

import pytest
import torch

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
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)[0].tolist() == [1, 1]


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
