from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit.lm import Policy, score_candidates, score_continuations

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22]]


def test_scores_are_sums_of_logps_in_the_order_asked(tiny) -> None:
    asked = [[[1, 2, 3], [4]], [[7, 7]], [[], [9, 8, 7, 6], [5]]]
    scores = score_continuations(tiny, PROMPTS, asked, max_rows=2)
    for prompt, continuations, row in zip(PROMPTS, asked, scores, strict=True):
        for continuation, score in zip(continuations, row, strict=True):
            with torch.no_grad():
                logps = tiny.model(input_ids=torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prompt) - 1 + i, t].item() for i, t in enumerate(continuation))
            assert score == pytest.approx(expected, abs=1e-4)


def test_every_prompt_needs_its_continuations(tiny) -> None:
    with pytest.raises(ValueError, match="zip"):
        score_continuations(tiny, PROMPTS, [[[1]]])


def alone(policy: Policy, before: list[int], after: list[int]) -> float:
    with torch.no_grad():
        logps = policy.model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(logps[len(before) - 1 + i, t].item() for i, t in enumerate(after))


TOKENS = st.lists(st.integers(0, 3), max_size=4)  # few, so that beginnings are shared


@settings(deadline=None, max_examples=25)
@given(st.lists(TOKENS, max_size=6), st.lists(TOKENS, min_size=1, max_size=3))
def test_a_trie_scores_what_separate_forwards_score(tiny, candidates, reasonings) -> None:
    prompt = PROMPTS[0]
    table = torch.tensor([[alone(tiny, prompt + r, c) for c in candidates] for r in reasonings], dtype=torch.float64)
    (mean,) = score_candidates(tiny, [prompt], [reasonings], [candidates])
    (most,) = score_candidates(tiny, [prompt], [reasonings], [candidates], aggregate="max")
    assert len(mean) == len(most) == len(candidates)
    if candidates:
        assert torch.allclose(torch.tensor(mean).double(), table.exp().mean(0).log(), atol=1e-4)
        assert torch.allclose(torch.tensor(most).double(), table.amax(0), atol=1e-4)


def test_every_shape_of_model_scores_alike(make, shape) -> None:
    policy = make(**shape)
    candidates = [policy.sid_ids(sid) for sid in [(0, 0, 0), (0, 0, 1), (0, 2, 4), (3, 1, 2)]]
    reasonings = [[[7, 8]], [[9], []], [[1, 2, 3], [4]]]
    scores = score_candidates(policy, PROMPTS, reasonings, [candidates] * 3)
    for prompt, some, row in zip(PROMPTS, reasonings, scores, strict=True):
        for candidate, score in zip(candidates, row, strict=True):
            each = torch.tensor([alone(policy, prompt + r, candidate) for r in some])
            assert score == pytest.approx(float(each.exp().mean().log()), abs=1e-4)


def test_no_reasoning_at_all_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="no reasoning"):
        score_candidates(tiny, [[1]], [[]], [[[2]]])
