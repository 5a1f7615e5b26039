"""The dataset of a run: who bought what in which order, and which steps are for training, validation and test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rerankkit.data.embed import equal_texts, item_text
from rerankkit.data.tables import NO_TITLE
from rerankkit.errors import DataError, did_you_mean
from rerankkit.types import Item

Split: TypeAlias = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

_SPLIT_NAMES = {"train": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}


@dataclass(frozen=True)
class Dataset:
    """Items and histories. A *step* (user, t) asks for `histories[user][t]` given `histories[user][:t]`."""

    items: tuple[Item, ...]
    """In the order of the item table; items that only interactions mention come last."""
    histories: Mapping[str, tuple[str, ...]]
    """Each user's items, oldest first, no item twice; users in the order of the table."""
    splits: Mapping[str, tuple[int, int]]
    """For each user (v, e): positions below v train, v to e-1 validate, from e on test."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What was dropped, tied, missing or equal on the way here: JSON values, for the report."""

    @cached_property
    def item_rows(self) -> Mapping[str, int]:
        """item_id -> its place in `items`."""
        return {item.item_id: row for row, item in enumerate(self.items)}

    @cached_property
    def items_by_id(self) -> Mapping[str, Item]:
        """item_id -> Item."""
        return {item.item_id: item for item in self.items}

    def steps(self, split: Split, earlier: int = 0) -> Iterator[tuple[str, int]]:
        """(user_id, t) of every step of a split that has a history.

        For train it is each user's last training step (third last of the sequence under leave-one-out), then up to
        `earlier` steps before it, newest first, whose history has at least two items.
        """
        for user_id, history in self.histories.items():
            valid_start, test_start = self.splits[user_id]
            if split == "train":
                last = valid_start - 1
                if last >= 1:
                    yield user_id, last
                for t in range(last - 1, max(1, last - 1 - earlier), -1):
                    yield user_id, t
            else:
                start, end = (valid_start, test_start) if split == "valid" else (test_start, len(history))
                for t in range(max(start, 1), end):
                    yield user_id, t

    def train_sequences(self) -> dict[str, tuple[str, ...]]:
        """Every user's history without validation and test steps; users with nothing left are left out."""
        cut = {user_id: history[: self.splits[user_id][0]] for user_id, history in self.histories.items()}
        return {user_id: history for user_id, history in cut.items() if history}

    def save(self, folder: Path) -> None:
        """Write items.parquet, histories.parquet and dataset.json into an existing folder; equal data, equal bytes."""
        items = {
            "item_id": pa.array([item.item_id for item in self.items], pa.string()),
            "title": pa.array([item.title for item in self.items], pa.string()),
            "categories": pa.array([list(item.categories) for item in self.items], pa.list_(pa.string())),
            "description": pa.array([item.description for item in self.items], pa.string()),
            "brand": pa.array([item.brand for item in self.items], pa.string()),
            "price": pa.array([item.price for item in self.items], pa.float64()),
            "sid": pa.array([list(item.sid) for item in self.items], pa.list_(pa.int64())),
        }
        histories = {
            "user_id": pa.array(list(self.histories), pa.string()),
            "item_ids": pa.array([list(history) for history in self.histories.values()], pa.list_(pa.string())),
            "valid_start": pa.array([self.splits[user_id][0] for user_id in self.histories], pa.int64()),
            "test_start": pa.array([self.splits[user_id][1] for user_id in self.histories], pa.int64()),
        }
        pq.write_table(pa.table(items), folder / "items.parquet")
        pq.write_table(pa.table(histories), folder / "histories.parquet")
        text = json.dumps({"notes": dict(self.notes)}, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Take back what `save` wrote."""
        items = tuple(
            Item(**{**row, "categories": tuple(row["categories"]), "sid": tuple(row["sid"])})
            for row in pq.read_table(folder / "items.parquet").to_pylist()
        )
        rows = pq.read_table(folder / "histories.parquet").to_pylist()
        return cls(
            items,
            {row["user_id"]: tuple(row["item_ids"]) for row in rows},
            {row["user_id"]: (row["valid_start"], row["test_start"]) for row in rows},
            json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["notes"],
        )


def build_dataset(
    interactions: pd.DataFrame,
    items: pd.DataFrame,
    *,
    k_core: int = 5,
    split: Literal["leave-one-out", "column"] = "leave-one-out",
    min_rating: float | None = None,
) -> Dataset:
    """Turn the two tables of `data.tables` into a Dataset; every row left out is counted in `notes`.

    In this order: rows rated below `min_rating` go (unrated ones too, when it is set); of a user's repeats of one item
    the earliest stays; users and items with fewer than `k_core` rows go, again and again until none is left. Order is
    by timestamp, and rows of equal time keep the order of the table: never by id. leave-one-out: the last step of a
    user with at least three is for test, the one before for validation. column: the table's `split` decides, and must
    not put a training row after a validation or test row of the same user; users may lack either.

    An item without a row in `items` stays, called `untitled`, and is counted. With k_core of 2 and more, catalogue rows
    without interactions are left out; below that they stay, since lists from a file may hold them. Raises DataError.
    """
    notes: dict[str, Any] = {"interactions_read": len(interactions), "split": split, "k_core": k_core}
    notes["order"] = "by timestamp; rows of equal time keep the order of the table"
    rows = _rated(interactions, min_rating, notes)
    rows = rows.iloc[np.argsort(rows["timestamp"].to_numpy(), kind="stable")]
    repeats = rows.duplicated(["user_id", "item_id"])
    notes["duplicates_dropped"] = int(repeats.sum())
    rows = _core(rows[~repeats], k_core, notes)
    if rows.empty:
        raise DataError(f"data.k_core = {k_core}: no user and item with so many interactions is left; set it lower")

    first_seen = {user_id: place for place, user_id in enumerate(dict.fromkeys(interactions["user_id"]))}
    places = rows["user_id"].map(first_seen).to_numpy()
    rows = rows.iloc[np.argsort(places, kind="stable")]  # users in table order, each chronological
    histories = {user_id: tuple(ids) for user_id, ids in rows.groupby("user_id", sort=False)["item_id"]}
    splits = _leave_one_out(histories) if split == "leave-one-out" else _split_column(rows)
    catalogue = _catalogue(items, histories, k_core, notes)

    same_user = rows["user_id"].to_numpy()[1:] == rows["user_id"].to_numpy()[:-1]
    same_time = rows["timestamp"].to_numpy()[1:] == rows["timestamp"].to_numpy()[:-1]
    last_of_user = np.append(~same_user[1:], True) & same_user
    notes["tied_steps_share"] = _share(same_user & same_time, same_user)
    notes["tied_last_steps_share"] = _share(last_of_user & same_time, last_of_user)
    notes["users"], notes["items"], notes["interactions"] = len(histories), len(catalogue), len(rows)
    notes["users_without_test"] = sum(splits[user_id][1] == len(history) for user_id, history in histories.items())
    groups = equal_texts([item_text(item) for item in catalogue])
    notes["equal_text_groups"], notes["items_sharing_text"] = len(groups), sum(map(len, groups))
    return Dataset(catalogue, histories, splits, notes)


def co_engaged_pairs(dataset: Dataset) -> NDArray[np.int64]:
    """Rows in `dataset.items` of items that follow one another in a training sequence: [E, 2], older one first."""
    place = dataset.item_rows
    pairs = [(place[a], place[b]) for history in dataset.train_sequences().values() for a, b in pairwise(history)]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _rated(interactions: pd.DataFrame, min_rating: float | None, notes: dict[str, Any]) -> pd.DataFrame:
    if min_rating is None:
        return interactions
    if interactions["rating"].isna().all():
        raise DataError(f"data.min_rating = {min_rating:g}, but no row has a rating; leave it out, or map data.columns")
    notes["unrated_dropped"] = int(interactions["rating"].isna().sum())
    notes["rated_below_dropped"] = int((interactions["rating"] < min_rating).sum())
    return interactions[interactions["rating"] >= min_rating]


def _core(rows: pd.DataFrame, k: int, notes: dict[str, Any]) -> pd.DataFrame:
    users, items = rows["user_id"].nunique(), rows["item_id"].nunique()
    while k > 1:
        by_user = rows["user_id"].map(rows["user_id"].value_counts())
        by_item = rows["item_id"].map(rows["item_id"].value_counts())
        keep = (by_user >= k) & (by_item >= k)
        if keep.all():
            break
        rows = rows[keep]
    notes["users_dropped_by_k_core"] = users - rows["user_id"].nunique()
    notes["items_dropped_by_k_core"] = items - rows["item_id"].nunique()
    return rows


def _leave_one_out(histories: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, int]]:
    lengths = {user_id: len(history) for user_id, history in histories.items()}
    return {user_id: (n - 2, n - 1) if n >= 3 else (n, n) for user_id, n in lengths.items()}


def _split_column(rows: pd.DataFrame) -> dict[str, tuple[int, int]]:
    if "split" not in rows:
        raise DataError('data.split = "column", but the interactions have no column `split`; map it with data.columns')
    unknown = next((name for name in rows["split"].unique() if name not in _SPLIT_NAMES), None)
    if unknown is not None:
        raise DataError(f"interactions: split is {unknown!r}; {did_you_mean(str(unknown), _SPLIT_NAMES)}")
    stages = rows["split"].map(_SPLIT_NAMES).to_numpy(dtype=np.int64)
    users = rows["user_id"].to_numpy()
    back = np.flatnonzero((users[1:] == users[:-1]) & (stages[1:] < stages[:-1]))
    if len(back):
        row = rows.iloc[back[0] + 1]
        raise DataError(
            f"interactions: user {row['user_id']!r} has a {row['split']} row (item {row['item_id']!r}) after a later "
            f"split's row; {len(back):,} rows are so. A split column must go train, valid, test in each user's time; "
            'use data.split = "leave-one-out" to have one made'
        )
    frame = pd.DataFrame({"user": users, "train": stages == 0, "valid": stages == 1})
    counts = frame.groupby("user", sort=False)[["train", "valid"]].sum()
    return {
        str(user): (int(train), int(train + valid))
        for user, train, valid in zip(counts.index, counts["train"], counts["valid"], strict=True)
    }


def _catalogue(
    items: pd.DataFrame, histories: Mapping[str, tuple[str, ...]], k_core: int, notes: dict[str, Any]
) -> tuple[Item, ...]:
    repeats = items.duplicated("item_id")
    rows = items[~repeats]
    touched = dict.fromkeys(item_id for history in histories.values() for item_id in history)
    used = rows["item_id"].isin(touched)
    notes["item_rows_repeated"] = int(repeats.sum())
    notes["items_without_interactions"] = int((~used).sum())
    if k_core >= 2:
        rows = rows[used]
    notes["items_without_title"] = int((~rows["titled"]).sum()) if "titled" in rows else 0
    known = items_in(rows)
    described = {item.item_id for item in known}
    strangers = [Item(item_id, NO_TITLE) for item_id in touched if item_id not in described]
    notes["items_without_row"] = len(strangers)
    if len(strangers) == len(touched):
        raise DataError(
            f"no item of the interactions (such as {strangers[0].item_id!r}) is in the item table "
            f"(such as {known[0].item_id if known else 'none'!r}): do both use the same item_id? See data.columns"
        )
    return (*known, *strangers)


def items_in(rows: pd.DataFrame) -> list[Item]:
    """The items of a table that `read_items` gave, a row each."""
    columns = zip(
        *(rows[name].tolist() for name in ("item_id", "title", "categories", "description", "brand", "price")),
        strict=True,
    )
    return [
        Item(item_id, title, tuple(path), description, brand, None if np.isnan(price) else float(price))
        for item_id, title, path, description, brand, price in columns
    ]


def _share(part: Any, whole: Any) -> float:
    return round(float(part.sum() / max(1, whole.sum())), 4)


def length_counts(dataset: Dataset) -> Mapping[int, int]:
    """How many users have a history of each length, shortest first."""
    return dict(sorted(Counter(map(len, dataset.histories.values())).items()))
