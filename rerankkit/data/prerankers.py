"""Pre-rankers: the first stage that puts ten candidates before the policy.

All share one duty: a list made for training must look like one made at test time. At test a user's target was never
seen by the model that ranks for them, so for a training step (user, t) whatever that user did at t and later is taken
out of the model first. How each does that is said in its docstring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rerankkit.data.dataset import SPLITS, Dataset, Split
from rerankkit.data.knn import Knn, KnnSettings
from rerankkit.data.lists import CandidateList, CandidateLists, relevance_of
from rerankkit.data.prerank_base import (
    OWN_PART_OUT,
    PreRanker,
    Ranked,
    Sequences,
    Step,
    fitted_on,
    order_by_count,
    sampled,
)
from rerankkit.data.tables import as_id
from rerankkit.errors import DataError, did_you_mean

__all__ = [
    "FromScores",
    "GivenLists",
    "Knn",
    "KnnSettings",
    "Popularity",
    "PreRanker",
    "RankFn",
    "Ranked",
    "Step",
    "from_file",
    "from_scores",
    "make_lists",
]


def make_lists(
    dataset: Dataset,
    preranker: PreRanker,
    *,
    size: int = 10,
    max_history: int = 50,
    earlier_steps: int = 0,
    max_users: int | Mapping[str, int] | None = None,
    seed: int = 0,
    splits: Iterable[Split] = SPLITS,
) -> CandidateLists:
    """Make the candidate lists of all splits: each user's own step, and for train up to `earlier_steps` before it.

    `max_users` (for all splits, or by split) keeps a seeded sample of the users, the same ones in whatever order they
    come. The pre-ranker sees whole histories; the lists keep the last `max_history` items of each.
    """
    made: list[CandidateList] = []
    notes: dict[str, Any] = {}
    for split in splits:
        limit = max_users.get(split) if isinstance(max_users, Mapping) else max_users
        steps = sampled(list(dataset.steps(split, earlier_steps if split == "train" else 0)), limit, seed)
        ranked = preranker.rank(steps, split, size)
        notes[f"{split}_steps_without_list"] = sum(one is None for one in ranked)
        for (user_id, t), one in zip(steps, ranked, strict=True):
            if one is not None:
                history = dataset.histories[user_id]
                target = history[t]
                relevance = one.relevance or relevance_of(one.candidates, target)
                cut = history[max(0, t - max_history) : t]
                made.append(
                    CandidateList(
                        f"{user_id}/{t}", user_id, t, split, cut, one.candidates, one.scores, relevance, target
                    )
                )
    made_by: dict[str, str] = {
        split: preranker.made_by(split) for split in SPLITS if any(one.split == split for one in made)
    }
    return CandidateLists(tuple(made), made_by, {**notes, **preranker.notes})


# ---- popularity ------------------------------------------------------------------------------------------------------


class Popularity:
    """The items with most users that this user does not have yet; ties fall in a seeded order.

    Counts come from train for train and validation lists, from train + valid for test lists (train if not `refit`). For
    a step (user, t) one is taken off the count of every item that the user got at t or later: exactly what counting
    without those rows gives.
    """

    def __init__(self, dataset: Dataset, *, refit: bool = True, seed: int = 0) -> None:
        self._sequences = Sequences(dataset, seed)
        self._refit = refit
        self.notes: dict[str, Any] = {}

    def rank(self, steps: Sequence[Step], split: Split, size: int) -> Sequence[Ranked]:
        """One list a step, of `size` items wherever the catalogue has so many new ones."""
        sequences = self._sequences
        ends = sequences.ends[fitted_on(split, self._refit)]
        counts = np.bincount(sequences.flat(ends)[1], minlength=sequences.num_items).astype(np.float64)
        order = order_by_count(sequences, counts)
        ranked = []
        for user_id, t in steps:
            history, end = sequences.histories[sequences.rows[user_id]], ends[sequences.rows[user_id]]
            items, left = sequences.popular(order, counts, history[:t], history[t:end], size)
            ranked.append(Ranked(tuple(sequences.item_ids[i] for i in items), tuple(left.tolist())))
        return ranked

    def made_by(self, split: Split) -> str:
        """How the lists of a split were made."""
        return f"popularity, fitted on {fitted_on(split, self._refit)}{OWN_PART_OUT if split == 'train' else ''}"


# ---- any scoring function, the policy's beam search among them -------------------------------------------------------

RankFn: TypeAlias = Callable[[Sequence[tuple[str, ...]]], Sequence[tuple[Sequence[str], Sequence[float]]]]
"""Histories (item ids, oldest first) -> for each, item ids best first and their scores."""


class FromScores:
    """A function as pre-ranker: the constrained beam search of the mid-trained policy, say, which is GR2's first stage.

    No leak only if the function's model never saw the listed steps: train it on `dataset.histories[user][:t]` alone for
    the earliest step t that is listed for each user (lists for validation and test then come from the same model, or
    from one refreshed up to the step before). Nothing here can check that; `fitted_on` says it in the protocol string.

    The function should return `size` items and as many more as it may repeat from the history: history items and
    repeats are dropped, and what is missing is filled up by popularity (counted without the user's later steps) and
    counted in `notes["filled"]`. An id that is not in the catalogue raises DataError.
    """

    def __init__(
        self,
        dataset: Dataset,
        rank_fn: RankFn,
        *,
        name: str = "policy",
        fitted_on: str,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self._dataset = dataset
        self._rank_fn = rank_fn
        self._name = name
        self._fitted_on = fitted_on
        self._batch_size = batch_size
        self._popularity = Popularity(dataset, refit=False, seed=seed)
        self.notes: dict[str, Any] = {"filled": 0}

    def rank(self, steps: Sequence[Step], split: Split, size: int) -> Sequence[Ranked]:
        """One list of `size` a step."""
        ranked: list[Ranked] = []
        for start in range(0, len(steps), self._batch_size):
            batch = steps[start : start + self._batch_size]
            histories = [self._dataset.histories[user_id][:t] for user_id, t in batch]
            answers = self._rank_fn(histories)
            if len(answers) != len(batch):
                raise DataError(f"{self._name}: {len(answers)} lists came back for {len(batch)} histories")
            for step, history, (ids, scores) in zip(batch, histories, answers, strict=True):
                ranked.append(self._complete(step, split, history, ids, scores, size))
        return ranked

    def made_by(self, split: Split) -> str:
        """How the lists of a split were made."""
        return f"{self._name}, fitted on {self._fitted_on}"

    def _complete(
        self, step: Step, split: Split, history: Sequence[str], ids: Sequence[str], scores: Sequence[float], size: int
    ) -> Ranked:
        seen, chosen = set(history), dict[str, float]()
        for item_id, score in zip(ids, scores, strict=True):
            if item_id not in self._dataset.item_rows:
                raise DataError(f"{self._name}: returned {item_id!r}, which is not in the catalogue")
            if item_id not in seen and item_id not in chosen and len(chosen) < size:
                chosen[item_id] = float(score)
        if len(chosen) < size:
            (popular,) = self._popularity.rank([step], split, size + len(chosen))
            floor = min(chosen.values(), default=0.0)
            fill = [item_id for item_id in popular.candidates if item_id not in chosen][: size - len(chosen)]
            self.notes["filled"] += len(fill)
            chosen.update(dict.fromkeys(fill, floor))
        return Ranked(tuple(chosen), tuple(chosen.values()))


def from_scores(dataset: Dataset, rank_fn: RankFn, *, name: str = "policy", fitted_on: str, **more: int) -> FromScores:
    """A pre-ranker from any function that ranks items for histories; read FromScores on how leaks are avoided."""
    return FromScores(dataset, rank_fn, name=name, fitted_on=fitted_on, **more)


# ---- the user's own lists --------------------------------------------------------------------------------------------


class GivenLists:
    """Lists that somebody else's first stage made. Whether they leak is theirs to know; the protocol string says so."""

    def __init__(self, source: str, lists: Mapping[tuple[Split, Step], Ranked], unplaced: int) -> None:
        self._source = source
        self._lists = lists
        self.notes: dict[str, Any] = {"given_lists": len(lists), "given_lists_without_step": unplaced}

    def rank(self, steps: Sequence[Step], split: Split, size: int) -> Sequence[Ranked | None]:
        """The given list of each step cut to `size`, or None. DataError if one is shorter than `size`."""
        return [self._cut(step, split, size) for step in steps]

    def made_by(self, split: Split) -> str:
        """Where the lists come from."""
        return f"lists given in {self._source}"

    def _cut(self, step: Step, split: Split, size: int) -> Ranked | None:
        one = self._lists.get((split, step))
        if one is None:
            return None
        if len(one.candidates) < size:
            raise DataError(
                f"{self._source}: the {split} list of user {step[0]!r} holds {len(one.candidates)} items, but "
                f"candidates.size is {size}; give longer lists or set candidates.size = {len(one.candidates)}"
            )
        grades = one.relevance
        return Ranked(one.candidates[:size], one.scores[:size], grades[:size] if grades is not None else None)


def from_file(source: str | Path | Mapping[str, str], dataset: Dataset, size: int) -> GivenLists:
    """Read lists from parquet or JSONL: user_id, split, candidates (ids, best first)[, scores][, target][, relevance].

    `source` is one file, or split -> file for tables without a `split` column. With `target` (or `step`, a position in
    the history) the list belongs to that step; else to the user's validation, test or last training step. Lists longer
    than `size` are cut later. Every unknown user or item, repeat or short list is found, the first few are shown with
    their row, and DataError is raised, as it is for a file of which no list belongs to a step of the dataset. Other
    lists of users who have no step in that split (held-out ones) are counted.
    """
    files = {str(path): split for split, path in source.items()} if isinstance(source, Mapping) else {str(source): ""}
    for split in files.values():
        if split and split not in SPLITS:
            raise DataError(f"candidates.path: {split!r} is no split; {did_you_mean(split, SPLITS)}")
    lists: dict[tuple[Split, Step], Ranked] = {}
    problems: list[str] = []
    unplaced = 0
    useless: list[str] = []
    for path, split in files.items():
        num_rows, placed_before = 0, len(lists) + len(problems)
        for place, row in _rows(Path(path)):
            num_rows += 1
            try:
                found = _given(row, split, dataset, size)
                if found is not None and found[0] in lists:
                    raise ValueError(f"a second list for user {found[0][1][0]!r} at step {found[0][1][1]}")
            except (ValueError, TypeError) as error:  # TypeError: None or a list where a number should be
                problems.append(f"{path}{place}: {error}")
                continue
            if found is None:
                unplaced += 1
            else:
                lists[found[0]] = found[1]
        if len(lists) + len(problems) == placed_before:
            held = f"none of its {num_rows:,} lists belongs to a {split or 'listed'} step of the dataset"
            useless.append(f"{path}: {held if num_rows else 'holds no list'}")
    if problems:
        shown = "\n".join(problems[:5])
        raise DataError(f"{len(problems):,} of the given candidate lists cannot be used, the first are\n{shown}")
    if useless:
        raise DataError("\n".join(useless) + "\nGive each split's lists for the users that data.split puts there.")
    return GivenLists(", ".join(files), lists, unplaced)


def _rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(place, row) of a table of lists; the columns are those that `from_file` names."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: is not a parquet file that can be read: {error}") from error
        yield from ((f", row {number}", row) for number, row in enumerate(rows, 1))
    elif path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as text:
            for number, line in enumerate(text, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError as error:
                    raise DataError(f"{path}:{number}: is no JSON: {error}") from error
                if line.strip():
                    yield f":{number}", row if isinstance(row, dict) else {}
    else:
        raise DataError(f"{path}: candidate lists end in .parquet or .jsonl")


def _given(
    row: Mapping[str, Any], split_of_file: str, dataset: Dataset, size: int
) -> tuple[tuple[Split, Step], Ranked] | None:
    """The list of one row and the step it is for; None if the dataset has no such step; ValueError if it is bad."""
    for name in ("user_id", "candidates"):
        if row.get(name) is None:
            raise ValueError(f"no {name}; found {', '.join(row) or 'nothing'}")
    user_id = as_id(row["user_id"])
    if user_id not in dataset.histories:
        raise ValueError(f"user {user_id!r} is not in the interactions (or was dropped by data.k_core)")
    name = split_of_file or as_id(row.get("split"))
    split = next((known for known in SPLITS if known == name), None)
    if split is None:
        raise ValueError(f"split is {name!r}; {did_you_mean(name, SPLITS)}")
    if not isinstance(row["candidates"], list):
        raise ValueError(f"candidates is {row['candidates']!r:.40}; it should be a list of item ids")
    candidates = tuple(as_id(item_id) for item_id in row["candidates"])
    unknown = next((item_id for item_id in candidates if item_id not in dataset.item_rows), None)
    if unknown is not None:
        raise ValueError(f"candidate {unknown!r} is not in the catalogue")
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"user {user_id!r} has a candidate twice")
    if len(candidates) < size:
        raise ValueError(f"{len(candidates)} candidates, but candidates.size is {size}")
    step = _step(row, user_id, split, dataset)
    if step is None:
        return None
    scores = _aligned(row, "scores", candidates) or tuple(-float(place) for place in range(len(candidates)))
    return (split, (user_id, step)), Ranked(candidates, scores, _aligned(row, "relevance", candidates))


