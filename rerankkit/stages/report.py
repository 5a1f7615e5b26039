"""From rankings to a report: the before/after table, and what it says in sentences.

`summarise` computes, `build_report` adds what a reader must know before quoting a number, `write_report` writes
`report.json`, `report.md` and `report.html` (render.py draws the pages). Nothing here reads a clock: equal runs give an
equal `report.json`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit.errors import DataError
from rerankkit.stages.wording import BOUNDS, capital, change, interval, label, number, percent, plain, points, signed
from rerankkit.store import write_text
from rerankkit.types import Item, Parse, Ranking, RerankExample, SidSurface

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPARED = ("R@1", "R@3", "R@5", "NDCG@3", "NDCG@5", "NDCG@10", "MRR")
"""The metrics that get a paired interval. R@10 of a list of ten is 1 under the condition."""
HEADLINE = "NDCG@5"
KNOWN = ("pre-rank", "mid-train", "sft", "rl", "no-reasoning", *BOUNDS)
INVALID_LIMIT, IDENTITY_LIMIT, TAU_LIMIT, FEW_USERS = 0.05, 0.80, 0.95, 200
MOSTLY_INVALID, HANDFUL = 0.5, 20
"""Beyond this share of invalid answers, and below this many users, the headline itself says so."""


def summarise(
    examples: Sequence[RerankExample],
    systems: Mapping[str, Sequence[Ranking]],
    *,
    num_users: int,
    seed: int,
    samples: int = 10_000,
    exported: str = "",
) -> dict[str, Any]:
    """Rows, paired comparisons and findings for the systems that ranked `examples`, in `report.json`'s form.

    `examples` are the N test users whose target is in their list, of `num_users` test users in all; each value of
    `systems` has N rankings, aligned. The rows `pre-rank` (the order as given) and `oracle` (relevance order) are
    added; a system named `ceiling` counts as a bound like the oracle. `invalid_rate` is the share of answers that were
    not a complete permutation, whether repaired or failed; `failed_rate` the share of those of which nothing could be
    used, so that the given order stood in for them. Comparisons: each system against pre-rank, rl and rl@STEP against
    sft, sft against mid-train, the `exported` system against no-reasoning, with 95% intervals from `samples` paired
    bootstrap samples. Raises DataError when there is nothing to evaluate or lengths differ.
    """
    from rerankkit.math.metrics import ranking_metrics
    from rerankkit.math.statistics import paired_bootstrap

    everything = _with_bounds(examples, systems)
    per_user: dict[str, Mapping[str, NDArray[np.float64]]] = {
        name: ranking_metrics([[e.relevance[i] for i in r.order] for e, r in zip(examples, rankings, strict=True)])
        for name, rankings in everything.items()
    }
    rows = [_row(name, examples, rankings, per_user[name]) for name, rankings in everything.items()]
    comparisons = []
    sizes = sorted({len(e.candidates) for e in examples})
    compared = COMPARED if sizes[-1] <= 10 else (*COMPARED, "R@10")
    for row in rows:
        row["exported"] = row["name"] == exported
    for a, b in _pairs(list(everything), exported):
        for metric in compared:
            drawn = paired_bootstrap(per_user[a][metric], per_user[b][metric], samples=samples, seed=seed)
            found = {"difference": drawn.difference, "low": drawn.low, "high": drawn.high}
            comparisons.append({"a": a, "b": b, "metric": metric, **found})
    share = len(examples) / num_users
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    summary = {
        "condition": f"test users whose target is among the {size} candidates: {len(examples):,} of {num_users:,}",
        "n": len(examples),
        "num_users": num_users,
        "rows": rows,
        "comparisons": comparisons,
        "all_users": {row["name"]: {m: v * share for m, v in row["metrics"].items()} for row in rows},
        "bootstrap": {"samples": samples, "seed": seed, "level": 0.95},
    }
    summary = plain(summary)
    return {
        **summary,
        "headline": capital(headline(summary)),
        "findings": [capital(text) for text in _findings(summary)],
        "warnings": [capital(text) for text in _warnings(summary)],
    }


def build_report(
    summary: Mapping[str, Any],
    *,
    title: str,
    protocol: str,
    lists_digest: str,
    caveats: Mapping[str, str],
    data: Mapping[str, Any],
    sids: Mapping[str, Any],
    teacher: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """All of `report.json`: a `summarise` result and what a reader needs to judge it.

    `protocol` names split, lists and metrics in one line, `lists_digest` hashes the frozen test lists; two reports
    are comparable when both agree. `caveats` is label -> sentence (pre-ranker, what it and the policy were fitted
    on); `data` and `sids` are label -> value. `teacher` may hold `acceptance`: `{position, asked, accepted}` by the
    target's 1-based position in the given order; its other keys are label -> value. `manifest` holds `parts`
    (`{slot, name, distribution, version}`), `seed`, `fingerprints` and whatever else is the same in an equal run:
    no times, no paths.
    """
    whole = {
        "title": title,
        "protocol": protocol,
        "lists_digest": lists_digest,
        **summary,
        "caveats": caveats,
        "data": data,
        "sids": sids,
        "teacher": teacher,
        "manifest": manifest,
    }
    done: dict[str, Any] = plain(whole)
    return done


def headline(summary: Mapping[str, Any]) -> str:
    """The one sentence that stands first: the last trained system against the given order."""
    names = [row["name"] for row in summary["rows"] if row["name"] not in ("pre-rank", *BOUNDS)]
    if not names:
        return f"Nothing was trained: the given order, {summary['condition']}."
    best = _best(summary) or names[-1]
    found = _comparison(summary, best, "pre-rank", HEADLINE)
    few = f" (only {summary['n']} test users)" if summary["n"] < HANDFUL else ""
    between = f"{interval(found)}{few}"
    row = next(row for row in summary["rows"] if row["name"] == best)
    if row["invalid_rate"] > MOSTLY_INVALID:
        return (
            f"{label(best)} cannot be judged: {percent(row['invalid_rate'])} of its answers were invalid, and for "
            f"{percent(row['failed_rate'])} of users the given order stands in; {HEADLINE} {signed(found)} points "
            f"{between}."
        )
    if found["low"] > 0:
        return f"{label(best)} lifts {HEADLINE} over pre-rank by {points(found['difference'])} points {between}."
    if found["high"] < 0:
        return f"{label(best)} lowers {HEADLINE} below pre-rank by {points(-found['difference'])} points {between}."
    return f"{label(best)} shows no measurable change of {HEADLINE} over pre-rank: {signed(found)} points {between}."


def example_card(
    example: RerankExample, answers: Mapping[str, tuple[str, Ranking]], surface: SidSurface, show: int = 10
) -> dict[str, Any]:
    """One before/after example for `render_html`: titles in place of items, SIDs in the reasoning made readable.

    `answers` is system -> (reasoning, ranking), in the order of the columns; at most the last `show` history items.
    """
    texts = {surface.text(item.sid): {"text": _title(item), "given": 0} for item in example.history if item.sid}
    for position, item in enumerate(example.candidates, start=1):
        if item.sid:
            texts[surface.text(item.sid)] = {"text": _title(item), "given": position}
    target = example.target_index
    shown = []
    for name, (reasoning, ranking) in answers.items():
        rank = None if target is None else ranking.order.index(target) + 1
        pieces = re.split("(" + "|".join(map(re.escape, texts)) + ")", reasoning) if texts else [reasoning]
        shown.append(
            {
                "name": name,
                "order": list(ranking.order),
                "parse": str(ranking.parse),
                "problem": ranking.problem,
                "target_rank": rank,
                "reasoning": [texts.get(piece, {"text": piece, "given": None}) for piece in pieces if piece],
            }
        )
    return {
        "history": [_title(item) for item in example.history[-show:]],
        "earlier": max(0, len(example.history) - show),
        "candidates": [_title(item) for item in example.candidates],
        "target": target,
        "systems": shown,
    }


def choose_examples(
    examples: Sequence[RerankExample], rankings: Sequence[Ranking], *, count: int = 12, seed: int = 0
) -> list[int]:
    """Row numbers of examples to show: targets that rose, fell and stayed in turn, each kind drawn at random.

    Drawn so, and not by how well they look: a reader should see the failures too.
    """
    kinds: dict[int, list[int]] = {1: [], -1: [], 0: []}
    for row, (example, ranking) in enumerate(zip(examples, rankings, strict=True)):
        if example.target_index is not None:
            moved = _places_up(example, ranking)
            kinds[(moved > 0) - (moved < 0)].append(row)
    generator = random.Random(seed)
    for rows in kinds.values():
        generator.shuffle(rows)
    chosen: list[int] = []
    while len(chosen) < count and any(kinds.values()):
        chosen += [rows.pop() for rows in kinds.values() if rows]
    return chosen[:count]


def write_report(
    folder: Path, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]]
) -> None:
    """Write `report.html`, `report.md` and, last, `report.json` into `folder`, each one whole or not at all."""
    import json

    from rerankkit.stages.render import render_html, render_markdown

    write_text(folder / "report.html", render_html(report, metrics, examples))
    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _with_bounds(
    examples: Sequence[RerankExample], systems: Mapping[str, Sequence[Ranking]]
) -> dict[str, Sequence[Ranking]]:
    """The systems between `pre-rank` and `oracle`, checked."""
    if not examples:
        raise DataError(
            "No test user has its target among its candidates, so there is nothing to rank better or worse. "
            "Use longer lists, a better pre-ranker or more users."
        )
    for name, rankings in systems.items():
        if len(rankings) != len(examples):
            raise DataError(
                f"System {name!r} has {len(rankings)} rankings for {len(examples)} examples; they must align."
            )
        for example, ranking in zip(examples, rankings, strict=True):
            if sorted(ranking.order) != list(range(len(example.candidates))):
                raise DataError(
                    f"System {name!r}, example {example.example_id!r}: the order {list(ranking.order)} is not a "
                    f"permutation of its {len(example.candidates)} candidates."
                )
    for example in examples:
        if example.target_index is None:
            raise DataError(
                f"Example {example.example_id!r} has no relevant candidate; leave such users out and count them in "
                "num_users."
            )
    given = [Ranking(tuple(range(len(e.candidates)))) for e in examples]
    ideal = [Ranking(_by_relevance(e)) for e in examples]
    middle = {name: rankings for name, rankings in systems.items() if name not in ("pre-rank", "oracle")}
    return {"pre-rank": given, **middle, "oracle": ideal}


def _by_relevance(example: RerankExample) -> tuple[int, ...]:
    return tuple(sorted(range(len(example.candidates)), key=lambda i: -example.relevance[i]))


def _row(
    name: str,
    examples: Sequence[RerankExample],
    rankings: Sequence[Ranking],
    per_user: Mapping[str, NDArray[np.float64]],
) -> dict[str, Any]:
    from rerankkit.math.metrics import kendall_tau

    moves = [_places_up(example, ranking) for example, ranking in zip(examples, rankings, strict=True)]
    count = len(rankings)
    return {
        "name": name,
        "n": count,
        "metrics": {metric: float(values.mean()) for metric, values in per_user.items()},
        "identity_rate": sum(r.identity for r in rankings) / count,
        "first_kept_rate": sum(r.order[0] == 0 for r in rankings) / count,
        "kendall_tau": sum(float(kendall_tau(r.order)) for r in rankings) / count,
        "invalid_rate": sum(r.parse is not Parse.OK for r in rankings) / count,
        "failed_rate": sum(r.parse is Parse.FAILED for r in rankings) / count,
        "up_rate": sum(move > 0 for move in moves) / count,
        "down_rate": sum(move < 0 for move in moves) / count,
    }


def _places_up(example: RerankExample, ranking: Ranking) -> int:
    """How many places nearer to the top the target stands than it was given; negative when it fell."""
    target = example.target_index
    return 0 if target is None else target - ranking.order.index(target)


def _pairs(names: Sequence[str], exported: str) -> list[tuple[str, str]]:
    against = [(name, "pre-rank") for name in names if name != "pre-rank"]
    trained = [(name, "sft") for name in names if name.startswith("rl")]
    others = [*trained, ("sft", "mid-train"), (exported, "no-reasoning")]
    return against + [(a, b) for a, b in others if a in names and b in names]


def _best(summary: Mapping[str, Any]) -> str | None:
    """The system that the report is about: the exported one, or the last of those that were trained."""
    rows = {row["name"]: row for row in summary["rows"]}
    exported = [name for name, row in rows.items() if row.get("exported")]
    return next((name for name in (*exported, "rl", "sft", "mid-train") if name in rows), None)


def _findings(summary: Mapping[str, Any]) -> Iterator[str]:
    rows = {row["name"]: row for row in summary["rows"]}
    for what, a, b in (
        *(("Reinforcement", name, "sft") for name in rows if name.startswith("rl")),
        *(("Thinking", name, "no-reasoning") for name in rows if rows[name].get("exported")),
    ):
        if b in rows:
            yield helped(summary, what, a, b)
    for a, b in (
        ("rl", "pre-rank"),
        ("sft", "pre-rank"),
        ("sft", "mid-train"),
        ("mid-train", "pre-rank"),
    ):
        if a in rows and b in rows:
            yield _verdict(summary, a, b)
    for name in (name for name in rows if name not in KNOWN):
        yield _verdict(summary, name, "pre-rank")
    best = _best(summary)
    if best is None:
        return
    yield (
        f"{label(best)} moves the target up for {percent(rows[best]['up_rate'])} of users and down for "
        f"{percent(rows[best]['down_rate'])}."
    )
    gain = _comparison(summary, best, "pre-rank", HEADLINE)["difference"]
    bound, means = (
        ("ceiling", "The best order possible on average") if "ceiling" in rows else ("oracle", "A perfect order")
    )
    room = _comparison(summary, bound, "pre-rank", HEADLINE)["difference"]
    if room > 0:
        taken = f"{label(best)} takes {percent(gain / room)} of that" if gain > 0 else f"{label(best)} takes none of it"
        yield f"{means} would lift {HEADLINE} by {points(room)} points; {taken}."


def helped(summary: Mapping[str, Any], what: str, a: str, b: str) -> str:
    """Whether a is better than b, at which depths, and which way it went where it went both ways; with numbers."""
    found = {c["metric"]: c for c in summary["comparisons"] if (c["a"], c["b"]) == (a, b)}
    up = [metric for metric, c in found.items() if c["low"] > 0]
    down = [metric for metric, c in found.items() if c["high"] < 0]
    if up and down:
        said = f"helped at {', '.join(up)} and hurt at {', '.join(down)}"
        if "R@1" in up and any(metric.startswith("R@") for metric in down):
            said += ": more targets come first, and others are lost further down"
    elif up or down:
        level = [metric for metric in found if metric not in up + down]
        said = f"helped at {', '.join(up)}" if up else f"hurt at {', '.join(down)}"
        said += f"; no measurable difference at {', '.join(level)}" if level else ""
    else:
        said = "made no measurable difference at any depth"
    numbers = ", ".join(
        f"{metric} {change(c)}" for metric, c in found.items() if metric in ("R@1", "R@5", "R@10", HEADLINE)
    )
    return f"{what} {said} ({label(a)} against {label(b)}). {numbers}."


def bias_findings(bias: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What shuffling the lists showed of each system, a sentence each."""
    for name, found in bias.items():
        spread, first = found["metrics"][HEADLINE], found["shown_first"]
        yield (
            f"Position bias of {label(name)}: over {found['shuffles']} shuffles of the same lists the first choice was "
            f"the same in {percent(found['same_first'])} of pairs of orders, mean Kendall tau "
            f"{found['kendall_tau']:.2f}; {HEADLINE} {number(spread['given'])} as given, {number(spread['low'])} to "
            f"{number(spread['high'])} shuffled; what was shown first was chosen in {percent(first[0])} of lists, "
            f"{percent(1 / len(first))} without bias."
        )


