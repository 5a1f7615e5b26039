"""How sure a difference between two systems is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22  # counts held at once while resampling


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and the ends of its confidence interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    a: NDArray[np.floating], b: NDArray[np.floating], *, samples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of mean(a - b), where a [N] and b [N] are two systems' scores of the same users.

    Users are drawn with replacement and both systems' scores go together (Efron & Tibshirani 1993, An Introduction to
    the Bootstrap, section 13.3). Drawing N users is drawing how often each *distinct* difference occurs, a multinomial:
    the same distribution, a hundred times cheaper for metrics of short lists, and independent of the users' order.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"a and b must be two [N] of the same users, N > 0, not {a.shape} and {b.shape}")
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(f"confidence must lie in (0, 1) and samples be positive, not {confidence} and {samples}")
    differences = a - b
    if not np.isfinite(differences).all():
        raise ValueError("a - b holds NaN or infinity")
    values, counts = np.unique(differences, return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    rows = max(1, _CHUNK // values.size)
    for start in range(0, samples, rows):
        part = means[start : start + rows]
        part[:] = rng.multinomial(a.size, counts / a.size, size=part.size) @ values / a.size
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(differences.mean()), float(low), float(high))
