"""Semantic IDs: every item gets a short tuple of codes, once and for good (GR2, stage 1a)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rerankkit.config import Embeddings
from rerankkit.errors import DataError, RunFailed, RunFolderError
from rerankkit.protocols import Tokenizer
from rerankkit.store import read_json, write_json
from rerankkit.types import Catalog, Item, RunInfo, Sid, SidSurface

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset


class SidTable(Mapping[str, Sid]):
    """item_id -> SID over an array, and back by binary search: dicts of tuples would take seconds for a million."""

    def __init__(self, item_ids: Sequence[str], codes: NDArray[np.integer]) -> None:
        self.item_ids = list(item_ids)
        self.codes = np.asarray(codes, dtype=np.int32)
        """[N, L], in the order of `item_ids`."""
        if self.codes.ndim != 2 or len(self.codes) != len(self.item_ids):
            raise ValueError(f"{len(self.item_ids)} items need codes [N, L], not {list(self.codes.shape)}")

    @classmethod
    def of(cls, sids: Mapping[str, Sid], levels: int) -> SidTable:
        """The table that any mapping amounts to."""
        if isinstance(sids, SidTable):
            return sids
        return cls(list(sids), np.array(list(sids.values()), dtype=np.int32).reshape(len(sids), levels))

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Rows in the order of their SIDs (equal SIDs in the order of the table), and the codes [L, N] so ordered."""
        order = np.lexsort(self.codes.T[::-1])
        return order, np.ascontiguousarray(self.codes[order].T)

    def __getitem__(self, item_id: str) -> Sid:
        return tuple(self.codes[self._rows[item_id]].tolist())

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.item_ids)

    def __len__(self) -> int:
        return len(self.item_ids)

    def under(self, prefix: Sid) -> list[str]:
        """The items whose SID begins with these codes, in the order of their SIDs."""
        order, codes = self._sorted
        if len(prefix) > len(codes) or any(not 0 <= code < 2**31 for code in prefix):
            return []
        low, high = 0, len(order)
        for level, code in zip(codes, np.array(prefix, dtype=np.int32), strict=False):  # another type would copy
            left, right = np.searchsorted(level[low:high], code), np.searchsorted(level[low:high], code, "right")
            low, high = low + int(left), low + int(right)
        return [self.item_ids[row] for row in order[low:high]]


