from __future__ import annotations

import pytest
from rerankkit import Reward
from rerankkit.testing import check_reward, make_example, make_rollout, part_of

from rerankkit_brevity import plugin


def test_keeps_the_contract() -> None:
    check_reward(part_of(plugin), judges_order=False)


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(50, 1.0), (100, 1.0), (150, 0.5), (200, 0.0), (300, 0.0)],  # limit 100: 2 - 150 / 100 = 0.5
)
def test_falls_from_the_limit_to_twice_the_limit(num_tokens: int, value: float) -> None:
    rollout = make_rollout(make_example(), num_tokens=num_tokens)

    assert part_of(plugin, limit=100)([rollout]) == [Reward(value)]
