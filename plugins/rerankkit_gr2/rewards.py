"""GR2's rewards. Pure functions of rollout records; GR2's conditional reward is a composition of them.

The formulas: reference in docs/papers.md. R_rank = (rank_in - rank_out) / |D| of the target; R_fmt = 1 for an answer
that parses; R = R_rank + a * R_fmt where the format bonus is paid only to answers that earned it, because a bonus for
all is collected by copying the input order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from rerankkit.gates import earned, gate
from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, NotApplicable, Outcome, Parse, Reward, Rollout, Sid, SidSurface

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


@dataclass(frozen=True)
class ReciprocalRank:
    """1 / place of the first relevant candidate (Voorhees 1999); 0 if the answer cannot be read."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        if rollout.example.target_index is None:
            return _NO_TARGET
        if rollout.ranking.parse is Parse.FAILED:
            return Reward(0.0)
        grades = [rollout.example.relevance[i] for i in rollout.ranking.order]
        return Reward(1.0 / (1 + next(place for place, grade in enumerate(grades) if grade > 0)))


@dataclass(frozen=True)
class Auc:
    """Share of pairs of unlike relevance that stand in the right order; 0 if the answer cannot be read.

    With one relevant candidate of n it is 1 - (place - 1) / (n - 1).
    """

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        grades = [rollout.example.relevance[i] for i in rollout.ranking.order]
        unlike = [first > second for first, second in combinations(grades, 2) if first != second]
        if not unlike:
            return NotApplicable("all candidates are equally relevant: there is no pair to judge")
        return Reward(0.0 if rollout.ranking.parse is Parse.FAILED else sum(unlike) / len(unlike))


@dataclass(frozen=True)
class ExactFirst:
    """1 if the candidate put first is as relevant as any, else 0; 0 if the answer cannot be read."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        relevance = rollout.example.relevance
        if rollout.example.target_index is None:
            return _NO_TARGET
        hit = relevance[rollout.ranking.order[0]] == max(relevance) and rollout.ranking.parse is not Parse.FAILED
        return Reward(float(hit))


@dataclass(frozen=True)
class TargetLogp:
    """log P(target first), as far as a record of sampling under the permutation mask tells it; `floor` to 0.

    The sampler's choices give p_k, the probability of the candidate in place k among those still left. If choices
    obey Luce's axiom (1959: what is left is chosen in proportion, whatever was taken before), then for a target in
    place t

        log P(first) = log p_t + sum over k < t of log(1 - p_k)

    which is exact for t = 1. It says how far the policy was from choosing the target, where a ranking metric says
    only that it did not. Dense, and free: the log-probabilities are in the record.
    """

    floor: float = -20.0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        target = rollout.example.target_index
        if target is None:
            return _NO_TARGET
        if not rollout.allowed_ids or rollout.ranking.parse is Parse.FAILED:
            return NotApplicable("not sampled under the permutation mask: the choices were not among candidates alone")
        logps = _choice_logps(rollout)
        if logps is None:
            return Failed("the recorded choices do not fit the candidates' SIDs")
        total = 0.0
        for place, logp in zip(rollout.ranking.order, logps, strict=True):
            if rollout.example.candidates[place].sid == rollout.example.candidates[target].sid:
                return Reward(max(self.floor, total + logp))
            passed_over = -math.expm1(min(0.0, logp))  # 1 - p
            total += math.log(passed_over) if passed_over > 0 else -math.inf
        raise AssertionError("a ranking holds every candidate")


def _choice_logps(rollout: Rollout) -> list[float] | None:
    """The log-probability of each place's candidate among those left; None if the record is of something else.

    No text tokenizer is needed: which levels of a SID were a choice, and among how many, follows from the SIDs left.
    """
    made = [
        (len(ids), logp)
        for ids, logp in zip(rollout.allowed_ids, rollout.logps, strict=False)
        if ids is not None and len(ids) > 1
    ]
    left: list[Sid] = [item.sid for item in rollout.example.candidates]
    logps = []
    for sid in [left[place] for place in rollout.ranking.order]:
        total = 0.0
        for level in range(len(sid)):
            branches = len({other[level] for other in left if other[:level] == sid[:level]})
            if branches > 1:
                among, logp = made.pop(0) if made else (0, 0.0)
                if among != branches:
                    return None
                total += logp
        logps.append(total)
        left.remove(sid)
    return None if made else logps


@dataclass(frozen=True)
class ReasoningLength:
    """1 for a reasoning of `low` to `high` tokens, falling to 0 at none and at twice `high`; 0 if it cannot be read.

    The tokens are those before the ranking, the few that open the answer among them; a reasoning without a word
    gets 0.
    """

    low: int = 20
    high: int = 200

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        if not rollout.token_ids:
            return NotApplicable("the record has no tokens to count")
        count = rollout.num_reasoning_tokens
        if rollout.ranking.parse is Parse.FAILED or not rollout.reasoning.strip():
            return Reward(0.0)
        return Reward(max(0.0, min(1.0, count / self.low, 2.0 - count / self.high)))


@dataclass(frozen=True)
class Citations:
    """Share of the SIDs that the reasoning cites, each counted once, that are the example's own items.

    A reasoning that cites none gets `uncited`, or is not applicable if that is None.
    """

    surface: SidSurface = field(default_factory=SidSurface)
    uncited: float | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        cited = set(self.surface.find(rollout.reasoning))
        if not cited:
            return NotApplicable("the reasoning cites no SID") if self.uncited is None else Reward(self.uncited)
        own = {item.sid for item in (*rollout.example.history, *rollout.example.candidates)}
        return Reward(len(cited & own) / len(cited))


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