@dataclass(frozen=True)
class SidMap:
    """item <-> SID, in both directions, without the tokenizer that drew it, and without torch."""

    sids: Mapping[str, Sid]
    """item_id -> SID of every item that ever got one: items that have left the catalogue keep theirs."""
    codebook_sizes: tuple[int, ...]
    scorecard: Mapping[str, Any]
    """How good they are: shares of distinct and of own SIDs, use of each level."""
    tokenizer: Tokenizer | None = None
    """The fitted tokenizer, where there is one to save; its folder lies beside the map."""
    surface: SidSurface = field(default_factory=SidSurface)
    """How they are spelled."""

    @cached_property
    def table(self) -> SidTable:
        """`sids` as an array [N, L] and its item ids."""
        return SidTable.of(self.sids, len(self.codebook_sizes))

    def attach(self, items: Sequence[Item]) -> dict[str, Item]:
        """item_id -> the item with its SID. Raises DataError for an item that was never given one."""
        unknown = [item.item_id for item in items if item.item_id not in self.sids]
        if unknown:
            raise DataError(
                f"{len(unknown)} items have no SID, the first of them {unknown[0]!r}; run the sids stage again."
            )
        return {item.item_id: replace(item, sid=self.sids[item.item_id]) for item in items}

    def sid_of(self, item_id: str) -> Sid:
        """An item's SID. Raises DataError if it was never given one."""
        if item_id not in self.sids:
            raise DataError(f"item {item_id!r} has no SID; {len(self.sids):,} items have one")
        return self.sids[item_id]

    def items_of(self, sid: Sid) -> list[str]:
        """The item ids that hold this SID: one, unless it collides; none, if nobody has it."""
        return self.table.under(sid) if len(sid) == len(self.codebook_sizes) else []

    def items_under(self, prefix: Sid) -> list[str]:
        """The item ids whose SID begins with these codes, in the order of their SIDs; the empty prefix is everybody."""
        return self.table.under(prefix)

    def save(self, folder: Path) -> None:
        """sids.parquet and sids.json, and the tokenizer's own files in `tokenizer/`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        levels = len(self.codebook_sizes)
        codes = self.table.codes
        ends = pa.array(np.arange(len(codes) + 1, dtype=np.int32) * levels)
        columns = {
            "item_id": pa.array(self.table.item_ids, pa.string()),
            "sid": pa.ListArray.from_arrays(ends, pa.array(codes.ravel(), pa.int32())),
        }
        pq.write_table(pa.table(columns), folder / "sids.parquet")
        facts = {
            "codebook_sizes": self.codebook_sizes,
            "surface": asdict(self.surface),
            "scorecard": self.scorecard,
        }
        write_json(folder / "sids.json", facts)
        if self.tokenizer is not None:
            (folder / "tokenizer").mkdir()
            self.tokenizer.save(folder / "tokenizer")

    @classmethod
    def load(cls, folder: str | Path) -> SidMap:
        """Read sids.parquet and sids.json. Raises RunFolderError if they are not there or not whole."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        folder = Path(folder)
        facts = read_json(folder / "sids.json")
        try:
            table = pq.read_table(folder / "sids.parquet")
            sizes = tuple(facts["codebook_sizes"])
            surface = SidSurface(**facts["surface"])
            sids = table["sid"].combine_chunks()
            if pc.count_distinct(table["item_id"], mode="all").as_py() < len(sids):
                raise ValueError("an item stands twice")
            codes = sids.flatten().to_numpy().reshape(len(sids), len(sizes))
            if not pc.all(pc.equal(pc.list_value_length(sids), len(sizes)), min_count=0).as_py():
                raise ValueError(f"a SID has not {len(sizes)} codes")
            if not ((codes >= 0) & (codes < np.array(sizes))).all():
                raise ValueError(f"a code lies outside its codebook; the sizes are {sizes}")
            return cls(SidTable(table["item_id"].to_pylist(), codes), sizes, facts["scorecard"], surface=surface)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise RunFolderError(f"{folder}: no whole item <-> SID map is here ({error})") from error


def draw_sids(tokenizer: Tokenizer, embeddings: Embeddings, dataset: Dataset, *, info: RunInfo) -> SidMap:
    """Fit the tokenizer on the catalogue and encode it. Raises RunFailed for codes outside the codebooks."""
    from rerankkit.math.sids import sid_scorecard

    catalog = make_catalog(embeddings, dataset, info)
    tokenizer.fit(catalog)
    codes = np.asarray(tokenizer.encode(catalog))
    sizes = tuple(tokenizer.codebook_sizes)
    fits = codes.shape == (len(catalog.items), len(sizes)) and np.issubdtype(codes.dtype, np.integer)
    if not fits or (codes < 0).any() or (codes >= np.array(sizes)).any():
        values = f"from {codes.min()} to {codes.max()}" if codes.size else "none"
        raise RunFailed(
            f"tokenizer: encode gave codes of shape {codes.shape}, {codes.dtype} {values}; "
            f"expected whole numbers [{len(catalog.items)}, {len(sizes)}] below the codebook sizes {sizes}. "
            "Its plugin is at fault."
        )
    sids = SidTable([item.item_id for item in catalog.items], codes)
    return SidMap(sids, sizes, sid_scorecard(codes, sizes), tokenizer, info.surface)


def make_catalog(embeddings: Embeddings, dataset: Dataset, info: RunInfo) -> Catalog:
    """Items, their vectors, and which follow one another in training."""
    from rerankkit.data.dataset import co_engaged_pairs
    from rerankkit.data.embed import embed, item_text

    vectors = embed(
        [item_text(item) for item in dataset.items],
        use=embeddings.use,
        model=embeddings.model,
        device=info.device,
        path=embeddings.path or None,
        item_ids=[item.item_id for item in dataset.items],
        dim=embeddings.dim,
        seed=info.seed,
    )
    return Catalog(dataset.items, vectors, co_engaged_pairs(dataset))
