"""make_lists, popularity, any function as pre-ranker, and lists given in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from rerankkit.data.dataset import Dataset, build_dataset
from rerankkit.data.prerankers import Knn, Popularity, from_file, from_scores, make_lists
from rerankkit.errors import DataError
from tests.data.conftest import Make


def test_popularity_counts_others_and_not_the_users_own_later_rows(make: Make) -> None:
    # training: u abc, v ab, w b. For u at step 1 (history a): b has v and w left, c nobody
    dataset = make({"u": "abcxy", "v": "abxy", "w": "bxy"})
    (one,) = Popularity(dataset).rank([("u", 1)], "train", 2)
    assert one.candidates[0] == "b" and one.scores[:2] == (2.0, 0.0)
    # for test x has been everybody's validation item, and y nobody's
    (late,) = Popularity(dataset).rank([("w", 2)], "test", 3)
    assert late.candidates[0] == "a" and set(late.scores) == {2.0, 1.0, 0.0}


def test_lists_hold_new_items_each_once_and_the_last_of_the_history(shop: Dataset) -> None:
    lists = make_lists(shop, Popularity(shop), size=4, max_history=2, earlier_steps=2)
    for one in lists:
        full = shop.histories[one.user_id][: one.step]
        assert one.history == full[-2:]
        assert not set(one.candidates) & set(full)
        assert len(set(one.candidates)) == len(one.candidates) == min(4, len(shop.items) - len(full))
        assert one.target == shop.histories[one.user_id][one.step]
        assert one.relevance == tuple(float(item == one.target) for item in one.candidates)
        assert one.example_id == f"{one.user_id}/{one.step}"
    assert {one.split for one in lists} == {"train", "valid", "test"}
    assert list(lists.made_by) == ["train", "valid", "test"]


def test_a_sample_of_users_does_not_depend_on_the_others(make: Make) -> None:
    many = {f"u{i}": "abcde" for i in range(40)}
    dataset, turned = make(many), make(dict(reversed(many.items())))
    users = [{one.user_id for one in make_lists(d, Popularity(d), max_users=7, seed=3)} for d in (dataset, turned)]
    assert users[0] == users[1] and len(users[0]) == 7
    by_split = make_lists(dataset, Popularity(dataset), max_users={"train": 5})
    assert [len(by_split.of(split)) for split in ("train", "valid", "test")] == [5, 40, 40]
    assert {o.user_id for o in make_lists(dataset, Popularity(dataset), max_users=7, seed=4)} != users[0]


def test_any_function_can_pre_rank_and_what_it_lacks_is_filled_up(shop: Dataset) -> None:
    asked: list[Sequence[str]] = []

    def rank(histories: Sequence[tuple[str, ...]]) -> list[tuple[list[str], list[float]]]:
        asked.extend(histories)
        return [(["h", history[0], "h", "g"], [0.9, 0.8, 0.7, 0.6]) for history in histories]

    ranker = from_scores(shop, rank, fitted_on="train steps before the listed ones", batch_size=2)
    lists = make_lists(shop, ranker, size=3, splits=("valid",))
    first = lists.of("valid")[0]
    assert asked[0] == ("a", "b", "c")
    assert first.candidates[:2] == ("h", "g") and first.scores == (0.9, 0.6, 0.6)
    assert first.candidates[2] in {"d", "e", "f"}
    assert lists.notes["filled"] == 5 + sum(
        item in shop.histories[u][:t] for u, t in shop.steps("valid") for item in "hg"
    )
    assert "policy, fitted on train steps before the listed ones" in lists.protocol("valid")

    stranger = from_scores(shop, lambda histories: [(["nope"], [1.0])] * len(histories), fitted_on="x")
    with pytest.raises(DataError, match="'nope', which is not in the catalogue"):
        make_lists(shop, stranger)


def rows_for(shop: Dataset) -> list[dict[str, object]]:
    return [
        {"user_id": "u1", "split": "test", "candidates": ["e", "f", "g"], "scores": [3.0, 2.0, 1.0], "target": "e"},
        {"user_id": "u1", "split": "train", "candidates": ["c", "f", "g"]},
        {"user_id": "u2", "split": "valid", "candidates": ["d", "f", "g"], "relevance": [1, 2, 0]},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_given_lists_are_taken_as_they_are(shop: Dataset, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"lists.{kind}"
    rows = rows_for(shop)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pd.DataFrame(rows).to_parquet(path)
    lists = make_lists(shop, from_file(path, shop, 2), size=2)
    assert [(one.split, one.user_id, one.step) for one in lists] == [
        ("train", "u1", 2),
        ("valid", "u2", 3),
        ("test", "u1", 4),
    ]
    train, valid, test = lists
    assert test.candidates == ("e", "f") and test.scores == (3.0, 2.0) and test.relevance == (1.0, 0.0)
    assert train.target == "c" and train.scores == (0.0, -1.0)
    assert valid.relevance == (1.0, 2.0)  # grades of the file
    assert lists.notes["test_steps_without_list"] == 4
    assert "lists given in" in lists.protocol()


def test_a_target_says_which_training_step_a_list_is_for(make: Make, tmp_path: Path) -> None:
    dataset = make({"u": "abcdef", "v": "ghabc"})
    path = tmp_path / "lists.jsonl"
    row = {"user_id": "u", "split": "train", "candidates": ["c", "g"], "target": "c"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "target": "d"}))
    lists = make_lists(dataset, from_file(path, dataset, 2), size=2, earlier_steps=3)
    assert [(one.step, one.target, one.history) for one in lists] == [(3, "d", ("a", "b", "c")), (2, "c", ("a", "b"))]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"user_id": "nobody"}, "user 'nobody' is not in the interactions"),
        ({"user_id": None}, "no user_id"),
        ({"split": "tset"}, "Did you mean 'test'"),
        ({"candidates": ["e", "f", "zz"]}, "candidate 'zz' is not in the catalogue"),
        ({"candidates": ["e", "e", "f"]}, "a candidate twice"),
        ({"candidates": ["e"]}, "1 candidates, but candidates.size is 3"),
        ({"target": "a"}, "target 'a' is no test item of user 'u1'"),
        ({"candidates": "e f g"}, "it should be a list of item ids"),
        ({"scores": [1.0, None, 0.0]}, "NoneType"),
        ({"scores": [1.0]}, "1 scores for 3 candidates"),
        ({"scores": [1.0, float("nan"), 0.0]}, "scores hold NaN"),
    ],
)
def test_lists_that_cannot_be_right_are_refused_by_line(
    shop: Dataset, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(rows_for(shop)[1]) + "\n" + json.dumps({**rows_for(shop)[0], **change}))
    with pytest.raises(DataError, match="1 of the given candidate lists") as caught:
        from_file(path, shop, 3)
    assert f"{path}:2: " in str(caught.value) and problem in str(caught.value)


def test_two_lists_for_one_step_and_unreadable_files_are_refused(shop: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text("\n".join([json.dumps(rows_for(shop)[0])] * 2))
    with pytest.raises(DataError, match="a second list for user 'u1'"):
        from_file(path, shop, 2)
    path.write_text("{nope")
    with pytest.raises(DataError, match=r":1: is no JSON"):
        from_file(path, shop, 2)
    with pytest.raises(DataError, match="no such file"):
        from_file(tmp_path / "absent.parquet", shop, 2)
    with pytest.raises(DataError, match="Did you mean 'test'"):
        from_file({"tst": str(path)}, shop, 2)


def test_the_reference_lists_of_beauty_can_be_given(beauty: Path, beauty_dataset: Dataset) -> None:
    dataset = beauty_dataset
    paths = {split: str(beauty / f"candidates_knn_{split}.parquet") for split in ("train", "test")}
    lists = make_lists(dataset, from_file(paths, dataset, 10), size=10)
    # the README's counts of lists whose target is among the ten
    assert sum(one.target in one.candidates for one in lists.of("test")) == 1_681
    assert sum(one.target in one.candidates for one in lists.of("train")) == 2_166
    assert all(one.step == dataset.splits[one.user_id][0] - 1 for one in lists.of("train"))


def test_knn_on_the_world_is_good_but_not_perfect(shop: Dataset) -> None:
    from rerankkit.data.tables import tables_of
    from rerankkit.data.world import make_world

    world = make_world(num_users=200, seed=0)
    dataset = build_dataset(*tables_of(world.interactions, world.items), k_core=0)
    lists = make_lists(dataset, Knn(dataset), splits=("test",))
    assert 0.15 < lists.recall_at(10) < 0.95
    assert lists.recall_at(10) > make_lists(dataset, Popularity(dataset), splits=("test",)).recall_at(10)


def test_a_file_that_serves_no_step_and_a_wrong_step_are_refused(make: Make, tmp_path: Path) -> None:
    # u: abc train, d valid, e test; v has too few items for a test step, and is held out
    dataset = make({"u": "abcde", "v": "ab"})
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    row = {"user_id": "u", "candidates": ["d", "e"]}
    train.write_text(json.dumps(row))
    files = {"train": str(train), "test": str(test)}
    test.write_text("")
    with pytest.raises(DataError, match=r"test\.jsonl: holds no list"):
        from_file(files, dataset, 2)
    for step in (None, 1):
        test.write_text(json.dumps({**row, "user_id": "v", "step": step}))
        with pytest.raises(DataError, match=r"test\.jsonl: none of its 1 lists belongs to a test step"):
            from_file(files, dataset, 2)
    test.write_text(test.read_text() + "\n" + json.dumps(row))
    assert from_file(files, dataset, 2).notes == {"given_lists": 2, "given_lists_without_step": 1}
    test.write_text(json.dumps(row) + "\n" + json.dumps({**row, "step": 9}))
    with pytest.raises(DataError, match=r"test\.jsonl:2: step 9 is no test step of user 'u'; possible: 4"):
        from_file(files, dataset, 2)
    train.write_text(json.dumps({**row, "step": 0}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: step 0 is no train step of user 'u'; possible: 1 to 2"):
        from_file({"train": str(train)}, dataset, 2)
