"""Listing what is there must not cost what training costs."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "pandas", "pyarrow", "datasets", "sklearn", "scipy", "accelerate")
SHORT = {
    "import": "import rerankkit",
    "--help": "import sys; sys.argv = ['rerankkit', '--help']; from rerankkit.cli import main; main()",
    "plugins list": "import sys; sys.argv = ['rerankkit', 'plugins', 'list']; from rerankkit.cli import main; main()",
}


@pytest.mark.parametrize("code", SHORT.values(), ids=SHORT)
def test_nothing_heavy_is_imported(code: str) -> None:
    last = f"import atexit; atexit.register(lambda: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {last}\n{code}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


def cpu_seconds(code: str) -> float:
    """User and system time of a fresh interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_short_verbs_take_under_a_tenth_of_importing_torch() -> None:
    codes = ["import torch", *SHORT.values()]
    rounds = [[cpu_seconds(code) for code in codes] for _ in range(4)]  # in turns: whatever disturbs one disturbs all
    torch, *short = (min(times) for times in zip(*rounds, strict=True))
    assert {name: seconds < torch / 10 for name, seconds in zip(SHORT, short, strict=True)} == dict.fromkeys(
        SHORT, True
    ), f"torch {torch:.3f} s, the others {short}"
