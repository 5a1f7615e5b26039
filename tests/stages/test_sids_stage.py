from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rerankkit.config import Embeddings, Sids
from rerankkit.errors import DataError, RunFailed
from rerankkit.plugins import load_plugins
from rerankkit.stages.sids import SidMap, draw_sids, make_catalog
from rerankkit.types import Catalog, Item, RunInfo

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
    assert (tmp_path / "tokenizer" / "codes.txt").read_text() == "saved"


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
