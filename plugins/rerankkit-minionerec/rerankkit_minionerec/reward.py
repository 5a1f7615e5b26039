"""The rank-aware reward of a group of beams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rerankkit import NotApplicable, Outcome, Parse, Reward, Rollout


@dataclass(frozen=True)
class RankAware:
    """Of G beams of one search, the one at rank i (0 is the likeliest) gets

        hit                                                       if its item is the target
        -penalty * (1 / log2(i + 2)) / sum_{j < G} 1 / log2(j + 2)    if not, and another beam's is
        0                                                         if no beam's is

    Its place is the beam's rank, never the row that it is handed over in. Rollouts that are no beams have no rank: for
    them the reward is not applicable.
    """

    hit: float = 1.0
    penalty: float = 1.0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        sizes = Counter(rollout.group for rollout in rollouts)
        found = {rollout.group for rollout in rollouts if _hits(rollout)}
        return [self._one(rollout, sizes[rollout.group], rollout.group in found) for rollout in rollouts]

    def _one(self, rollout: Rollout, size: int, found: bool) -> Outcome:
        if rollout.origin != "beam":
            return NotApplicable("no beam: take an optimizer whose groups are beams")
        if rollout.example.target_index is None:
            return NotApplicable("no candidate is relevant")
        hit = _hits(rollout)
        total = math.fsum(1 / math.log2(rank + 2) for rank in range(size))
        below = -1 / math.log2(rollout.beam_rank + 2) / total if found and not hit else 0.0
        return Reward(self.hit * hit + self.penalty * below, {"hit": float(hit), "penalty": below})


def _hits(rollout: Rollout) -> bool:
    """Whether the item that the beam has put first is the target, or shares its SID."""
    candidates, target = rollout.example.candidates, rollout.example.target_index
    if target is None or rollout.origin != "beam" or rollout.ranking.parse is Parse.FAILED:
        return False
    return candidates[rollout.ranking.order[0]].sid == candidates[target].sid
