"""Frozen lists: what they hold, that they cannot change unseen, and that outside tools read them as we do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ir_measures
import pyarrow.parquet as pq
import pytest

from rerankkit.data.dataset import Dataset, build_dataset
from rerankkit.data.lists import CandidateList, CandidateLists
from rerankkit.data.prerankers import Knn, make_lists
from rerankkit.data.tables import tables_of
from rerankkit.data.world import make_world
from rerankkit.errors import DataError


@pytest.fixture(scope="module")
def world() -> Dataset:
    made = make_world(num_users=60, seed=5)
    return build_dataset(*tables_of(made.interactions, made.items), k_core=0)


@pytest.fixture(scope="module")
def lists(world: Dataset) -> CandidateLists:
    return make_lists(world, Knn(world, tune=False), earlier_steps=1, max_history=3)


HIT = CandidateList("u/3", "u", 3, "test", ("h",), ("a", "b", "c"), (3.0, 2.0, 1.0), (0.0, 1.0, 0.0), "b")
MISS = CandidateList("v w/4", "v w", 4, "test", ("h",), ("a", "b", "c"), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), "z z")


def test_recall_counts_lists_without_the_target() -> None:
    two = CandidateLists((HIT, MISS))
    assert [two.recall_at(k) for k in (1, 2, 3)] == [0.0, 0.5, 0.5]
    assert two.recall_at(3, "valid") == 0.0


def test_the_protocol_line_states_the_condition() -> None:
    line = CandidateLists((HIT, MISS), {"test": "knn, fitted on train+valid"}).protocol()
    assert line.startswith("test: 2 lists of 3 for 2 users, target in the list for 1 (50.0%)")
    assert "knn, fitted on train+valid" in line and CandidateLists((HIT, MISS)).digest[:12] in line


def test_trec_files_name_each_list_and_item_in_one_field_and_keep_the_order_of_ties() -> None:
    two = CandidateLists((HIT, MISS))
    assert two.trec_run().splitlines()[3:] == [
        "v%20w/4 Q0 a 1 3 pre-rank",
        "v%20w/4 Q0 b 2 2 pre-rank",
        "v%20w/4 Q0 c 3 1 pre-rank",
    ]
    assert two.trec_qrels() == "u/3 0 b 1\nv%20w/4 0 z%20z 1\n"


def test_metrics_of_ir_measures_agree(lists: CandidateLists, world: Dataset, tmp_path: Path) -> None:
    lists.export_trec(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{s}.{e}" for s in ("train", "valid", "test") for e in ("run", "qrels")
    }
    run = list(ir_measures.read_trec_run(str(tmp_path / "test.run")))
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "test.qrels")))
    names = ["R@1", "R@5", "R@10"]
    found = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in names], qrels, run)
    ours = {name: lists.recall_at(int(name[2:])) for name in names}
    assert 0.1 < ours["R@10"] < 1
    assert {str(measure): value for measure, value in found.items()} == pytest.approx(ours)


def test_examples_keep_the_order_and_may_hold_out_lists_without_target(lists: CandidateLists, world: Dataset) -> None:
    every = lists.examples(world.items_by_id, "test", only_with_target=False)
    asked = lists.examples(world.items_by_id, "test")
    assert len(every) == len(lists.of("test")) > len(asked) > 0
    one, source = every[0], lists.of("test")[0]
    assert tuple(item.item_id for item in one.candidates) == source.candidates
    assert tuple(item.item_id for item in one.history) == source.history
    assert all(example.candidates[example.target_index or 0].item_id for example in asked)
    assert {example.example_id for example in asked} == {
        o.example_id for o in lists.of("test") if o.target in o.candidates
    }


def test_save_and_load_give_the_same_lists_and_bytes(lists: CandidateLists, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    lists.save(folders[0])
    loaded = CandidateLists.load(folders[0])
    loaded.save(folders[1])
    assert loaded == lists and loaded.digest == lists.digest
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


def test_lists_changed_after_they_were_made_are_refused(lists: CandidateLists, tmp_path: Path) -> None:
    lists.save(tmp_path)
    table = pq.read_table(tmp_path / "lists.parquet")
    pq.write_table(table.slice(1), tmp_path / "lists.parquet")
    with pytest.raises(DataError, match="make them again"):
        CandidateLists.load(tmp_path)


@pytest.mark.parametrize("change", [{"candidates": ("b", "a", "c")}, {"target": "a"}, {"history": ()}, {"step": 9}])
def test_the_digest_sees_every_change(change: dict[str, object]) -> None:
    assert CandidateLists((HIT,)).digest != CandidateLists((replace(HIT, **change),)).digest  # type: ignore[arg-type]


def test_lists_are_made_the_same_twice(lists: CandidateLists, world: Dataset) -> None:
    again = make_lists(world, Knn(world, tune=False), earlier_steps=1, max_history=3)
    assert again.digest == lists.digest
    assert len({(one.split, one.example_id) for one in lists}) == len(lists)
