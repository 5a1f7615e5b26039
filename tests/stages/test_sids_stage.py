from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rerankkit.config import Embeddings, Sids
from rerankkit.errors import DataError, RunFailed, RunFolderError
from rerankkit.plugins import load_plugins
from rerankkit.stages.sids import SidMap, draw_sids, make_catalog
from rerankkit.types import Catalog, Item, RunInfo, SidSurface

from .conftest import Shop


class Fake:
    """Gives the codes it was told, whatever the catalogue."""

    def __init__(self, codes: Any, sizes: tuple[int, ...]) -> None:
        self.codes, self.codebook_sizes = codes, sizes
        self.fitted: Catalog | None = None

    def fit(self, catalog: Catalog) -> None:
        self.fitted = catalog

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        assert self.fitted is catalog, "encode before fit"
        found: NDArray[np.int64] = self.codes(len(catalog.items)) if callable(self.codes) else self.codes
        return found

    def save(self, folder: Path) -> None:
        (folder / "codes.txt").write_text("saved")

    def load(self, folder: Path) -> None:
        raise AssertionError("not needed")


def pairs(n: int) -> NDArray[np.int64]:
    """Item i -> (i // 100, i % 100)."""
    return np.stack(np.divmod(np.arange(n), 100), axis=1)


def draw(shop: Shop, codes: Any, sizes: tuple[int, ...]) -> SidMap:
    return draw_sids(Fake(codes, sizes), Sids(), Embeddings(dim=4), shop.dataset, info=RunInfo())


def test_every_item_gets_the_codes_of_its_row(shop: Shop) -> None:
    sids = draw(shop, pairs, (3, 100))
    items = shop.dataset.items
    assert sids.sids[items[0].item_id] == (0, 0) and sids.sids[items[237].item_id] == (2, 37)
    assert all(type(code) is int for sid in sids.sids.values() for code in sid)
    assert sids.items_of((2, 37)) == [items[237].item_id] and sids.items_of((2, 99)) == []
    assert sids.scorecard["own_share"] == 1.0


def test_the_catalogue_has_vectors_and_who_follows_whom(shop: Shop) -> None:
    catalog = make_catalog(Embeddings(dim=4), shop.dataset, RunInfo())
    assert catalog.items == shop.dataset.items and catalog.embeddings.shape == (240, 4)
    first = next(iter(shop.dataset.train_sequences().values()))
    rows = shop.dataset.item_rows
    assert [rows[first[0]], rows[first[1]]] == catalog.pairs[0].tolist()


@pytest.mark.parametrize(
    ("codes", "sizes"),
    [
        (lambda n: pairs(n)[:-1], (3, 100)),
        (lambda n: pairs(n)[:, 0], (3, 100)),
        (lambda n: pairs(n), (3, 99)),
        (lambda n: pairs(n) - 1, (3, 100)),
        (lambda n: pairs(n), (3, 100, 5)),
        (lambda n: pairs(n)[:0], (3, 100)),
        (lambda n: pairs(n) + 0.5, (4, 101)),
    ],
)
def test_codes_that_cannot_be_are_the_tokenizers_fault(shop: Shop, codes: Any, sizes: tuple[int, ...]) -> None:
    with pytest.raises(RunFailed, match=r"tokenizer: encode gave codes of shape .* Its plugin is at fault\."):
        draw(shop, codes, sizes)


def test_what_is_saved_is_what_is_loaded(shop: Shop, tmp_path: Path) -> None:
    sids = draw(shop, pairs, (3, 100))
    sids.save(tmp_path)
    again = SidMap.load(tmp_path)
    assert (again.sids, again.codebook_sizes, again.scorecard) == (sids.sids, (3, 100), sids.scorecard)
    assert again.surface == SidSurface() and again.tokenizer is None
    assert (tmp_path / "tokenizer" / "codes.txt").read_text() == "saved"
    assert str(pq.read_schema(tmp_path / "sids.parquet").types) == "[DataType(string), ListType(list<element: int32>)]"


SHARED = {"a": (2, 1), "b": (0, 3), "c": (2, 0), "d": (2, 1), "e": (0, 3)}


