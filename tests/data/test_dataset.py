"""Cores, repeats, order and splits, on tables small enough to check by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rerankkit.data.dataset import Dataset, build_dataset, co_engaged_pairs, length_counts
from rerankkit.data.tables import tables_of
from rerankkit.data.world import make_world
from rerankkit.errors import DataError
from rerankkit.types import Interaction, Item
from tests.data.conftest import Make, frames


def test_order_is_by_time_and_ties_keep_the_order_of_the_table() -> None:
    # by id the three of time 5 would be a, b, z
    rows = [("z", 5), ("b", 5), ("first", 1), ("a", 5), ("last", 9)]
    interactions, items = tables_of([Interaction("u", i, t) for i, t in rows], [Item(i, i + "!") for i, _ in rows])
    dataset = build_dataset(interactions, items, k_core=0)
    assert dataset.histories["u"] == ("first", "z", "b", "a", "last")
    # of the four steps z-b and b-a are tied; the last one is not
    assert dataset.notes["tied_steps_share"] == 0.5
    assert dataset.notes["tied_last_steps_share"] == 0.0


def test_leave_one_out_gives_the_last_to_test_and_the_one_before_to_validation(make: Make) -> None:
    dataset = make({"u1": "abcde", "u2": "ab", "u3": "xyz"})
    assert list(dataset.steps("test")) == [("u1", 4), ("u3", 2)]
    assert list(dataset.steps("valid")) == [("u1", 3), ("u3", 1)]
    # u1 trains on c given a, b; u2 has no held-out steps; u3's only training item has no history
    assert list(dataset.steps("train")) == [("u1", 2), ("u2", 1)]
    assert dataset.train_sequences() == {"u1": ("a", "b", "c"), "u2": ("a", "b"), "u3": ("x",)}


@pytest.mark.parametrize(("earlier", "steps"), [(0, [5]), (1, [5, 4]), (2, [5, 4, 3]), (9, [5, 4, 3, 2])])
def test_earlier_training_steps_keep_a_history_of_two(make: Make, earlier: int, steps: list[int]) -> None:
    dataset = make({"u": "abcdefgh"})  # train a to f
    assert [t for _, t in dataset.steps("train", earlier)] == steps


def test_k_core_goes_on_until_nothing_is_left_to_drop() -> None:
    # d is rare, so u3 is left with one item and goes, so c is left with one user and goes; u1 and u2 keep a and b
    dataset = build_dataset(*frames({"u1": "abc", "u2": "ab", "u3": "cd"}), k_core=2)
    assert dict(dataset.histories) == {"u1": ("a", "b"), "u2": ("a", "b")}
    assert dataset.notes["users_dropped_by_k_core"] == 1
    assert dataset.notes["items_dropped_by_k_core"] == 2
    assert [item.item_id for item in dataset.items] == ["a", "b"]
    with pytest.raises(DataError, match="k_core = 9"):
        build_dataset(*frames({"u1": "abc"}), k_core=9)


def test_of_repeats_the_earliest_stays() -> None:
    rows = [Interaction("u", "a", 3), Interaction("u", "b", 2), Interaction("u", "a", 1), Interaction("u", "c", 4)]
    interactions, items = tables_of(rows, [Item(i, i + "!") for i in "abc"])
    dataset = build_dataset(interactions, items, k_core=0)
    assert dataset.histories["u"] == ("a", "b", "c")
    assert dataset.notes["duplicates_dropped"] == 1


def test_ratings_below_the_bar_and_unrated_rows_go_and_are_counted() -> None:
    rows = [
        Interaction("u", item, t, rating) for t, (item, rating) in enumerate(zip("abcd", (5, 2, None, 4), strict=True))
    ]
    interactions, items = tables_of(rows, [Item(i, i + "!") for i in "abcd"])
    dataset = build_dataset(interactions, items, k_core=0, min_rating=4)
    assert dataset.histories["u"] == ("a", "d")
    assert (dataset.notes["rated_below_dropped"], dataset.notes["unrated_dropped"]) == (1, 1)
    with pytest.raises(DataError, match="no row has a rating"):
        build_dataset(*frames({"u": "abc"}), k_core=0, min_rating=4)


def test_the_split_column_decides_and_users_may_lack_test_rows() -> None:
    interactions, items = frames({"public": "abcd", "held_out": "bca"})
    interactions["split"] = ["train", "train", "valid", "test", "train", "train", "validation"]
    dataset = build_dataset(interactions, items, k_core=0, split="column")
    assert list(dataset.steps("test")) == [("public", 3)]
    assert list(dataset.steps("valid")) == [("public", 2), ("held_out", 2)]
    assert dataset.notes["users_without_test"] == 1

    interactions["split"] = ["train", "valid", "train", "test", "train", "train", "train"]
    with pytest.raises(DataError, match=r"user 'public' has a train row \(item 'c'\)"):
        build_dataset(interactions, items, k_core=0, split="column")
    interactions["split"] = "tain"
    with pytest.raises(DataError, match="Did you mean 'train'"):
        build_dataset(interactions, items, k_core=0, split="column")
    with pytest.raises(DataError, match="no column `split`"):
        build_dataset(interactions.drop(columns="split"), items, k_core=0, split="column")


def test_items_without_row_stay_untitled_and_are_counted() -> None:
    interactions, items = frames({"u": "abc"})
    dataset = build_dataset(interactions, items[items["item_id"] != "b"], k_core=0)
    assert [(item.item_id, item.title) for item in dataset.items] == [
        ("a", "title a"),
        ("c", "title c"),
        ("b", "untitled"),
    ]
    assert dataset.notes["items_without_row"] == 1
    with pytest.raises(DataError, match="same item_id"):
        build_dataset(interactions, items.assign(item_id="other"), k_core=0)


def test_catalogue_rows_nobody_touched_stay_unless_there_is_a_core() -> None:
    interactions, items = frames({"u": "ab", "v": "ab"})
    items = pd.concat([items, items.tail(1).assign(item_id="cold")])
    assert len(build_dataset(interactions, items, k_core=0).items) == 3
    assert len(build_dataset(interactions, items, k_core=2).items) == 2


def test_equal_texts_are_counted(make: Make) -> None:
    interactions, items = frames({"u": "abcd"})
    items["title"] = ["Soap", "soap ", "Gel", "Balm"]
    notes = build_dataset(interactions, items, k_core=0).notes
    assert (notes["equal_text_groups"], notes["items_sharing_text"]) == (1, 2)


def test_pairs_come_from_training_sequences_only(make: Make) -> None:
    dataset = make({"u1": "abcde", "u2": "ca"})
    rows = dataset.item_rows
    expected = [[rows["a"], rows["b"]], [rows["b"], rows["c"]], [rows["c"], rows["a"]]]
    pairs = co_engaged_pairs(dataset)
    assert pairs.tolist() == expected and pairs.dtype == np.int64
    assert co_engaged_pairs(make({"u": "abc"})).shape == (0, 2)


def test_save_and_load_give_the_same_dataset_and_the_same_bytes(tmp_path: Path) -> None:
    world = make_world(num_users=20, seed=1)
    dataset = build_dataset(*tables_of(world.interactions, world.items), k_core=0)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    dataset.save(folders[0])
    loaded = Dataset.load(folders[0])
    loaded.save(folders[1])
    assert loaded == dataset
    assert list(loaded.histories) == list(dataset.histories)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


def test_lengths_are_counted(make: Make) -> None:
    assert length_counts(make({"u": "abc", "v": "abc", "w": "ab"})) == {2: 1, 3: 2}


def test_beauty_tables_give_the_counts_that_their_readme_states(beauty_dataset: Dataset) -> None:
    dataset = beauty_dataset
    assert (len(dataset.histories), len(dataset.items), dataset.notes["interactions"]) == (22_363, 12_101, 194_029)
    assert dataset.notes["items_without_title"] == 7
    assert len(list(dataset.steps("valid"))) == 22_363
    assert len(list(dataset.steps("test"))) == 17_890
