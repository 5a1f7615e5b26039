"""Item-item nearest neighbours that know the order of a history: the pre-ranker of a run unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from rerankkit.data.dataset import Dataset, Split
from rerankkit.data.prerank_base import OWN_PART_OUT, Ranked, Sequences, Step, fitted_on, order_by_count, sampled


@dataclass(frozen=True)
class KnnSettings:
    """How the KNN weighs what it counted. The defaults were chosen on Beauty's validation users."""

    transitions: Literal["symmetric", "directed"] = "symmetric"
    """directed counts only what came after; where same-day rows stand in catalogue order it profits from that leak."""
    recency_decay: float = 0.4
    """Weight of a history item relative to the one after it."""
    transition_weight: float = 4.0
    """Weight of a direct follower, relative to one shared user."""
    popularity_power: float = 0.2
    """Scores are divided by the candidate's count to this power; 0.5 is the cosine, less lets popular items up."""
    history_power: float = 0.3
    """The same for the history item's count."""
    window: int = 5
    """Steps within which one item counts as following another, with weight 1/distance."""
    length_power: float = 0.2
    """A user's counts are divided by the number of their counted items to this power."""


@dataclass(frozen=True)
class _Counts:
    """What a dataset's histories, each cut at `ends`, add up to. All else is computed from it at ranking time."""

    ends: NDArray[np.int64]
    """[U]: how many of each user's items were counted."""
    item_counts: NDArray[np.float64]
    """[M]"""
    together: sp.csr_matrix
    """[M, M]: users (weighted) who have both items; the diagonal is empty."""
    following: sp.csr_matrix
    """[M, M]: times the column came 1 to `window` steps after the row, weighted by user and by 1/distance."""


