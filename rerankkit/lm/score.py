"""How likely the policy finds given continuations, without generating."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rerankkit.lm.forward import group_logps
from rerankkit.lm.policy import Policy


@torch.no_grad()
def score_continuations(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    autocast: torch.dtype | None = None,
    max_rows: int = 8,
) -> list[list[float]]:
    """log P(continuation | prompt) in nats, summed over its tokens; `continuations[p][c]` follows `prompts[p]`.

    Each prompt is read once, in one row with all its continuations; `max_rows` prompts run at once. An empty
    continuation scores 0. Raises ValueError for an empty prompt.
    """
    training = policy.model.training
    policy.model.eval()
    scores: list[list[float]] = [[] for _ in prompts]
    sizes = [len(prompt) + sum(map(len, c)) for prompt, c in zip(prompts, continuations, strict=True)]
    order = sorted(range(len(prompts)), key=lambda p: (sizes[p], p))
    try:
        for start in range(0, len(order), max_rows):
            chosen = order[start : start + max_rows]
            result = group_logps(
                policy, [prompts[p] for p in chosen], [continuations[p] for p in chosen], autocast=autocast
            )
            sums = iter([float(part.double().sum()) for part in result.split()])
            for p in chosen:
                scores[p] = [next(sums) for _ in continuations[p]]
    finally:
        policy.model.train(training)
    return scores
