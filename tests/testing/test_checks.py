"""Each check passes rerankkit's own parts, and fails a deliberately broken one with a message that names the fault."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rerankkit.gates import CONDITIONS, gated
from rerankkit.plugins import load_plugins
from rerankkit.protocols import RewardFn
from rerankkit.stages.rewards import combine
from rerankkit.testing import check_reward, check_teacher, check_tokenizer, make_rollout
from rerankkit.types import (
    Catalog,
    Failed,
    NotApplicable,
    Outcome,
    Parse,
    RerankExample,
    Reward,
    Rollout,
    RunInfo,
    Trace,
    TraceFailure,
)


def places(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """An honest reward: how near to the front the target is, -1 for what cannot be read."""
    return [Reward(_place(rollout)) for rollout in rollouts]


def _place(rollout: Rollout) -> float:
    target = rollout.example.target_index
    if rollout.ranking.parse is Parse.FAILED or target is None:
        return -1.0
    return -rollout.ranking.order.index(target) / len(rollout.ranking.order)


# rewards


ORDER_BLIND = {"format", "reasoning-length", "citations", "target-logp"}


@pytest.mark.parametrize("name", load_plugins(only="gr2").register.rewards.parts)
def test_every_reward_that_ships_passes(name: str) -> None:
    check_reward(built("reward", name), judges_order=name not in ORDER_BLIND)


@pytest.mark.parametrize("gate", CONDITIONS)
def test_rewards_behind_gates_pass(gate: str) -> None:
    # behind these two even the best answer gets 0 where the given order is the best
    blind = gate in ("not-identity", "promoted")
    check_reward(gated(built("reward", "ndcg"), [gate]), judges_order=not blind)


def test_the_sum_of_rewards_passes() -> None:
    parts = [(weight, name, built("reward", name)) for weight, name in ((1.0, "gr2"), (0.1, "citations"))]
    check_reward(combine(parts))


def built(kind: str, name: str) -> RewardFn:
    spec = load_plugins().part(kind, name, "here")
    part: RewardFn = spec.build(spec.config(), RunInfo())
    return part


def too_few(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return places(rollouts)[:-1]


def not_finite(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(math.nan) for _ in rollouts]


def bad_part(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(_place(rollout), {"share": math.inf}) for rollout in rollouts]


def bare_numbers(rollouts: Sequence[Rollout]) -> list[float]:
    return [_place(rollout) for rollout in rollouts]


def by_row(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(_place(rollout) + 0.001 * row) for row, rollout in enumerate(rollouts)]


def sorting(rollouts: list[Rollout]) -> list[Outcome]:
    outcomes = places(rollouts)
    rollouts.sort(key=lambda rollout: rollout.text)
    return outcomes


def rewriting(rollouts: Sequence[Rollout]) -> list[Outcome]:
    for rollout in rollouts:
        object.__setattr__(rollout, "reasoning", "changed")
    return places(rollouts)


def paying_for_copies(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(float(rollout.ranking.identity and rollout.ranking.parse is Parse.OK)) for rollout in rollouts]


def paying_the_unread(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(5.0 if rollout.ranking.parse is Parse.FAILED else _place(rollout)) for rollout in rollouts]


@dataclass
class Moody:
    calls: int = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        self.calls += 1
        return [Reward(_place(rollout) + self.calls) for rollout in rollouts]


def flipped(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(-_place(rollout)) for rollout in rollouts]


DICE = random.Random(0)


def dicing_for_invalid(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(_place(r) if r.ranking.parse is Parse.OK else DICE.random()) for r in rollouts]


def by_row_for_invalid(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(_place(r) if r.ranking.parse is Parse.OK else -row) for row, r in enumerate(rollouts)]


def raising_for_strangers(rollouts: Sequence[Rollout]) -> list[Outcome]:
    for rollout in rollouts:
        if "strangers" in rollout.ranking.problem:
            raise KeyError("price of a stranger")
    return places(rollouts)


def needing_a_target(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(-r.ranking.order.index(r.example.relevance.index(max(1.0, *r.example.relevance)))) for r in rollouts]


def per_token(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(_place(rollout) / len(rollout.token_ids)) for rollout in rollouts]


def best_of_the_batch(rollouts: Sequence[Rollout]) -> list[Outcome]:
    best = max(len(rollout.text) for rollout in rollouts)
    return [Reward(_place(rollout) - len(rollout.text) / best / 1000) for rollout in rollouts]


def none_as_value(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(None if r.ranking.parse is Parse.FAILED else _place(r)) for r in rollouts]  # type: ignore[arg-type]


def speechless(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Failed("") if r.ranking.parse is Parse.FAILED else Reward(_place(r)) for r in rollouts]


def never_applying(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [NotApplicable("not today")] * len(rollouts)


def in_reverse(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return places(rollouts)[::-1]


def hit_in_five(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """Too coarse: a target in place 4 as given is as good as in front."""
    return [Reward(float(_place(r) > -0.5 and r.ranking.parse is not Parse.FAILED)) for r in rollouts]


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (too_few, r"too_few: (\d+) outcomes for \d+ rollouts; give one for each, in order"),
        (flipped, "flipped: the reversed order gets 0.9, the best answer -?0 .* place 0: the sign looks flipped"),
        (dicing_for_invalid, "dicing_for_invalid: a second call .* other outcomes.* For half a list: "),
        (by_row_for_invalid, "by_row_for_invalid: the outcomes depend on row order.* For an answer that "),
        (
            raising_for_strangers,
            "raising_for_strangers: raised KeyError: 'price of a stranger' for an answer that lists strangers .*Failed",
        ),
        (needing_a_target, "needing_a_target: raised ValueError: .*; say Failed"),
        (per_token, "per_token: raised ZeroDivisionError: .* for an answer without its tokens"),
        (best_of_the_batch, "best_of_the_batch: the outcomes of a group depend on what other groups are judged"),
        (none_as_value, "none_as_value: {'value': None} is not finite for an answer that says that it cannot tell"),
        (speechless, "speechless: Failed without a reason for an answer that"),
        (never_applying, "never_applying: the best answer was not rewarded .*: NotApplicable"),
        (in_reverse, "in_reverse: the outcomes depend on row order"),
        (
            hit_in_five,
            "hit_in_five: the order as given gets 1, the best answer 1 when the target is given in place 3",
        ),
        (not_finite, "not_finite: .*nan.* is not finite"),
        (bad_part, "bad_part: .*'share': inf.* is not finite"),
        (bare_numbers, "bare_numbers: returned .*an outcome is Reward, NotApplicable or Failed"),
        (by_row, "by_row: the outcomes depend on row order"),
        (sorting, "sorting: changed the rollouts it was given"),
        (rewriting, "rewriting: changed the rollouts it was given"),
        (Moody(), "Moody: a second call on the same rollouts gave other outcomes"),
        (
            paying_for_copies,
            "paying_for_copies: the order as given gets 1, the best answer 0 when the target .* place 3",
        ),
        (paying_the_unread, "paying_the_unread: an answer that cannot be read gets 5, the best answer 0 when"),
    ],
)
def test_a_broken_reward_is_told_what_is_wrong(broken: RewardFn, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_reward(broken)


def test_an_honest_reward_passes_also_on_rollouts_of_ones_own() -> None:
    from rerankkit.testing import make_example

    check_reward(places)
    check_reward(places, rollouts=[make_rollout(make_example(1))])


# tokenizers


@pytest.mark.parametrize("name", ["residual-kmeans", "rqvae"])
def test_tokenizers_pass(name: str) -> None:
    from rerankkit import RunInfo, load_plugins

    spec = load_plugins().part("tokenizer", name, "here")
    few = {"levels": 2, "codes": 8, **({"epochs": 1, "min_steps": 5} if name == "rqvae" else {})}
    check_tokenizer(spec.build(spec.config(**few), RunInfo()))


class Counting:
    """An honest tokenizer: items are numbered in the order they are met."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (8, 8)

    def fit(self, catalog: Catalog) -> None:
        self.numbers = {item.item_id: number for number, item in enumerate(catalog.items)}

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        return np.array([divmod(self.numbers[item.item_id], 8) for item in catalog.items], dtype=np.int64)

    def save(self, folder: Path) -> None:
        (folder / "numbers.json").write_text(json.dumps(self.numbers))

    def load(self, folder: Path) -> None:
        self.numbers = json.loads((folder / "numbers.json").read_text())


