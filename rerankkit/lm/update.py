"""An optimizer step: cut into passes that fit in memory; gradients added up over passes and processes, then applied."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rerankkit import processes
from rerankkit.lm.meter import spent_on, spent_waiting
from rerankkit.lm.policy import Policy
from rerankkit.lm.shard import inside, is_sharded, whole
from rerankkit.lm.zero import zero_of

P = TypeVar("P")
R = TypeVar("R")


def passes(sizes: Sequence[int], max_tokens: int, max_rows: int = sys.maxsize) -> list[list[int]]:
    """Indices of rows of these sizes, cut into passes of at most `max_tokens` tokens, padding counted, and `max_rows`.

    A row that is longer gets a pass of its own.
    """
    found: list[list[int]] = []
    width = 0
    for index, size in enumerate(sizes):
        width = max(width, size)
        if not found or (len(found[-1]) + 1) * width > max_tokens or len(found[-1]) == max_rows:
            found.append([])
            width = size
        found[-1].append(index)
    return found


def accumulate(policy: Policy, own: Sequence[P], forward: Callable[[P], tuple[Tensor, R]], idle: P) -> list[R]:
    """Add up the gradients of this process's passes; returns what there is to log about every process's passes.

    `forward` gives a pass's loss, divided by what the *whole* batch is divided by, and a record (JSON). `idle` is a
    pass to run, its loss not counted, where others have more: sharded weights are put together by all at once.
    """
    zero = zero_of(policy)
    if zero is not None:
        zero.start(partial(forward, idle))
    num_idle = max(processes.gathered(lambda: [len(own)])) - len(own) if is_sharded(policy) else 0
    # FSDP and DeepSpeed take the mean of the processes' gradients, and what is wanted is their sum
    scale = processes.count() if is_sharded(policy) else 1

    def work() -> list[R]:
        records = []
        wanted = [*((one, scale) for one in own), *[(idle, 0)] * num_idle]
        for number, (one, factor) in enumerate(wanted, start=1):
            if zero is not None:
                zero.boundary(number == len(wanted))
            with spent_on("forward"):
                loss, record = inside(policy, partial(forward, one))
            with spent_on("backward"):
                if zero is not None:
                    zero.backward(factor * loss)
                else:
                    (factor * loss).backward()  # type: ignore[no-untyped-call]
            if factor:
                records.append(record)
        return records

    with spent_waiting():
        if not is_sharded(policy):
            return processes.gathered(work)
        records = work()  # not within `gathered`, since its passes exchange weights
        return processes.gathered(lambda: records)


def apply_gradients(policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Step with the sum of all processes' gradients and clear them; returns its length before clipping.

    A length that is not finite is returned without a step.
    """
    if (zero := zero_of(policy)) is not None:
        with spent_on("optimizer"):
            return zero.step(max_grad_norm)
    if not is_sharded(policy):  # under FSDP the backward pass has done it
        with spent_waiting():
            processes.sum_gradients(policy.model.parameters())
    with spent_on("optimizer"):
        norm = float(whole(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_grad_norm)))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
