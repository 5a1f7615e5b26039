"""The tokenizer: RecTokens quantises, a book keeps what was given, a last code tells colliding items apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rerankkit import Catalog

_PRECISION = torch.get_float32_matmul_precision()
from rectokens.quantizers import kmeans, residual  # noqa: E402

torch.set_float32_matmul_precision(_PRECISION)  # importing RecTokens lowers it for the whole process


class RecTokens:
    """SIDs for life: an item that has one keeps it; new items of the same codes take the next last code.

    RecTokens' own RQKMeansTokenizer is made of the same quantisers, but compiles at every call, and saves a pickle.
    """

    def __init__(self, levels: int, codes: int, epochs: int, batch_size: int, seed: int) -> None:
        self.codebook_sizes = (codes,) * (levels + 1)
        self._epochs, self._batch_size, self._seed = epochs, batch_size, seed
        self._book: dict[str, tuple[int, ...]] = {}

    def fit(self, catalog: Catalog) -> None:
        """Learn the codebooks, and give every item its SID."""
        self._quantizer = self._fresh(catalog.embeddings.shape[1])
        for _ in range(self._epochs):
            for batch in torch.split(torch.tensor(catalog.embeddings), self._batch_size):
                self._quantizer.fit_step(batch)
        self.encode(catalog)

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """SIDs [N, L]: those given before; an item that is new takes its own now."""
        new = [row for row, item in enumerate(catalog.items) if item.item_id not in self._book]
        held = Counter(sid[:-1] for sid in self._book.values())
        nearest = self._quantizer.quantize(torch.tensor(catalog.embeddings[new])).codes.tolist()
        for row, prefix in zip(new, map(tuple, nearest), strict=True):
            if held[prefix] == self.codebook_sizes[-1]:
                raise ValueError(f"rectokens: over {held[prefix]} items at {prefix}; set tokenizer.codes higher")
            self._book[catalog.items[row].item_id] = (*prefix, held[prefix])
            held[prefix] += 1
        return np.array([self._book[item.item_id] for item in catalog.items], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Sizes, book and codebooks as JSON."""
        codebooks = [level.codebook.embeddings.tolist() for level in self._quantizer.levels]
        (folder / "rectokens.json").write_text(json.dumps([self.codebook_sizes, self._book, codebooks]))

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        sizes, book, codebooks = json.loads((folder / "rectokens.json").read_text())
        self.codebook_sizes, self._book = tuple(sizes), {item_id: tuple(sid) for item_id, sid in book.items()}
        self._quantizer = self._fresh(len(codebooks[0][0]))
        for level, vectors in zip(self._quantizer.levels, map(torch.tensor, codebooks), strict=True):
            level.fit_step(vectors)  # or it takes itself for unfitted
            level.codebook.update(torch.arange(len(vectors)), vectors)

    def _fresh(self, dim: int) -> residual.ResidualQuantizer:
        sizes = enumerate(self.codebook_sizes[1:])
        return residual.ResidualQuantizer([kmeans.KMeansQuantizer(n, dim, seed=self._seed + i) for i, n in sizes])
