"""The machine a run is on: device, threads, number of processes, trackers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rerankkit.config import RunConfig
from rerankkit.errors import ConfigError, UsageError

Track = Callable[[Mapping[str, float]], None]


@contextmanager
def prepare(config: RunConfig, out: Path) -> Iterator[tuple[str, Track]]:
    """Set torch up and give (device, what to tell trackers). Raises UsageError for what this version cannot do."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version runs in one process; start it without a launcher."
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
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

    try:
        accelerator = Accelerator(cpu=device == "cpu", log_with=list(config.trackers), project_dir=str(out))
        accelerator.init_trackers("rerankkit")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"trackers: {list(config.trackers)} cannot be used: {error}") from error
    try:
        yield device, lambda metrics: accelerator.log(dict(metrics))
    finally:
        accelerator.end_training()
