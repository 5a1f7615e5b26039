"""The reward itself: a pure function of the rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rerankkit import Outcome, Reward, Rollout


@dataclass(frozen=True)
class Brevity:
    """1 up to `limit` tokens, then falling in a straight line to 0 at twice as many."""

    limit: int

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        return [Reward(min(1.0, max(0.0, 2 - len(rollout.token_ids) / self.limit))) for rollout in rollouts]
