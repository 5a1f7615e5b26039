"""The pipeline from end to end, in real processes: it ends, it is skipped, it survives being killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.toml"
SYSTEMS = ["pre-rank", "mid-train", "sft", "rl"]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rerankkit", "run", str(TINY), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run that every test here may look at and none may change."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    finish(start(out))
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_a_run_ends_in_a_report_of_every_system(undisturbed: Path) -> None:
    report = report_of(undisturbed)
    names = [row["name"] for row in report["rows"]]
    assert [name for name in names if name in SYSTEMS] == SYSTEMS and {"oracle", "ceiling"} < set(names)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["oracle"]["metrics"]["R@1"] == 1.0
    assert rows["pre-rank"]["identity_rate"] == 1.0 and rows["pre-rank"]["kendall_tau"] == 1.0
    # Answers are decoded under the permutation mask, so even this untrained policy's are complete.
    assert rows["rl"]["invalid_rate"] == 0.0 and rows["rl"]["identity_rate"] < 1.0
    assert {"a", "b", "metric", "difference", "low", "high"} == set(report["comparisons"][0])
    page = (undisturbed / "report.html").read_text()
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert len(list((undisturbed / "completions").glob("*.parquet"))) == 6
    assert [folder.name for folder in (undisturbed / "stages" / "7-rl" / "kept").iterdir()] == ["step-00004"]


def test_the_exported_policy_is_the_best_on_validation_users_and_tried_in_every_way(undisturbed: Path) -> None:
    report = report_of(undisturbed)
    gate = json.loads((undisturbed / "stages" / "8-gate" / "gate.json").read_text())
    assert report["gate"] == gate
    means = {row["name"]: row["metrics"]["NDCG@5"] for row in gate["rows"]}
    assert list(means) == ["pre-rank", "mid-train", "sft", "rl@4", "rl"]
    assert gate["exported"] == max(list(means)[1:], key=means.__getitem__)
    exported = gate["exported"]
    assert [row["name"] for row in report["rows"] if row["exported"]] == [exported]
    folder = {"mid-train": "3-midtrain", "sft": "6-sft", "rl@4": "7-rl/kept/step-00004", "rl": "7-rl"}[exported]
    weights = [undisturbed / "stages" / place / "model.safetensors" for place in (folder, "8-gate")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert report["findings"][0] == gate["reason"] + "."
    assert set(report["position_bias"]) == {"sft", exported}
    assert (exported == "mid-train") != any(row["name"] == "no-reasoning" for row in report["rows"])


def test_the_watch_over_a_run_is_told_in_its_log_and_its_report(undisturbed: Path) -> None:
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["stage"] == "rl"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    for record in steps:
        assert sum(record[f"first_choice/{place}"] for place in range(1, 11)) == pytest.approx(1)
        assert {"reward", "kendall_tau", "tau_within_group", "entropy", "grad_norm", "logp_gap"} <= record.keys()
    watch = report_of(undisturbed)["watch"]
    assert watch["steps"] == 6 and len(watch["first_choice"]["last steps"]) == 10
    assert "Given place of the first choice" in (undisturbed / "report.html").read_text()
    assert (undisturbed / "trec" / "test.qrels").exists()


def test_a_second_run_finds_everything_done(undisturbed: Path) -> None:
    before = (undisturbed / "report.json").read_bytes()
    _, err = finish(start(undisturbed))
    assert "started" not in err and err.count("skipped") == 12
    assert (undisturbed / "report.json").read_bytes() == before


def test_a_changed_setting_redoes_its_stage_and_what_follows(undisturbed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(undisturbed), str(copy)], check=True)
    _, err = finish(start(copy, "optimizer.steps=1"))
    redone = [line.split()[1] for line in err.splitlines() if line.startswith("started")]
    assert redone == ["rl", "gate", "rank-rl", "rank-exported"]


def test_longer_lists_need_a_policy_of_more_places(placed_run: Path, tiny_run: Path) -> None:
    from rerankkit.config import find_plugins, load_config, make_config
    from rerankkit.run import plan

    for run, file, state in ((placed_run, "placed.toml", "to do"), (tiny_run, "tiny.toml", "done")):
        for size, expected in ((10, "done"), (12, state)):
            raw, _ = load_config(ROOT / "tests" / file, [f"candidates.size={size}"])
            states = plan(make_config(raw, find_plugins(raw)), run)
            assert states["midtrain"] == expected, (file, size)


def test_a_second_process_is_refused_while_one_is_at_work(tmp_path: Path) -> None:
    first = start(tmp_path / "run")
    while not (tmp_path / "run" / "holder.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    _, err = finish(start(tmp_path / "run"), code=2)
    assert f"in use by process {first.pid}" in err
    first.send_signal(signal.SIGKILL)
    first.communicate()


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_report(undisturbed: Path, tmp_path: Path) -> None:
    moments = random.Random(20)
    out = tmp_path / "killed"
    kills = 0
    while kills < 10:
        process = start(out)
        # The clock starts when the folder is locked, so that kills fall into the work and not into imports.
        while process.poll() is None and not (out / "holder.json").exists():
            time.sleep(0.02)
        try:
            process.wait(timeout=moments.uniform(0.2, 5.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        (out / "holder.json").unlink(missing_ok=True)
        kills += 1
        if process.returncode == 0:  # it got through: begin again, so that all ten kills hit something
            subprocess.run(["rm", "-rf", str(out)], check=True)
    finish(start(out))
    assert (out / "report.json").read_bytes() == (undisturbed / "report.json").read_bytes()
