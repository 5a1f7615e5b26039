"""The audit of a reward: what cheating earns under it, beside what ranking honestly earns, before anything is trained.

Pure: rollouts of honest policies and of exploits go in (`rerankkit.testing.zoo` makes them), numbers come out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev, variance
from typing import Any, TypeAlias

from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, Outcome, Reward, Rollout

Group: TypeAlias = Sequence[Rollout]
"""Rollouts of one ask. The last one's seat is what an exploit takes."""

SURE = 3.0
"""Standard errors by which a mean must exceed 0 to count: some thirty exploits are looked at."""
UNSURE = 2.0
"""Standard errors beyond which a mean that is not sure to exceed 0 may well do."""
COPY = "copy"
"""The exploit that hands the given order back; there must be one."""
_SAME = 1e-6  # rewards closer than this are one reward, as for advantages


@dataclass(frozen=True)
class Mean:
    """A mean over asks, and its standard error; over none it is NaN."""

    value: float
    error: float
    """Given how many asks have their target in each place: only what varies within a place counts. A place with a
    single ask is taken to vary as the others do."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None], places: Sequence[int | None]) -> Mean:
        """Of one value an ask, where it has one; `places` says where the ask's target was given."""
        by_place = defaultdict(list)
        for value, place in zip(values, places, strict=True):
            if value is not None:
                by_place[place].append(value)
        groups = list(by_place.values())
        every = [value for group in groups for value in group]
        if not every:
            return cls(math.nan, math.nan, 0)
        several = [group for group in groups if len(group) > 1] or [every] * (len(every) > 1)
        pooled = _ratio(sum((len(group) - 1) * variance(group) for group in several), sum(len(g) - 1 for g in several))
        spread = math.fsum(len(group) * (variance(group) if len(group) > 1 else pooled) for group in groups)
        return cls(fmean(every), math.sqrt(spread) / len(every), len(every))

    @property
    def positive(self) -> bool:
        """Above 0 by more than chance."""
        return self.count > 0 and self.value > SURE * self.error + _SAME


@dataclass(frozen=True)
class Finding:
    """What one exploit earns."""

    name: str
    about: str
    trick: bool
    """It dresses up an honest answer; otherwise it orders without looking at the items."""
    reward: Mean
    gain: Mean
    """Its reward less that of honest answers that rank better than the given order; of a trick, less that of the same
    answer without it."""
    advantage: Mean
    """What a group-normalised optimizer sees: its z-score in a group of honest answers that rank as well as the given
    order; of a trick, less that of the same answer without it. If it is positive, it is made more likely."""
    gain_first: Mean
    """`gain` on asks whose most relevant candidate is given first."""
    gain_elsewhere: Mean
    """`gain` on the others."""
    lift: Mean
    """NDCG@5 of its answers less that of the given order (of a trick, of the same answer without it)."""
    failed: float
    """Share of its answers that the reward failed to judge."""
    reason: str = ""
    """The first of the reasons that it gave."""

    @property
    def pays(self) -> bool:
        """It earns more than ranking better does, or has an advantage over ranking as well, and ranks no better."""
        return (self.gain.positive or self.advantage.positive) and not self.lift.positive

    @property
    def may_pay(self) -> bool:
        """It would pay if two standard errors were enough: there are too few asks to say."""
        some = any(mean.count and mean.value > UNSURE * mean.error + _SAME for mean in (self.gain, self.advantage))
        return some and not self.pays and not self.lift.positive

    def sentence(self) -> str:
        """Of one that pays: what it does, and what that earns."""
        if self.trick:
            earned = [f"earns {_signed(self.gain)} over the same answer without"]
        else:
            earned = [f"earns more than honest answers that rank better, {_signed(self.gain)}"] * self.gain.positive
        if self.advantage.positive:
            among = "it" if self.trick else "honest answers that rank as well"
            earned.append(f"has an advantage over {among}, {_signed(self.advantage)}")
        who = "an answer" if self.trick else "a policy"
        return f"{self.name} pays: {who} that {self.about} {' and '.join(earned)}."


