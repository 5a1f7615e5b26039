from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from rerankkit.config import Watch, WatchRules
from rerankkit.data.lists import CandidateLists
from rerankkit.errors import RunFailed
from rerankkit.lm import Policy
from rerankkit.stages.rl import reinforce, save_completions, watching
from rerankkit.store import read_metrics
from rerankkit.types import (
    Failed,
    Item,
    NotApplicable,
    Outcome,
    Parse,
    Ranking,
    RerankExample,
    Reward,
    Rollout,
    RunInfo,
    StepReport,
)

from .conftest import Shop


def fixed(value: float) -> Any:
    return lambda rollouts: [Reward(value) for _ in rollouts]


def step(number: int, *judged: tuple[Rollout, Outcome]) -> StepReport:
    return StepReport(number, {"reward": 0.5}, tuple(r for r, _ in judged), tuple(o for _, o in judged))


EXAMPLE = RerankExample("u7/3", "u7", (), (Item("a", "A"), Item("b", "B")), (0.0, 1.0))
ROLLOUT = Rollout(EXAMPLE, "text\u2028", "why", Ranking((1, 0)), (5, 6, 7), (-0.1, -0.2, -0.3), group=2)


@dataclass
class Recorder:
    """An optimizer that asks the reward once and reports two steps."""

    seen: list[Any] = field(default_factory=list)

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: Any, info: RunInfo
    ) -> Iterator[StepReport]:
        self.seen += [len(examples), reward([ROLLOUT])]
        yield step(1, (ROLLOUT, Reward(1.0)))
        yield step(2, (ROLLOUT, Failed("down")))


def test_the_optimizer_gets_the_lists_that_hold_their_target_and_the_weighted_sum(shop: Shop) -> None:
    logged: list[Any] = []
    watched: list[int] = []
    recorder = Recorder()
    rewards = [(0.5, "a", fixed(1.0)), (2.0, "b", fixed(0.25))]

    found = reinforce(
        recorder,
        rewards,
        shop.dataset,
        shop.sids,
        shop.lists,
        shop.base,
        info=RunInfo(log=logged.append),
        watch=lambda report, info: watched.append(report.step),
    )

    num_asks = len(shop.lists.examples(shop.items, "train"))
    # 0.5 * 1 + 2 * 0.25
    assert recorder.seen == [num_asks, [Reward(1.0, {"a": 1.0, "b": 0.25})]]
    assert found.policy is shop.base and found.kept is None
    assert logged == []  # that is left to the watch
    assert watched == [1, 2]


def test_without_a_list_that_holds_its_target_there_is_nothing_to_learn(shop: Shop) -> None:
    missed = CandidateLists(tuple(replace(one, relevance=(0.0,) * 4) for one in shop.lists))
    with pytest.raises(RunFailed, match=r"no training list holds its target; raise candidates\.size"):
        reinforce(Recorder(), [(1.0, "a", fixed(1))], shop.dataset, shop.sids, missed, shop.base, info=RunInfo())


def test_completions_are_a_row_each_with_their_judgement(tmp_path: Path) -> None:
    unread = replace(ROLLOUT, ranking=Ranking((0, 1), Parse.FAILED, "no key"), truncated=True)
    report = step(17, (ROLLOUT, Reward(0.75, {"a": 1.0})), (unread, Failed("down")), (ROLLOUT, NotApplicable("n/a")))

    save_completions(tmp_path / "completions", report)

    rows = pq.read_table(tmp_path / "completions" / "step-00017.parquet").to_pylist()
    assert rows[0] == {
        "step": 17,
        "group": 2,
        "example_id": "u7/3",
        "text": "text\u2028",
        "reasoning": "why",
        "order": [1, 0],
        "parse": "ok",
        "num_tokens": 3,
        "truncated": False,
        "reward": 0.75,
        "why_none": "",
    }
    assert [(r["parse"], r["truncated"], r["reward"], r["why_none"]) for r in rows[1:]] == [
        ("failed", True, None, "down"),
        ("ok", False, None, "n/a"),
    ]
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["step-00017.parquet"]


def test_a_step_that_is_done_again_replaces_its_completions(tmp_path: Path) -> None:
    for value in (0.25, 0.5):
        save_completions(tmp_path, step(1, (ROLLOUT, Reward(value))))
    [row] = pq.read_table(tmp_path / "step-00001.parquet").to_pylist()
    assert row["reward"] == 0.5


def test_a_step_without_rollouts_writes_nothing(tmp_path: Path) -> None:
    save_completions(tmp_path / "completions", step(1))
    assert not (tmp_path / "completions").exists()


def test_plugins_watch_every_step(shop: Shop, tmp_path: Path) -> None:
    told: list[tuple[str, int, float]] = []
    hooks = SimpleNamespace(
        rerankkit_step=lambda stage, report: told.append((stage, report.step, report.metrics["reward"]))
    )
    logged: list[Any] = []
    folder: Any = SimpleNamespace(
        path=tmp_path, hooks=hooks, config=SimpleNamespace(watch=Watch(rules=WatchRules(error_budget="off")))
    )

    make = watching(reinforce, folder)
    asked = [shop.dataset, shop.sids, shop.lists, shop.base]
    make(Recorder(), [(1.0, "a", fixed(1))], *asked, info=RunInfo(log=logged.append))

    assert told == [("rl", 1, 1.0), ("rl", 2, 0.5)]  # with what is logged
    # what the rollouts tell stands over what the optimizer says of them: the one reward of step 1 is 1, not .5
    assert [(r["step"], r["reward"], r["rewards/failed"]) for r in logged] == [(1, 1.0, 0.0), (2, 0.5, 1.0)]
    assert (logged[1]["tau_to_last"], logged[1]["seen_before"]) == (1.0, 1.0)
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        "step-00001.parquet",
        "step-00002.parquet",
    ]


def test_a_rule_that_stops_ends_the_run_and_leaves_its_evidence(shop: Shop, tmp_path: Path) -> None:
    warned: list[str] = []
    settings = Watch(rules=WatchRules(error_budget="stop", one_place="off"), window=1)
    folder: Any = SimpleNamespace(
        path=tmp_path, hooks=None, config=SimpleNamespace(watch=settings), warn=lambda stage, text: warned.append(text)
    )

    def log(record: Any) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "rl", **record}) + "\n")

    make = watching(reinforce, folder)
    asked = [shop.dataset, shop.sids, shop.lists, shop.base]
    with pytest.raises(RunFailed, match=r"watch: reinforcement was stopped at step 2: 100% of rollouts could not be"):
        make(Recorder(), [(1.0, "a", fixed(1))], *asked, info=RunInfo(log=log))

    assert warned[0].startswith("step 1: for 1 steps all rewards were 1 ") and warned[0].endswith("(no_signal)")
    assert warned[1].startswith("step 2: 100% of rollouts could not be judged")
    facts = json.loads((tmp_path / "watch.json").read_text())
    assert [(a["rule"], a["action"], a["step"]) for a in facts["alarms"]] == [
        ("no_signal", "warn", 1),
        ("error_budget", "stop", 2),
    ]
    assert facts["alarms"][1]["evidence"] == {"rewards/failed": [[1, 0.0], [2, 1.0]]}
    page = (tmp_path / "watch.html").read_text()
    assert "the run was stopped" in page and "Given place of the first choice" in page and "<script" not in page
    assert len(read_metrics(tmp_path)) == len(list((tmp_path / "completions").iterdir())) == 2
