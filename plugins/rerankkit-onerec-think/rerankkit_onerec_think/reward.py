"""The rollout-beam reward: how near the best of a rationale's beams comes to the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from rerankkit import NotApplicable, Outcome, RerankExample, Reward, Rollout, Sid, SidSurface
from rerankkit.text.answers import RANKING_KEY


@dataclass(frozen=True)
class RolloutBeam:
    """R = max over the answer's first K SIDs s of sum_l 1[s_l = s*_l] (2510.11639, the rollout-beam reward).

    With `prefix` the sum ends at the first code that differs. 0 for an answer that lists nothing. Part: `hit`, whether
    the target itself is among the K. A place that an answer cites stands for the SID of what is there.
    """

    beams: int
    match: Literal["positional", "prefix"] = "positional"
    surface: SidSurface = SidSurface()  # noqa: RUF009 (frozen)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One outcome for each rollout, in order."""
        return [self._one(rollout) for rollout in rollouts]

    def _one(self, rollout: Rollout) -> Outcome:
        place = rollout.example.target_index
        if place is None:
            return NotApplicable("no candidate is relevant")
        target = rollout.example.candidates[place].sid
        _, key, listed = rollout.text.rpartition(RANKING_KEY)
        shown = rollout.example.in_order(rollout.shown) if rollout.shown else rollout.example
        found = self._cited(listed, shown)[: self.beams] if key else []
        return Reward(max((float(self.common(sid, target)) for sid in found), default=0.0), {"hit": target in found})

    def _cited(self, listed: str, example: RerankExample) -> list[Sid]:
        if not self.surface.places:
            return self.surface.find(listed)
        there = {name: item.sid for name, item in zip(self.surface.names(example), example.candidates, strict=True)}
        return [there[name] for name in self.surface.citations(listed) if name in there]

    def common(self, sid: Sid, target: Sid) -> int:
        """Codes that both have: in the same places, or before the first that differs."""
        same = [a == b for a, b in zip(sid, target, strict=False)]
        return sum(same) if self.match == "positional" else len(list(takewhile(bool, same)))
