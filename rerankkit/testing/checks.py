"""The contract of a reward, tried on made records."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence

from rerankkit.protocols import RewardFn
from rerankkit.testing.records import make_example, make_rollout
from rerankkit.types import Failed, NotApplicable, Outcome, RerankExample, Reward, Rollout


def check_reward(reward: RewardFn, *, judges_order: bool = True, rollouts: Sequence[Rollout] | None = None) -> None:
    """One typed, finite outcome a row; the same again and in any row order; input left alone.

    With `judges_order` also: an answer that puts the target first gets more than the probes that do not (the order as
    given, the reverse) and than an answer that cannot be read. `rollouts` are tried in place of the made ones.
    """
    name, rows = _name(reward), list(_made_rollouts() if rollouts is None else rollouts)
    outcomes = _judged(name, reward, rows)
    _require(
        _equal(outcomes, _judged(name, reward, rows)),
        f"{name}: a second call on the same rollouts gave other outcomes; a reward is a pure function of the records",
    )
    shuffled = random.Random(0).sample(range(len(rows)), len(rows))
    again = _judged(name, reward, [rows[i] for i in shuffled])
    _require(
        _equal([outcomes[i] for i in shuffled], again),
        f"{name}: the outcomes depend on row order; judge each rollout by its own record and group",
    )
    if judges_order:
        for example in _examples_with_target():
            _check_gold(name, reward, example)


def _made_rollouts() -> list[Rollout]:
    rows = []
    for group, example in enumerate([*_examples_with_target(), make_example(None)]):
        rows += [make_rollout(example, order, group=group) for order in _orders(example).values()]
        rows.append(make_rollout(example, text="I cannot say.", group=group))
        # half a list: read, but repaired
        rows.append(
            make_rollout(
                example, text=make_rollout(example).text[:-200] + '"]}', num_tokens=400, group=group, truncated=True
            )
        )
    return rows


def _examples_with_target() -> list[RerankExample]:
    return [make_example(target) for target in (0, 3, 9)]


def _orders(example: RerankExample) -> dict[str, tuple[int, ...]]:
    """What an answer may look like: the target first and the rest as given; and orders that nobody thought about."""
    given = tuple(range(len(example.candidates)))
    target = example.target_index
    gold = given if target is None else (target, *(i for i in given if i != target))
    return {"gold": gold, "the order as given": given, "the reversed order": given[::-1]}


def _check_gold(name: str, reward: RewardFn, example: RerankExample) -> None:
    orders = _orders(example)
    probes = {
        **{what: make_rollout(example, order) for what, order in orders.items() if order[0] != orders["gold"][0]},
        "an answer that cannot be read": make_rollout(example, text="I cannot say."),
    }
    gold, *others = _judged(name, reward, [make_rollout(example, orders["gold"]), *probes.values()])
    where = f"when the target is given in place {example.target_index}"
    if not isinstance(gold, Reward):
        raise AssertionError(f"{name}: the best answer was not rewarded {where}: {gold}")
    for what, outcome in zip(probes, others, strict=True):
        if isinstance(outcome, Reward):
            _require(
                gold.value > outcome.value,
                f"{name}: {what} gets {outcome.value:g}, the best answer {gold.value:g} {where}; it must get more "
                "(or pass judges_order=False for a reward that does not judge the order)",
            )


def _judged(name: str, reward: RewardFn, rollouts: list[Rollout]) -> list[Outcome]:
    """The outcomes, each of the right kind and finite; the rollouts must be as they were."""
    before, given = copy.deepcopy(rollouts), list(rollouts)
    outcomes = list(reward(given))
    _require(
        len(given) == len(rollouts) and all(a is b for a, b in zip(given, rollouts, strict=True)) and given == before,
        f"{name}: changed the rollouts it was given",
    )
    _require(
        len(outcomes) == len(rollouts),
        f"{name}: {len(outcomes)} outcomes for {len(rollouts)} rollouts; give one for each, in order",
    )
    for outcome in outcomes:
        _require(
            isinstance(outcome, Reward | NotApplicable | Failed),
            f"{name}: returned {outcome!r}; an outcome is Reward, NotApplicable or Failed",
        )
        if isinstance(outcome, Reward):
            numbers = {"value": outcome.value, **outcome.parts}
            bad = {part: value for part, value in numbers.items() if not math.isfinite(value)}
            _require(not bad, f"{name}: {bad} is not finite; say Failed(reason) where there is nothing to judge by")
    return outcomes


def _equal(these: Sequence[Outcome], those: Sequence[Outcome]) -> bool:
    return all(map(_same, these, those))


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
