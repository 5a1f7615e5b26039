"""A run made to collapse on purpose, with the real optimizer: the watch sees it and ends it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rerankkit.config import Watch
from rerankkit.errors import RunFailed
from rerankkit.plugins import load_plugins
from rerankkit.stages.rl import reinforce, watching
from rerankkit.store import read_metrics
from rerankkit.types import Outcome, Reward, Rollout, RunInfo

from .conftest import Shop


def brevity(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """Pays for saying nothing: the shorter the reasoning, the better."""
    return [Reward(-rollout.num_reasoning_tokens / 10) for rollout in rollouts]


@pytest.mark.slow
def test_a_reward_that_pays_for_silence_is_caught_as_a_collapse_of_length(shop: Shop, tmp_path: Path) -> None:
    settings = {"steps": 60, "prompts_per_step": 4, "group_size": 4, "learning_rate": 3e-3, "max_new_tokens": 70}
    part = load_plugins(only="gr2").part("optimizer", "dapo", "test")
    optimizer = part.build(part.config(**settings), RunInfo())
    warned: list[str] = []
    config = SimpleNamespace(watch=Watch(on_fire="stop"))
    folder: Any = SimpleNamespace(
        path=tmp_path, hooks=None, config=config, warn=lambda stage, text: warned.append(text)
    )

    def log(record: Any) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "rl", **record}) + "\n")

    asked = (shop.dataset, shop.sids, shop.lists, shop.policy())
    with pytest.raises(RunFailed, match=r"stopped at step \d+: reasoning shrank from \d+ to \d+ tokens"):
        watching(reinforce, folder)(optimizer, [(1.0, "brevity", brevity)], *asked, info=RunInfo(seed=1, log=log))

    facts = json.loads((tmp_path / "watch.json").read_text())
    [alarm] = facts["alarms"]
    assert alarm["rule"] == "length_collapse"
    lengths = [length for _, length in alarm["evidence"]["completions/mean_reasoning_length"]]
    logged = read_metrics(tmp_path)
    assert len(logged) == alarm["step"] == len(list((tmp_path / "completions").iterdir())) < 60
    assert lengths == pytest.approx([record["completions/mean_reasoning_length"] for record in logged], abs=1e-6)
    assert sum(lengths[-5:]) < 0.5 * sum(lengths[:5])
    assert logged[-1]["reward"] > logged[0]["reward"]  # it looked like success