@dataclass(frozen=True)
class Level:
    """Honest answers of one skill."""

    name: str
    ndcg: float
    """NDCG@5 of its answers."""
    reward: Mean
    copying: Mean
    """The advantage of handing the given order back, in a group of its answers."""


@dataclass(frozen=True)
class Audit:
    """What the audit of a reward found."""

    given_ndcg: float
    """NDCG@5 of the given order."""
    first: float
    """Share of asks whose most relevant candidate is given first."""
    levels: tuple[Level, ...]
    """Honest policies, the worst first."""
    findings: tuple[Finding, ...]
    """One for each exploit; the best paid first."""
    judges_order: bool
    """Whether the best of the levels earns more than the worst, on the same asks."""

    @property
    def paying(self) -> tuple[Finding, ...]:
        """The exploits that pay."""
        return tuple(finding for finding in self.findings if finding.pays)

    @property
    def passed(self) -> bool:
        """The reward tells better rankings from worse ones, and no exploit pays."""
        return self.judges_order and not self.paying

    def sentences(self) -> list[str]:
        """What was found, in words."""
        told = []
        if not self.judges_order:
            told.append(
                "It does not judge the order: the best honest ranking earns no more than the worst. Alone it says "
                "nothing against copying; audit the config that it is a part of."
            )
        told += [finding.sentence() for finding in self.paying]
        told += [
            f"{f.name} pays only where the target is given first already, {self.first:.0%} of the asks: "
            f"{_signed(f.gain_first)}. There it is the right answer; elsewhere it loses: {_signed(f.gain_elsewhere)}."
            for f in self.findings
            if f.name == COPY and not f.pays and f.gain_first.positive
        ]
        if worse := [level.name for level in self.levels if level.copying.positive]:
            told.append(f"{COPY} has an advantage over honest answers of these skills: {', '.join(worse)}.")
        if self.passed:
            told.append(f"None of {len(self.findings)} exploits pays.")
        if close := [finding for finding in self.findings if finding.may_pay]:
            told.append(
                f"{', '.join(f.name for f in close)} may pay, by two standard errors though not by three: more asks or "
                "larger groups would tell."
            )
        failing = [f for f in self.findings if f.failed]
        if failing:
            why = " ".join(failing[0].reason.split()).rstrip(".") or "no reason given"
            names, most = ", ".join(f.name for f in failing), max(f.failed for f in failing)
            told.append(f"It fails to judge answers of {names} (up to {most:.0%}): {why}.")
        return told

    def plain(self) -> dict[str, Any]:
        """Everything as JSON; what could not be judged is null."""
        found: dict[str, Any] = _no_nan(asdict(self))
        for one, finding in zip(found["findings"], self.findings, strict=True):
            one["pays"] = finding.pays
        return {"passed": self.passed, "sentences": self.sentences(), **found}


