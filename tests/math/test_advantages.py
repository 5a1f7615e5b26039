from __future__ import annotations

import math

import pytest
import torch

from rerankkit.math.advantages import AdvantageKind, group_advantages

REWARDS = torch.tensor([[1.0, 0.0, 0.0, math.nan], [0.3, 0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
KEEP = torch.tensor([[True, True, True, False], [True, True, True, True]])


@pytest.mark.parametrize(
    ("kind", "first", "rest"),
    [
        # kept rewards 1, 0, 0: mean 1/3; squares 4/9 + 1/9 + 1/9 = 2/3, over n - 1 = 2: std = sqrt(1/3)
        ("zscore", 2 / 3 * math.sqrt(3), -1 / 3 * math.sqrt(3)),
        ("centred", 2 / 3, -1 / 3),
        # 1 minus the mean of 0, 0; 0 minus the mean of 1, 0
        ("leave-one-out", 1.0, -0.5),
    ],
)
def test_by_hand(kind: AdvantageKind, first: float, rest: float) -> None:
    values, has_signal = group_advantages(REWARDS, KEEP, kind, eps=0.0)
    assert values[0].tolist() == pytest.approx([first, rest, rest, 0.0])
    assert values[1].tolist() == [0, 0, 0, 0]  # no variance, but for the last bit
    assert has_signal.tolist() == [True, False]


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