def _step(row: Mapping[str, Any], user_id: str, split: Split, dataset: Dataset) -> int | None:
    history, (valid_start, test_start) = dataset.histories[user_id], dataset.splits[user_id]
    start, end = {"train": (1, valid_start), "valid": (valid_start, test_start), "test": (test_start, len(history))}[
        split
    ]
    if row.get("target") is not None and start < end:
        target = as_id(row["target"])
        if target not in history[start:end]:
            raise ValueError(f"target {target!r} is no {split} item of user {user_id!r}")
        step = history.index(target)
        if row.get("step") is not None and row["step"] != step:
            raise ValueError(f"target {target!r} stands at step {step} of user {user_id!r}, not at {row['step']}")
        return step
    if row.get("step") is not None:
        if start >= end:  # a held-out user
            return None
        if row["step"] not in range(start, end):
            steps = f"{start} to {end - 1}" if end - start > 1 else f"{start}"
            raise ValueError(f"step {row['step']!r} is no {split} step of user {user_id!r}; possible: {steps}")
        return int(row["step"])
    step = end - 1 if split == "train" else start
    return step if start <= step < end and step >= 1 else None


def _aligned(row: Mapping[str, Any], name: str, candidates: Sequence[str]) -> tuple[float, ...] | None:
    values = row.get(name)
    if values is None:
        return None
    if len(values) != len(candidates):
        raise ValueError(f"{len(values)} {name} for {len(candidates)} candidates")
    numbers = tuple(float(value) for value in values)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} hold NaN or infinity")
    return numbers