def audit(
    reward: RewardFn,
    honest: Mapping[str, Sequence[Group]],
    exploits: Sequence[tuple[str, str, bool, Sequence[Rollout]]],
    *,
    baseline: str,
    better: str,
) -> Audit:
    """Play `exploits` against `reward`: (name, what it does, whether it is a trick, its rollout for each ask).

    `honest` has the groups of each level by name, the worst first, for the same asks in the same order; those of
    `baseline` rank as well as the given order, those of `better` better. An exploit is judged in the company of the
    baseline's group, in the last one's seat, as a reward may compare within groups. A trick dresses up that last
    one's answer.
    """
    rows = honest[baseline]
    places = [group[0].example.target_index for group in rows]
    judged = {name: _by_ask(reward, groups) for name, groups in honest.items()}
    copies = next(played for name, _, _, played in exploits if name == COPY)
    means = {name: [_mean(values) for values in groups] for name, groups in judged.items()}
    levels = tuple(
        Level(
            name,
            fmean(_quality(row) for group in groups for row in group),
            Mean.of(means[name], places),
            Mean.of([advantage(group) for group in _by_ask(reward, _seated(groups, copies))], places),
        )
        for name, groups in honest.items()
    )
    worst, *_, best = means.values()
    findings = [
        _finding(reward, name, about, trick, rows, played, judged[baseline], means[better])
        for name, about, trick, played in exploits
    ]
    return Audit(
        given_ndcg=fmean(ndcg(group[0].example.relevance) for group in rows),
        first=fmean(place == 0 for place in places),
        levels=levels,
        findings=tuple(sorted(findings, key=_rank)),
        judges_order=Mean.of(_differences(best, worst), places).positive,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _seated(groups: Sequence[Group], played: Sequence[Rollout]) -> list[Group]:
    """Groups in which an exploit's answer has the last seat."""
    return [[*group[:-1], row] for group, row in zip(groups, played, strict=True)]


def _finding(
    reward: RewardFn,
    name: str,
    about: str,
    trick: bool,
    honest: Sequence[Group],
    played: Sequence[Rollout],
    plain: Sequence[Sequence[float | None]],
    better: Sequence[float | None],
) -> Finding:
    places = [row.example.target_index for row in played]
    outcomes = _outcomes(reward, _seated(honest, played))
    failures = [group[-1] for group in outcomes if isinstance(group[-1], Failed)]
    values = [[_value(outcome) for outcome in group] for group in outcomes]
    own = [group[-1] for group in values]
    gains = _differences(own, [group[-1] for group in plain] if trick else better)
    advantages = [advantage(group) for group in values]
    if trick:
        advantages = _differences(advantages, [advantage(group) for group in plain])
    first = [gain if place == 0 else None for gain, place in zip(gains, places, strict=True)]
    elsewhere = [gain if place != 0 else None for gain, place in zip(gains, places, strict=True)]
    lifts = [
        _quality(row) - (_quality(group[-1]) if trick else ndcg(row.example.relevance))
        for group, row in zip(honest, played, strict=True)
    ]
    return Finding(
        name,
        about,
        trick,
        reward=Mean.of(own, places),
        gain=Mean.of(gains, places),
        advantage=Mean.of(advantages, places),
        gain_first=Mean.of(first, places),
        gain_elsewhere=Mean.of(elsewhere, places),
        lift=Mean.of(lifts, places),
        failed=len(failures) / len(outcomes),
        reason=failures[0].reason if failures else "",
    )


def advantage(rewards: Sequence[float | None]) -> float | None:
    """The z-score of the last of a group, among those that have a reward; 0 where all are alike (2402.03300, 4.1.2)."""
    known, last = _known(rewards), rewards[-1]
    if last is None or len(known) < 2:
        return None
    if max(known) - min(known) <= _SAME:
        return 0.0
    return (last - fmean(known)) / (stdev(known) + _SAME)


def _quality(rollout: Rollout) -> float:
    return ndcg([rollout.example.relevance[place] for place in rollout.ranking.order])


def ndcg(grades: Sequence[float], k: int = 5) -> float:
    """NDCG@k of relevance in the order ranked, the gain being the relevance itself, as in a report."""

    def dcg(grades: Sequence[float]) -> float:
        return math.fsum(grade / math.log2(place + 2) for place, grade in enumerate(grades[:k]))

    best = dcg(sorted(grades, reverse=True))
    return dcg(grades) / best if best > 0 else 0.0


def _by_ask(reward: RewardFn, groups: Sequence[Group]) -> list[list[float | None]]:
    return [[_value(outcome) for outcome in group] for group in _outcomes(reward, groups)]


def _outcomes(reward: RewardFn, groups: Sequence[Group]) -> list[list[Outcome]]:
    outcomes = iter(reward([row for group in groups for row in group]))
    return [[next(outcomes) for _ in group] for group in groups]


def _value(outcome: Outcome) -> float | None:
    return outcome.value if isinstance(outcome, Reward) else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None


def _differences(these: Sequence[float | None], those: Sequence[float | None]) -> list[float | None]:
    """this - that, ask by ask, where both are known."""
    pairs = zip(these, those, strict=True)
    return [None if this is None or that is None else this - that for this, that in pairs]


def _rank(finding: Finding) -> tuple[bool, float]:
    gain = finding.gain.value
    return not finding.pays, math.inf if math.isnan(gain) else -gain


def _signed(mean: Mean) -> str:
    return "n/a" if not mean.count else f"{mean.value:+.3f} (standard error {mean.error:.3f})"


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _no_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
