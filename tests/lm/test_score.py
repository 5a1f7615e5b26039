from __future__ import annotations

import pytest
import torch

from rerankkit.lm import score_continuations

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
