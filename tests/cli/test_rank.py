"""`rerankkit rank`, as a user calls it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rerankkit.cli import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """`call("--run", run)` -> exit code, stdout, stderr; the current directory is an empty one."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rerankkit", "rank", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def asks(tiny_run: Path, tmp_path: Path) -> Path:
    rows = pq.read_table(tiny_run / "stages" / "4-candidates" / "lists.parquet").to_pylist()
    lines = [{"id": row["user_id"], "history": row["history"], "candidates": row["candidates"]} for row in rows[:5]]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path("asks.jsonl")


def test_answers_are_lines_in_the_order_of_the_asks(call: Call, tiny_run: Path, asks: Path) -> None:
    code, out, err = call("--run", tiny_run, "--asks", asks, "--policy", "rl")
    answers = [json.loads(line) for line in out.splitlines()]
    lines = [json.loads(line) for line in asks.read_text().splitlines()]
    assert code == 0
    assert [answer["id"] for answer in answers] == [line["id"] for line in lines]
    for answer, line in zip(answers, lines, strict=True):
        assert answer["ranking"] == [line["candidates"][place] for place in answer["order"]]
        assert sorted(answer["ranking"]) == sorted(line["candidates"])
        keys = "id ranking order parse problem identity reasoning cited unknown"
        assert list(answer) == keys.split() and answer["parse"] == "ok"
    assert f"5 lists ranked by rl of {tiny_run}, " in err and "0 not well formed" in err


def test_a_file_of_answers_is_what_stdout_would_be(call: Call, tiny_run: Path, asks: Path) -> None:
    _, out, _ = call("--run", tiny_run, "--asks", asks, "--policy", "sft", "--batch-size", "2", "--device", "cpu")
    Path("answers.jsonl").write_text("older")
    code, said, _ = call("--run", tiny_run, "--asks", asks, "--policy", "sft", "--out", "answers.jsonl")
    assert (code, said, Path("answers.jsonl").read_text()) == (0, "", out)
    assert sorted(path.name for path in Path().iterdir()) == ["answers.jsonl", "asks.jsonl"]


def test_asks_may_come_from_stdin(call: Call, tiny_run: Path, asks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = call("--run", tiny_run, "--asks", asks)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(asks.read_bytes())))
    assert call("--run", tiny_run, "--asks", "-")[1] == out


def test_a_bad_line_exits_2_and_leaves_the_old_answers(call: Call, tiny_run: Path, asks: Path) -> None:
    Path("answers.jsonl").write_text("older")
    with asks.open("a") as file:
        file.write('{"history": [], "candidates": ["item1", "no such"]}\n')
    code, out, err = call("--run", tiny_run, "--asks", asks, "--out", "answers.jsonl")
    assert (code, out) == (2, "") and err.startswith("error: asks.jsonl:6: candidates[1]: 'no such' is no item of")
    assert Path("answers.jsonl").read_text() == "older"
    assert call("--run", tiny_run, "--asks", asks, "--unknown", "last", "--out", "answers.jsonl")[0] == 0
    last = json.loads(Path("answers.jsonl").read_text().splitlines()[-1])
    assert (last["id"], last["ranking"], last["unknown"]) == (6, ["item1", "no such"], ["no such"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--run", "absent"], "error: absent is not a run folder."),
        (["--out", "absent/answers.jsonl"], "error: --out absent/answers.jsonl: cannot be written; name a file in"),
        (["--out", "."], "error: --out .: cannot be written"),
        (["--asks", "absent.jsonl"], "error: absent.jsonl: cannot be read (No such file or directory)."),
        (["--batch-size", "0"], "batch_size: 0 cannot be used: Input should be greater than 0."),
        (["--policy", "best"], "'best' is not one of 'exported', 'rl', 'sft', 'mid-train'"),
        (["--unknown", "skip"], "'skip' is not one of 'refuse', 'text', 'last'"),
    ],
)
def test_a_call_that_can_be_mended_says_how(
    words: list[str], problem: str, call: Call, tiny_run: Path, asks: Path
) -> None:
    code, out, err = call("--run", tiny_run, "--asks", asks, *words)
    assert (code, out) == (2, "") and problem in err


def test_several_processes_are_refused(call: Call, tiny_run: Path, asks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("--run", tiny_run, "--asks", asks)
    assert code == 2 and "rank: works in one process; split the asks into files" in err


def test_help_shows_an_ask_and_its_answer(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert '  {"id": "u1", "history": ["i7", "i2"], "candidates": ["i9", "i4", "i5"]}\n' in out
