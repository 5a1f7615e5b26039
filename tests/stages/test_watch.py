from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.config import Watch, WatchRules
from rerankkit.stages.rl import save_completions
from rerankkit.stages.watch import RULES, Alarm, Watcher, alarms, findings, measure, tau, watch_facts
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
    StepReport,
)


def ask(name: str, target: int = 1, size: int = 3) -> RerankExample:
    items = tuple(Item(f"{name}{i}", f"item {i}") for i in range(size))
    return RerankExample(name, "u", (), items, tuple(float(i == target) for i in range(size)))


def said(example: RerankExample, *order: int, group: int = 0, parse: Parse = Parse.OK, **more: Any) -> Rollout:
    return Rollout(example, "", "", Ranking(order, parse), group=group, **more)


def step(number: int, *judged: tuple[Rollout, Outcome], **metrics: float) -> StepReport:
    return StepReport(number, metrics, tuple(r for r, _ in judged), tuple(o for _, o in judged))


A, B = ask("a"), ask("b")


def test_a_step_is_measured_from_its_rollouts_alone() -> None:
    report = step(
        1,
        (said(A, 0, 1, 2, token_ids=(1, 2, 3, 4), num_reasoning_tokens=2), Reward(0.0, {"rank": 0.0})),
        (said(A, 1, 0, 2, token_ids=(1, 2), num_reasoning_tokens=1), Reward(1.0, {"rank": 1.0, "form": 0.5})),
        (said(B, 2, 1, 0, group=1, token_ids=(1, 2, 3), truncated=True), Reward(0.5, {"rank": 0.5})),
        (said(B, 0, 1, 2, group=1, parse=Parse.FAILED, token_ids=(1, 2, 3)), Failed("down")),
    )

    found = measure(report)

    assert found["reward"] == 0.5 and (found["reward_min"], found["reward_max"]) == (0.0, 1.0)
    assert found["reward_std"] == 0.5  # of 0 and 1; the other group has one reward alone
    assert (found["rewards/rank/mean"], found["rewards/form/mean"]) == (0.5, 0.5)
    assert found["frac_reward_zero_std"] == found["zero_std/unjudged"] == 0.5
    assert (found["rewards/failed"], found["rewards/not_applicable"]) == (0.25, 0.0)
    # the unreadable answer shows the given order, but did not choose it
    assert (found["identity_rate"], found["first_kept_rate"], found["invalid_rate"]) == (0.25, 0.25, 0.25)
    # 1 - 4 * inversions / 6: none, one, three
    assert found["kendall_tau"] == pytest.approx((1 + 1 / 3 - 1) / 3)
    assert found["tau_within_group"] == pytest.approx(1 / 3)
    assert [found[f"first_choice/{place}"] for place in (1, 2, 3)] == pytest.approx([1 / 3] * 3)
    assert (found["completions/mean_length"], found["completions/mean_reasoning_length"]) == (3.0, 0.75)
    assert found["completions/clipped_ratio"] == 0.25


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("unjudged", [(said(A, 1, 0, 2), Reward(1.0)), (said(A, 0, 1, 2), NotApplicable("no"))]),
        ("unreadable", [(said(A, 0, 1, 2, parse=Parse.FAILED), Reward(-1.0))] * 2),
        ("same_answers", [(said(A, 2, 0, 1), Reward(0.3))] * 3),
        ("target_first", [(said(A, 1, 0, 2), Reward(1.0)), (said(A, 1, 2, 0), Reward(1.0))]),
        ("other", [(said(A, 0, 1, 2), Reward(0.0)), (said(A, 2, 1, 0), Reward(0.0))]),
    ],
)
def test_a_group_without_variance_has_a_reason(reason: str, group: list[tuple[Rollout, Outcome]]) -> None:
    found = measure(step(1, *group))
    shares = {name: share for name, share in found.items() if name.startswith("zero_std/")}
    assert shares == {f"zero_std/{name}": float(name == reason) for name in REASONS}
    assert found["frac_reward_zero_std"] == 1.0


REASONS = ("unjudged", "same_answers", "unreadable", "target_first", "other")


def test_a_shuffled_prompt_is_copied_when_the_answer_has_its_order_and_not_the_given_one() -> None:
    copied = said(A, 2, 0, 1, shown=(2, 0, 1))
    given = said(A, 0, 1, 2, shown=(2, 0, 1))  # the given order, of which this prompt showed the second first
    found = measure(step(1, (copied, Reward(1)), (given, Reward(0))))
    assert (found["identity_rate"], found["first_kept_rate"]) == (0.5, 0.5)
    assert (found["first_choice/1"], found["first_choice/2"]) == (0.5, 0.5)
    # against (2, 0, 1) the order (0, 1, 2) has two inversions of three: 1 - 4 * 2 / 6
    assert found["kendall_tau"] == pytest.approx((1 - 1 / 3) / 2)


