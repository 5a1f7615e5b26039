"""Evidence: what the interactions and texts say about a candidate, in small whole numbers that a prompt can show.

A language model reads words; how alike two titles are, or how often two items were bought together, it would have to
remember. So a run can have the facts looked up when its lists are made, under the same rule as the lists: nothing that
the user did at the listed step or later is counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from rerankkit.data.dataset import Dataset
from rerankkit.data.embed import item_text
from rerankkit.data.lists import CandidateList, CandidateLists
from rerankkit.data.prerank_base import Sequences, fitted_on, seeded_hash
from rerankkit.data.side import Collaborative
from rerankkit.types import Item

LATEST = 3
"""Items at the end of a history that evidence is about."""
WINDOW = 5
"""Steps within which two items count as bought together."""
NEAR = ("beside", "follows", "taste")
"""Facts from a space of what is bought beside what."""
DIM = 128
"""Directions of that space, or one less than there are items."""
FOLDS = 6
"""Spaces for lists whose step is among those counted: each is fitted without the users it serves."""
FADING = 0.7
"""What an item of the history counts in `taste`, as a share of the next one's."""
_BATCH = 2000


class Evidence:
    """Looks up facts about candidates, given a history. The names and what they count:

    alike     10 times the largest cosine of the candidate's text to one of the last three items' (TF-IDF), cut: 0 to 9
    last      the same to the last item alone
    together  log2(1 + users who have the candidate within five steps of one of the last three items, before or after,
              summed over the three), cut: 0 to 6
    brand     how many of the last three items have the candidate's brand: 0 to 3
    kind      how many category levels, from the broadest, the candidate shares with the last item: 0 to 9
    beside    how near the candidate lies to one of the last three items in a space of what is bought beside what
              (`Collaborative`): -1.5 log2(1 - cosine), since most cosines there are close to 1, cut: 0 to 9
    follows   the same to the last item alone
    taste     the same of the mean cosine to all items of the history, each counting FADING times as much as the next
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], *, refit: bool = True, new: Sequence[Item] = ()) -> None:
        """`new` are items beyond the dataset's; they change nothing for the others."""
        self.names = tuple(names)
        self._num_fitted = len(dataset.items)
        self._dataset = dataset = replace(dataset, items=(*dataset.items, *new))
        self._sequences = Sequences(dataset, 0)
        self._refit = refit
        self._counted: dict[str, sp.csr_matrix] = {}
        self._spaces: dict[tuple[str, int | None], NDArray[np.float32]] = {}
        brands: dict[str, int] = {"": 0}
        self._brands = np.array([brands.setdefault(item.brand.casefold(), len(brands)) for item in dataset.items])
        self._kinds = _levels(dataset.items)

    def about(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[Facts]:
        """For each history and its candidates (item ids) what is known now, as for a test list."""
        return self._look_up(histories, candidates, [("", len(h)) for h in histories], fitted_on("test", self._refit))

    def attached(self, lists: CandidateLists) -> CandidateLists:
        """The lists with evidence of their own split beside every candidate."""
        found: dict[str, Facts] = {}
        for rows in {fitted_on(one.split, self._refit): None for one in lists}:
            some = [one for one in lists if fitted_on(one.split, self._refit) == rows]
            for start in range(0, len(some), _BATCH):
                batch = some[start : start + _BATCH]
                steps = [(one.user_id, one.step) for one in batch]
                facts = self._look_up([o.history for o in batch], [o.candidates for o in batch], steps, rows)
                found |= {f"{o.split} {o.example_id}": fact for o, fact in zip(batch, facts, strict=True)}
        done: list[CandidateList] = [replace(o, evidence=found[f"{o.split} {o.example_id}"]) for o in lists]
        return replace(lists, lists=tuple(done))

    def _look_up(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[str]],
        steps: Sequence[tuple[str, int]],
        rows: str,
    ) -> list[Facts]:
        place = self._dataset.item_rows
        latest = [[place[i] for i in history[-LATEST:]] for history in histories]
        listed = [[place[i] for i in some] for some in candidates]
        # One row a pair (list, candidate, history item); `back` 0 is the last item.
        pairs = np.array(
            [
                (number, spot, item, seen, back)
                for number, (some, shown) in enumerate(zip(listed, latest, strict=True))
                for spot, item in enumerate(some)
                for back, seen in enumerate(reversed(shown))
            ],
            dtype=np.int64,
        ).reshape(-1, 5)
        number, spot, item, seen, back = pairs.T
        shape = (len(listed), max(map(len, listed), default=0))
        cosine = np.asarray(self._texts[item].multiply(self._texts[seen]).sum(axis=1)).ravel()
        known = self._brands[item] > 0
        values = {
            "alike": _most(shape, number, spot, cosine),
            "last": _most(shape, number[back == 0], spot[back == 0], cosine[back == 0]),
            "together": _total(shape, number, spot, self._count(rows)[seen, item].A1 if len(item) else np.empty(0)),
            "brand": _total(shape, number, spot, known & (self._brands[item] == self._brands[seen])),
            "kind": _most(shape, number[back == 0], spot[back == 0], self._shared(item, seen)[back == 0]),
        }
        values["together"] -= self._own(shape, listed, [len(shown) for shown in latest], steps, rows)
        near = self._near(shape, histories, listed, steps, rows) if set(NEAR) & set(self.names) else {}
        scaled = {
            "alike": np.clip(10 * values["alike"], 0, 9),
            "last": np.clip(10 * values["last"], 0, 9),
            "together": np.clip(np.log2(1 + np.maximum(values["together"], 0)), 0, 6),
            "brand": values["brand"],
            "kind": np.clip(values["kind"], 0, 9),
            **{name: np.clip(-1.5 * np.log2(np.maximum(1 - cosines, 1e-6)), 0, 9) for name, cosines in near.items()},
        }
        whole = {name: np.floor(scaled[name] + 1e-6).astype(int) for name in self.names}
        return [
            tuple({name: int(whole[name][n, s]) for name in self.names} for s in range(len(some)))
            for n, some in enumerate(listed)
        ]

    def _near(
        self,
        shape: tuple[int, int],
        histories: Sequence[Sequence[str]],
        listed: list[list[int]],
        steps: Sequence[tuple[str, int]],
        rows: str,
    ) -> dict[str, NDArray[np.float64]]:
        """Cosines for each of NEAR, in a space that knows nothing of the user if it counts the listed step."""
        place, found = self._dataset.item_rows, {name: np.zeros(shape) for name in NEAR}
        for number, (history, some, (user_id, step)) in enumerate(zip(histories, listed, steps, strict=True)):
            if not history:
                continue
            row = self._sequences.rows.get(user_id)
            counted = row is not None and step < self._sequences.ends[rows][row]
            space = self._space(rows, _fold(user_id) if counted else None)
            cosines = (space[some] @ space[[place[i] for i in history]].T).astype(np.float64)  # [C, H]
            fading = FADING ** np.arange(len(history))[::-1]
            spots = slice(len(some))
            found["beside"][number, spots] = cosines[:, -LATEST:].max(axis=1)
            found["follows"][number, spots] = cosines[:, -1]
            found["taste"][number, spots] = cosines @ (fading / fading.sum())
        return found

    def _space(self, rows: str, without: int | None) -> NDArray[np.float32]:
        """Unit vectors [M, DIM] from what was counted up to the end of `rows`, except by one fold of users."""
        if (rows, without) not in self._spaces:
            ends = zip(self._dataset.histories.items(), self._sequences.ends[rows], strict=True)
            seen = {user: h[:end] for (user, h), end in ends if _fold(user) != without}
            splits = {user: (len(h), len(h)) for user, h in seen.items()}
            counted = replace(self._dataset, histories=seen, splits=splits)
            own = replace(counted, items=counted.items[: self._num_fitted])  # in a small one, items add directions
            self._spaces[rows, without] = Collaborative.fit(own, DIM).vectors(counted)
        return self._spaces[rows, without]

    @cached_property
    def _texts(self) -> sp.csr_matrix:
        """TF-IDF of single words, unit rows [M, V]; not reduced, since here the rare words are what counts.

        Which words are rare, the dataset's own items say.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        weigh = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\W\d_]{3,}", dtype=np.float32)
        texts = [item_text(item) for item in self._dataset.items]
        own = texts[: self._num_fitted]
        if not any(re.search(r"[^\W\d_]{3,}", text) for text in own):
            return sp.csr_matrix((len(texts), 1), dtype=np.float32)
        return sp.csr_matrix(weigh.fit(own).transform(texts))

    def _count(self, rows: str) -> sp.csr_matrix:
        """[M, M]: how many users have both within the window, counted up to the end of `rows`."""
        if rows not in self._counted:
            users, items = self._sequences.flat(self._sequences.ends[rows])
            first, second = [], []
            for step in range(1, WINDOW + 1):
                same = users[:-step] == users[step:]
                first.append(items[:-step][same])
                second.append(items[step:][same])
            a, b = np.concatenate(first), np.concatenate(second)
            ones = np.ones(2 * len(a), dtype=np.float32)
            both = (np.concatenate([a, b]), np.concatenate([b, a]))
            self._counted[rows] = sp.csr_matrix((ones, both), shape=(self._sequences.num_items,) * 2)
        return self._counted[rows]

    def _own(
        self,
        shape: tuple[int, int],
        listed: list[list[int]],
        num_latest: Sequence[int],
        steps: Sequence[tuple[str, int]],
        rows: str,
    ) -> NDArray[np.float64]:
        """What the listed user's own counted steps from the listed one on add to `together`.

        Exactly, since no history holds an item twice.
        """
        own = np.zeros(shape)
        for number, (user_id, step) in enumerate(steps):
            if user_id not in self._sequences.rows:
                continue
            row = self._sequences.rows[user_id]
            later = self._sequences.histories[row][step : min(self._sequences.ends[rows][row], step + WINDOW)]
            for after, item in enumerate(later.tolist()):
                if item in listed[number]:
                    # of the latest items, at step - 1 and before, those within the window of step + after
                    own[number, listed[number].index(item)] += max(0, min(num_latest[number], WINDOW - after))
        return own

    def _shared(self, item: NDArray[np.int64], seen: NDArray[np.int64]) -> NDArray[np.float64]:
        same = (self._kinds[item] == self._kinds[seen]) & (self._kinds[item] > 0)
        return np.asarray(np.cumprod(same, axis=1).sum(axis=1), dtype=np.float64)


Facts = tuple[dict[str, int], ...]
"""Aligned with the candidates of a list: name -> value."""


def _fold(user_id: str) -> int:
    return seeded_hash(0, user_id) % FOLDS


def _levels(items: Sequence[Item]) -> NDArray[np.int64]:
    """[M, depth]: a number for every category path from the broadest level on; 0 where there is none."""
    known: dict[tuple[str, ...], int] = {}
    depth = max([1, *(len(item.categories) for item in items)])
    levels = np.zeros((len(items), depth), dtype=np.int64)
    for row, item in enumerate(items):
        for level in range(len(item.categories)):
            levels[row, level] = known.setdefault(item.categories[: level + 1], len(known) + 1)
    return levels


def _most(
    shape: tuple[int, int], number: NDArray[np.int64], spot: NDArray[np.int64], values: NDArray[np.floating]
) -> NDArray[np.float64]:
    found = np.zeros(shape)
    np.maximum.at(found, (number, spot), values)
    return found


def _total(
    shape: tuple[int, int], number: NDArray[np.int64], spot: NDArray[np.int64], values: NDArray[np.generic]
) -> NDArray[np.float64]:
    found = np.zeros(shape)
    np.add.at(found, (number, spot), values.astype(np.float64))
    return found
