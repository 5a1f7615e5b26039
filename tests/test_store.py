"""The run folder: done once, whole or not at all, by one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rerankkit.config import ChosenPart, Midtrain, RunConfig, make_config
from rerankkit.errors import ConfigError, DataError, RunFailed, RunFolderError
from rerankkit.plugins import PartSpec, PluginConfig, load_plugins
from rerankkit.store import (
    RunFolder,
    StageStatus,
    StoppedEarlyError,
    drop_half_line,
    holder_of,
    open_run,
    publish,
    read_json,
    read_metrics,
    read_status,
    write_text,
)
from rerankkit.types import RunInfo, SidSurface

CONFIG = make_config({}, load_plugins(only="gr2"))


@dataclass(frozen=True)
class Note:
    """The smallest artifact."""

    text: str

    def save(self, folder: Path) -> None:
        (folder / "note.txt").write_text(self.text)

    @classmethod
    def load(cls, folder: Path) -> Note:
        return cls((folder / "note.txt").read_text())


class Kitchen:
    """Makes notes and remembers which."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def first(self, text: str, settings: Midtrain, *, info: RunInfo) -> Note:
        self.made.append("first")
        return Note(text)

    def second(self, before: Note, *, info: RunInfo) -> Note:
        self.made.append("second")
        info.log({"step": 1, "loss": 0.5})
        return Note(before.text + " and more")


def cook(path: Path, text: str = "salt", config: RunConfig = CONFIG, **how: Any) -> tuple[Kitchen, str]:
    """Two stages, the second made from the first."""
    kitchen = Kitchen()
    with open_run(path, config, **how) as folder:
        first = folder.stage("first", kitchen.first, Note.load, text, config.midtrain)
        second = folder.stage("second", kitchen.second, Note.load, first)
        return kitchen, second.load().text


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    assert cook(tmp_path, announce=lambda name, state, seconds: told.append((name, state)))[0].made == [
        "first",
        "second",
    ]
    kitchen, text = cook(tmp_path, announce=lambda name, state, seconds: told.append((name, state)))
    assert (kitchen.made, text) == ([], "salt and more")
    assert told == [
        ("first", "started"),
        ("first", "done"),
        ("second", "started"),
        ("second", "done"),
        ("first", "skipped"),
        ("second", "skipped"),
    ]


def test_another_input_setting_seed_or_part_version_is_another_stage(tmp_path: Path) -> None:
    cook(tmp_path)
    assert cook(tmp_path, "pepper")[0].made == ["first", "second"]
    longer = replace(CONFIG, midtrain=CONFIG.midtrain.model_copy(update={"steps": 9}))
    assert cook(tmp_path, "pepper", longer)[0].made == ["first", "second"]
    assert cook(tmp_path, "pepper", replace(longer, seed=1))[0].made == ["first", "second"]

    def use_part(config: RunConfig) -> list[str]:
        with open_run(tmp_path / "part", config) as folder:
            return [folder.stage("x", lambda part, info: Note("x"), Note.load, config.reward).fingerprint]

    part = CONFIG.reward[0]
    changed = [
        replace(part, weight=0.5),
        replace(part, spec=replace(part.spec, version="9")),
        replace(part, config=part.config.model_copy(update={"format_weight": 0.1})),
    ]
    prints = [use_part(replace(CONFIG, reward=(one,))) for one in (part, *changed)]
    assert len({one for [one] in prints}) == 4


def test_only_what_depends_on_a_change_is_redone(tmp_path: Path) -> None:
    cook(tmp_path)
    other = replace(CONFIG, sft=CONFIG.sft.model_copy(update={"epochs": 9}))
    assert cook(tmp_path, config=other)[0].made == []
    assert read_json(tmp_path / "config.json")["sft"]["epochs"] == 9


