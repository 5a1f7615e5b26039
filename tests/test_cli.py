"""The command as a user calls it: what it says, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rerankkit
from rerankkit.cli import main
from rerankkit.config import make_config
from rerankkit.errors import ConfigError, RunFailed
from rerankkit.pipeline import Pipeline
from rerankkit.plugins import load_plugins
from rerankkit.run import STAGES
from rerankkit.stages.compare import save_rankings
from rerankkit.stages.report import summarise
from rerankkit.stages.scorecard import make_scorecard
from rerankkit.store import open_run, write_json
from rerankkit.testing import make_catalog
from rerankkit.types import Item, Ranking, RerankExample

QUICKSTART = Path(__file__).parent.parent / "examples" / "configs" / "quickstart.toml"
CLI = [sys.executable, "-c", "from rerankkit.cli import main; main()"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """`call("plugins", "list")` -> exit code, stdout, stderr; the current directory is an empty one."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rerankkit", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


def test_help_names_every_verb_and_how_to_start(call: Call) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {verb} " in out for verb in ("run", "rank", "status", "compare", "doctor", "sids", "plugins"))
    assert "Start with: rerankkit run examples/configs/quickstart.toml" in out


def test_the_version_is_that_of_the_package(call: Call) -> None:
    assert call("--version") == (0, f"{rerankkit.__version__}\n", "")


def test_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run([*CLI, "run", "absent.toml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: absent.toml: cannot be read (No such file or directory); name a config file, for example "
        "examples/configs/quickstart.toml.\n"
    )


@pytest.mark.parametrize("words", [["run"], ["runn"], ["status"], ["run", "--wat", "x"], ["plugins", "shw"]])
def test_a_call_that_is_no_call_exits_2(call: Call, words: Sequence[str]) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "") and "rerankkit" in err


def test_plugins_list_shows_parts_and_whose_they_are(call: Call) -> None:
    code, out, _ = call("plugins", "list")
    assert code == 0
    assert f"gr2  rerankkit {rerankkit.__version__}\n  tokenizer  rqvae " in out

    listed = json.loads(call("plugins", "list", "--json")[1])
    assert {"kind": "optimizer", "name": "dapo", "plugin": "gr2", "distribution": "rerankkit", "version": "0.1.0"} in (
        listed["parts"]
    )


