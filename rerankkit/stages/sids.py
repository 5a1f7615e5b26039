"""Semantic IDs: every item gets a short tuple of codes, once and for good (GR2, stage 1a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit.config import Embeddings, Sids
from rerankkit.errors import DataError, RunFailed
from rerankkit.protocols import Tokenizer
from rerankkit.stages.scorecard import make_scorecard
from rerankkit.store import read_json, write_json
from rerankkit.types import Catalog, Item, RunInfo, Sid

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset


@dataclass(frozen=True)
class SidMap:
    """item <-> SID, in both directions, without the tokenizer that drew it."""

    sids: Mapping[str, Sid]
    """item_id -> SID."""
    codebook_sizes: tuple[int, ...]
    scorecard: Mapping[str, Any]
    """How good they are, as `stages.scorecard` measures it."""
    tokenizer: Tokenizer | None = None
    """The fitted tokenizer, where there is one to save; its folder lies beside the map."""

    def attach(self, items: Sequence[Item]) -> dict[str, Item]:
        """item_id -> the item with its SID. Raises DataError for an item that was never given one."""
        unknown = [item.item_id for item in items if item.item_id not in self.sids]
        if unknown:
            raise DataError(
                f"{len(unknown)} items have no SID, the first of them {unknown[0]!r}; run the sids stage again."
            )
        return {item.item_id: replace(item, sid=self.sids[item.item_id]) for item in items}

    def items_of(self, sid: Sid) -> list[str]:
        """The item ids that hold this SID: one, unless it collides."""
        return [item_id for item_id, own in self.sids.items() if own == sid]

    def save(self, folder: Path) -> None:
        """sids.json, scorecard.json, and the tokenizer's own files in `tokenizer/`."""
        write_json(folder / "scorecard.json", self.scorecard)
        write_json(
            folder / "sids.json",
            {
                "codebook_sizes": self.codebook_sizes,
                "sids": {item_id: list(sid) for item_id, sid in self.sids.items()},
            },
        )
        if self.tokenizer is not None:
            (folder / "tokenizer").mkdir()
            self.tokenizer.save(folder / "tokenizer")

    @classmethod
    def load(cls, folder: Path) -> SidMap:
        """Read sids.json and scorecard.json."""
        record = read_json(folder / "sids.json")
        sids = {item_id: tuple(codes) for item_id, codes in record["sids"].items()}
        return cls(sids, tuple(record["codebook_sizes"]), read_json(folder / "scorecard.json"))


def draw_sids(tokenizer: Tokenizer, sids: Sids, embeddings: Embeddings, dataset: Dataset, *, info: RunInfo) -> SidMap:
    """Fit the tokenizer on the catalogue and encode it. Raises RunFailed for codes outside the codebooks."""
    import numpy as np

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
    drawn = {item.item_id: tuple(map(int, row)) for item, row in zip(catalog.items, codes, strict=True)}
    return SidMap(drawn, sizes, make_scorecard(codes, sizes, catalog, tokenizer, seed=info.seed), tokenizer)


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