def test_a_stage_that_breaks_leaves_nothing_that_looks_done_and_is_continued(tmp_path: Path) -> None:
    def breaks(before: Note, *, info: RunInfo) -> Note:
        assert info.work is not None
        (info.work / "halfway").write_text("so far")
        raise KeyboardInterrupt

    def goes_on(before: Note, *, info: RunInfo) -> Note:
        assert info.work is not None
        return Note((info.work / "halfway").read_text())

    states: list[str] = []
    for make, error in ((breaks, KeyboardInterrupt), (goes_on, None)):
        with open_run(tmp_path, CONFIG, announce=lambda name, state, s: states.append(f"{name} {state}")) as folder:
            first = folder.stage("first", Kitchen().first, Note.load, "salt", CONFIG.midtrain)
            if error is not None:
                with pytest.raises(error):
                    folder.stage("second", make, Note.load, first)
                assert [s.state for s in read_status(tmp_path)] == ["done", "unfinished"]
            else:
                assert folder.stage("second", make, Note.load, first).load() == Note("so far")
    assert states[-3:] == ["first skipped", "second continued", "second done"]
    assert not (tmp_path / "stages" / "2-second.work").exists()


def test_a_changed_stage_does_not_continue_from_the_old_one(tmp_path: Path) -> None:
    def attempt(text: str) -> list[str]:
        def make(given: str, *, info: RunInfo) -> Note:
            assert info.work is not None
            seen.extend(file.name for file in info.work.iterdir())
            (info.work / text).write_text("")
            raise RunFailed(text)

        seen: list[str] = []
        with open_run(tmp_path, CONFIG) as folder, pytest.raises(RunFailed):
            folder.stage("x", make, Note.load, text)
        return seen

    assert attempt("a") == ["stage.json"]
    assert sorted(attempt("a")) == ["a", "stage.json"]
    assert attempt("b") == ["stage.json"]


@pytest.mark.parametrize("existing", [False, True])
def test_publishing_is_all_or_nothing(tmp_path: Path, existing: bool) -> None:
    folder = tmp_path / "stage"
    if existing:
        publish(folder, Note("old").save)

    def dies_halfway(aside: Path) -> None:
        (aside / "note.txt").write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        publish(folder, dies_halfway)
    assert (Note.load(folder).text if existing else folder.exists()) == ("old" if existing else False)

    publish(folder, Note("new").save)
    assert Note.load(folder).text == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_until_stops_after_the_stage_it_names(tmp_path: Path) -> None:
    kitchen = Kitchen()
    with open_run(tmp_path, CONFIG, until="first") as folder:
        first = folder.stage("first", kitchen.first, Note.load, "salt", CONFIG.midtrain)
        with pytest.raises(StoppedEarlyError):
            folder.stage("second", kitchen.second, Note.load, first)
    assert kitchen.made == ["first"]