def test_which_groups_teach_nothing_is_for_the_optimizer_to_say() -> None:
    filtered = step(
        1, (said(A, 0, 1, 2), Reward(1)), (said(A, 1, 0, 2), Reward(0)), frac_reward_zero_std=1.0, reward=7.0
    )
    found = measure(filtered)
    assert found["frac_reward_zero_std"] == 1.0 and found["zero_std/other"] == 0.0  # it left one of the two out
    assert found["reward"] == 0.5


def test_a_step_without_rollouts_has_no_measures() -> None:
    assert measure(step(3, loss=1.0)) == {}


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_tau_between_orders_is_symmetric_and_1_only_for_equals(a: list[int], b: list[int]) -> None:
    assert tau(a, b) == pytest.approx(tau(b, a))
    assert (tau(a, b) == 1) == (a == b)
    assert tau(a, b) == pytest.approx(-tau(a, b[::-1]))


def test_answers_are_compared_with_the_latest_to_the_same_ask() -> None:
    watcher = Watcher(Watch())
    first = watcher.measure(step(1, (said(A, 0, 1, 2), Reward(1)), (said(A, 2, 1, 0), Reward(1))))
    assert first["seen_before"] == 0 and "tau_to_last" not in first
    watcher.measure(step(2, (said(B, 0, 1, 2), Reward(1))))

    third = watcher.measure(
        step(
            3,
            (said(A, 0, 2, 1), Reward(1)),
            (said(A, 2, 1, 0), Reward(1)),
            (said(ask("c"), 0, 1, 2, group=1), Reward(1)),
        )
    )

    # one swap away from its counterpart of step 1: 1 - 4/6; the other is as it was. Of two asks one is known.
    assert third["tau_to_last"] == pytest.approx((1 / 3 + 1) / 2)
    assert third["seen_before"] == 0.5


def series(length: int = 12, **values: Sequence[float] | float) -> list[dict[str, Any]]:
    """Records of `length` steps; a number stays, a list is one value a step."""
    return [
        {"step": n + 1, **{k: v[n] if isinstance(v, list) else v for k, v in values.items()}} for n in range(length)
    ]


def fired(records: list[dict[str, Any]], settings: Watch | None = None) -> dict[str, int]:
    return {alarm.rule: alarm.step for alarm in alarms(records, settings or Watch(window=2))}


def falling(start: float, end: float, at: int = 6, length: int = 12) -> list[float]:
    return [start if n < at else end for n in range(length)]


QUIET: Mapping[str, Any] = {
    "reward": 0.5,
    "reward_min": 0.0,
    "reward_max": 1.0,
    "loss": 0.1,
    "grad_norm": 1.0,
    "entropy": 1.0,
    "kl": 0.01,
    "frac_reward_zero_std": 0.5,
    "rewards/failed": 0.0,
    "identity_rate": 0.1,
    "first_kept_rate": 0.3,
    "completions/mean_length": 60.0,
    "completions/mean_reasoning_length": 20.0,
    "completions/clipped_ratio": 0.0,
    "first_choice/1": 0.6,
    "first_choice/2": 0.4,
}


def test_a_run_in_which_nothing_happens_sets_off_no_rule() -> None:
    assert fired(series(**QUIET)) == {}


@pytest.mark.parametrize(
    ("rule", "values", "at"),
    [
        ("not_a_number", {"grad_norm": falling(1.0, math.inf, 3)}, 4),
        ("not_a_number", {"loss": falling(1.0, math.nan, 0)}, 1),
        # window 2: 0 and .3 average to .15 at step 4, above the budget of .1
        ("error_budget", {"rewards/failed": falling(0.0, 0.3, 3)}, 4),
        ("no_signal", {"frac_reward_zero_std": falling(0.5, 1.0, 4)}, 6),
        # 1 -> .2: after two steps of it the mean is below a quarter
        ("entropy_collapse", {"entropy": falling(1.0, 0.2)}, 8),
        ("length_collapse", {"completions/mean_reasoning_length": falling(20.0, 5.0)}, 8),
        ("length_explosion", {"completions/mean_length": falling(60.0, 130.0)}, 8),
        ("length_explosion", {"completions/clipped_ratio": falling(0.0, 0.9)}, 8),
        # +.2 of identity is reached once both steps have it, and the reward is up at step 7 already
        ("copying", {"identity_rate": falling(0.1, 0.31), "reward": falling(0.5, 0.6)}, 8),
        ("copying", {"first_kept_rate": falling(0.3, 0.7), "reward": falling(0.5, 0.6)}, 8),
        ("one_place", {"first_choice/1": falling(0.6, 0.05), "first_choice/2": falling(0.4, 0.95)}, 8),
    ],
)
def test_each_rule_fires_at_its_step_and_no_other_does(rule: str, values: dict[str, Any], at: int) -> None:
    assert fired(series(**{**QUIET, **values})) == {rule: at}


