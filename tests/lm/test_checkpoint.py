from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rerankkit.errors import RunFolderError
from rerankkit.lm import Policy, TrainSequence, load_checkpoint, packed_logps, save_checkpoint

LESSON = [[TrainSequence((1, 2, 3, 4, 5), (0.0, 1.0, 1.0, 1.0, 1.0))]]


def optimizer(policy: Policy, rate: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(policy.model.parameters(), rate)


def train(policy: Policy, adam: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        adam.zero_grad()
        (-packed_logps(policy, LESSON).logps.mean()).backward()
        adam.step()


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize("tie", [True, False])
def test_continuing_is_as_if_never_stopped(make, tie: bool, tmp_path: Path) -> None:
    policy = make(tie_embeddings=tie)
    adam = optimizer(policy)
    train(policy, adam, 3)
    save_checkpoint(tmp_path, 3, policy, adam, {"seen": [1, 2], "note": "x"})
    train(policy, adam, 2)
    other = make(seed=5, tie_embeddings=tie)
    fresh = optimizer(other, rate=9.0)
    assert load_checkpoint(tmp_path, other, fresh) == (3, {"seen": [1, 2], "note": "x"})
    assert fresh.param_groups[0]["lr"] == 1e-2 and fresh.param_groups[0]["betas"] == (0.9, 0.999)
    train(other, fresh, 2)
    assert torch.equal(weights(other), weights(policy))


def test_only_the_newest_is_kept_and_nothing_is_a_pickle(make, tmp_path: Path) -> None:
    policy = make()
    adam = optimizer(policy)
    for step in (1, 2, 2, 1):  # a step may be saved again
        save_checkpoint(tmp_path, step, policy, adam, {"turn": step})
    (kept,) = tmp_path.iterdir()
    assert sorted(p.name for p in kept.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert load_checkpoint(tmp_path, policy, adam) == (1, {"turn": 1})


def test_no_checkpoint_is_none_and_leftovers_are_not_one(make, tmp_path: Path) -> None:
    policy = make()
    adam = optimizer(policy)
    assert load_checkpoint(tmp_path / "absent", policy, adam) is None
    (tmp_path / ".aside-00000007").mkdir()
    (tmp_path / ".aside-00000007" / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path, policy, adam) is None
    save_checkpoint(tmp_path, 1, policy, adam, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000000"]


def test_another_model_is_refused(make, tmp_path: Path) -> None:
    policy = make()
    save_checkpoint(tmp_path, 1, policy, optimizer(policy), {})
    other = make(hidden_size=64)
    with pytest.raises(RunFolderError, match="another model"):
        load_checkpoint(tmp_path, other, optimizer(other))


FOREVER = """
import sys, torch
from pathlib import Path
from tests.lm.conftest import make_policy
from rerankkit.lm import save_checkpoint
torch.set_num_threads(1)
policy = make_policy(num_layers=1)
adam = torch.optim.AdamW(policy.model.parameters())
for step in range(1, 10**6):
    for parameter in policy.model.parameters():
        parameter.data.fill_(step)
    save_checkpoint(Path(sys.argv[1]), step, policy, adam, {"step": step})
    print(step, flush=True)
"""


def test_killed_at_any_moment_a_whole_checkpoint_remains(make, tmp_path: Path) -> None:
    policy = make(num_layers=1)
    process = subprocess.Popen(
        [sys.executable, "-c", FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    reported = [int(line) for line in process.stdout.read().split()] or [5]
    process.wait()
    process.stdout.close()
    found = load_checkpoint(tmp_path, policy, optimizer(policy))
    assert found is not None and found[0] >= reported[-1] and found[1] == {"step": found[0]}
    assert bool((weights(policy) == found[0]).all())
