from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.math.advantages import AdvantageKind, group_advantages, pass_at_k_bonus

REWARDS = torch.tensor([[1.0, 0.0, 0.0, math.nan], [0.3, 0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
KEEP = torch.tensor([[True, True, True, False], [True, True, True, True]])


@pytest.mark.parametrize(
    ("kind", "first", "rest"),
    [
        # kept rewards 1, 0, 0: mean 1/3; squares 4/9 + 1/9 + 1/9 = 2/3, over n - 1 = 2: std = sqrt(1/3)
        ("zscore", 2 / 3 * math.sqrt(3), -1 / 3 * math.sqrt(3)),
        ("centred", 2 / 3, -1 / 3),
        # the other group has no signal, so the batch is this group
        ("batch", 2 / 3 * math.sqrt(3), -1 / 3 * math.sqrt(3)),
        # 1 minus the mean of 0, 0; 0 minus the mean of 1, 0
        ("leave-one-out", 1.0, -0.5),
    ],
)
def test_by_hand(kind: AdvantageKind, first: float, rest: float) -> None:
    values, has_signal = group_advantages(REWARDS, KEEP, kind, eps=0.0)
    assert values[0].tolist() == pytest.approx([first, rest, rest, 0.0])
    assert values[1].tolist() == [0, 0, 0, 0]  # no variance, but for the last bit
    assert has_signal.tolist() == [True, False]


def test_a_batch_has_one_standard_deviation() -> None:
    # means .5 and 2; of the four rewards that count, 0, 1, 0, 4: mean 1.25, squares 1.5625 + .0625 + 1.5625 + 7.5625
    # = 10.75, over 3. The last group has no signal, and 9 is not kept: neither is in it.
    rewards = torch.tensor([[0.0, 1.0, 9.0], [0.0, 4.0, 9.0], [7.0, 7.0, 7.0]], dtype=torch.float64)
    keep = torch.tensor([[True, True, False], [True, True, False], [True, True, True]])
    values, has_signal = group_advantages(rewards, keep, "batch", eps=0.0)
    std = math.sqrt(10.75 / 3)
    assert values[:2, :2].flatten().tolist() == pytest.approx([-0.5 / std, 0.5 / std, -2 / std, 2 / std])
    assert has_signal.tolist() == [True, True, False] and not values[:, 2].any()
    assert not group_advantages(rewards[2:], kind="batch").values.any()  # nobody has signal: no 0 / 0


def test_pass_at_k_bonus_by_hand() -> None:
    # 1, 0, 0, 0 and k = 2: the first adds 1 to any other, the others add nothing: 2 * mean(1, 1, 1) = 2.
    # 3, 1, 0 and k = 2: 3 adds 2 to 1 and 3 to 0: 2 * 2.5; 1 adds 0 to 3 and 1 to 0: 2 * .5. k = 3: 3 adds 2 to {1, 0}.
    values = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 9.0, 1.0, 0.0]])
    keep = torch.tensor([[True] * 4, [True, False, True, True]])
    assert pass_at_k_bonus(values, 2, keep).tolist() == [[2, 0, 0, 0], [5, 0, 1, 0]]
    assert pass_at_k_bonus(values, 3, keep)[1].tolist() == [6, 0, 0, 0]
    assert not pass_at_k_bonus(values, 4, keep)[1].any()  # three are kept: there is no set of four
    with pytest.raises(ValueError, match="k must be at least 2, not 1"):
        pass_at_k_bonus(values, 1)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=7), st.integers(2, 5))
def test_pass_at_k_bonus_is_the_mean_over_all_sets(values: list[int], k: int) -> None:
    found = pass_at_k_bonus(torch.tensor([values], dtype=torch.float64), k)[0].tolist()
    for i, value in enumerate(values):
        others = [*combinations([other for j, other in enumerate(values) if j != i], k - 1)]
        gains = [max(0, value - max(some)) for some in others]
        assert found[i] == pytest.approx(k * sum(gains) / len(gains) if gains else 0.0)


def test_pass_at_k_bonus_estimates_the_gradient_of_the_best_of_k() -> None:
    # Rewards are 1 with chance p = sigmoid(x). d/dx [1 - (1 - p)^k] = k (1 - p)^(k - 1) p (1 - p), and the estimate is
    # the mean over all outcomes of n draws of sum_i B_i d log P(draw i) / dx / n, with d log P = R - p.
    p, n, k = 0.3, 5, 3
    mean = 0.0
    for number in range(2**n):
        draws = [float(number >> i & 1) for i in range(n)]
        chance = math.prod(p if draw else 1 - p for draw in draws)
        bonus = pass_at_k_bonus(torch.tensor([draws], dtype=torch.float64), k)[0].tolist()
        mean += chance * sum(b * (draw - p) for b, draw in zip(bonus, draws, strict=True)) / n
    assert mean == pytest.approx(k * (1 - p) ** (k - 1) * p * (1 - p), abs=1e-12)


def test_rollouts_that_are_not_kept_change_nothing() -> None:
    other = REWARDS.clone()
    other[0, 3] = 1e9
    assert torch.equal(group_advantages(other, KEEP).values, group_advantages(REWARDS, KEEP).values)


def test_a_group_of_one_or_none_has_no_signal() -> None:
    keep = torch.tensor([[True, False], [False, False]])
    values, has_signal = group_advantages(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), keep)
    assert not has_signal.any()
    assert not values.any()


def test_zscore_equals_torch_std() -> None:
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, eps=1e-4).values, expected)


def test_refusals_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[P, G\].*\[3\]"):
        group_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[2, 2\] torch.float32"):
        group_advantages(torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        group_advantages(torch.tensor([[math.nan, 0.0]]))
    other: Any = "group"
    with pytest.raises(ValueError, match="kind: 'group' is not one of zscore, centred, batch, leave-one-out"):
        group_advantages(torch.zeros(2, 2), kind=other)
