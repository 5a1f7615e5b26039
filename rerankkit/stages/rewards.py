"""Rewards by weight: the sum that a run's `[[reward]]` blocks stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rerankkit.errors import RunFailed
from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, NotApplicable, Outcome, Reward, Rollout


def combine(parts: Sequence[tuple[float, str, RewardFn]]) -> RewardFn:
    """The weighted sum of (weight, name, reward) parts.

    A part that is not applicable is left out of the sum (weights are not rescaled); if all are, so is the sum. One
    failed part fails the sum: a total without it would be compared with totals that have it. The log gets every
    part's unweighted value as `name` and its own parts as `name/part`. Names must differ.
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
    """A reward's outcomes; a count that is off is a bug in it, a value that is no number a failure of that row."""
    outcomes = list(reward(rollouts))
    if len(outcomes) != len(rollouts):
        raise RunFailed(
            f"reward {name!r} returned {len(outcomes)} outcomes for {len(rollouts)} rollouts; it must return one for "
            "each, in order"
        )
    return [
        Failed(f"value {outcome.value} is not finite")
        if isinstance(outcome, Reward) and not math.isfinite(outcome.value)
        else outcome
        for outcome in outcomes
    ]
