"""examples/quickstart.py works: its reward keeps the contract, its stages alone, and the start of its pipeline."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rerankkit import Pipeline, Reward
from rerankkit.testing import check_reward, make_example, make_rollout

SCRIPT = Path(__file__).parent.parent / "examples" / "quickstart.py"
SMALL = [
    "data.num_users=60",
    "candidates.tune=false",
    "policy.hidden_size=32",
    "policy.num_layers=1",
    "policy.intermediate_size=64",
    "midtrain.steps=2",
    "midtrain.tokens_per_step=512",
    "sft.epochs=1",
    "optimizer.steps=2",
    "optimizer.prompts_per_step=2",
    "optimizer.group_size=2",
    "optimizer.max_new_tokens=160",
]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_its_reward_keeps_the_contract(quickstart: ModuleType) -> None:
    reward = quickstart.ReciprocalRank()
    example = make_example(3, num_candidates=4)

    check_reward(reward)
    # the target, given last, is put second: 1 / 2; left last: 1 / 4
    assert reward([make_rollout(example, (0, 3, 1, 2)), make_rollout(example)]) == [Reward(0.5), Reward(0.25)]


def test_its_stages_can_be_called_alone(quickstart: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recall = quickstart.look(num_users=60)

    assert 0 < recall < 1
    assert "target among the ten" in capsys.readouterr().out


def test_its_pipeline_runs_with_the_reward_swapped_in(quickstart: ModuleType, tmp_path: Path) -> None:
    pipeline = Pipeline(config=quickstart.CONFIG, overrides=SMALL, reward=quickstart.ReciprocalRank())

    report = pipeline.run(tmp_path / "run", until="rl", progress=False)

    assert report == {}  # it stopped before the report
    assert (tmp_path / "run" / "stages" / "7-rl" / "model.safetensors").is_file()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [block["use"] for block in config["reward"]] == ["ReciprocalRank"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    [first, _] = [record for record in map(json.loads, lines) if record["stage"] == "rl"]
    assert -1 <= first["reward"] <= 1
