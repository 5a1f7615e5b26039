"""Reward functions as their authors write them for TRL, verifiers and verl, judged as ours."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rerankkit import Failed, NotApplicable, Reward, SidSurface
from rerankkit.adapters import COLUMNS, from_trl, from_verifiers, from_verl
from rerankkit.adapters.columns import columns_of, flat
from rerankkit.config import make_config
from rerankkit.errors import ConfigError, PluginError
from rerankkit.plugins import load_plugins
from rerankkit.testing import check_reward, make_example, make_rollout
from rerankkit.types import Rollout, RunInfo

FIRST, LAST = make_rollout(make_example(3), (3, 0, 1, 2, 4, 5, 6, 7, 8, 9)), make_rollout(make_example(3))


def place(completion: str, answer: str) -> float:
    """1 / place of the answer in the text behind the ranking's key; 0 where it is not."""
    listed = completion.partition('"recommendations"')[2]
    found = [SidSurface().text(sid) for sid in SidSurface().find(listed)]
    return 1 / (1 + found.index(answer)) if answer in found else 0.0


def test_columns_are_the_documented_ones_and_say_what_is_so() -> None:
    row = columns_of(FIRST, SidSurface())

    assert row.keys() == COLUMNS.keys()
    assert (
        row["target"] == row["answer"] == "<|sid_begin|><s_a_0><s_b_0><s_c_3><|sid_end|>"
    )  # item3: 0 * 64 + 0 * 8 + 3
    assert (row["target_id"], row["order"][0], row["parse"]) == ("item3", 3, "ok")
    assert columns_of(make_rollout(make_example(None)), SidSurface())["target"] == ""


# TRL


