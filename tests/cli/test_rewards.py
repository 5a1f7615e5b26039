"""`rerankkit rewards audit`: what it audits, on which asks, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rerankkit.cli import main

FEW = ["--examples", "100", "--group-size", "2"]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["rerankkit", "rewards", "audit", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_name_is_audited_on_made_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "format", *FEW) == 0

    told = capsys.readouterr().out
    assert told.startswith("1 format: does not pass\n100 made asks; the given order's NDCG@5 is 0.5")
    assert "It does not judge the order" in told
    assert all(name in told for name in ("worse", "perfect", "swap-last-two", "control-tokens"))


def test_the_bar_makes_it_exit_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "format", "--fail-on-exploit", *FEW) == 1


def test_rewards_of_a_config_are_added_up_with_weights_gates_and_overrides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[[reward]]\nuse = "ndcg"\n[[reward]]\nuse = "format"\nweight = 0.2\ngate = "earned"\n')

    code = call(monkeypatch, str(config), "reward.1.weight=0.5", "--json", "--fail-on-exploit", *FEW)

    found = json.loads(capsys.readouterr().out)
    assert code == (not found["passed"])
    assert found["reward"][1] == {"use": "format", "weight": 0.5, "gate": ["earned"]}
    assert found["asks"] == 100 and found["source"] == "made asks" and found["judges_order"]
    # the best order: NDCG 1, and half a point for its form
    assert found["levels"][-1]["reward"]["value"] == pytest.approx(1.5, abs=0.01)
    assert {"name", "gain", "advantage", "pays", "lift"} <= found["findings"][0].keys()


def test_a_name_takes_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "gr2", "reward.format_weight=5", "--json", *FEW)

    found = json.loads(capsys.readouterr().out)
    assert found["reward"][0]["format_weight"] == 5 and found["levels"][-1]["reward"]["value"] > 5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gr3"], "no reward is named 'gr3'; known: auc,"),
        (["nowhere.toml"], "nowhere.toml: cannot be read"),
        (["gr2", "reward.fromat_weight=1"], "reward.fromat_weight: no such key"),
        (["gr2", "--out", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_what_cannot_be_audited_is_an_error_of_the_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert call(monkeypatch, *words) == 2
    assert told in capsys.readouterr().err


def test_a_single_file_plugin_is_audited(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plugin = tmp_path / "copying.py"
    plugin.write_text(
        "from rerankkit import PluginConfig, Reward, hookimpl\n"
        "class CopyingConfig(PluginConfig):\n    pass\n"
        "def copying(rollouts):\n    return [Reward(float(r.ranking.identity)) for r in rollouts]\n"
        "@hookimpl\ndef rerankkit_register(register):\n"
        "    register.rewards.add('copying', CopyingConfig, lambda config, info: copying)\n"
    )

    assert call(monkeypatch, "copying", "--file", str(plugin), "--fail-on-exploit", *FEW) == 1

    told = capsys.readouterr().out
    assert "copy pays: a policy that hands the given order back earns more than honest answers that rank better" in (
        " ".join(told.split())
    )


def test_a_finished_run_lends_its_training_lists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = Path(__file__).parents[1] / "tiny.toml"
    monkeypatch.setattr("sys.argv", ["rerankkit", "run", str(tiny), "--out", "run", "--until", "candidates"])
    with pytest.raises(SystemExit):
        main()
    capsys.readouterr()

    call(monkeypatch, str(tiny), "--out", "run", "--json", *FEW)

    found = json.loads(capsys.readouterr().out)
    assert found["source"] == "training lists of run" and 0 < found["asks"] <= 100
