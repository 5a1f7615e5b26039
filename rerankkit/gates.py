"""Conditions by name, and rewards that are paid only where one holds: `[[reward]] use = "format" gate = "earned"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TypeAlias

from rerankkit.protocols import RewardFn
from rerankkit.types import Outcome, Parse, Reward, Rollout

Condition: TypeAlias = Callable[[Rollout], bool]
"""Whether a gate is open for a rollout: a pure function of the record."""


def valid(rollout: Rollout) -> bool:
    """The answer is well formed, and a complete order of the candidates."""
    return rollout.ranking.parse is Parse.OK


def readable(rollout: Rollout) -> bool:
    """At least some candidates could be read from the answer."""
    return rollout.ranking.parse is not Parse.FAILED


def not_identity(rollout: Rollout) -> bool:
    """The order is another one than was given."""
    return not rollout.ranking.identity


def not_copied(rollout: Rollout) -> bool:
    """A valid answer, and not the order as given unless that was the best there is (GR2 Technical Report, 2606.31984).

    The given order is the best if no candidate stands before a more relevant one.
    """
    best = all(first >= second for first, second in pairwise(rollout.example.relevance))
    return valid(rollout) and (best or not rollout.ranking.identity)


def promoted(rollout: Rollout) -> bool:
    """The target stands nearer to the front than it was given."""
    target = rollout.example.target_index
    return target is not None and readable(rollout) and rollout.ranking.order.index(target) < target


def earned(rollout: Rollout) -> bool:
    """GR2's condition (2602.07774): the target moved up, or it was first and the answer kept it first.

    "Kept" is the diffusion paper's reading (2607.01170) and ours; an answer that could not be read has kept nothing.
    """
    kept = rollout.example.target_index == 0 and readable(rollout) and rollout.ranking.order[0] == 0
    return kept or promoted(rollout)


CONDITIONS: Mapping[str, Condition] = {
    "valid": valid,
    "readable": readable,
    "not-identity": not_identity,
    "not-copied": not_copied,
    "promoted": promoted,
    "earned": earned,
}
"""What `gate` in a reward's block can name."""


@dataclass(frozen=True)
class Gate:
    """`reward` where `condition` holds, 0 elsewhere. Logs `condition` (0 or 1) and the ungated value as `name`.

    What is no value (not applicable, failed) passes, whether the gate is open or not.
    """

    condition: Condition
    reward: RewardFn
    name: str = "ungated"
    logged: str = "condition"
    """The condition's name in the log."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        return [self._one(rollout, outcome) for rollout, outcome in zip(rollouts, self.reward(rollouts), strict=True)]

    def _one(self, rollout: Rollout, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Reward):
            return outcome
        is_open = self.condition(rollout)
        parts = {self.logged: float(is_open), self.name: outcome.value, **outcome.parts}
        return Reward(outcome.value if is_open else 0.0, parts)


def gate(condition: Condition, reward: RewardFn, name: str = "ungated") -> RewardFn:
    """`reward` only for rollouts that meet `condition`; see `Gate`."""
    return Gate(condition, reward, name)


def gated(reward: RewardFn, names: Sequence[str]) -> RewardFn:
    """`reward` only where all of `names` (see `CONDITIONS`) hold, each logged as 0 or 1 under its name."""
    return reduce(lambda inner, name: Gate(CONDITIONS[name], inner, "ungated", name), names, reward)
