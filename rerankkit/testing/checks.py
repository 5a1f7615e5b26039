"""What the contract of a reward is tried on: made answers of every kind, and how outcomes are compared."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TypeAlias

from rerankkit.protocols import RewardFn
from rerankkit.testing.records import make_example, make_rollout
from rerankkit.testing.zoo import Honest, exploits
from rerankkit.types import Failed, NotApplicable, Outcome, RerankExample, Reward, Rollout

Row: TypeAlias = tuple[str, Rollout]
"""A rollout and what it is, for messages."""


def _made_rollouts() -> list[Row]:
    examples = [*_examples_with_target(), make_example(None), make_example(1, num_candidates=2, num_history=0)]
    cheats = exploits(examples)
    rows: list[Row] = []
    for group, example in enumerate(examples):
        for what, order in _orders(example).items():
            rows.append((what, make_rollout(example, order, group=group)))
        # half a list: read, but repaired
        half = make_rollout(example).text[:-60] + '"]}'
        rows.append(("half a list", make_rollout(example, text=half, num_tokens=400, group=group, truncated=True)))
        bare = replace(make_rollout(example, group=group), token_ids=(), logps=(), num_reasoning_tokens=0)
        rows.append(("an answer without its tokens", bare))
        rows.append(
            ("an answer out of a beam", replace(make_rollout(example, group=group), origin="beam", beam_rank=1))
        )
        honest = Honest(skill=1.0).play(example, random.Random(group), group)
        rows.append(("an honest answer", honest))
        rows += [(f"an answer that {c.about}", c.play(honest, random.Random(group))) for c in cheats]
    return rows


def _examples_with_target() -> list[RerankExample]:
    graded = make_example(relevance=(0, 1, 0, 3, 2, 0), example_id="graded/3")
    return [*(make_example(target) for target in (0, 3, 9)), graded]


def _orders(example: RerankExample) -> dict[str, tuple[int, ...]]:
    """What an answer may look like: the best order, the rest as given; and orders that nobody thought about."""
    given = tuple(range(len(example.candidates)))
    gold = tuple(sorted(given, key=lambda place: -example.relevance[place]))
    return {"gold": gold, "the order as given": given, "the reversed order": given[::-1]}


def _check_gold(name: str, reward: RewardFn, example: RerankExample) -> None:
    orders = _orders(example)
    probes = {
        **{what: make_rollout(example, order) for what, order in orders.items() if order[0] != orders["gold"][0]},
        "an answer that cannot be read": make_rollout(example, text="I cannot say."),
    }
    rows = [("the best answer", make_rollout(example, orders["gold"])), *probes.items()]
    gold, *others = _judged(name, reward, rows)
    where = f"when the target is given in place {example.target_index}"
    if not isinstance(gold, Reward):
        raise AssertionError(f"{name}: the best answer was not rewarded {where}: {gold}")
    known = {what: outcome.value for what, outcome in zip(probes, others, strict=True) if isinstance(outcome, Reward)}
    flipped = len(known) > 1 and all(gold.value < value for value in known.values())
    hint = ": the sign looks flipped" if flipped else ""
    for what, value in known.items():
        _require(
            gold.value > value,
            f"{name}: {what} gets {value:g}, the best answer {gold.value:g} {where}{hint}; it must get more "
            "(or pass judges_order=False for a reward that does not judge the order)",
        )


def _judged(name: str, reward: RewardFn, rows: Sequence[Row]) -> list[Outcome]:
    """The outcomes, each of the right kind and finite; the rollouts must be as they were."""
    rollouts = [row for _, row in rows]
    before, given = copy.deepcopy(rollouts), list(rollouts)
    try:
        outcomes = list(reward(given))
    except Exception as error:
        raise AssertionError(
            f"{name}: raised {type(error).__name__}: {error}{_raised_for(reward, rows)}; say Failed(reason) for what "
            "cannot be judged"
        ) from error
    _require(
        len(given) == len(rollouts) and all(a is b for a, b in zip(given, rollouts, strict=True)) and given == before,
        f"{name}: changed the rollouts it was given",
    )
    _require(
        len(outcomes) == len(rollouts),
        f"{name}: {len(outcomes)} outcomes for {len(rollouts)} rollouts; give one for each, in order",
    )
    for (what, _), outcome in zip(rows, outcomes, strict=True):
        _require(
            isinstance(outcome, Reward | NotApplicable | Failed),
            f"{name}: returned {outcome!r}; an outcome is Reward, NotApplicable or Failed",
        )
        if isinstance(outcome, Reward):
            numbers = {"value": outcome.value, **outcome.parts}
            bad = {part: value for part, value in numbers.items() if not _finite(value)}
            _require(
                not bad,
                f"{name}: {bad} is not finite for {what}; say Failed(reason) where there is nothing to judge by",
            )
        else:
            _require(bool(outcome.reason), f"{name}: {type(outcome).__name__} without a reason for {what}")
    return outcomes


def _raised_for(reward: RewardFn, rows: Sequence[Row]) -> str:
    """Of which answer it was, where one alone brings it about."""
    for what, row in rows:
        try:
            list(reward([row]))
        except Exception:
            return f" for {what}"
    return ""


def _finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _same_again(rows: Sequence[Row], these: Sequence[Outcome], those: Sequence[Outcome], fault: str) -> None:
    for (what, _), this, that in zip(rows, these, those, strict=True):
        _require(_same(this, that), f"{fault}. For {what}: {_short(this)}, then {_short(that)}")


def _short(outcome: Outcome) -> str:
    return f"{outcome.value:g}" if isinstance(outcome, Reward) else str(outcome)


def _same(a: Outcome, b: Outcome) -> bool:
    if not isinstance(a, Reward) or not isinstance(b, Reward):
        return type(a) is type(b)
    # Sums over a group may be added up in another order: the last bits may differ.
    return a.parts.keys() == b.parts.keys() and all(
        math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
        for x, y in [(a.value, b.value), *((a.parts[part], b.parts[part]) for part in a.parts)]
    )


def _name(part: object) -> str:
    return getattr(part, "__qualname__", None) or type(part).__name__


def _require(kept: bool, fault: str) -> None:
    if not kept:
        raise AssertionError(fault)
