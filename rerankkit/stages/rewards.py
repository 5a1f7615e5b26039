"""Rewards by weight: the sum that a run's `[[reward]]` blocks stand for."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from rerankkit.errors import RerankkitError, RunFailed
from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, NotApplicable, Outcome, Reward, Rollout


def combine(parts: Sequence[tuple[float, str, RewardFn]]) -> RewardFn:
    """The weighted sum of (weight, name, reward) parts.

    A part that is not applicable is left out of the sum (weights are not rescaled); if all are, so is the sum. One
    failed part fails the sum: a total without it would be compared with totals that have it. The log gets every
    part's unweighted value as `name` and its own parts as `name/part`. Names must differ.

    A part that raises is asked again group by group, and fails the groups that it raises for, with the exception's
    words as the reason; RunFailed if it raises for each of several. rerankkit's own errors, raised on purpose, pass.
    """
    names = [name for _, name, _ in parts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"rewards are combined under different names, and there must be one: {names}")
    return _Weighted(tuple(parts))


@dataclass(frozen=True)
class _Weighted:
    parts: tuple[tuple[float, str, RewardFn], ...]

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        judged = [_judge(name, reward, rollouts) for _, name, reward in self.parts]
        return [self._total(row) for row in zip(*judged, strict=True)]

    def _total(self, row: Sequence[Outcome]) -> Outcome:
        named = [(weight, name, outcome) for (weight, name, _), outcome in zip(self.parts, row, strict=True)]
        if failed := [f"{name}: {outcome.reason}" for _, name, outcome in named if isinstance(outcome, Failed)]:
            return Failed("; ".join(failed))
        given = [(weight, name, outcome) for weight, name, outcome in named if isinstance(outcome, Reward)]
        if not given:
            return NotApplicable("; ".join(f"{n}: {o.reason}" for _, n, o in named if isinstance(o, NotApplicable)))
        log: dict[str, float] = {}
        for _, name, outcome in given:
            log[name] = outcome.value
            log |= {f"{name}/{part}": value for part, value in outcome.parts.items()}
        return Reward(sum(weight * outcome.value for weight, _, outcome in given), log)


def _judge(name: str, reward: RewardFn, rollouts: Sequence[Rollout]) -> list[Outcome]:
    """A reward's outcomes. What it cannot judge is a failure of that row, never a 0; what is a bug in it is told."""
    try:
        outcomes = list(reward(rollouts))
    except RerankkitError:
        raise
    except Exception as error:
        return _by_group(name, reward, rollouts, error)
    return _checked(name, outcomes, len(rollouts))


def _by_group(name: str, reward: RewardFn, rollouts: Sequence[Rollout], error: Exception) -> list[Outcome]:
    """The outcomes of a reward that raised for the batch: asked again group by group, as it may compare within one.

    The rollouts of a group that it raises for fail. If it raises for each of several, it is broken: RunFailed.
    """
    groups: dict[int, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(row)
    outcomes: list[Outcome] = [Failed("")] * len(rollouts)
    raised = 0
    for rows in groups.values():
        try:
            judged = list(reward([rollouts[row] for row in rows]))
        except RerankkitError:
            raise
        except Exception as again:
            judged, raised, error = [Failed(_told(again))] * len(rows), raised + 1, again
        for row, outcome in zip(rows, _checked(name, judged, len(rows)), strict=True):
            outcomes[row] = outcome
    if raised == len(groups) > 1:  # one group alone may be a bad record: that is for the optimizer's error budget
        raise RunFailed(
            f"reward {name!r} raised for every group of {len(rollouts)} rollouts, at last {_told(error)}. A reward "
            "says Failed(reason) for what it cannot judge."
        ) from error
    return outcomes


def _told(error: Exception) -> str:
    """An exception in one line, with the place it was raised at."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _checked(name: str, outcomes: Sequence[Any], count: int) -> list[Outcome]:
    """`outcomes` if they are such; a wrong count or kind is a bug, a value that is no number a failure of its row."""
    if len(outcomes) != count:
        raise RunFailed(
            f"reward {name!r} returned {len(outcomes)} outcomes for {count} rollouts; it must return one for each, in "
            "order"
        )
    for outcome in outcomes:
        if not isinstance(outcome, Reward | NotApplicable | Failed):
            raise RunFailed(
                f"reward {name!r} returned {outcome!r:.80}; an outcome is Reward(value), NotApplicable(reason) or "
                "Failed(reason)"
            )
    return [_finite(outcome) if isinstance(outcome, Reward) else outcome for outcome in outcomes]


def _finite(reward: Reward) -> Outcome:
    for part, value in [("value", reward.value), *reward.parts.items()]:
        if not isinstance(value, Real) or not math.isfinite(value):
            return Failed(
                f"{part} {value!r} is not finite" if isinstance(value, Real) else f"{part} {value!r} is no number"
            )
    return reward