def test_a_map_is_read_in_both_directions_and_by_prefix(tmp_path: Path) -> None:
    SidMap(SHARED, (3, 4), {}, surface=SidSurface(prefix="t")).save(tmp_path)
    sids = SidMap.load(tmp_path)
    assert sids.sid_of("c") == (2, 0) and sids.surface.text((2, 0)) == "<|sid_begin|><t_a_2><t_b_0><|sid_end|>"
    assert (sids.items_of((2, 1)), sids.items_of((1, 1)), sids.items_of((2,))) == (["a", "d"], [], [])
    assert sids.items_under((2,)) == ["c", "a", "d"] and sids.items_under(()) == ["b", "e", "c", "a", "d"]
    assert sids.items_under((2, 1, 0)) == sids.items_under((-1,)) == sids.items_under((2**40,)) == []
    with pytest.raises(DataError, match="item 'z' has no SID; 5 items have one"):
        sids.sid_of("z")


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), max_size=30), st.lists(st.integers(0, 3), max_size=3))
def test_looking_up_a_prefix_finds_what_a_scan_finds(sids: list[tuple[int, ...]], codes: list[int]) -> None:
    table, prefix = {str(n): sid for n, sid in enumerate(sids)}, tuple(codes)
    holders = [
        item_id
        for item_id, sid in sorted(table.items(), key=lambda e: (e[1], int(e[0])))
        if sid[: len(prefix)] == prefix
    ]
    found = SidMap(table, (3, 3, 3), {})
    assert found.items_under(prefix) == holders
    assert found.items_of(prefix) == (holders if len(prefix) == 3 else [])


def test_a_map_is_read_without_torch(tmp_path: Path) -> None:
    SidMap(SHARED, (3, 4), {}).save(tmp_path)
    code = f"""import sys
from rerankkit import SidMap
sids = SidMap.load({str(tmp_path)!r})
print(sids.items_of(sids.sid_of("a")), {{"torch", "transformers", "sklearn"}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['a', 'd'] set()\n"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"item_id": ["a", "a"], "sid": [[0, 0], [1, 1]]}, "an item stands twice"),
        ({"item_id": ["a", "b"], "sid": [[0, 0], [1, 4]]}, r"outside its codebook; the sizes are \(3, 4\)"),
        ({"item_id": ["a", "b"], "sid": [[0, 0, 1], [1]]}, "has not 2 codes"),
        ({"item_id": ["a", "b"], "sid": [[0, 0], None]}, "has not 2 codes|cannot reshape"),
        ({"item_id": ["a"]}, "sid"),
        ({}, "sids.parquet"),
    ],
)
def test_a_damaged_map_is_refused(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    SidMap({"a": (0, 0), "b": (1, 1)}, (3, 4), {}).save(tmp_path)
    (tmp_path / "sids.parquet").unlink()
    if columns:
        types = {"item_id": pa.string(), "sid": pa.list_(pa.int32())}
        table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
        pq.write_table(table, tmp_path / "sids.parquet")
    with pytest.raises(RunFolderError, match=f"no whole item <-> SID map is here .*({problem})"):
        SidMap.load(tmp_path)


def test_items_are_given_their_sids_and_strangers_are_refused(shop: Shop) -> None:
    sids = SidMap({"a": (1, 2)}, (3, 3), {})
    assert sids.attach([Item("a", "A")]) == {"a": Item("a", "A", sid=(1, 2))}
    with pytest.raises(DataError, match="1 items have no SID, the first of them 'b'"):
        sids.attach([Item("a", "A"), Item("b", "B")])


def test_a_real_tokenizer_draws_the_same_sids_every_time(shop: Shop) -> None:
    spec = load_plugins(only="gr2").part("tokenizer", "residual-kmeans", "")
    settings = spec.config(levels=2, codes=32, iterations=3)  # type: ignore[call-arg]
    one, two = (
        draw_sids(spec.build(settings, RunInfo(seed=3)), Sids(), Embeddings(dim=8), shop.dataset, info=RunInfo(seed=3))
        for _ in range(2)
    )
    assert one.sids == two.sids and one.codebook_sizes == (32, 32)
    assert len(set(one.sids.values())) == 240  # reassign leaves no collision where there is room
