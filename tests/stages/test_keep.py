"""An item keeps its SID for life: a run that keeps another's, and items that come later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rerankkit.config import Embeddings, RunConfig, Sids, WorldData, make_config
from rerankkit.data.dataset import Dataset
from rerankkit.errors import ConfigError, DataError, RunFailed, RunFolderError
from rerankkit.pipeline import Pipeline
from rerankkit.plugins import load_plugins
from rerankkit.protocols import Tokenizer
from rerankkit.run import plan
from rerankkit.stages.data import make_dataset
from rerankkit.stages.sids import SidMap, draw_sids, drawn_with, make_catalog
from rerankkit.types import Catalog, Item, RunInfo

SETTINGS: dict[str, dict[str, Any]] = {
    "residual-kmeans": {"levels": 2, "codes": 64, "iterations": 3},
    "rqvae": {"levels": 3, "codes": 16, "latent": 8, "hidden": [32], "epochs": 1, "min_steps": 30},
}
"""Small enough to be quick, with room for 64 and 16 items under each prefix."""


@pytest.fixture(scope="module")
def world() -> Dataset:
    """240 items, of which the last tenth came later."""
    return make_dataset(WorldData(num_users=60), {}, info=RunInfo())


def of_items(dataset: Dataset, items: tuple[Item, ...]) -> Dataset:
    """The dataset as it is with some of its items alone; every step trains."""
    known = {item.item_id for item in items}
    cut = {user: tuple(i for i in history if i in known) for user, history in dataset.histories.items()}
    return Dataset(items, cut, {user: (len(history),) * 2 for user, history in cut.items()})


def without_the_last(dataset: Dataset, num: int) -> Dataset:
    return of_items(dataset, dataset.items[:-num])


def built(name: str) -> Tokenizer:
    spec = load_plugins(only="gr2").part("tokenizer", name, "")
    tokenizer: Tokenizer = spec.build(spec.config(**SETTINGS[name]), RunInfo(seed=3))
    return tokenizer


def draw(tokenizer: Tokenizer, dataset: Dataset, keep: Path | None = None, **how: Any) -> SidMap:
    sids = Sids(keep=str(keep or ""))
    return draw_sids(tokenizer, sids, Embeddings(dim=16), dataset, how, info=RunInfo(seed=3))


def saved(sids: SidMap, folder: Path) -> Path:
    folder.mkdir()
    sids.save(folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_a_tenth_of_new_items_changes_no_sid_and_collides_with_none(world: Dataset, tmp_path: Path, name: str) -> None:
    first = draw(built(name), without_the_last(world, 24))
    assert len(set(first.sids.values())) == 216
    kept = draw(built(name), world, saved(first, tmp_path / "first"))
    assert {item_id: kept.sids[item_id] for item_id in first.sids} == first.sids
    assert len(kept.sids) == len(set(kept.sids.values())) == 240  # there is room, so that nobody shares
    assert kept.table.item_ids[:216] == first.table.item_ids
    assert kept.scorecard["num_items"] == 240

    # and on from there, with items that have left the catalogue: they keep theirs, and nobody gets it
    fewer = of_items(world, world.items[100:])
    again = draw(built(name), fewer, saved(kept, tmp_path / "kept"))
    assert again.sids == kept.sids and again.scorecard["num_items"] == 140


def test_new_items_are_placed_in_the_space_of_the_old_ones(world: Dataset, tmp_path: Path) -> None:
    few = without_the_last(world, 24)
    first = draw(built("residual-kmeans"), few)
    before = make_catalog(Embeddings(dim=16), few, RunInfo(seed=3), spaces=first.spaces).embeddings
    saved(first, tmp_path / "first")
    kept = draw(built("residual-kmeans"), world, tmp_path / "first")
    after = make_catalog(Embeddings(dim=16), world, RunInfo(seed=3), spaces=kept.spaces).embeddings
    np.testing.assert_array_equal(after[:216], before)
    (tmp_path / "first" / "spaces" / "tfidf.json").unlink()
    with pytest.raises(RunFolderError, match="no whole TF-IDF space is here"):
        draw(built("residual-kmeans"), world, tmp_path / "first")


class Numbered:
    """The row number is the SID: new ones only if `offset` is, which is the fault it is made for."""

    def __init__(self, offset: int = 0, size: int = 300) -> None:
        self.offset, self.codebook_sizes = offset, (size,)

    def fit(self, catalog: Catalog) -> None: ...

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        return (np.arange(len(catalog.items))[:, None] + self.offset) % 300

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def test_a_tokenizer_that_changes_a_sid_is_named_and_stops_the_run(world: Dataset, tmp_path: Path) -> None:
    saved(draw(Numbered(), without_the_last(world, 24)), tmp_path / "first")
    plugin = {"name": "numbered", "plugin": "mine", "distribution": "my-package", "version": "2.0"}
    with pytest.raises(RunFailed) as stopped:
        draw(Numbered(offset=1), world, tmp_path / "first", plugin=plugin)
    assert str(stopped.value) == (
        "tokenizer 'numbered' (plugin mine, my-package 2.0): gave another SID to 216 of 216 items that have one, the "
        f"first of them {world.items[0].item_id!r}: (1,) in place of (0,). A SID is for life: its plugin is at fault."
    )
    with pytest.raises(RunFailed, match=r"codebook sizes \(301,\) after load; the kept SIDs have \(300,\)"):
        draw(Numbered(size=301), world, tmp_path / "first")
    assert draw(Numbered(), world, tmp_path / "first").sids[world.items[239].item_id] == (239,)


def test_vectors_of_another_width_are_refused(world: Dataset, tmp_path: Path) -> None:
    for width in (4, 5):
        np.save(tmp_path / f"{width}.npy", np.ones((240, width), dtype=np.float32))
    own = [Embeddings(use="file", path=str(tmp_path / f"{width}.npy")) for width in (4, 5)]
    first = draw_sids(Numbered(), Sids(), own[0], world, info=RunInfo())
    saved(first, tmp_path / "first")
    assert first.spaces is None and not (tmp_path / "first" / "spaces").exists()
    with pytest.raises(DataError, match="was drawn from vectors of 4 dimensions, not 5"):
        draw_sids(Numbered(), Sids(keep=str(tmp_path / "first")), own[1], world, info=RunInfo())


class Asking(Numbered):
    """Looks at one side matrix."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.seen: list[NDArray[np.float32]] = []

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        self.seen.append(catalog.side[self.name])
        return super().encode(catalog)


