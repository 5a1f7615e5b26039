"""The machine a run is on: device, threads, number of processes, trackers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rerankkit.config import RunConfig
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

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version runs in one process; start it without a launcher."
        )
    log: Any = transformers.utils.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    if config.policy.threads is not None:
        torch.set_num_threads(config.policy.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {config.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if not config.trackers:
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
        accelerator.end_training()
