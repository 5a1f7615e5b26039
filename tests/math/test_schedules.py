from __future__ import annotations

import pytest

from rerankkit.math.schedules import learning_rate_at


def test_the_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth() -> None:
    rates = [learning_rate_at(step, 14, 1.0, 4) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)  # half way: 0.1 + 0.9 / 2
    assert rates[13] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate_at(1, 3, 1.0, 0) < 1.0
    assert [learning_rate_at(step, 2, 1.0, 10) for step in (1, 2)] == [0.1, 0.2]  # shorter than its warm-up


def test_linear_falls_evenly_and_constant_stays() -> None:
    # after the warm-up four steps from 2 to 0.2, 0.45 each
    assert [learning_rate_at(s, 5, 2.0, 1, "linear") for s in range(1, 6)] == pytest.approx([2.0, 1.55, 1.1, 0.65, 0.2])
    assert [learning_rate_at(s, 5, 2.0, 2, "constant") for s in range(1, 6)] == [1.0, 2.0, 2.0, 2.0, 2.0]
