"""Several processes that do one run together, as torchrun or `accelerate launch` start them. Alone, all of it is free.

Every process runs the same code with the same seeds. Work is shared out by its place in a list and put together again
in that order, and sums are sums over all processes: no result depends on how many there are, beyond rounding.

What is exchanged is JSON and tensors, never a pickle. Functions that exchange must be called by every process, in the
same order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from rerankkit.errors import PeerFailed, RerankkitError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for another's stage: a teacher may take days. One that dies is noticed at once."""
BUCKET = 2**24
"""Gradient entries that are summed at once."""


def launched() -> tuple[int, int]:
    """(rank, number of processes) as the launcher's environment has them; (0, 1) without a launcher."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), number) if number > 1 else (0, 1)


def launcher_warning() -> str:
    """What to tell a user whose launcher started fewer processes than it was asked for; empty if all seems well.

    Trap: `accelerate launch --cpu --num_processes 2` starts one, and says nothing.
    """
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except (psutil.Error, OSError):
        return ""
    asked = _asked_for(words)
    if launched()[1] > 1 or asked <= 1:
        return ""
    return (
        f"`accelerate launch` was asked for {asked} processes and started one, as it does with --cpu; "
        f"run torchrun --nproc_per_node {asked} -m rerankkit run ..."
    )


def _asked_for(words: Sequence[str]) -> int:
    """The number of processes in the command line of an `accelerate launch`; 1 if it is none, or does not say."""
    if not any("accelerate" in word for word in words[:3]) or "launch" not in " ".join(words[:4]):
        return 1
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            value = value or "".join(words[place + 1 : place + 2])
            return int(value) if value.isdecimal() else 1
    return 1


def count() -> int:
    """How many processes do this run."""
    distributed = sys.modules.get("torch.distributed")
    return distributed.get_world_size() if distributed is not None and _met(distributed) else 1


def rank() -> int:
    """This process's number, from 0."""
    distributed = sys.modules.get("torch.distributed")
    return distributed.get_rank() if distributed is not None and _met(distributed) else 0


def is_main() -> bool:
    """Whether this is the process that writes the run folder."""
    return rank() == 0


def leave() -> None:
    """Part from the others at the end of a run that went well. After an error it would wait for those that are gone."""
    if count() > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


def share(things: Sequence[T]) -> Sequence[T]:
    """This process's part of a list that all of them hold: a slice, perhaps empty. `gathered` puts parts together."""
    size, number, own = len(things), count(), rank()
    return things[size * own // number : size * (own + 1) // number]


def decide(work: Callable[[], T]) -> T:
    """What `work` returns (JSON) in the main process, the only one to do it. An error there is one everywhere."""
    if count() == 1:
        return work()
    if not is_main():
        return _value(_broadcast(""), 0)  # type: ignore[no-any-return]
    try:
        value = work()
    except Exception as error:
        _broadcast(_failure(error))
        raise
    _broadcast(json.dumps({"value": value}))
    return value


def gathered(work: Callable[[], Sequence[T]]) -> list[T]:
    """What `work` returns (JSON) in each process, one after the other by rank. An error in one is one everywhere.

    Trap: `work` itself must not exchange anything, or an error in one process would leave the others waiting.
    """
    if count() == 1:
        return list(work())
    try:
        said = json.dumps({"value": list(work())})
    except Exception as error:
        _all_gather(_failure(error))
        raise
    return [value for number, text in enumerate(_all_gather(said)) for value in _value(text, number)]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put the sum over all processes of each gradient in its place; a process that has none counts as zero.

    With a loss that every process divides by the weight of the *whole* batch, this is the whole batch's gradient,
    however unevenly the batch was shared. What DistributedDataParallel does (a mean of means) is not.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=device)
    with _together():
        torch.distributed.all_reduce(present, op=torch.distributed.ReduceOp.MAX)
        # A weight that nobody's loss reached keeps no gradient, as it would in one process: no weight decay for it.
        for bucket in _buckets([p for p, found in zip(trained, present.tolist(), strict=True) if found]):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([part.flatten() for part in parts])
            torch.distributed.all_reduce(flat)
            for parameter, part in zip(bucket, torch.split(flat, [part.numel() for part in parts]), strict=True):
                parameter.grad = part.view_as(parameter)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in runs of one type and of at most BUCKET entries, or a single larger one."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        size = sum(other.numel() for other in bucket) + parameter.numel()
        if bucket and (size > BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _met(distributed: Any) -> bool:
    return bool(distributed.is_available() and distributed.is_initialized())


@cache
def _control() -> Any:
    """The group for JSON: on the CPU, and patient, where the gradients' group gives up after minutes."""
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _together() -> Iterator[None]:
    """Turn what torch raises when another process is gone into a sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerFailed(
            f"process {rank()} stops: it lost touch with the others; their own errors tell why ({reason})."
        ) from error


def _broadcast(text: str) -> str:
    """The main process's text, in every process."""
    import torch
    import torch.distributed

    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    with _together():
        torch.distributed.broadcast(size, src=0, group=_control())
        data = data if is_main() else torch.empty(int(size), dtype=torch.uint8)
        torch.distributed.broadcast(data, src=0, group=_control())
    return bytes(data.tolist()).decode()


def _all_gather(text: str) -> list[str]:
    """Every process's text, by rank, in every process."""
    import torch
    import torch.distributed

    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(count())]
    with _together():
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]), group=_control())
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(found, padded, group=_control())
    return [found_one[: int(size)].numpy().tobytes().decode() for found_one, size in zip(found, sizes, strict=True)]


def _failure(error: Exception) -> str:
    told = str(error) if isinstance(error, RerankkitError) else f"{type(error).__name__}: {error}"
    code = error.exit_code if isinstance(error, RerankkitError) else 1
    return json.dumps({"error": told, "exit_code": code})


def _value(text: str, number: int) -> Any:
    record = json.loads(text)
    if "error" in record:
        raise PeerFailed(f"process {rank()} stops: process {number} failed: {record['error']}", record["exit_code"])
    return record["value"]
