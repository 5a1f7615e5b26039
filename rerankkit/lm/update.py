"""An optimizer step: cut into passes that fit in memory; gradients added up over the processes, clipped, applied."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch

from rerankkit import processes
from rerankkit.lm.meter import spent_on, spent_waiting
from rerankkit.lm.policy import Policy


def apply_gradients(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Step with the sum of all processes' gradients and clear them; returns its length before clipping.

    Every process must have divided its loss by what the *whole* batch is divided by. A length that is not finite is
    returned without a step.
    """
    with spent_waiting():
        processes.sum_gradients(policy.model.parameters())
    with spent_on("optimizer"):
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_grad_norm).item()
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def passes(sizes: Sequence[int], max_tokens: int, max_rows: int = sys.maxsize) -> list[list[int]]:
    """Indices of rows of these sizes, cut into passes of at most `max_tokens` tokens, padding counted, and `max_rows`.

    A row that is longer gets a pass of its own.
    """
    found: list[list[int]] = []
    width = 0
    for index, size in enumerate(sizes):
        width = max(width, size)
        if not found or (len(found[-1]) + 1) * width > max_tokens or len(found[-1]) == max_rows:
            found.append([])
            width = size
        found[-1].append(index)
    return found
