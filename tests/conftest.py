"""One torch thread (beside other load two are slower than one) and no network, whatever a test imports."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def beauty() -> Path:
    """The Amazon Beauty tables, where they are to be had; otherwise the test is skipped."""
    folder = Path(os.environ.get("RERANKKIT_DATA", ROOT.parent / "shared" / "data")) / "beauty"
    if not folder.is_dir():
        pytest.skip(f"no Beauty tables at {folder}; set RERANKKIT_DATA to the folder that holds beauty/")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of tests/tiny.toml. Shared: tests must not change it."""
    from rerankkit.pipeline import Pipeline

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    Pipeline(config=ROOT / "tests" / "tiny.toml").run(folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def placed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, cited by place and with every kind of evidence, in prompts that RL shuffles."""
    from rerankkit.pipeline import Pipeline

    folder = tmp_path_factory.mktemp("runs") / "placed"
    Pipeline(config=ROOT / "tests" / "placed.toml").run(folder, progress=False)
    return folder
