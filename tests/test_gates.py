"""Conditions by hand, and what a reward behind gates gives and logs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rerankkit.config import make_config
from rerankkit.gates import CONDITIONS, gated
from rerankkit.plugins import load_plugins
from rerankkit.testing import make_example, make_rollout
from rerankkit.types import NotApplicable, Outcome, Reward, Rollout, RunInfo

SECOND = make_example(1, num_candidates=3)
FIRST = make_example(0, num_candidates=3)
NONE = make_example(None, num_candidates=3)
SORTED = make_example(relevance=(2, 1, 1))
TEXT = make_rollout(SECOND).text
ROWS = {
    "moved up": make_rollout(SECOND, (1, 0, 2)),
    "copied": make_rollout(SECOND),
    "moved down": make_rollout(SECOND, (0, 2, 1)),
    "kept first": make_rollout(FIRST, (0, 2, 1)),
    "copied, and the best": make_rollout(SORTED),
    "moved up, repaired": make_rollout(SECOND, text=make_rollout(SECOND, (1, 0, 2)).text[:-1]),
    "unread": make_rollout(FIRST, text="no idea"),
    "no target": make_rollout(NONE, (1, 0, 2)),
}


@pytest.mark.parametrize(
    ("name", "open_for"),
    [
        ("valid", "moved up|copied|moved down|kept first|copied, and the best|no target"),
        ("readable", "moved up|copied|moved down|kept first|copied, and the best|moved up, repaired|no target"),
        ("not-identity", "moved up|moved down|kept first|moved up, repaired|no target"),
        # where nothing is relevant no order is better than the given one
        ("not-copied", "moved up|moved down|kept first|copied, and the best|no target"),
        ("promoted", "moved up|moved up, repaired"),
        ("earned", "moved up|kept first|copied, and the best|moved up, repaired"),
    ],
)
def test_each_condition(name: str, open_for: str) -> None:
    assert [row for row in ROWS if CONDITIONS[name](ROWS[row])] == open_for.split("|")


def test_there_is_a_test_for_every_condition() -> None:
    assert set(CONDITIONS) == {"valid", "readable", "not-identity", "not-copied", "promoted", "earned"}


class Two:
    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(2.0, {"part": 1.0}) if r.ranking.problem == "" else NotApplicable("x") for r in rollouts]


def test_all_gates_must_be_open_and_each_is_logged() -> None:
    reward = gated(Two(), ["valid", "not-identity"])
    log = {"ungated": 2.0, "part": 1.0}
    assert reward([ROWS["moved up"], ROWS["copied"], ROWS["unread"]]) == [
        Reward(2.0, {**log, "valid": 1.0, "not-identity": 1.0}),
        Reward(0.0, {**log, "valid": 1.0, "not-identity": 0.0}),
        NotApplicable("x"),
    ]
    two = Two()
    assert gated(two, []) is two


def test_a_config_names_gates_and_the_log_of_a_run_has_them() -> None:
    from rerankkit.stages.rewards import combine

    blocks = [{"use": "rank-promotion"}, {"use": "format", "weight": 0.2, "gate": "earned"}]
    parts = make_config({"reward": blocks}, load_plugins(only="gr2")).reward
    total = combine([(part.weight, part.spec.name, part.build(RunInfo())) for part in parts])
    up, copied = total([ROWS["moved up"], ROWS["copied"]])
    # GR2's conditional reward, composed: (1 - 0) / 3 + 0.2, and nothing for the copy
    assert isinstance(up, Reward) and up.value == pytest.approx(1 / 3 + 0.2)
    assert copied == Reward(0.0, {"rank-promotion": 0.0, "format": 0.0, "format/earned": 0.0, "format/ungated": 1.0})
