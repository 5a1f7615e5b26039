from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rerankkit.lm import Policy, adapted, apply_gradients, packed_logps, save_snapshot
from rerankkit.lm.sequences import TrainSequence

LESSON = [[TrainSequence(tuple(range(20, 50)), (1.0,) * 30)]]


def step(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    (-packed_logps(policy, LESSON).logps.mean()).backward()  # type: ignore[no-untyped-call]
    apply_gradients(policy, optimizer, 1.0)


def adam(policy: Policy) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], 1e-2)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}


def test_a_snapshot_is_the_policy_as_it_is(make: Any, tmp_path: Path) -> None:
    policy = make()
    policy.thinks = False
    step(policy, adam(policy))
    save_snapshot(policy, tmp_path / "snapshot")
    loaded = Policy.load(tmp_path / "snapshot")
    assert all(torch.equal(a, b) for a, b in zip(weights(policy).values(), weights(loaded).values(), strict=True))
    assert (loaded.codebook_sizes, loaded.style, loaded.thinks) == (policy.codebook_sizes, policy.style, False)


@pytest.mark.parametrize("thrifty", [False, True])
def test_adapters_are_merged_in_the_snapshot_and_trained_on_in_the_policy(
    make: Any, tmp_path: Path, thrifty: bool
) -> None:
    pytest.importorskip("peft")
    ends = []
    for snapshot in (False, True):
        policy = make()
        if thrifty:
            policy.checkpoint_gradients()
        policy.model.train()
        with adapted(policy, 1, rank=2, alpha=4):
            optimizer = adam(policy)
            step(policy, optimizer)
            if snapshot:
                save_snapshot(policy, tmp_path / "snapshot")
                midway = packed_logps(policy, LESSON).logps.detach()
            step(policy, optimizer)
        ends.append(weights(policy))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # it changed nothing
    loaded = Policy.load(tmp_path / "snapshot")
    assert weights(loaded).keys() == ends[0].keys()
    torch.testing.assert_close(packed_logps(loaded, LESSON).logps.detach(), midway, rtol=1e-4, atol=1e-4)
    before = weights(make())
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(loaded).items())
