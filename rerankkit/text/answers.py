"""The one parser: what a policy or a teacher wrote, read as a ranking."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rerankkit.types import Parse, Ranking, RerankExample, SidSurface

RANKING_KEY = '"recommendations"'
"""Where the reasoning ends and the ranking begins."""

_REASONING_KEY = '"explanation"'


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said, and the order it stands for."""

    reasoning: str
    ranking: Ranking


def parse_answer(text: str, example: RerankExample, surface: SidSurface) -> Answer:
    """Read an answer; any text gives a complete permutation, and `ranking.parse` says how it came about.

    OK: the stripped text is one JSON object with exactly the keys explanation and recommendations, in that order, and
    the list names every candidate exactly once and nothing else. REPAIRED: some candidates could be read after the
    last recommendations key; repeats and strangers are dropped, the missing appended in input order. FAILED: none
    could, and the order is the input order. Where several candidates share a SID, its k-th mention is the k-th of them.
    """
    written = _well_formed(text)
    if written is not None:
        reasoning, entries = written
        order = _exact_order(entries, example, surface)
        if order is not None:
            return Answer(reasoning, Ranking(order))
    before, key, after = text.rpartition(RANKING_KEY)
    reasoning = written[0] if written is not None else _reasoning(before if key else text)
    return Answer(reasoning, _salvage(after if key else None, written is not None, example, surface))


def _well_formed(text: str) -> tuple[str, list[str]] | None:
    """Explanation and list of a well-formed answer, whatever the list names; None for anything else."""
    try:
        # As pairs: an object that gives a key twice would silently lose one of the two lists.
        pairs = json.loads(text.strip(), object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    match pairs:
        case [("explanation", str(reasoning)), ("recommendations", list(entries))] if all(
            isinstance(entry, str) for entry in entries
        ):
            return reasoning, entries
    return None


def _positions(example: RerankExample, surface: SidSurface) -> dict[str, list[int]]:
    """Positions of the candidates that each name stands for, first to last."""
    positions = defaultdict(list)
    for i, name in enumerate(surface.names(example)):
        positions[name].append(i)
    return dict(positions)


def _exact_order(entries: Sequence[str], example: RerankExample, surface: SidSurface) -> tuple[int, ...] | None:
    left = _positions(example, surface)
    if len(entries) != len(example.candidates):
        return None
    order = []
    for entry in entries:
        if not left.get(entry):
            return None
        order.append(left[entry].pop(0))
    return tuple(order)


def _salvage(listed: str | None, well_formed: bool, example: RerankExample, surface: SidSurface) -> Ranking:
    """What can be read from the text after the key (None: there was no key)."""
    same = tuple(range(len(example.candidates)))
    if listed is None:
        return Ranking(same, Parse.FAILED, f"no {RANKING_KEY} key")
    if "]" not in surface.begin + surface.end:
        listed = listed.partition("]")[0]  # what is cited behind the list is talk, not ranking
    left = _positions(example, surface)
    known = frozenset(left)
    order: list[int] = []
    strangers = repeats = 0
    for name in surface.citations(listed):
        if left.get(name):
            order.append(left[name].pop(0))
        else:
            strangers, repeats = strangers + (name not in known), repeats + (name in known)
    if not order:
        return Ranking(same, Parse.FAILED, f"no candidate after the last {RANKING_KEY} key")
    missing = [i for i in same if i not in set(order)]
    counts = {"missing": len(missing), "repeated": repeats, "strangers": strangers}
    problem = ", ".join(
        [*([] if well_formed else ["not the JSON asked for"]), *(f"{n} {what}" for what, n in counts.items() if n)]
    )
    return Ranking((*order, *missing), Parse.REPAIRED, problem or "entries are not bare SIDs")


def _reasoning(text: str) -> str:
    """The explanation of an answer that is not JSON, as far as it can be told from the text before the key."""
    before, key, after = text.partition(_REASONING_KEY)
    told = after.lstrip().removeprefix(":").lstrip().removeprefix('"') if key else before.strip().removeprefix("{")
    return told.rstrip().removesuffix(",").rstrip().removesuffix('"')
