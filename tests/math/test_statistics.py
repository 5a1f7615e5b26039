from __future__ import annotations

import numpy as np
import pytest

from rerankkit.math.statistics import Interval, paired_bootstrap


def test_a_constant_difference_is_certain() -> None:
    a = np.array([0.5, 1.0, 0.75])
    assert paired_bootstrap(a, a - 0.25) == Interval(0.25, 0.25, 0.25)


def test_two_users_by_hand() -> None:
    # differences 0 and 1: a sample's mean is 0, .5 or 1 with probability 1/4, 1/2, 1/4
    assert paired_bootstrap(np.array([0.0, 1.0]), np.zeros(2), confidence=0.4) == Interval(0.5, 0.5, 0.5)
    assert paired_bootstrap(np.array([0.0, 1.0]), np.zeros(2), confidence=0.6) == Interval(0.5, 0.0, 1.0)


def test_close_to_the_normal_interval_and_to_plain_resampling() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(800), rng.random(800)
    interval = paired_bootstrap(a, b)
    error = (a - b).std(ddof=1) / np.sqrt(800)
    assert interval.difference == pytest.approx((a - b).mean())
    assert interval.low == pytest.approx((a - b).mean() - 1.96 * error, abs=0.05 * error)
    assert interval.high == pytest.approx((a - b).mean() + 1.96 * error, abs=0.05 * error)
    plain = [(a - b)[rng.integers(0, 800, 800)].mean() for _ in range(10_000)]
    assert [interval.low, interval.high] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.07 * error)


def test_pairing_counts() -> None:
    # the same shift, once on the same users and once with the pairs torn apart
    rng = np.random.default_rng(2)
    a = rng.random(300)
    b = a - 0.01 + 0.02 * rng.standard_normal(300)
    torn = paired_bootstrap(a, rng.permutation(b))
    assert paired_bootstrap(a, b).low > 0
    assert torn.low < 0 < torn.high


def test_seeded_and_independent_of_the_users_order() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, 500).astype(float), rng.integers(0, 2, 500).astype(float)
    order = rng.permutation(500)
    assert paired_bootstrap(a, b, seed=5) == paired_bootstrap(a, b, seed=5)
    assert paired_bootstrap(a, b, seed=5) == paired_bootstrap(a[order], b[order], seed=5)
    continuous = rng.random(500)  # 500 distinct differences: resampled in several chunks
    assert paired_bootstrap(continuous, b, seed=5) != paired_bootstrap(continuous, b, seed=6)


def test_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(300):
        a = (rng.random(200) < 0.6).astype(float)
        b = (rng.random(200) < 0.5).astype(float)
        interval = paired_bootstrap(a, b, samples=1000, seed=trial)
        inside += interval.low <= 0.1 <= interval.high
    assert 0.91 <= inside / 300 <= 0.985  # .95 with a standard error of .013


@pytest.mark.parametrize(("a", "b"), [(np.zeros(3), np.zeros(2)), (np.zeros((2, 2)), np.zeros((2, 2))), ([], [])])
def test_shapes_are_named(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\[N\]"):
        paired_bootstrap(np.asarray(a), np.asarray(b))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        paired_bootstrap(np.array([np.nan]), np.array([0.0]))
