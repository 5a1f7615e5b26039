"""The watch over reinforcement: what every step's rollouts tell, and the rules that say when it goes wrong.

`measure` reads rollouts and outcomes, so that it works for any optimizer; the rules read what is logged, the
optimizer's own metrics included. A rule is a pure function of the series: which rule fired when can be told again from
`metrics.jsonl` alone, and that is what the report does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, TypeAlias

from rerankkit.config import Watch
from rerankkit.store import read_metrics
from rerankkit.types import Failed, NotApplicable, Outcome, Parse, Reward, Rollout, StepReport

Series: TypeAlias = Sequence[Mapping[str, Any]]
"""Records of RL's steps, in order."""
Orders: TypeAlias = tuple[tuple[int, ...], ...]
Judged: TypeAlias = list[tuple[Rollout, Outcome]]

PLACE, ZERO_STD, WHY = "first_choice/", "frac_reward_zero_std", "zero_std/"
EVIDENCE_STEPS = 60
"""Steps of the evidence that a report keeps: the latest."""


def measure(report: StepReport) -> dict[str, float]:
    """What a step's rollouts and outcomes tell, under the names of docs/watch.md; empty without rollouts.

    It stands over what an optimizer logs by the same name, but for `frac_reward_zero_std`: which groups it learns
    nothing from, an optimizer that filters rollouts knows better.
    """
    found = _measured(report)
    return found | {name: report.metrics[name] for name in (ZERO_STD,) if name in report.metrics and found}


def _measured(report: StepReport) -> dict[str, float]:
    pairs = list(zip(report.rollouts, report.outcomes, strict=True))
    if not pairs:
        return {}
    count = len(pairs)
    groups: dict[int, Judged] = {}
    for pair in pairs:
        groups.setdefault(pair[0].group, []).append(pair)
    read = [rollout for rollout, _ in pairs if rollout.ranking.parse is not Parse.FAILED]
    orders = [[r.ranking.order for r, _ in group if r.ranking.parse is not Parse.FAILED] for group in groups.values()]
    within = [tau(a, b) for some in orders for a, b in pairwise(some)]
    return {
        **_rewards(pairs),
        **_no_variance(list(groups.values())),
        "rewards/failed": sum(isinstance(outcome, Failed) for _, outcome in pairs) / count,
        "rewards/not_applicable": sum(isinstance(outcome, NotApplicable) for _, outcome in pairs) / count,
        "identity_rate": sum(rollout.ranking.order == _shown(rollout) for rollout in read) / count,
        "first_kept_rate": sum(rollout.ranking.order[0] == _shown(rollout)[0] for rollout in read) / count,
        "invalid_rate": sum(rollout.ranking.parse is not Parse.OK for rollout, _ in pairs) / count,
        **_mean("kendall_tau", [tau(_shown(r), r.ranking.order) for r in read]),
        **_mean("tau_within_group", within),
        **_places(read),
        **_lengths([rollout for rollout, _ in pairs]),
    }


def _shown(rollout: Rollout) -> tuple[int, ...]:
    """The order that the policy was given, and could copy: the pre-ranker's, unless the prompt was shuffled."""
    return rollout.shown or tuple(range(len(rollout.ranking.order)))


def tau(a: Sequence[int], b: Sequence[int]) -> float:
    """Kendall's tau between two orders of the same candidates: 1 equal, -1 reversed."""
    from rerankkit.math.metrics import kendall_tau

    place = {candidate: rank for rank, candidate in enumerate(a)}
    return kendall_tau([place[candidate] for candidate in b])


def _rewards(pairs: Judged) -> dict[str, float]:
    judged = [outcome for _, outcome in pairs if isinstance(outcome, Reward)]
    values = [outcome.value for outcome in judged]
    parts: dict[str, list[float]] = {}
    for outcome in judged:
        for name, value in outcome.parts.items():
            parts.setdefault(name, []).append(value)
    ends = {"reward_min": min(values), "reward_max": max(values)} if values else {}
    return {
        **_mean("reward", values),
        **ends,
        **{f"rewards/{name}/mean": fmean(some) for name, some in sorted(parts.items())},
    }