def trl_style(prompts: list[Any], completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
    assert kwargs["trainer_state"] is None and len(kwargs["completion_ids"]) == len(prompts)
    kwargs["log_metric"]("seen", len(prompts))
    return [
        None if not target else place(completion[0]["content"], target)
        for completion, target in zip(completions, answer, strict=True)
    ]


async def trl_async(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [place(completion[0]["content"], target) for completion, target in zip(completions, solution, strict=True)]


@pytest.mark.parametrize("function", [trl_style, trl_async])
def test_a_trl_function_keeps_our_contract(function: Any) -> None:
    check_reward(from_trl(function))


def test_a_trl_function_sees_messages_and_none_is_not_applicable() -> None:
    outcomes = from_trl(trl_style)([FIRST, LAST, make_rollout(make_example(None))])

    # the target is named first, then fourth
    assert outcomes == [Reward(1.0), Reward(0.25), NotApplicable("trl_style returned None")]
    assert from_trl(trl_style)([]) == []


def test_plain_text_and_columns_of_ones_own_name() -> None:
    def plain(prompts: list[str], completions: list[str], label: list[str]) -> list[int]:
        return [len(prompt) > 0 and label_ == "item3" for prompt, label_ in zip(prompts, label, strict=True)]

    assert from_trl(plain, {"label": "target_id"}, chat=False)([FIRST]) == [Reward(1.0)]
    with pytest.raises(PluginError, match=r"columns: label = 'targetid' is no column; .*Did you mean"):
        from_trl(plain, {"label": "targetid"})


def test_what_a_function_needs_and_nobody_gives_is_said_before_it_is_called() -> None:
    def needy(completions: list[Any], difficulty: list[int]) -> list[float]:
        raise AssertionError

    with pytest.raises(PluginError, match=r"needy: it needs 'difficulty', and is given only .*candidate_sids"):
        from_trl(needy)
    from_trl(partial(needy, difficulty=[1]))


def test_what_goes_wrong_is_a_failure_with_its_reason_and_never_a_zero() -> None:
    def raising(completions: list[Any]) -> list[float]:
        raise KeyError("gone")

    def odd(completions: list[Any]) -> list[Any]:
        return [math.nan, "high"]

    raised = from_trl(raising)([FIRST, LAST])
    assert [type(outcome) for outcome in raised] == [Failed, Failed]
    assert "raising raised KeyError: 'gone'" in raised[0].reason  # type: ignore[union-attr]
    reasons = [outcome.reason for outcome in from_trl(odd)([FIRST, LAST]) if isinstance(outcome, Failed)]
    assert [reason.split("> ")[-1].split("odd ")[-1] for reason in reasons] == [
        "returned nan", "returned 'high', which is no number",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="returned 0 rewards for 1 completions"):
        from_trl(lambda completions: [])([FIRST])


def test_async_functions_work_where_a_loop_runs_already() -> None:
    async def notebook() -> list[Any]:
        return from_trl(trl_async)([FIRST, LAST])

    assert asyncio.run(notebook()) == [Reward(1.0), Reward(0.25)]


# verifiers


def rubric(prompt: Any, completion: Any, answer: str, state: dict[str, Any], **kwargs: Any) -> float:
    assert state["prompt"] is prompt and state["candidate_sids"] and kwargs["info"]["target_id"]
    state["judged"] = True  # rubric functions keep things there
    return place(completion[-1]["content"], answer)


async def rubric_async(completion: Any, answer: str) -> float:
    return place(completion[-1]["content"], answer)


def rubric_group(completions: list[Any], answers: list[str]) -> list[float]:
    places = [place(one[-1]["content"], answer) for one, answer in zip(completions, answers, strict=True)]
    return [value - max(places) for value in places]  # against the best of the group


@pytest.mark.parametrize("function", [rubric_async, rubric_group])
def test_a_verifiers_function_keeps_our_contract(function: Any) -> None:
    check_reward(from_verifiers(function), judges_order=function is rubric_async)


def test_a_verifiers_function_is_given_what_it_names() -> None:
    assert from_verifiers(rubric)([FIRST, LAST]) == [Reward(1.0), Reward(0.25)]
    with pytest.raises(PluginError, match="rubric_parsed: it needs 'parser'"):
        from_verifiers(rubric_parsed)
    assert from_verifiers(partial(rubric_parsed, parser=flat))([FIRST]) == [Reward(1.0)]


def rubric_parsed(completion: Any, answer: str, parser: Any) -> float:
    return place(parser(completion), answer)


def test_a_group_function_is_called_once_a_group_and_rows_keep_their_place() -> None:
    seen: list[int] = []

    def sizes(completions: list[Any]) -> list[int]:
        seen.append(len(completions))
        return list(range(len(completions)))

    rollouts = [make_rollout(make_example(3), group=group) for group in (5, 2, 5, 2, 5)]

    assert from_verifiers(sizes)(rollouts) == [Reward(0.0), Reward(0.0), Reward(1.0), Reward(1.0), Reward(2.0)]
    assert seen == [3, 2]


# verl


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
    value = place(solution_str, ground_truth)
    return {"score": value, "acc": value == 1, "note": data_source, "parse": extra_info["parse"]}


def test_a_verl_function_keeps_our_contract_and_its_numbers_are_parts() -> None:
    check_reward(from_verl(compute_score))

    outcomes = from_verl(compute_score)([FIRST, make_rollout(make_example(None))])

    assert outcomes == [Reward(1.0, {"acc": 1.0}), NotApplicable("no candidate is relevant")]


def test_a_verl_function_gets_its_own_keyword_arguments() -> None:
    def scaled(data_source: str, solution_str: str, ground_truth: str, extra_info: Any, scale: float) -> float:
        return scale

    assert from_verl(scaled, {"scale": 3})([FIRST]) == [Reward(3.0)]
    with pytest.raises(PluginError, match="scaled: it needs 'scale'"):
        from_verl(scaled)
    [no_score] = from_verl(lambda solution_str: {"accuracy": 1.0})([FIRST])
    assert isinstance(no_score, Failed) and "returned a dict without score: ['accuracy']" in no_score.reason


# in a config


SOURCE = """
def best_first(completions, order, relevance, **kwargs):
    return [grades[places[0]] for places, grades in zip(order, relevance)]

def score(data_source, solution_str, ground_truth, extra_info):
    return 0.5

async def rate(completion, label):
    return float(label == "item3")
"""


def built(block: dict[str, Any]) -> Any:
    [chosen] = make_config({"reward": [block]}, load_plugins()).reward
    return chosen.build(RunInfo())


def test_a_config_names_a_function_in_a_file_or_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions_of_others.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    file = f"{tmp_path}/functions_of_others.py"

    rewards = [
        built({"use": "trl", "function": f"{file}:best_first"}),
        built({"use": "trl", "function": "functions_of_others:best_first"}),
        built({"use": "verl", "function": f"{file}:score", "data_source": "shop"}),
        built({"use": "verifiers", "function": "functions_of_others:rate", "columns": {"label": "target_id"}}),
    ]

    rollouts: list[Rollout] = [FIRST, LAST]
    assert rewards[0](rollouts) == rewards[1](rollouts) == [Reward(1.0), Reward(0.0)]
    assert rewards[2](rollouts) == [Reward(0.5), Reward(0.5)]
    assert rewards[3](rollouts) == [Reward(1.0), Reward(1.0)]


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("best_first", r"reward\[0\]\.function.*is not written as module:function"),
        ("no_such_file.py:f", "there is no file no_such_file.py"),
        ("no_such_module_at_all:f", "Python finds no module 'no_such_module_at_all'; install it, or name its file"),
    ],
)
def test_a_function_that_is_not_there_is_a_fault_of_the_config(function: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make_config({"reward": [{"use": "trl", "function": function}]}, load_plugins())


def test_a_module_without_the_function_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)

    with pytest.raises(PluginError, match=r"has no function 'best_frist'; .*Did you mean 'best_first'\?"):
        built({"use": "trl", "function": f"{tmp_path}/mine.py:best_frist"})
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(PluginError, match="cannot be imported: ZeroDivisionError"):
        built({"use": "trl", "function": f"{tmp_path}/broken.py:f"})