def test_a_report_of_other_results_goes_when_a_stage_is_redone(tmp_path: Path) -> None:
    cook(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    cook(tmp_path)
    assert (tmp_path / "report.json").exists()
    cook(tmp_path, "pepper")
    assert not (tmp_path / "report.json").exists()


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_store import CONFIG
from rerankkit.store import open_run
with open_run(Path(sys.argv[1]), CONFIG):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = HOLDER.format(root=str(Path(__file__).parent.parent))
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        try:
            command = [sys.executable, "-c", "from rerankkit.cli import main; main()", "run", str(out / "config.json")]
            refused = subprocess.run(command, capture_output=True, text=True, check=False)
            assert refused.returncode == 2
            assert f"error: {out} is in use by process {holder.pid} on " in refused.stderr
            assert "wait for it, stop it, or choose another --out." in refused.stderr
            assert holder_of(out)["pid"] == holder.pid
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    assert holder_of(out) == {}
    assert cook(out)[1] == "salt and more"


def test_one_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", CONFIG), pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
        cook(tmp_path / "run")
    assert cook(tmp_path / "run")[1] == "salt and more"


def test_other_peoples_folders_are_refused_and_left_alone(tmp_path: Path) -> None:
    model = {"model_type": "llama", "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds other files and is not a run folder"):
        cook(tmp_path)
    with pytest.raises(RunFolderError, match="is a file; --out names a folder"):
        cook(tmp_path / "notes.txt")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        read_status(tmp_path)
    assert read_json(tmp_path / "config.json") == model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


@pytest.mark.parametrize("name", ["hit", "gr2/rank", "ndcg", "ndcg/", "ndcgs", "NDCG/x"])
def test_a_run_whose_optimizer_looks_at_a_reward_that_is_not_there_does_not_start(tmp_path: Path, name: str) -> None:
    raw = {"optimizer": {"filter_on": name}, "reward": [{"use": "ndcg"}, {"use": "format"}]}
    config = make_config(raw, load_plugins(only="gr2"))
    if name.startswith("ndcg") and name != "ndcgs":  # which parts a reward has, nobody knows yet
        assert cook(tmp_path / "run", config=config)[1] == "salt and more"
        return
    with pytest.raises(
        ConfigError, match=f"optimizer.filter_on: '{name}' is no reward of this run.*; known: format, n"
    ):
        cook(tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_and_one_that_was_killed_at_once_are_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.tmp").write_text("{")
    assert cook(tmp_path)[1] == "salt and more"


def test_a_step_that_was_logged_twice_counts_the_last_time(tmp_path: Path) -> None:
    lines: list[Mapping[str, Any]] = [
        {"stage": "sft", "step": 2, "loss": 0.9},
        {"stage": "sft", "step": 1, "loss": 1.0},
        {"stage": "rl", "step": 1, "loss": 7.0},
        {"stage": "sft", "step": 2, "loss": 0.8},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "sft", "st')
    assert [(r["stage"], r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        ("rl", 1, 7.0),
        ("sft", 1, 1.0),
        ("sft", 2, 0.8),
    ]


def test_half_a_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    def make(*, info: RunInfo) -> Note:
        info.log({"step": 2, "loss": 0.5})
        if (tmp_path / "metrics.jsonl").read_text().count("\n") == 1:
            raise RunFailed
        return Note("")

    with open_run(tmp_path, CONFIG) as folder, pytest.raises(RunFailed):
        folder.stage("x", make, Note.load)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "x", "st')
    with open_run(tmp_path, CONFIG) as folder:
        folder.stage("x", make, Note.load)
    line = '{"stage": "x", "step": 2, "loss": 0.5}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == 2 * line


@pytest.mark.parametrize(("text", "left"), [("a\nb\n", "a\nb\n"), ("a\nb", "a\n"), ("a", ""), ("", "")])
def test_half_lines_are_dropped(tmp_path: Path, text: str, left: str) -> None:
    file = tmp_path / "lines"
    file.write_text(text)
    drop_half_line(file)
    drop_half_line(tmp_path / "absent")
    assert file.read_text() == left


def test_a_stage_that_starts_afresh_forgets_what_it_logged(tmp_path: Path) -> None:
    cook(tmp_path)
    assert len(read_metrics(tmp_path)) == 1
    seen: dict[str, float] = {}
    cook(tmp_path, "pepper", track=lambda metrics: seen.update(metrics))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"stage": "second", "step": 1, "loss": 0.5}\n'
    assert seen == {"second/step": 1, "second/loss": 0.5}


def test_status_tells_what_is_done_and_how_far_the_rest_is(tmp_path: Path) -> None:
    def breaks(*, info: RunInfo) -> Note:
        info.log({"step": 7})
        raise RunFailed

    with open_run(tmp_path, CONFIG) as folder:
        for number in range(9):
            folder.stage(f"s{number}", lambda info: Note(""), Note.load)
        with pytest.raises(RunFailed):
            folder.stage("rank-rl", breaks, Note.load)
    found = read_status(tmp_path)
    assert [stage.name for stage in found] == [*(f"s{number}" for number in range(9)), "rank-rl"]
    assert found[-1] == StageStatus("rank-rl", "unfinished", None, 7)
    assert found[0].state == "done" and found[0].seconds is not None


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")

    def dies(handle: int) -> None:
        raise OSError("killed")

    monkeypatch.setattr("rerankkit.store.os.fsync", dies)
    with pytest.raises(OSError, match="killed"):
        write_text(file, "new")
    assert file.read_text() == "old"


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_json_that_is_no_object_reads_as_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == {}


def test_a_damaged_artifact_is_named_with_what_to_do(tmp_path: Path) -> None:
    cook(tmp_path)
    (tmp_path / "stages" / "1-first" / "note.txt").unlink()
    (tmp_path / "stages" / "2-second" / "stage.json").unlink()
    with pytest.raises(RunFolderError, match=r"stages/1-first: .*FileNotFoundError.*; delete it and run again"):
        cook(tmp_path)


def test_results_of_other_stages_go_and_folders_in_their_place_are_refused(tmp_path: Path) -> None:
    cook(tmp_path)
    (tmp_path / "trec").mkdir()
    for name in ("trec/test.run", "rankings.parquet", "report.md"):
        (tmp_path / name).write_text("old")
    cook(tmp_path)
    assert (tmp_path / "rankings.parquet").exists() and (tmp_path / "trec").exists()
    cook(tmp_path, "pepper")
    assert not any((tmp_path / name).exists() for name in ("trec", "rankings.parquet", "report.md"))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RunFolderError, match=r"report\.html is a folder"):
        cook(tmp_path)


class Boom:
    """A part that raises whatever it is given, in a helper of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, rollouts: Any) -> Any:
        return raises(self.error)


def raises(error: Exception) -> Any:
    raise error


def use_rewards(rewards: Any, *, info: RunInfo) -> Note:
    for _, _, reward in rewards:
        reward([])
    return Note("")


def part_that_raises(error: Exception, building: bool = False, distribution: str = "acme") -> ChosenPart:
    def build(config: PluginConfig, info: RunInfo) -> Boom:
        return raises(error) if building else Boom(error)

    spec = PartSpec("reward", "boom", lambda: (PluginConfig, build), "", "badrew", distribution, "1.2")
    return ChosenPart(spec, PluginConfig())


@pytest.mark.parametrize("building", [True, False])
def test_a_part_that_raises_is_named_and_its_traceback_kept(tmp_path: Path, building: bool) -> None:
    fine = ChosenPart.given("reward", lambda rollouts: [])
    parts = (fine, part_that_raises(ZeroDivisionError("by 0"), building))
    with open_run(tmp_path, CONFIG) as folder, pytest.raises(RunFailed) as caught:
        folder.stage("rl", use_rewards, Note.load, parts)
    assert str(caught.value).startswith("reward 'boom' (plugin badrew, acme 1.2): ZeroDivisionError: by 0. ")
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" in log and "in raises" in log and log.endswith("ZeroDivisionError: by 0\n")


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with open_run(tmp_path, CONFIG) as folder:
        for error in (DataError("a bad row"), RunFailed("a gate was missed")):
            with pytest.raises(type(error), match=f"^{error}$"):
                folder.stage("rl", use_rewards, Note.load, (part_that_raises(error),))
        with pytest.raises(ZeroDivisionError):  # a bug of rerankkit's own part
            folder.stage("rl", use_rewards, Note.load, (part_that_raises(ZeroDivisionError(), False, "rerankkit"),))
        with pytest.raises(KeyError):  # a stage's own, with a part at hand that is not to blame
            folder.stage("x", lambda rewards, info: raises(KeyError("k")), Note.load, (part_that_raises(ValueError()),))


def test_a_run_spells_what_its_prompts_show(tmp_path: Path) -> None:
    raw = {"candidates": {"size": 7}, "policy": {"prompt": {"cite": "place", "evidence": ["brand"]}}}
    folder = RunFolder(tmp_path, make_config(raw, load_plugins()))
    assert folder.surface == SidSurface(places=7, facts=("brand",)) == folder.info("sft", tmp_path).surface
    assert RunFolder(tmp_path, make_config({}, load_plugins())).surface == SidSurface()


def test_what_only_saves_memory_leaves_stages_done(tmp_path: Path) -> None:
    def identity(**policy: Any) -> Any:
        config = make_config({"policy": policy}, load_plugins())
        return RunFolder(tmp_path, config)._identity(config.policy)

    assert identity(tokens_per_pass=512, gradient_checkpointing=True, threads=3) == identity()
    assert identity(precision="bfloat16") != identity()