def _verdict(summary: Mapping[str, Any], a: str, b: str) -> str:
    """Where a is better than b, where worse, and where the users are too few to tell; two numbers in full."""
    found = [c for c in summary["comparisons"] if c["a"] == a and c["b"] == b]
    kinds = {
        "better at": [c["metric"] for c in found if c["low"] > 0],
        "worse at": [c["metric"] for c in found if c["high"] < 0],
        "no measurable difference at": [c["metric"] for c in found if c["low"] <= 0 <= c["high"]],
    }
    said = "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names)
    if len(kinds["better at"]) == len(found) or len(kinds["worse at"]) == len(found):
        said = f"{said.split(' at ')[0]} at every metric"
    elif len(kinds["no measurable difference at"]) == len(found):
        said = "no measurable difference at any metric"
    numbers = ", ".join(f"{c['metric']} {change(c)}" for c in found if c["metric"] in ("R@1", HEADLINE))
    return f"{label(a)} against {label(b)}: {said}. {numbers}."


def _warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["n"] < FEW_USERS:
        yield f"Only {summary['n']} test users: intervals are wide, and small effects cannot be seen."
    for row in summary["rows"]:
        name = label(row["name"])
        if row["name"] in ("pre-rank", *BOUNDS):
            continue
        if row["invalid_rate"] > INVALID_LIMIT:
            yield (
                f"{name}: {percent(row['invalid_rate'])} of answers were invalid, {percent(row['failed_rate'])} "
                "beyond repair; there the given order stands in, which flatters the row."
            )
        if row["identity_rate"] > IDENTITY_LIMIT:
            yield f"{name} mostly copies the given order: {percent(row['identity_rate'])} of its rankings equal it."
        elif row["kendall_tau"] > TAU_LIMIT:
            yield f"{name} hardly departs from the given order: mean Kendall tau to it is {row['kendall_tau']:.2f}."
    rows = {row["name"] for row in summary["rows"]}
    if {"rl", "sft"} <= rows and (c := _comparison(summary, "rl", "sft", HEADLINE))["high"] < 0:
        exported = _best(summary)
        then = "Prefer the SFT policy" if exported == "rl" else f"{capital(label(exported or 'sft'))} is exported"
        yield f"RL made {HEADLINE} worse than SFT: {change(c)} points. {then}."


def _comparison(report: Mapping[str, Any], a: str, b: str, metric: str) -> Mapping[str, Any]:
    for c in report["comparisons"]:
        if (c["a"], c["b"], c["metric"]) == (a, b, metric):
            found: Mapping[str, Any] = c
            return found
    raise KeyError((a, b, metric))


def _title(item: Item) -> str:
    return item.title or " > ".join(item.categories[-2:]) or "untitled item"
