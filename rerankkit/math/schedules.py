"""Learning rates over the steps of a training."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Shape: TypeAlias = Literal["cosine", "linear", "constant"]
"""Of the decay after the warm-up: see `learning_rate_at`."""

FLOOR = 0.1
"""Where decay ends, as a share of the peak."""


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_steps: int, shape: Shape = "cosine") -> float:
    """Linear warm-up to `peak`, then decay to a tenth of it, or none; steps count from 1.

        constant   peak
        linear     peak (0.1 + 0.9 (1 - p))
        cosine     peak (0.1 + 0.9 (1 + cos(pi p)) / 2)

    with p the share of the steps after the warm-up that are done, this one included.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
    return peak * (FLOOR + (1 - FLOOR) * left)
