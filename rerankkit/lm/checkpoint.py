"""A training that goes on after a kill. Checkpoints: weights, optimizer state, counters; written aside, no pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rerankkit import processes
from rerankkit.errors import RunFolderError
from rerankkit.lm.policy import Policy
from rerankkit.lm.shard import like, whole, whole_state
from rerankkit.math.schedules import Shape, learning_rate_at
from rerankkit.types import RunInfo

DONE = "checkpoint-"
ASIDE = ".aside-"


def resumable_steps(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    info: RunInfo,
    *,
    what: str = "training",
    checkpoint_every: int = 1,
    warmup_steps: int = 0,
    schedule: Shape = "constant",
) -> Iterator[int]:
    """The steps of a training, from 1 or from its checkpoint in `info.work`; writes one after every `checkpoint_every`.

    It is loaded into `policy` and `optimizer` when the first step is asked for: enter `reference_of` before the loop.
    It is written when the next step is asked for, so that what a step reports has been heard, and a step that was left
    in the middle is taken again; none is written after the last. What a step draws must depend on (`info.seed`, step)
    alone. `what` names the progress bar.

    Given `schedule` or `warmup_steps`, each step has its learning rate from `learning_rate_at`, with the optimizer's
    own as the peak. Raises RunFolderError when the checkpoint is of another model or of a longer training.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    folder = info.work / "checkpoint" if info.work else None
    found = load_checkpoint(folder, policy, optimizer) if folder else None
    done = found[0] if found else 0
    if done > num_steps:
        raise RunFolderError(
            f"{folder}: the checkpoint is of step {done}, and this training has {num_steps}. "
            "Delete the folder to start this stage afresh."
        )
    for step in info.progress(range(done + 1, num_steps + 1), total=num_steps - done, what=what):
        if warmup_steps or schedule != "constant":
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = learning_rate_at(step, num_steps, peak, warmup_steps, schedule)
        yield step
        if folder and step % checkpoint_every == 0 and step < num_steps:
            save_checkpoint(folder, step, policy, optimizer, {})


def save_checkpoint(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]
) -> None:
    """Write `folder/checkpoint-N`, then drop older ones. Killed at any moment, the last complete one is still there.

    Of several processes, whose policies are equal, only the main one writes; all must call it.
    `extra` is whatever else the loop needs, as JSON: counters, the sampler's place, a schedule's state.
    """
    with whole_state(policy, optimizer) as state:
        tensors, plain = _flatten(state)
        weights = {name: whole(tensor).clone() for name, tensor in _weights(policy).items()}
    tensors = {name: whole(tensor) for name, tensor in tensors.items()}
    if not processes.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(leftover)
    older = _finished(folder)
    number = int(older[-1].name.removeprefix(DONE)) + 1 if older else 0
    aside = folder / f"{ASIDE}{number:08d}"
    aside.mkdir()
    save_file(weights, aside / "model.safetensors")
    save_file(tensors, aside / "optimizer.safetensors")
    record = {"step": step, "optimizer": plain, "extra": dict(extra)}
    (aside / "state.json").write_text(json.dumps(record, sort_keys=True), encoding="utf-8")
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    aside.rename(folder / f"{DONE}{number:08d}")
    _sync(folder)
    for other in older:
        shutil.rmtree(other)


def load_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Put the newest checkpoint back into `policy` and `optimizer`; its step and extra, or None if there is none.

    Raises RunFolderError when it belongs to another model.
    """
    found = _finished(folder)
    if not found:
        return None
    record = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    saved = load_file(found[-1] / "model.safetensors")
    current = _weights(policy)
    wrong = sorted(
        set(saved) ^ set(current) | {k for k in set(saved) & set(current) if saved[k].shape != current[k].shape}
    )
    if wrong:
        raise RunFolderError(
            f"{found[-1]}: a checkpoint of another model; {wrong[0]} is missing or of another shape. "
            "Delete the folder to start this stage afresh."
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(like(saved[name], tensor))
    state = _unflatten(load_file(found[-1] / "optimizer.safetensors"), record["optimizer"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state["state"].items():
        state["state"][index] = {
            name: like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
    optimizer.load_state_dict(state)
    return int(record["step"]), record["extra"]


def _weights(policy: Policy) -> dict[str, Tensor]:
    """Every weight that is trained, once: tied ones share memory, which safetensors refuses."""
    named = dict(policy.model.named_parameters())
    trained = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    if len(trained) < len(named):
        return {name: tensor.detach() for name, tensor in trained.items()}
    shared = {tensor.data_ptr() for tensor in named.values()}
    buffers = {k: v for k, v in policy.model.state_dict().items() if k not in named and v.data_ptr() not in shared}
    return {name: tensor.detach() for name, tensor in (named | buffers).items()}


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `index.name` and everything else as JSON."""
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{name}"] = value
    # load_file puts everything on the CPU and load_state_dict moves it to where the parameters are
    return {k: v.detach().contiguous() for k, v in tensors.items()}, {"state": plain, "groups": state["param_groups"]}


def _unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["state"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    # JSON has no tuples, and optimizers compare and unpack their betas as one
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in plain["groups"]
    ]
    return {"state": state, "param_groups": groups}


def _finished(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{DONE}*"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