def test_plugins_list_with_a_broken_plugin(call: Call, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('needs a licence')")

    code, out, _ = call("plugins", "list", "--file", "broken.py")
    listed = json.loads(call("plugins", "list", "--json", "--file", "broken.py")[1])

    assert code == 0 and "broken: ImportError: needs a licence (" in out and "rqvae" in out
    assert [(p["name"], p["error"][:11]) for p in listed["plugins"]] == [
        ("adapters", ""),
        ("gr2", ""),
        ("broken", "ImportError"),
    ]


def test_plugins_show_tells_every_setting(call: Call) -> None:
    code, out, _ = call("plugins", "show", "ndcg")
    assert code == 0
    assert "reward ndcg  (gr2, rerankkit 0.1.0)\nNDCG@k of the answered order, gain 2^relevance - 1" in out
    assert "  k = 10    int\n      Depth.\n" in out

    shown = json.loads(call("plugins", "show", "reward/ndcg", "--json")[1])
    assert shown["settings"] == [{"name": "k", "type": "int", "default": "10", "documentation": "Depth."}]


def test_plugins_show_of_something_unknown_and_of_something_broken(call: Call, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('needs a licence')")

    assert call("plugins", "show", "ncdg2")[::2] == (
        2,
        "error: no part is named 'ncdg2'; known: auc, cispo, citations, dapo, dr-grpo, exact-first, format, gr2, "
        "gr2-unconditional, grpo, gspo, ndcg, rank-promotion, reasoning-length, reciprocal-rank, rejection, "
        "residual-kmeans, rqvae, target-logp, targeted, trl, verifiers, verl. "
        "Did you mean 'ndcg'?\n",
    )
    code, _, err = call("plugins", "show", "broken", "--file", "broken.py")
    assert code == 2 and err.startswith(
        "error: plugin broken (broken.py) is not in order: ImportError: needs a licence"
    )
    code, _, err = call("plugins", "show", "mine", "--file", "broken.py")
    assert code == 2 and err.startswith("error: no part is named 'mine'; known: auc, ")
    assert "\n  plugin broken (broken.py) is not in order: ImportError: needs a licence" in err


def test_a_typo_exits_2_and_writes_nothing(call: Call, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[sft]\nepocs = 3\n")
    code, out, err = call("run", config, "--out", "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {config}:2: sft.epocs: no such key; known: ") and "Did you mean 'epochs'?" in err
    assert call("run", QUICKSTART, "--until", "stf", "--out", "out")[::2] == (
        2,
        "error: --until: no stage is named 'stf'; known: candidates, data, gate, midtrain, rank-exported, "
        "rank-mid-train, rank-rl, rank-sft, rl, sft, sids, traces. Did you mean 'sft'?\n",
    )
    assert call("run", QUICKSTART, "data.use=tables", "data.folder=nowhere", "--out", "out", "--dry-run")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_a_run_warns_of_a_broken_installed_plugin_and_goes_on(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RERANKKIT_PLUGINS", "gr2,absent")
    (tmp_path / "mine.toml").write_text("seed = 1\n")
    code, _, err = call("run", "mine.toml", "--dry-run")
    assert code == 0 and err.startswith("warning: plugin absent: ")


def test_a_plugin_file_that_the_config_names_must_work(call: Call, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('needs a licence')")
    (tmp_path / "mine.toml").write_text("plugin_files = ['broken.py', 'absent.py']\n")
    code, _, err = call("run", "mine.toml", "--dry-run")
    assert code == 2 and err.splitlines() == [
        f"error: mine.toml:1: plugin_files: broken.py: ImportError: needs a licence ({tmp_path / 'broken.py'}:1)",
        f"mine.toml:1: plugin_files: absent.py: plugin file {tmp_path}/absent.py does not exist",
    ]
    code, _, err = call("run", "mine.toml", "plugin_files=absent.py", "--dry-run")
    tried = f"{tmp_path}/absent.py"
    assert (code, err) == (2, f"error: command line: plugin_files: absent.py: plugin file {tried} does not exist\n")
    with pytest.raises(ConfigError, match="needs a licence"):
        Pipeline(config={"plugin_files": ["broken.py"]}).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_sets_nothing_is_told_of(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("# soon\n")
    code, _, err = call("run", "empty.toml", "--dry-run")
    assert (code, err) == (0, "note: empty.toml sets nothing; every setting has its default\n")


@pytest.mark.parametrize("out", ["a.txt/run", "a.txt", "x" * 300])
def test_a_run_folder_that_cannot_be_made_exits_2(call: Call, tmp_path: Path, out: str) -> None:
    (tmp_path / "a.txt").write_text("")
    code, _, err = call("run", QUICKSTART, "--out", out, "--dry-run")
    assert code == 2 and err.startswith("error: ") and "--out" in err


def test_a_damaged_report_is_not_taken_for_a_missing_one(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text('{"n": ')
    code, _, err = call("compare", "a", "a")
    assert code == 2 and err == "error: a: report.json is damaged; finish the run with `rerankkit run`.\n"


def test_a_dry_run_refuses_a_reward_that_the_run_does_not_have(call: Call) -> None:
    code, _, err = call("run", QUICKSTART, "--dry-run", "optimizer.filter_on=hit")
    assert code == 2 and "optimizer.filter_on: 'hit' is no reward of this run" in err


def test_a_dry_run_shows_everything_and_writes_nothing(call: Call, tmp_path: Path) -> None:
    code, out, err = call("run", QUICKSTART, "--dry-run", "optimizer.steps=3")
    assert (code, err) == (0, "")
    assert all(f"  to do      {stage}\n" in out for stage in STAGES)
    assert "gate        3 policies rank up to 150 validation users each\n" in out
    assert "run folder  runs/quickstart\n" in out and "GiB at the peak" in out and out.endswith("nothing was written\n")

    _, out, _ = call("run", QUICKSTART, "--dry-run", "optimizer.steps=30", "gate.keep_every=10")
    assert "gate        5 policies rank" in out  # mid-training, SFT, steps 10 and 20, the end
    plan = json.loads(call("run", QUICKSTART, "--dry-run", "--json", "--until", "sids", "optimizer.steps=3")[1])
    assert plan["config"]["optimizer"]["steps"] == 3
    assert plan["stages"] == [{"name": name, "state": "to do"} for name in STAGES[: STAGES.index("sids") + 1]]
    assert list(tmp_path.iterdir()) == []


def test_a_run_stops_where_it_is_told_and_goes_on_from_its_own_config(call: Call, tmp_path: Path) -> None:
    small = ["data.num_users=30", "data.embeddings.dim=4", "tokenizer.use=residual-kmeans"]
    (tmp_path / "mine.toml").write_text("")

    code, out, err = call("run", "mine.toml", *small, "--until", "data", "--out", "here/run")
    assert (code, out) == (0, "")
    assert err.splitlines()[0] == "started   data" and err.splitlines()[1].startswith("done      data  ")
    assert err.splitlines()[-1] == "stopped after data; run again without --until to go on"

    _, out, _ = call("status", "here/run")
    assert out.startswith("done       data") and "\nto do      sids\n" in out
    assert out.endswith("nobody is at work on it; `rerankkit run` with its config.json goes on from here\n")

    code, _, err = call("run", "here/run/config.json", "--until", "sids")
    assert code == 0 and err.splitlines()[:2] == ["skipped   data", "started   sids"]

    status = json.loads(call("status", "here/run", "--json")[1])
    assert [(stage["name"], stage["state"]) for stage in status["stages"]] == [("data", "done"), ("sids", "done")]
    assert status["report"] is False and status["holder"] == {}

    plan = json.loads(call("run", "here/run/config.json", "data.num_users=31", "--dry-run", "--json")[1])
    assert {stage["state"] for stage in plan["stages"]} == {"to do"}  # not `done`: they would be redone
    plan = json.loads(call("run", "here/run/config.json", "--dry-run", "--json")[1])
    assert [stage["state"] for stage in plan["stages"]][:3] == ["done", "done", "to do"]
    assert [stage["name"] for stage in plan["stages"]] == list(STAGES)


def test_an_interrupted_run_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rerankkit.run.run", interrupted)
    assert call("run", QUICKSTART) == (130, "", "interrupted; run the same command again to continue\n")


def test_a_run_that_fails_exits_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*arguments: Any, **how: Any) -> None:
        raise RunFailed("sft: the loss is nan")

    monkeypatch.setattr("rerankkit.run.run", failed)
    assert call("run", QUICKSTART) == (1, "", "error: sft: the loss is nan\n")


def test_status_of_something_else(call: Call, tmp_path: Path) -> None:
    code, out, err = call("status", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path} is not a run folder. `rerankkit run CONFIG --out {tmp_path}` makes one.\n"


def test_status_names_who_is_at_work(call: Call, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", make_config({}, load_plugins(only="gr2"))):
        assert "at work: process " in call("status", "run")[1]


def finished(folder: Path, *orders: tuple[int, ...]) -> None:
    """A run folder's report of as many users as there are orders; the target is given second."""
    folder.mkdir()
    items = tuple(Item(str(i), f"t{i}") for i in range(3))
    examples = [RerankExample(f"e{i}", f"u{i}", (), items, (0.0, 1.0, 0.0)) for i in range(len(orders))]
    systems = {"rl": [Ranking(order) for order in orders]}
    summary = summarise(examples, systems, num_users=len(orders), seed=0, samples=50)
    write_json(folder / "report.json", {**summary, "lists_digest": "d", "protocol": "p"})
    save_rankings(folder / "rankings.parquet", examples, systems)


def test_two_runs_are_compared_on_the_same_users(call: Call, tmp_path: Path) -> None:
    finished(tmp_path / "a", (0, 1, 2), (0, 1, 2))
    finished(tmp_path / "b", (1, 0, 2), (1, 0, 2))

    found = json.loads(call("compare", "a", "b", "--json")[1])

    [first] = [c for c in found["comparisons"] if (c["name"], c["metric"]) == ("rl", "R@1")]
    assert (first["difference"], first["low"], first["high"]) == (1.0, 1.0, 1.0)
    assert call("compare", "a", "b")[1].startswith("b minus a, in points, on the same 2 test users")


def test_a_run_without_a_report_cannot_be_compared(call: Call, tmp_path: Path) -> None:
    finished(tmp_path / "a", (0, 1, 2))
    code, _, err = call("compare", "a", "b")
    assert (code, err) == (2, "error: b: report.json is not there; finish the run with `rerankkit run`.\n")


def with_scorecard(folder: Path, place: str = "stages/2-sids") -> dict[str, Any]:
    """A run folder of four items, two of them on one SID; returns its scorecard."""
    catalog = make_catalog(4)
    card = make_scorecard(np.array([[0, 0], [0, 0], [1, 0], [1, 1]]), (2, 2), catalog, seed=0)
    (folder / place).mkdir(parents=True)
    write_json(folder / "config.json", {"optimizer": {}})
    write_json(folder / place / "scorecard.json", card)
    return card


def test_sids_report_shows_the_scorecard(call: Call, tmp_path: Path) -> None:
    card = with_scorecard(tmp_path / "run")

    code, out, err = call("sids", "report", "run")

    assert (code, err) == (0, "") and out.startswith("50.0% of 4 items have a SID of their own.\n2 levels of 2 codes\n")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "items with a SID of their own 50.0%" in lines
    assert "1 2 of 2 2.0 1.00" in lines  # two codes, used equally: one bit
    assert "0, 0 2 Norda Shampoo 0 | Velis Conditioner 1" in lines
    assert "0 0 Care > Shampoo 50% 2 items" in lines and lines[-1].startswith("1 Care > ")
    assert json.loads(call("sids", "report", "run", "--json")[1]) == card


def test_sids_report_writes_a_page(call: Call, tmp_path: Path) -> None:
    with_scorecard(tmp_path / "run")
    assert call("sids", "report", "run", "--html", "page.html")[1].endswith("\npage: page.html\n")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads(call("sids", "report", "run", "--html", "page.html", "--json")[1])["num_items"] == 4
    code, out, err = call("sids", "report", "run", "--html", "absent/page.html")
    assert (code, out, err) == (
        2,
        "",
        "error: --html absent/page.html: cannot be written (No such file or directory).\n",
    )


def test_sids_report_prefers_what_the_gate_has_just_stopped(call: Call, tmp_path: Path) -> None:
    with_scorecard(tmp_path / "run")
    write_json(tmp_path / "run" / "scorecard.json", {**with_scorecard(tmp_path / "other"), "missed_gate": "too few"})
    assert "\ntoo few\n" in call("sids", "report", "run")[1]


def test_without_sids_there_is_nothing_to_report(call: Call, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"optimizer": {}})
    assert call("sids", "report", ".")[::2] == (
        2,
        "error: . has no SIDs yet; `rerankkit run config.json --until sids` draws them.\n",
    )
    assert call("sids", "report", "absent")[0] == 2


PAIRING = """
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from rerankkit import Catalog, PluginConfig, Register, hookimpl


@dataclass
class Pairing:
    codebook_sizes = (500,)

    def fit(self, catalog: Catalog) -> None: ...
    def encode(self, catalog: Catalog): return np.arange(len(catalog.items))[:, None] // 2
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@hookimpl
def rerankkit_register(register: Register) -> None:
    register.tokenizers.add("pairing", PluginConfig, lambda config, info: Pairing())
"""
"""A tokenizer that puts two items on each SID, and has none of the optional methods."""


def test_a_run_is_stopped_by_the_gate_and_its_next_attempt_forgets(call: Call, tmp_path: Path) -> None:
    (tmp_path / "pairing.py").write_text(PAIRING)
    setup = ["plugin_files=pairing.py", "tokenizer.use=pairing", "--out", "run", "--until", "sids"]
    code, out, err = call("run", QUICKSTART, *setup)

    assert (code, out) == (1, "")
    assert (
        "error: sids: only 0% of 240 items have a SID of their own. The most crowded SIDs:\n  0: 2 items, such" in err
    )
    assert "What can be changed: tokenizer.use (now pairing), or sids.min_unique itself" in err
    assert (tmp_path / "run" / "sids.html").exists() and not (tmp_path / "run" / "stages" / "2-sids").exists()
    assert "so the run stopped" in call("sids", "report", "run")[1]

    assert call("run", QUICKSTART, "sids.min_unique=0", *setup)[0] == 0
    assert not (tmp_path / "run" / "sids.html").exists()
    assert "so the run stopped" not in call("sids", "report", "run")[1]


def test_doctor_tells_the_machine_and_what_is_wrong(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call("doctor")
    assert code == 0 and out.endswith("\nall is well\n") and "plugin gr2 " in out
    assert re.search(r"^processes +1 \(NO\), this is 0 on ", out, re.M)

    monkeypatch.setenv("RERANKKIT_PLUGINS", "gr2,absent")
    code, out, _ = call("doctor", "--json")
    assert code == 1
    [problem] = json.loads(out)["problems"]
    assert problem.startswith("plugin absent: RERANKKIT_PLUGINS asks for it, but it is not installed")