def _no_variance(groups: Sequence[Judged]) -> dict[str, float]:
    """Shares of all groups that teach a group-based optimizer nothing, by the first reason that holds."""
    counts = dict.fromkeys(("unjudged", "same_answers", "unreadable", "target_first", "other"), 0)
    spreads = []
    for group in groups:
        judged = [(rollout, outcome.value) for rollout, outcome in group if isinstance(outcome, Reward)]
        values = [value for _, value in judged]
        if len(values) > 1:
            spreads.append(pstdev(values))
            if max(values) - min(values) > 1e-6:
                continue
        counts[_why_equal([rollout for rollout, _ in judged])] += 1
    return {
        **_mean("reward_std", spreads),
        ZERO_STD: sum(counts.values()) / len(groups),
        **{f"{WHY}{reason}": number / len(groups) for reason, number in counts.items()},
    }


def _why_equal(judged: Sequence[Rollout]) -> str:
    """Why the rewards of a group are all alike."""
    if len(judged) < 2:
        return "unjudged"
    if all(rollout.ranking.parse is Parse.FAILED for rollout in judged):
        return "unreadable"
    if len({rollout.ranking.order for rollout in judged}) == 1:
        return "same_answers"
    target = judged[0].example.target_index
    return "target_first" if all(rollout.ranking.order[0] == target for rollout in judged) else "other"


def _places(read: Sequence[Rollout]) -> dict[str, float]:
    """Shares of the answers whose first item was shown at place 1, 2, ...: the histogram of the choice."""
    size = max((len(rollout.ranking.order) for rollout in read), default=0)
    chosen = [_shown(rollout).index(rollout.ranking.order[0]) for rollout in read]
    return {f"{PLACE}{place + 1}": chosen.count(place) / len(read) for place in range(size)}


def _lengths(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """In tokens; an optimizer that reports no token ids has none."""
    told = [rollout for rollout in rollouts if rollout.token_ids]
    return {
        **_mean("completions/mean_length", [len(rollout.token_ids) for rollout in told]),
        **_mean("completions/mean_reasoning_length", [rollout.num_reasoning_tokens for rollout in told]),
        "completions/clipped_ratio": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
    }


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: fmean(values)} if values else {}


# --- the rules -----------------------------------------------------------------------------------------------------

LEARNT = ("loss", "grad_norm", "entropy", "kl", "logp_gap")
"""Metrics of an optimizer that must be finite where it logs them."""


@dataclass(frozen=True)
class Rule:
    """`finding` looks at a series up to now and says in a sentence what is wrong, or returns an empty one."""

    finding: Callable[[Series, Watch], str]
    evidence: tuple[str, ...]
    """The metrics it goes by; a name that ends in / stands for all that begin so."""


def not_a_number(series: Series, settings: Watch) -> str:
    """Something that was learnt from is NaN or infinite in the last step."""
    bad = [name for name in LEARNT if name in series[-1] and not math.isfinite(series[-1][name])]
    return f"{', '.join(bad)} is not a finite number; lower the learning rate" if bad else ""


def error_budget(series: Series, settings: Watch) -> str:
    """Too many rollouts went unjudged, over the last steps."""
    failed = _last(series, "rewards/failed", settings.window, at_least=1)
    if failed is None or failed <= settings.max_failed:
        return ""
    return (
        f"{failed:.0%} of rollouts could not be judged, more than {settings.max_failed:.0%}; look at why_none in "
        "completions/"
    )


def no_signal(series: Series, settings: Watch) -> str:
    """In none of the last steps did a group's rewards differ."""
    latest = series[-settings.window :]
    if len(latest) < settings.window or any(record.get(ZERO_STD, 0.0) < 1 for record in latest):
        return ""
    values = {record[end] for record in latest for end in ("reward_min", "reward_max") if end in record}
    every = f"all rewards were {values.pop():g}" if len(values) == 1 else "rewards were equal within every group"
    reasons = {
        name.removeprefix(WHY): fmean(record.get(name, 0.0) for record in latest)
        for name in latest[-1]
        if name.startswith(WHY)
    }
    why = ", ".join(f"{share:.0%} {name.replace('_', ' ')}" for name, share in reasons.items() if share)
    return f"for {settings.window} steps {every} ({why}): there is nothing to learn from; look at completions/"


def entropy_collapse(series: Series, settings: Watch) -> str:
    """Entropy is a small part of what it was."""
    found = _then_and_now(series, "entropy", settings.window)
    if found is None or found[0] <= 0 or found[1] >= settings.min_entropy * found[0]:
        return ""
    return (
        f"entropy fell from {found[0]:.3g} to {found[1]:.3g} nats a token: the samples of a group are becoming "
        "alike; lower the learning rate or stop earlier"
    )