class Knn:
    """Sequence-aware item-item nearest neighbours: cosine of co-occurrence with recency decay, plus transitions.

    score(j | h) = sum over the history's items i, the k-th last with weight recency_decay^k, of
    (users with i and j + transition_weight * transitions i to j) / (count_i^history_power * count_j^popularity_power).
    Counts come from train for train and validation lists, from train + valid for test lists (train if not `refit`).
    Items of the history are left out. Ties go by popularity, then by a seeded order; never by id.

    No leak: for a step (user, t) inside the counted rows the user's part at t and later is subtracted. Of all counts
    only the columns of those later items hold any of it (no item comes twice in a history), so subtracting there gives
    exactly the scores of counting without those rows. The user's weight for length stays the one of all counted rows:
    it touches pairs of history items only, and those are no candidates.

    `tune` tries a few values of four settings on validation users, one setting after the other, by NDCG@size of their
    lists; `notes["knn_tried"]` holds what was tried.
    """

    _GRID: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "popularity_power": (0.1, 0.2, 0.35, 0.5),
        "recency_decay": (0.4, 0.6, 0.8, 0.9),
        "transition_weight": (0.0, 1.0, 2.0, 4.0, 8.0),
        "history_power": (0.3, 0.5),
    }
    _MAX_SCORED = 50  # older items weigh nothing at any sensible decay
    _LONGEST = 1000  # users with more count no co-occurrences (their pairs grow with the square, and say little)
    _BATCH = 1000

    def __init__(
        self,
        dataset: Dataset,
        settings: KnnSettings | None = None,
        *,
        tune: bool = True,
        tune_users: int = 3000,
        refit: bool = True,
        seed: int = 0,
    ) -> None:
        self._dataset = dataset
        self._sequences = Sequences(dataset, seed)
        self.settings = settings or KnnSettings()
        self._tune_users = tune_users if tune else 0
        self._tuned = not tune
        self._refit = refit
        self._seed = seed
        self._counts: dict[str, _Counts] = {}
        self.notes: dict[str, Any] = {}

    def rank(self, steps: Sequence[Step], split: Split, size: int) -> Sequence[Ranked]:
        """One list a step, of `size` items wherever the catalogue has so many new ones; tunes on first use."""
        if not self._tuned:
            self._tuned = True
            self._choose_settings(size)
        if not steps:
            return []
        counts = self._count(fitted_on(split, self._refit))
        return list(self._rank(steps, counts, self.settings, size))

    def made_by(self, split: Split) -> str:
        """How the lists of a split were made."""
        s = self.settings
        return (
            f"knn, {s.transitions} transitions within {s.window} (weight {s.transition_weight:g}), decay "
            f"{s.recency_decay:g}, popularity power {s.popularity_power:g}, fitted on "
            f"{fitted_on(split, self._refit)}{OWN_PART_OUT if split == 'train' else ''}"
        )

    def _choose_settings(self, size: int) -> None:
        steps = sampled(list(self._dataset.steps("valid")), self._tune_users, self._seed)
        if not steps:
            self.notes["knn_tuned"] = "not tuned: no user has a validation step"
            return
        counts = self._count("train")
        tried: dict[KnnSettings, float] = {}

        def quality(settings: KnnSettings) -> float:
            if settings not in tried:
                total = 0.0
                for (user_id, t), one in zip(steps, self._rank(steps, counts, settings, size), strict=True):
                    target = self._dataset.histories[user_id][t]
                    if target in one.candidates:
                        total += 1 / math.log2(one.candidates.index(target) + 2)
                tried[settings] = total / len(steps)
            return tried[settings]

        best = self.settings
        for name, values in self._GRID.items():
            changes: list[dict[str, Any]] = [{name: value} for value in values]
            best = max([best, *(replace(best, **change) for change in changes)], key=quality)  # of equals the first
        self.settings = best
        self.notes["knn_tuned"] = f"by NDCG@{size} of {len(steps):,} validation lists, fitted on train"
        self.notes["knn_tried"] = [
            {**{name: getattr(settings, name) for name in self._GRID}, "ndcg": round(value, 5)}
            for settings, value in tried.items()
        ]

    def _count(self, rows: str) -> _Counts:
        """Add up the sequences; only `window`, `transitions` and `length_power` matter here, which are not tuned."""
        if rows in self._counts:
            return self._counts[rows]
        sequences, settings = self._sequences, self.settings
        ends, size = sequences.ends[rows], sequences.num_items
        users, items = sequences.flat(ends)
        weights = self._user_weights(ends)
        together = sp.csr_matrix(
            (np.where(ends[users] > self._LONGEST, 0.0, weights[users] ** 0.5), (users, items)), (len(ends), size)
        )
        together = (together.T @ together).tocsr()
        together = (together - sp.diags(together.diagonal())).tocsr()
        together.eliminate_zeros()
        following = sp.csr_matrix((size, size))
        for distance in range(1, settings.window + 1):
            same = users[distance:] == users[:-distance]
            pair = (items[:-distance][same], items[distance:][same])
            following = following + sp.csr_matrix((weights[users[distance:][same]] / distance, pair), (size, size))
        if settings.transitions == "symmetric":
            following = (following + following.T).tocsr()
        item_counts = np.bincount(items, minlength=size).astype(np.float64)
        self._counts[rows] = _Counts(ends, item_counts, together, following)
        return self._counts[rows]

    def _user_weights(self, ends: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.maximum(ends, 1).astype(np.float64) ** -self.settings.length_power)

    def _rank(self, steps: Sequence[Step], counts: _Counts, settings: KnnSettings, size: int) -> Iterator[Ranked]:
        both = (counts.together + settings.transition_weight * counts.following).tocsr()
        known = np.maximum(counts.item_counts, 1.0)
        row_scale, column_scale = known**-settings.history_power, known**-settings.popularity_power
        order = order_by_count(self._sequences, counts.item_counts)
        user_weights = self._user_weights(counts.ends)
        for start in range(0, len(steps), self._BATCH):
            batch = steps[start : start + self._BATCH]
            weights = self._history_weights(batch, row_scale, settings)
            scored = (weights @ both).tocsr()
            for row, (user_id, t) in enumerate(batch):
                user = self._sequences.rows[user_id]
                found = slice(scored.indptr[row], scored.indptr[row + 1])
                items = scored.indices[found].astype(np.int64)
                sums = scored.data[found].copy()
                popularity, scale = counts.item_counts[items], column_scale[items]
                history = self._sequences.histories[user]
                later = history[t : counts.ends[user]]
                if len(later):
                    own = self._own_part(history[:t], len(later), row_scale, settings, counts.ends[user])
                    spot = {int(item): place for place, item in enumerate(later)}
                    for place in np.flatnonzero(np.isin(items, later)):
                        sums[place] -= user_weights[user] * own[spot[int(items[place])]]
                        popularity[place] -= 1
                        scale[place] = max(popularity[place], 1.0) ** -settings.popularity_power
                # what is left of a difference that should be 0 must not lift an item above the others at 0
                scores = np.round(sums * scale, 10)
                yield self._list(history[:t], later, items, scores, popularity, counts, order, size)

    def _history_weights(
        self, batch: Sequence[Step], row_scale: NDArray[np.float64], settings: KnnSettings
    ) -> sp.csr_matrix:
        """[B, M]: what each history item weighs for each step."""
        recent = [
            self._sequences.histories[self._sequences.rows[user_id]][:t][-self._MAX_SCORED :] for user_id, t in batch
        ]
        rows = np.repeat(np.arange(len(batch)), [len(one) for one in recent])
        ages = np.concatenate([np.arange(len(one))[::-1] for one in recent])
        items = np.concatenate(recent)
        values = settings.recency_decay**ages * row_scale[items]
        return sp.csr_matrix((values, (rows, items)), (len(batch), self._sequences.num_items))

    def _own_part(
        self, past: NDArray[np.int64], num_later: int, row_scale: NDArray[np.float64], settings: KnnSettings, end: int
    ) -> NDArray[np.float64]:
        """[num_later]: what the user's own rows add, before their weight, to the sum of each of their later items."""
        recent = past[-self._MAX_SCORED :]
        weights = settings.recency_decay ** np.arange(len(recent)) * row_scale[recent[::-1]]  # newest first
        own = np.full(num_later, weights.sum() if end <= self._LONGEST else 0.0)
        for place in range(min(num_later, settings.window)):  # the newest history item is place + 1 steps before
            near = weights[: settings.window - place]
            own[place] += settings.transition_weight * (near / (np.arange(len(near)) + place + 1)).sum()
        return own

    def _list(
        self,
        past: NDArray[np.int64],
        later: NDArray[np.int64],
        items: NDArray[np.int64],
        scores: NDArray[np.float64],
        popularity: NDArray[np.float64],
        counts: _Counts,
        order: NDArray[np.int64],
        size: int,
    ) -> Ranked:
        new = np.flatnonzero((scores > 0) & ~np.isin(items, past))
        best = new[self._sequences.best(items[new], scores[new], popularity[new], size)]
        chosen, values = items[best], scores[best]
        if len(chosen) < size:
            taken = np.concatenate([past, chosen])
            more, _ = self._sequences.popular(order, counts.item_counts, taken, later, size - len(chosen))
            chosen, values = np.concatenate([chosen, more]), np.concatenate([values, np.zeros(len(more))])
        return Ranked(tuple(self._sequences.item_ids[item] for item in chosen), tuple(values.tolist()))