class Forgetful(Counting):
    def save(self, folder: Path) -> None:
        (folder / "numbers.json").write_text(json.dumps(dict.fromkeys(self.numbers, 0)))


class ByRow(Counting):
    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        return np.array([divmod(row, 8) for row in range(len(catalog.items))], dtype=np.int64)


class Overflowing(Counting):
    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (4, 8)


class Flat(Counting):
    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        return super().encode(catalog)[:, :1]


class Restless(Counting):
    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        codes = super().encode(catalog)
        self.numbers = {name: (number + 1) % 64 for name, number in self.numbers.items()}
        return codes


class Pickling(Counting):
    def save(self, folder: Path) -> None:
        (folder / "numbers.bin").write_bytes(pickle.dumps(self.numbers))


class Fractional(Counting):
    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        return super().encode(catalog) / 2


def test_an_honest_tokenizer_passes() -> None:
    check_tokenizer(Counting(), places_new_items=False)
    check_tokenizer(Placing())


class Placing(Counting):
    """Gives items that come later the numbers that are free, and keeps to it; knows what codes stand for."""

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        for item in catalog.items:
            self.numbers.setdefault(item.item_id, len(self.numbers))
        return super().encode(catalog)

    def reconstruct(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.repeat(codes[:, :1], 8, axis=1).astype(np.float32)

    def facts(self) -> dict[str, float | str]:
        return {"items met": len(self.numbers), "order": "as met"}


class Renaming(Placing):
    """Numbers everybody anew when somebody comes."""

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        if any(item.item_id not in self.numbers for item in catalog.items):
            self.numbers = {item.item_id: number for number, item in enumerate(reversed(catalog.items))}
        return super().encode(catalog)


class Fickle(Placing):
    """Forgets what it gave to items that it was not fitted on."""

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        known = dict(self.numbers)
        codes = super().encode(catalog)
        self.numbers = {**known, "gap": 63} if len(known) < len(self.numbers) else known
        return codes


class Unreal(Placing):
    def reconstruct(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.full((len(codes), 8), np.nan, dtype=np.float32)


class Narrow(Placing):
    def reconstruct(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.zeros((len(codes), 3), dtype=np.float32)


class Boastful(Placing):
    def facts(self) -> dict[str, float | str]:
        return {"quality": math.inf}


def test_a_tokenizer_that_says_it_places_no_new_items_must_refuse_them() -> None:
    with pytest.raises(AssertionError, match="Placing: places_new_items is False, and it encoded items"):
        check_tokenizer(Placing(), places_new_items=False)


class Sided(Counting):
    """Codes are signs of the first three collaborative numbers."""

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        signs = (catalog.side["collaborative"][:, :3] > 0).astype(np.int64)
        return np.stack([signs @ np.array([1, 2, 4]), signs[:, 0]], axis=1)


def test_a_tokenizer_may_look_at_side_matrices() -> None:
    check_tokenizer(Sided())


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (Forgetful, "Forgetful: SIDs differ after save and load"),
        (ByRow, "ByRow: an item's SID depends on which others are encoded with it, or on their order"),
        (Overflowing, r"Overflowing: a code lies outside its level's range; sizes \(4, 8\), codes from 0 to 7"),
        (Flat, r"Flat: codes of shape \(48, 1\) instead of \(48, 2\)"),
        (Restless, "Restless: encode gave other SIDs the second time"),
        (Pickling, r"Pickling: save wrote a pickle \(numbers.bin\)"),
        (Fractional, "Fractional: codes are float64, not integers"),
        (Counting, "Counting: raised KeyError: 'new0' for items it was not fitted on; place them, or pass"),
        (Renaming, "Renaming: new items changed the SIDs of old ones"),
        (Fickle, "Fickle: a new item was given another SID when it was asked for again"),
        (Unreal, "Unreal: reconstruct gave numbers that are not finite"),
        (Narrow, r"Narrow: reconstruct gave shape \(48, 3\) instead of \(48, 8\)"),
        (Boastful, "Boastful: facts holds {'quality': inf}; a value is text or a finite number"),
    ],
)
def test_a_broken_tokenizer_is_told_what_is_wrong(broken: Callable[[], Counting], fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_tokenizer(broken())


# teachers


@pytest.mark.parametrize("name", ["rejection", "targeted"])
def test_teachers_pass(name: str) -> None:
    from rerankkit import RunInfo, load_plugins

    spec = load_plugins().part("teacher", name, "here")
    check_teacher(spec.build(spec.config(), RunInfo()))


@dataclass
class Teacher:
    """An honest teacher that changes every answer by `spoil`."""

    spoil: Callable[[list[Trace | TraceFailure]], list[Trace | TraceFailure]]

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        answers: list[Trace | TraceFailure] = []
        for example in examples:
            if example.target_index is None:
                answers.append(TraceFailure(example.example_id, "nothing to teach"))
            else:
                order = tuple(sorted(range(len(example.candidates)), key=lambda i: -example.relevance[i]))
                answers.append(Trace(example.example_id, "It fits.", order, {"by": "test"}))
        yield from self.spoil(answers)


def first(**changes: object) -> Callable[[list[Trace | TraceFailure]], list[Trace | TraceFailure]]:
    return lambda answers: [replace(answers[0], **changes), *answers[1:]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda answers: answers[1:], r"no answer for \['user0/3'\]"),
        (lambda answers: [*answers, answers[0]], r"answered \['user0/3'\] more than once"),
        (first(example_id="who?"), r"answered \['who\?'\], which nobody asked"),
        (first(order=(0, 0, 1)), r"the order for user0/3 is \(0, 0, 1\); it must hold each of the 10 places once"),
        (first(reasoning=" "), "a trace for user0/3 without reasoning"),
        (first(provenance={"attempt": 3}), "provenance holds other things than text"),
        (lambda answers: [*answers[:-1], replace(answers[-1], reason="")], "a failure for userNone/3 gives no reason"),
        (lambda answers: [None, *answers[1:]], "yielded None; an answer is Trace or TraceFailure"),
    ],
)
def test_a_broken_teacher_is_told_what_is_wrong(spoil: Callable[..., list[Trace | TraceFailure]], fault: str) -> None:
    with pytest.raises(AssertionError, match=f"Teacher: {fault}"):
        check_teacher(Teacher(spoil))


def test_an_honest_teacher_passes() -> None:
    check_teacher(Teacher(lambda answers: answers))