def test_the_collaborative_matrix_is_made_for_who_asks_and_its_space_is_kept(world: Dataset, tmp_path: Path) -> None:
    assert draw(Numbered(), world).spaces.collaborative is None  # type: ignore[union-attr]
    few = without_the_last(world, 24)
    first = Asking("collaborative")
    saved(draw(first, few), tmp_path / "first")
    [matrix] = first.seen
    assert matrix.shape == (216, 64) and set(np.linalg.norm(matrix, axis=1).round(5)) <= {0, 1}
    bought = {item_id for history in few.train_sequences().values() if len(history) > 1 for item_id in history}
    assert [bool(row.any()) for row in matrix] == [item.item_id in bought for item in few.items]
    later = Asking("collaborative")
    draw(later, few, tmp_path / "first")
    np.testing.assert_array_equal(later.seen[0], matrix)


def test_side_matrices_are_read_when_asked_for_and_lie_in_the_work_folder(world: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.arange(480, dtype=np.float64).reshape(240, 2))
    info = RunInfo(work=tmp_path / "work")
    (tmp_path / "work").mkdir()
    files = {"views": str(tmp_path / "v.npy"), "wrong": str(tmp_path / "absent.npy")}
    catalog = make_catalog(Embeddings(dim=4), world, info, files)
    assert set(catalog.side) == {"collaborative", "views", "wrong"}
    assert catalog.side["views"][239].tolist() == [478, 479] and catalog.side["views"].dtype == np.float32
    with pytest.raises(DataError, match=r"absent\.npy: no such file"):
        catalog.side["wrong"]
    assert sorted(file.name for file in (tmp_path / "work").iterdir()) == ["embeddings.npy", "side-views.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "work" / "embeddings.npy"), catalog.embeddings)
    assert type(catalog.embeddings) is np.ndarray


# the config of a run


RUN = {
    "data": {"num_users": 60, "embeddings": {"dim": 16}},
    "tokenizer": {"use": "residual-kmeans", **SETTINGS["residual-kmeans"]},
    "seed": 3,
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose SIDs are drawn."""
    folder = tmp_path_factory.mktemp("runs") / "old"
    Pipeline(config=RUN).run(folder, until="sids", progress=False)
    return folder


def config(keep: Path | str, **blocks: Any) -> RunConfig:
    return make_config({**RUN, "sids": {"keep": str(keep)}, **blocks}, load_plugins(only="gr2"))


def test_a_run_keeps_the_sids_of_another_whatever_its_seed(old: Path, tmp_path: Path) -> None:
    how = {"sids": {"keep": str(old)}, "seed": 8}
    Pipeline(config={**RUN, **how}).run(tmp_path / "new", until="sids", progress=False)
    new = SidMap.load(tmp_path / "new" / "stages" / "2-sids")
    assert new.sids == SidMap.load(old / "stages" / "2-sids").sids
    assert new.made["seed"] == 8 and new.made["tokenizer"]["use"] == "residual-kmeans"
    assert plan(config(old, seed=8), tmp_path / "new", until="sids") == {"data": "done", "sids": "done"}


def test_another_map_in_the_kept_folder_is_another_input(old: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    sids = SidMap.load(old / "stages" / "2-sids")
    sids.save(kept)
    before = drawn_with(config(kept))
    assert before["kept"] == drawn_with(config(old))["kept"] and "kept" not in drawn_with(config(""))
    moved = dict(sids.sids)
    moved["item0"] = moved["item1"]
    replace(sids, sids=moved).save(kept)
    assert drawn_with(config(kept)) != before


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"tokenizer": {"use": "rqvae"}}, 'tokenizer.use = "residual-kmeans", and this config says "rqvae"; set'),
        ({"tokenizer": {**RUN["tokenizer"], "codes": 25}}, "tokenizer.codes = 64, and this config says 25"),  # type: ignore[dict-item]
        ({"data": {"embeddings": {"dim": 8}}}, "data.embeddings.dim = 16, and this config says 8"),
        ({"data": {"embeddings": {"use": "file", "path": "v.npy"}}}, 'data.embeddings.use = "tfidf", and this config'),
    ],
)
def test_sids_drawn_in_another_way_cannot_be_kept(old: Path, blocks: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        drawn_with(config(old, **blocks))
    assert str(refused.value).startswith(f"sids.keep: {old} was drawn with {problem}")


def test_what_holds_no_sids_cannot_be_kept(old: Path, tmp_path: Path) -> None:
    def refused(keep: Path) -> str:
        with pytest.raises(ConfigError) as error:
            plan(config(keep), tmp_path / "new")
        return str(error.value)

    run = tmp_path / "run"
    assert refused(run) == f"sids.keep: {run}: no such folder; name a run folder, or one of `rerankkit sids add`."
    run.mkdir()
    assert "is not a run folder" in refused(run)
    (run / ".lock").touch()
    assert f"{run}: its stage sids is still to do; `rerankkit run {run}/config.json --until sids`" in refused(run)
    work = run / "stages" / "2-sids.work"
    work.mkdir(parents=True)
    (work / "stage.json").write_text('{"fingerprint": "some"}')
    assert "its stage sids is unfinished" in refused(run)
    stage = work.rename(run / "stages" / "2-sids")
    (stage / "stage.json").write_text(json.dumps({"fingerprint": "f"}))
    (stage / "sids.json").write_text("{}")
    assert f"{stage}: no whole item <-> SID map is here ('made'); draw it anew." in refused(run)
    assert not (tmp_path / "new").exists()
