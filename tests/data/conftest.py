"""Small datasets, and a table maker that writes histories in the order given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest

from rerankkit.data.dataset import Dataset, build_dataset
from rerankkit.data.tables import read_interactions, read_items, tables_of
from rerankkit.types import Interaction, Item

Make = Callable[[Mapping[str, Sequence[str]]], Dataset]


def frames(histories: Mapping[str, Sequence[str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [Interaction(user, item, t) for user, history in histories.items() for t, item in enumerate(history)]
    items = [Item(item_id, f"title {item_id}") for item_id in dict.fromkeys(row.item_id for row in rows)]
    return tables_of(rows, items)


@pytest.fixture
def make() -> Make:
    """`make({"u": "abc"})`: user u had items a, b, c in this order; leave-one-out, no k-core."""
    return lambda histories: build_dataset(*frames(histories), k_core=0)


@pytest.fixture
def shop(make: Make) -> Dataset:
    """Five users over eight items; u1 tests on e, validates on d."""
    return make({"u1": "abcde", "u2": "abcfd", "u3": "bcdge", "u4": "acbde", "u5": "hfgab"})


@pytest.fixture(scope="session")
def beauty_dataset(beauty: Path) -> Dataset:
    """Amazon Beauty as its tables split it; read once."""
    interactions, bad = read_interactions(beauty / "interactions.parquet")
    items, bad_items = read_items(beauty / "items.parquet")
    assert bad.count == bad_items.count == 0
    return build_dataset(interactions, items, k_core=0, split="column")
