from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rerankkit.errors import RunFolderError
from rerankkit.lm import (
    Policy,
    TrainSequence,
    checkpoint,
    load_checkpoint,
    packed_logps,
    resumable_steps,
    save_checkpoint,
)
from rerankkit.types import RunInfo

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


def taught(policy: Policy, info: RunInfo, num_steps: int = 6, stop_at: int = 0, **settings: Any) -> list[int]:
    """The steps taken; `stop_at` is left in the middle, with gradients, before the optimizer's step."""
    adam, seen = optimizer(policy), []
    for step in resumable_steps(policy, adam, num_steps, info, **settings):
        seen.append(step)
        lesson = [[TrainSequence((1, 2, 3 + step, 4), (0.0, 1.0, 1.0, 1.0))]]
        (-packed_logps(policy, lesson).logps.mean()).backward()
        if step == stop_at:
            break
        adam.step()
        adam.zero_grad()
    return seen


@pytest.mark.parametrize(("stop_at", "rest"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5)])
@pytest.mark.parametrize("settings", [{}, {"schedule": "cosine", "warmup_steps": 2}], ids=str)
def test_steps_go_on_from_the_checkpoint_as_if_never_stopped(
    make, tmp_path: Path, stop_at: int, rest: int, settings: dict[str, Any]
) -> None:
    """With a checkpoint every two steps, a step that was left is taken again, and the one before it if that is odd."""
    whole, broken, resumed = make(), make(), make()
    info = RunInfo(work=tmp_path)
    settings = {"checkpoint_every": 2, **settings}

    assert taught(whole, RunInfo(), **settings) == [1, 2, 3, 4, 5, 6]
    assert taught(broken, info, stop_at=stop_at, **settings) == list(range(1, stop_at + 1))
    assert taught(resumed, info, **settings) == list(range(rest, 7))
    assert torch.equal(weights(resumed), weights(whole)) and not torch.equal(weights(broken), weights(whole))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [1, 2, 3, 4, 5]), ({"checkpoint_every": 2}, [2, 4]), ({"checkpoint_every": 6}, []), ({"num_steps": 0}, [])],
    ids=str,
)
def test_checkpoints_come_after_every_so_many_steps_but_the_last(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: list[int]
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda folder, step, *rest: saved.append(step))

    taught(make(num_layers=1), RunInfo(), **settings)
    assert saved == []  # no folder to write to

    taught(make(num_layers=1), RunInfo(work=tmp_path), **settings)
    assert saved == expected


def test_a_rate_without_a_schedule_is_the_callers(make) -> None:
    policy = make(num_layers=1)
    adam, rates = optimizer(policy), []
    for step in resumable_steps(policy, adam, 3, RunInfo()):
        rates.append(adam.param_groups[0]["lr"])
        adam.param_groups[0]["lr"] = step / 8

    assert rates == [1e-2, 0.125, 0.25]


def test_each_group_has_its_own_peak(make) -> None:
    """Linear, one step of warm-up: the peak, then 0.1 + 0.9 / 2 of it, then a tenth."""
    first, *others = make(num_layers=1).model.parameters()
    adam = torch.optim.AdamW([{"params": [first], "lr": 1.0}, {"params": others, "lr": 2.0}])
    steps = resumable_steps(make(num_layers=1), adam, 3, RunInfo(), warmup_steps=1, schedule="linear")
    rates = [[group["lr"] for group in adam.param_groups] for _ in steps]

    assert rates == [pytest.approx(expected) for expected in ([1.0, 2.0], [0.55, 1.1], [0.1, 0.2])]


def test_steps_of_another_training_are_refused(make, tmp_path: Path) -> None:
    policy, info = make(), RunInfo(work=tmp_path)
    taught(policy, info, stop_at=6)

    with pytest.raises(RunFolderError, match=r"the checkpoint is of step 5, and this training has 4\. Delete"):
        taught(policy, info, num_steps=4)
    with pytest.raises(RunFolderError, match="another model"):
        taught(make(hidden_size=64), info)
