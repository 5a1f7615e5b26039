"""A policy in the midst of its training, written as if training were done."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from rerankkit import processes
from rerankkit.lm.policy import Policy
from rerankkit.lm.shard import is_sharded, whole_model


def save_snapshot(policy: Policy, folder: Path) -> None:
    """Write what `Policy.save` would write if training ended here; it goes on as if nothing had happened.

    Adapters are merged in a copy (a second model in memory, for that while), slices are put together. Every process
    must call it; the main one writes.
    """
    plain = copy.copy(policy)
    if is_sharded(policy):
        plain.model = whole_model(policy, torch.device("cpu"))
    if not processes.is_main():
        return
    if policy.adapters is not None:
        plain.model = copy.deepcopy(policy.adapters).merge_and_unload()
    plain.save(folder)
