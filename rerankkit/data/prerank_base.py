"""What the pre-rankers share: the contract, and a dataset in integers with its one way to break ties."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rerankkit.data.dataset import Dataset, Split

Step: TypeAlias = tuple[str, int]
"""(user_id, t): rank for `histories[user_id][:t]`."""


class Ranked(NamedTuple):
    """One list: ids best first, their scores, and grades if the list came with some."""

    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    relevance: tuple[float, ...] | None = None


class PreRanker(Protocol):
    """Ranks the catalogue for steps of one split; must not use what the step's user did at t or later."""

    notes: dict[str, Any]
    """JSON values that the report should hold; may grow while ranking."""

    def rank(self, steps: Sequence[Step], split: Split, size: int) -> Sequence[Ranked | None]:
        """One list of at most `size` new items a step, or None where there is none."""

    def made_by(self, split: Split) -> str:
        """How the lists of a split were made, in one line, for the protocol string."""


def seeded_hash(seed: int, name: str) -> int:
    """A 63-bit number that depends on nothing but the two; says nothing about any order of the names."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()) >> 1


def sampled(steps: list[Step], limit: int | None, seed: int) -> list[Step]:
    users = list(dict.fromkeys(user_id for user_id, _ in steps))
    if limit is None or limit >= len(users):
        return steps
    kept = set(sorted(users, key=lambda user_id: seeded_hash(seed, user_id))[:limit])
    return [step for step in steps if step[0] in kept]


OWN_PART_OUT = " without the user's own steps at and after the listed one"


def fitted_on(split: Split, refit: bool) -> str:
    return "train+valid" if split == "test" and refit else "train"


class Sequences:
    """A dataset in integers: items and users are their places in it."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        place = dataset.item_rows
        self.item_ids = [item.item_id for item in dataset.items]
        self.num_items = len(self.item_ids)
        self.rows = {user_id: row for row, user_id in enumerate(dataset.histories)}
        self.histories = [np.array([place[i] for i in ids], dtype=np.int64) for ids in dataset.histories.values()]
        valid = np.array([dataset.splits[user_id][0] for user_id in dataset.histories], dtype=np.int64)
        test = np.array([dataset.splits[user_id][1] for user_id in dataset.histories], dtype=np.int64)
        self.ends = {"train": valid, "train+valid": test}
        hashes = [seeded_hash(seed, item_id) for item_id in self.item_ids]
        self.tie = np.empty(self.num_items, dtype=np.int64)  # the seeded order that breaks what popularity leaves tied
        self.tie[np.argsort(np.array(hashes, dtype=np.int64), kind="stable")] = np.arange(self.num_items)

    def flat(self, ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """User row and item row of every counted interaction, each [R], users together and in order of time."""
        cut = [history[:end] for history, end in zip(self.histories, ends, strict=True)]
        users = np.repeat(np.arange(len(cut)), [len(one) for one in cut])
        return users, np.concatenate(cut) if cut else np.empty(0, np.int64)

    def best(
        self,
        items: NDArray[np.int64],
        scores: NDArray[np.float64],
        popularity: NDArray[np.float64],
        size: int,
    ) -> NDArray[np.int64]:
        """Places of the `size` best: by score, then popularity (aligned with `items`), then the seeded order."""
        keep = np.arange(len(items))
        if len(items) > size:
            bar = np.partition(scores, len(scores) - size)[len(scores) - size]
            keep = np.flatnonzero(scores >= bar)
        order = np.lexsort((self.tie[items[keep]], -popularity[keep], -scores[keep]))
        return np.asarray(keep[order[:size]], dtype=np.int64)

    def popular(
        self,
        order: NDArray[np.int64],
        counts: NDArray[np.float64],
        seen: NDArray[np.int64],
        taken_out: NDArray[np.int64],
        size: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The `size` most popular items not `seen`, with one count less for every item `taken_out`, and the counts.

        `order` is all items by count: those taken out can only fall, so a prefix that is longer by as many is enough.
        """
        items = order[: size + len(seen) + len(taken_out)]
        items = items[~np.isin(items, seen)]
        left = counts[items] - np.isin(items, taken_out)
        best = self.best(items, left, left, size)
        return items[best], left[best]


def order_by_count(sequences: Sequences, counts: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray(np.lexsort((sequences.tie, -counts)), dtype=np.int64)
