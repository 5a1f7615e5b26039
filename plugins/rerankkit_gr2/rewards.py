"""GR2's rewards. Pure functions of rollout records; GR2's conditional reward is a composition of them.

The formulas: reference in docs/papers.md. R_rank = (rank_in - rank_out) / |D| of the target; R_fmt = 1 for an answer
that parses; R = R_rank + a * R_fmt where the format bonus is paid only to answers that earned it, because a bonus for
all is collected by copying the input order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, NotApplicable, Outcome, Parse, Reward, Rollout

Condition: TypeAlias = Callable[[Rollout], bool]
"""Whether a gate is open for a rollout."""

_NO_TARGET = NotApplicable("no candidate is relevant")


@dataclass(frozen=True)
class RankPromotion:
    """R_rank: by how much of the list's length the target moved up; -0.9 to 0.9 in a list of ten.

    An answer that could not be read at all gets `unparsable`: its order is the input order, but nobody chose it.
    """

    unparsable: float = -1.0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        target = rollout.example.target_index
        if target is None:
            return _NO_TARGET
        if rollout.ranking.parse is Parse.FAILED:
            return Reward(self.unparsable)
        return Reward((target - rollout.ranking.order.index(target)) / len(rollout.example.candidates))


@dataclass(frozen=True)
class Format:
    """R_fmt: 1 for a well-formed answer that ranks every candidate once, else 0."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(float(rollout.ranking.parse is Parse.OK)) for rollout in rollouts]


@dataclass(frozen=True)
class Ndcg:
    """NDCG@k of the answered order, gain 2^relevance - 1, discount 1 / log2(position + 1); 0 if it cannot be read."""

    k: int = 10

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        relevance = rollout.example.relevance
        if rollout.example.target_index is None:
            return _NO_TARGET
        if rollout.ranking.parse is Parse.FAILED:
            return Reward(0.0)
        best = _dcg(sorted(relevance, reverse=True)[: self.k])
        return Reward(_dcg([relevance[i] for i in rollout.ranking.order[: self.k]]) / best)


def _dcg(relevance: Sequence[float]) -> float:
    return math.fsum((2.0**grade - 1.0) / math.log2(place + 2) for place, grade in enumerate(relevance))


def earned(rollout: Rollout) -> bool:
    """GR2's condition: the target moved up, or it was first and the answer kept it first.

    "Kept" is the diffusion paper's reading and ours; an answer that could not be read has kept nothing.
    """
    target = rollout.example.target_index
    if target is None or rollout.ranking.parse is Parse.FAILED:
        return False
    place = rollout.ranking.order.index(target)
    return place < target or place == target == 0


@dataclass(frozen=True)
class Gate:
    """`reward` where `condition` holds, 0 elsewhere. Logs `condition` (0 or 1) and the ungated value as `name`."""

    condition: Condition
    reward: RewardFn
    name: str = "ungated"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout, outcome) for rollout, outcome in zip(rollouts, self.reward(rollouts), strict=True)]

    def _one(self, rollout: Rollout, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Reward):
            return outcome
        is_open = self.condition(rollout)
        parts = {"condition": float(is_open), self.name: outcome.value, **outcome.parts}
        return Reward(outcome.value if is_open else 0.0, parts)


def gate(condition: Condition, reward: RewardFn, name: str = "ungated") -> RewardFn:
    """`reward` only for rollouts that meet `condition`; see `Gate`."""
    return Gate(condition, reward, name)


@dataclass(frozen=True)
class Formula:
    """A weighted sum whose terms belong together: where one term has no value the sum has none.

    (`rerankkit.stages.rewards.combine` adds rewards that stand on their own.) Parts are the terms' values by name,
    and the terms' own parts beside them.
    """

    terms: tuple[tuple[float, str, RewardFn], ...]

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        columns = [reward(rollouts) for _, _, reward in self.terms]
        return [self._one(row) for row in zip(*columns, strict=True)]

    def _one(self, row: Sequence[Outcome]) -> Outcome:
        for kind in (Failed, NotApplicable):
            for outcome in row:
                if isinstance(outcome, kind):
                    return outcome
        value = 0.0
        log: dict[str, float] = {}
        for (weight, name, _), outcome in zip(self.terms, row, strict=True):
            assert isinstance(outcome, Reward)  # the loop above has returned for the other two
            value += weight * outcome.value
            log |= {name: outcome.value, **outcome.parts}
        return Reward(value, log)


def gr2(format_weight: float = 0.2, unparsable: float = -1.0) -> RewardFn:
    """The conditional reward: R_rank + a * R_fmt where `earned`, else R_rank; `unparsable` if it cannot be read.

    Parts: rank, format (ungated, 0 or 1), condition (0 or 1), bonus (the gated format).
    """
    bonus = gate(earned, Format(), "format")
    return Formula(((1.0, "rank", RankPromotion(unparsable)), (format_weight, "bonus", bonus)))


def gr2_unconditional(format_weight: float = 0.2, unparsable: float = -1.0) -> RewardFn:
    """R_rank + a * R_fmt for all: the ablation that copying the input order hacks. Parts: rank, format."""
    return Formula(((1.0, "rank", RankPromotion(unparsable)), (format_weight, "format", Format())))
