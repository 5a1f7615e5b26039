"""The tokenizer: semantic-id quantises, a book keeps what was given, a last code tells colliding items apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rerankkit import Catalog
from semantic_id import RQKMeans


class SemanticId:
    """SIDs for life: an item that has one keeps it; new items of the same codes take the next last code."""

    def __init__(
        self, levels: int, codes: int, implementation: Literal["kmeans", "constrained"], num_starts: int, seed: int
    ) -> None:
        self.codebook_sizes = (codes,) * (levels + 1)
        self._how: Any = {"implementation": implementation, "n_init": num_starts, "random_state": seed}
        self._book: dict[str, tuple[int, ...]] = {}

    def fit(self, catalog: Catalog) -> None:
        """Learn the codebooks, and give every item its SID."""
        num_clusters = min(self.codebook_sizes[0], len(catalog.items))  # k-means refuses more clusters than items
        self._encoder = RQKMeans(len(self.codebook_sizes) - 1, num_clusters, verbose=False, **self._how)
        self._encoder.fit(catalog.embeddings)
        self.encode(catalog)

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """SIDs [N, L]: those given before; an item that is new takes its own now."""
        new = [row for row, item in enumerate(catalog.items) if item.item_id not in self._book]
        held = Counter(sid[:-1] for sid in self._book.values())
        nearest = self._encoder.encode(catalog.embeddings[new]).tolist() if new else []
        for row, prefix in zip(new, map(tuple, nearest), strict=True):
            if held[prefix] == self.codebook_sizes[-1]:
                raise ValueError(f"semantic-id: more than {held[prefix]} items at {prefix}; set tokenizer.codes higher")
            self._book[catalog.items[row].item_id] = (*prefix, held[prefix])
            held[prefix] += 1
        return np.array([self._book[item.item_id] for item in catalog.items], dtype=np.int64)

    def reconstruct(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings [n, D] as the codes before the last remember them."""
        vectors: NDArray[np.float32] = self._encoder.decode(codes[:, :-1])
        return vectors

    def save(self, folder: Path) -> None:
        """semantic-id's own JSON and npz, and the book beside them."""
        self._encoder.save(str(folder))
        (folder / "book.json").write_text(json.dumps([self.codebook_sizes, self._book]), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        self._encoder = RQKMeans.load(str(folder))
        sizes, book = json.loads((folder / "book.json").read_text(encoding="utf-8"))
        self.codebook_sizes, self._book = tuple(sizes), {item_id: tuple(sid) for item_id, sid in book.items()}