def length_collapse(series: Series, settings: Watch) -> str:
    """Reasoning is a small part of what it was."""
    for name, what in (("completions/mean_reasoning_length", "reasoning"), ("completions/mean_length", "answers")):
        found = _then_and_now(series, name, settings.window)
        if found is not None and found[0] > 0:
            short = found[1] < settings.min_length * found[0]
            return f"{what} shrank from {found[0]:.0f} to {found[1]:.0f} tokens" if short else ""
    return ""


def length_explosion(series: Series, settings: Watch) -> str:
    """Answers are far longer than they were, or cut off at the limit."""
    cut = _last(series, "completions/clipped_ratio", settings.window)
    if cut is not None and cut > settings.max_truncated:
        return f"{cut:.0%} of answers are cut off at the length limit, more than {settings.max_truncated:.0%}"
    found = _then_and_now(series, "completions/mean_length", settings.window)
    if found is None or found[1] <= settings.max_length * found[0]:
        return ""
    return f"answers grew from {found[0]:.0f} to {found[1]:.0f} tokens"


def copying(series: Series, settings: Watch) -> str:
    """More answers keep the given order, and are rewarded for it."""
    reward = _then_and_now(series, "reward", settings.window)
    if reward is None or reward[1] <= reward[0]:
        return ""
    for name, what, rise in (
        ("identity_rate", "repeat the given order", settings.identity_rise),
        ("first_kept_rate", "keep the given first item", settings.first_kept_rise),
    ):
        found = _then_and_now(series, name, settings.window)
        if found is not None and found[1] - found[0] >= rise:
            return (
                f"the reward rose from {reward[0]:.3g} to {reward[1]:.3g} while the share of answers that {what} "
                f"rose from {found[0]:.0%} to {found[1]:.0%}: the reward pays for copying"
            )
    return ""


def one_place(series: Series, settings: Watch) -> str:
    """Nearly all answers put the candidate of the same given place first."""
    places = places_of(series[-settings.window :]) if len(series) >= settings.window else []
    if not places or max(places) <= settings.max_one_place:
        return ""
    place = places.index(max(places)) + 1
    return f"{max(places):.0%} of answers put the candidate first that was given in place {place}, whoever asks"


RULES: Mapping[str, Rule] = {
    "not_a_number": Rule(not_a_number, LEARNT),
    "error_budget": Rule(error_budget, ("rewards/failed",)),
    "no_signal": Rule(no_signal, (ZERO_STD, "reward_min", "reward_max", WHY)),
    "entropy_collapse": Rule(entropy_collapse, ("entropy",)),
    "length_collapse": Rule(length_collapse, ("completions/mean_reasoning_length", "completions/mean_length")),
    "length_explosion": Rule(length_explosion, ("completions/mean_length", "completions/clipped_ratio")),
    "copying": Rule(copying, ("reward", "identity_rate", "first_kept_rate")),
    "one_place": Rule(one_place, (PLACE,)),
}


def action_of(rule: str, settings: Watch) -> str:
    """`off`, `warn` or `stop`."""
    return str(getattr(settings.rules, rule) or settings.on_fire)


@dataclass(frozen=True)
class Alarm:
    """A rule that fired: at which step, what it says, and the values that it went by."""

    rule: str
    step: int
    action: str
    sentence: str
    evidence: Mapping[str, list[tuple[int, float]]]
    """Metric -> (step, value), the latest `EVIDENCE_STEPS`."""


def findings(series: Series, settings: Watch, quiet: frozenset[str] = frozenset()) -> Iterator[Alarm]:
    """The rules, but for the `quiet` ones, that the series up to its last step fires."""
    for name, rule in RULES.items():
        action = action_of(name, settings)
        if action == "off" or name in quiet or not series:
            continue
        if sentence := rule.finding(series, settings):
            yield Alarm(name, int(series[-1]["step"]), action, sentence, _evidence(series, rule))


def alarms(series: Series, settings: Watch) -> list[Alarm]:
    """Every rule's first alarm in a whole series, by step."""
    found: dict[str, Alarm] = {}
    for end in range(1, len(series) + 1):
        found |= {alarm.rule: alarm for alarm in findings(series[:end], settings, frozenset(found))}
    return list(found.values())


def places_of(records: Series) -> list[float]:
    """The mean histogram of the choice over some steps; empty if none has one."""
    names = {name for record in records for name in record if name.startswith(PLACE)}
    told = [record for record in records if any(name in record for name in names)]
    return [fmean(r.get(f"{PLACE}{n + 1}", 0.0) for r in told) for n in range(len(names))]


