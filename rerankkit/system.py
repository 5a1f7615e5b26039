"""The machine a run is on: device, threads, number of processes, trackers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rerankkit import processes
from rerankkit.config import PretrainedPolicy, RunConfig
from rerankkit.errors import ConfigError, UsageError, did_you_mean

Track = Callable[[Mapping[str, float]], None]


@contextmanager
def prepare(config: RunConfig, out: Path) -> Iterator[tuple[str, Track]]:
    """Set torch up and give (device, what to tell trackers). Raises UsageError for what this version cannot do."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars, some of which listen to nothing else
    import torch
    import transformers

    log: Any = transformers.utils.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    if isinstance(config.policy, PretrainedPolicy) and config.policy.lora is not None:
        from rerankkit.lm.adapters import require_peft

        require_peft()
        for name in ("FSDP", "DeepSpeed"):
            if processes.launched()[1] > 1 and _asked_for(name.upper()):
                raise ConfigError(f"policy.lora: adapters are not trained under {name}; choose multi-GPU without it.")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", device.partition(":")[0])  # DeepSpeed, imported by others, guesses aloud
    if processes.launched()[1] > 1:
        device = _join(device)
    if config.policy.threads is not None:
        torch.set_num_threads(config.policy.threads)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {config.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if not config.trackers or not processes.is_main():
        yield device, lambda metrics: None
        return
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in config.trackers:
        if name not in available:
            raise ConfigError(f"trackers: {name!r} is not installed, or no tracker; {did_you_mean(name, available)}")
    accelerator = Accelerator(cpu=device == "cpu", log_with=list(config.trackers), project_dir=str(out))

    @cache
    def started() -> Accelerator:
        accelerator.init_trackers("rerankkit")  # not before the first record: it writes into the run folder
        return accelerator

    try:
        yield device, lambda metrics: started().log(dict(metrics))
    finally:
        for tracker in accelerator.trackers:  # end_training() would part from the other processes, too
            tracker.finish()


def _join(device: str) -> str:
    """Meet the other processes that the launcher started; gives this one's device, or raises UsageError."""
    import torch
    from accelerate import PartialState

    number, own = processes.launched()[1], torch.device(device)
    if _asked_for("MEGATRON_LM"):
        raise UsageError(
            "accelerate's config asks for MEGATRON_LM, which is not supported: choose multi-GPU (every process holds "
            "the whole policy), or FSDP or DeepSpeed (every process trains a slice of it)."
        )
    if _asked_for("DEEPSPEED"):
        from rerankkit.lm.zero import require_deepspeed

        require_deepspeed()
    if own.index is not None:
        raise ConfigError(
            f'device: {device!r} is one device, and {number} processes run; write "cuda", "cpu" or "auto".'
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if own.type == "cuda" and here > torch.cuda.device_count():
        raise ConfigError(
            f"device: {here} processes on this machine and {torch.cuda.device_count()} GPUs; start one process a GPU, "
            'or set device = "cpu".'
        )
    return str(PartialState(cpu=own.type == "cpu").device)


def _asked_for(what: str) -> bool:
    """Whether accelerate's config, which its launcher hands on through the environment, asks for FSDP and the like."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"
