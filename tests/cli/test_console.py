from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from rerankkit.cli import console
from rerankkit.cli.console import duration, print_comparison, print_table, progress_bar, stage_line
from rerankkit.stages.report import summarise
from rerankkit.types import Item, Ranking, RerankExample

REPORT: dict[str, Any] = summarise(
    [RerankExample("e", "u", (), tuple(Item(str(i), f"t{i}") for i in range(3)), (0.0, 1.0, 0.0))],
    {"rl": [Ranking((1, 0, 2))]},
    num_users=5,
    seed=0,
    samples=20,
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 100 columns in place of stderr."""
    screen = io.StringIO()
    drawn = Console(file=screen, force_terminal=True, width=100, markup=False, highlight=False)
    monkeypatch.setattr(console, "_stderr", lambda: drawn)
    return screen


def test_without_a_terminal_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        assert list(progress(range(3), total=3, what="sampling")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_says_what_and_how_far(terminal: io.StringIO) -> None:
    with progress_bar() as progress:
        assert list(progress([5, 6], what="sampling [bold]")) == [5, 6]
    assert "sampling [bold]" in terminal.getvalue()  # not taken for markup
    assert "/2" in terminal.getvalue() and "left" in terminal.getvalue()


def test_a_bar_goes_when_its_loop_is_left_early(terminal: io.StringIO) -> None:
    with progress_bar() as progress:
        outer = progress(iter(range(9)), what="outer")
        next(outer)
        for _ in progress(range(3), what="inner"):
            break
        with pytest.raises(ValueError, match="invalid literal"):
            list(progress(map(int, ["1", "x"]), what="third"))
        before = terminal.tell()
        stage_line("sft", "done", 1.0)
    after = terminal.getvalue()[before:]
    assert "outer" in after and "inner" not in after and "third" not in after


def test_results_printed_under_a_bar_reach_stdout(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        for _ in progress(range(1), what="bar"):
            print("a result")
    assert capsys.readouterr().out == "a result\n"


def test_stage_lines_are_plain_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    stage_line("sids", "skipped")
    stage_line("sft", "continued")
    stage_line("rl [1]", "done", 185.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "skipped   sids\ncontinued sft\ndone      rl [1]  3 min 05 s\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_durations_read_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_table_is_a_result_and_stays_on_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(REPORT)
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "RL lifts NDCG@5 over pre-rank by 36.9 points [36.9, 36.9] (only 1 test users)."
    row = next(line.split() for line in lines if line.startswith("rl "))
    # The target goes from rank 2 to 1; tau of one swap among three is 1 - 4/6 = .33.
    assert row == ["rl", *["1.000"] * 6, "0%", "0.33", "0%"]
    assert "warning: Only 1 test users" in out


def test_a_comparison_names_the_runs_and_marks_nothing_up(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"difference": 0.081, "low": 0.052, "high": 0.11}
    comparison = {
        "n": 1681,
        "rows": [{"name": "rl", "n": 1681, "a": {}, "b": {}}],
        "comparisons": [{"name": "rl", "metric": "NDCG@5", **numbers}],
        "notes": ["protocol differs: [a] against [b]"],
        "only_in": {"a": ["mid-train"], "b": []},
    }
    print_comparison(comparison, "runs/[x]", "runs/y")
    out, _ = capsys.readouterr()
    assert out.startswith("runs/y minus runs/[x], in points, on the same 1,681 test users")
    assert "+8.1 [5.2, 11.0]" in out
    assert "only in runs/[x]: mid-train" in out and "[a] against [b]" in out


def test_importing_the_console_is_light() -> None:
    heavy = ("numpy", "pandas", "pyarrow", "torch")
    code = f"import sys, rerankkit.cli.console; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