def watch_facts(metrics: Series, settings: Watch) -> dict[str, Any]:
    """What a report says of the watch: the rules and what each does, its alarms, and the choice then and now."""
    series = [record for record in metrics if record.get("stage") == "rl"]
    window = settings.window
    return {
        "steps": len(series),
        "window": window,
        "rules": {name: action_of(name, settings) for name in RULES},
        "alarms": alarms(series, settings),
        "first_choice": {"first steps": places_of(series[:window]), "last steps": places_of(series[-window:])},
    }


@dataclass
class Watcher:
    """The watch at work: measures each step, and says which rules fire. `begin` takes up where a killed run was."""

    settings: Watch
    series: list[Mapping[str, Any]] = field(default_factory=list)
    answers: dict[str, Orders] = field(default_factory=dict)
    """example_id -> its latest answers, in the order of its group."""
    quiet: set[str] = field(default_factory=set)
    """Rules that have warned. One that stops the run is never quiet: the run cannot go on past it."""

    @classmethod
    def begin(cls, settings: Watch, run: Path, step: int) -> Watcher:
        """With all that a run folder holds of the steps before `step`: those from it on are done again."""
        series = [r for r in read_metrics(run) if r["stage"] == "rl" and r.get("step", step) < step]
        warned = {alarm.rule for alarm in alarms(series, settings) if alarm.action == "warn"}
        return cls(settings, list(series), _told(run / "completions", step), warned)

    def measure(self, report: StepReport) -> dict[str, float]:
        """`measure`, and how far the answers are from the latest ones to the same asks."""
        now = _answers(report.rollouts)
        known = [example for example in now if example in self.answers]
        taus = [tau(a, b) for example in known for a, b in zip(self.answers[example], now[example], strict=False)]
        self.answers |= now
        return {**measure(report), **_mean("tau_to_last", taus), "seen_before": len(known) / max(1, len(now))}

    def look(self, record: Mapping[str, Any]) -> list[Alarm]:
        """Take in the record of a step; the alarms that it sets off."""
        self.series.append(record)
        found = list(findings(self.series, self.settings, frozenset(self.quiet)))
        self.quiet |= {alarm.rule for alarm in found if alarm.action == "warn"}
        return found


def _answers(rollouts: Sequence[Rollout]) -> dict[str, Orders]:
    found: dict[str, Orders] = {}
    for rollout in rollouts:
        if rollout.ranking.parse is not Parse.FAILED:
            name = rollout.example.example_id
            found[name] = (*found.get(name, ()), rollout.ranking.order)
    return found


def _told(completions: Path, step: int) -> dict[str, Orders]:
    """The latest answers to each ask in the rollouts that a run has saved, of steps before `step`."""
    import pyarrow.parquet as pq

    found: dict[str, Orders] = {}
    for file in sorted(completions.glob("step-*.parquet"), key=_step_of):
        if _step_of(file) < step:
            fresh: dict[str, Orders] = {}
            for row in pq.read_table(file, columns=["example_id", "order", "parse"]).to_pylist():
                if row["parse"] != Parse.FAILED:
                    fresh[row["example_id"]] = (*fresh.get(row["example_id"], ()), tuple(row["order"]))
            found |= fresh
    return found


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))


def _then_and_now(series: Series, name: str, window: int) -> tuple[float, float] | None:
    """Means over the first and the last steps that have a metric; None before there are enough for both."""
    if name not in series[-1]:  # an optimizer that does not log it: no need to search the whole series
        return None
    then, now = _ends(series, name, window)
    if len(then) < window or then[-1][0] >= now[-1][0]:  # the two would share a step
        return None
    return fmean(value for _, value in then), fmean(value for _, value in now)


def _ends(series: Series, name: str, window: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The first and the last (index, value) pairs of a metric, each from its end of the series inwards."""

    def told(indices: Iterable[int]) -> list[tuple[int, float]]:
        pairs = ((i, series[i][name]) for i in indices if name in series[i])
        return list(islice(((i, value) for i, value in pairs if math.isfinite(value)), window))

    return told(range(len(series))), told(reversed(range(len(series))))


def _last(series: Series, name: str, window: int, at_least: int = 0) -> float | None:
    values = [r[name] for r in series[-window:] if name in r and math.isfinite(r[name])]
    return fmean(values) if len(values) >= (at_least or window) else None


def _evidence(series: Series, rule: Rule) -> dict[str, list[tuple[int, float]]]:
    names = [
        name
        for name in series[-1]
        if name in rule.evidence or any(name.startswith(start) for start in rule.evidence if start.endswith("/"))
    ]
    latest = series[-EVIDENCE_STEPS:]
    return {name: [(int(r["step"]), r[name]) for r in latest if name in r] for name in names}
