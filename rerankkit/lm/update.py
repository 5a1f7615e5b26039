"""The end of every optimizer step: gradients added up over the processes, clipped, applied."""

from __future__ import annotations

import math

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