@pytest.mark.parametrize(
    "values",
    [
        {"identity_rate": falling(0.1, 0.9)},  # more copies, but the reward does not pay for them
        {"identity_rate": falling(0.9, 0.1), "reward": falling(0.5, 0.6)},
        {"entropy": falling(1.0, 0.3)},
        {"entropy": falling(0.2, 1.0)},
        {"completions/mean_reasoning_length": 0.0},  # a policy that answers without reasoning
        {"frac_reward_zero_std": [1.0, 0.9] * 6},
        {"rewards/failed": 0.1},
    ],
)
def test_what_is_no_fault_sets_off_nothing(values: dict[str, Any]) -> None:
    assert fired(series(**{**QUIET, **values})) == {}


def test_an_optimizer_that_logs_nothing_of_its_own_is_watched_all_the_same() -> None:
    assert fired(series(frac_reward_zero_std=1.0, reward_min=0.0, reward_max=0.0, reward=0.0)) == {"no_signal": 2}


def test_equal_rewards_are_told_apart_by_kind() -> None:
    def sentence(**values: Any) -> str:
        [alarm] = findings(series(2, frac_reward_zero_std=1.0, **values), Watch(window=2))
        return alarm.sentence

    assert "all rewards were 0 (" in sentence(reward_min=0.0, reward_max=0.0)
    assert "all rewards were 0.5 (" in sentence(reward_min=0.5, reward_max=0.5)
    told = sentence(reward_min=0.0, reward_max=1.0, **{"zero_std/same_answers": 0.75, "zero_std/other": 0.25})
    assert "rewards were equal within every group (75% same answers, 25% other)" in told


def test_rules_are_switched_off_and_made_fatal_one_by_one() -> None:
    records = series(**{**QUIET, "entropy": falling(1.0, 0.1), "rewards/failed": 0.5})
    settings = Watch(window=2, on_fire="stop", rules=WatchRules(error_budget="off"))
    [alarm] = alarms(records, settings)
    assert (alarm.rule, alarm.action, alarm.step) == ("entropy_collapse", "stop", 8)
    assert alarm.evidence == {"entropy": [(n, 1.0 if n < 7 else 0.1) for n in range(1, 9)]}
    assert watch_facts(records, settings)["rules"]["error_budget"] == "off"


def test_every_rule_has_a_setting() -> None:
    assert set(RULES) == set(WatchRules.model_fields)
    assert WatchRules().not_a_number == "stop"
    assert [field.name for field in fields(Alarm)][:4] == ["rule", "step", "action", "sentence"]


def test_the_facts_hold_the_choice_at_the_start_and_at_the_end() -> None:
    records = series(4, **{"first_choice/1": [1.0, 0.8, 0.5, 0.1], "first_choice/2": [0.0, 0.2, 0.5, 0.9]})
    metrics = [{"stage": "sft", "step": 1}, *({"stage": "rl", **record} for record in records)]
    found = watch_facts(metrics, Watch(window=2))
    assert found["steps"] == 4
    assert found["first_choice"]["first steps"] == pytest.approx([0.9, 0.1])
    assert found["first_choice"]["last steps"] == pytest.approx([0.3, 0.7])


def test_a_resumed_watch_knows_what_an_undisturbed_one_knows(tmp_path: Path) -> None:
    reports = [
        step(1, (said(A, 0, 1, 2), Reward(0.0)), (said(A, 1, 0, 2), Reward(0.0))),
        step(2, (said(B, 2, 1, 0), Reward(0.0)), (said(B, 0, 1, 2, parse=Parse.FAILED), Reward(0.0))),
        step(3, (said(A, 0, 2, 1), Reward(0.0)), (said(B, 2, 1, 0, group=1), Reward(0.0))),
    ]
    settings = Watch(window=2)
    whole, told = Watcher(settings), []
    for report in reports:
        record = {"step": report.step, **whole.measure(report)}
        told.append(([alarm.rule for alarm in whole.look(record)], record))
        save_completions(tmp_path / "completions", report)
    lines = [json.dumps({"stage": "rl", **record}) for _, record in told]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    resumed = Watcher.begin(settings, tmp_path, 3)  # killed after step 3, and step 3 is done again

    record = {"step": 3, **resumed.measure(reports[2])}
    assert record == told[2][1]
    assert [rules for rules, _ in told] == [[], ["no_signal"], []]  # said once
    assert resumed.look(record) == []
    assert resumed.answers == whole.answers


def test_a_rule_that_stopped_a_run_stops_it_again(tmp_path: Path) -> None:
    settings = Watch(window=2, on_fire="stop")
    records = [{"stage": "rl", **record} for record in series(3, frac_reward_zero_std=1.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    resumed = Watcher.begin(settings, tmp_path, 3)
    assert [alarm.action for alarm in resumed.look(records[2])] == ["stop"]
