"""Side matrices of a catalogue, each made when a tokenizer asks for it; and what must be kept to place later items."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from rerankkit.data.dataset import Dataset
from rerankkit.data.embed import Tfidf
from rerankkit.errors import RunFolderError

WINDOW = 10
"""Steps within which one item of a history counts as beside another, with weight 1/distance."""
DAMPING = 5.0
"""Added to both items' totals before a count is divided by their geometric mean: what is rare says less.

Both were chosen on Beauty's validation steps, by how near the next item lies to the last one.
"""


class SideMatrices(Mapping[str, NDArray[np.float32]]):
    """Matrices [N, *] by name, each made at the first look at it, and then kept."""

    def __init__(self, makers: Mapping[str, Callable[[], NDArray[np.float32]]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, NDArray[np.float32]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the matrix
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Collaborative:
    """A space of what is bought beside what, in training histories alone.

    M[i, j] = c_ij / sqrt((d_i + DAMPING) (d_j + DAMPING)), where c_ij adds up 1/distance for every time i and j stand
    at most WINDOW steps apart in a history, whichever comes first, and d_i = sum_j c_ij. An item's place is its row of
    M times the right singular vectors of the M that was fitted, so that items which come later have one too.
    """

    item_ids: tuple[str, ...]
    """[M] of the catalogue it was fitted on."""
    totals: NDArray[np.float64]
    """d [M]"""
    axes: NDArray[np.float64]
    """[R, M], R <= dim"""
    dim: int

    @classmethod
    def fit(cls, dataset: Dataset, dim: int = 64, seed: int = 0) -> Collaborative:
        """Count and factorise. Equal on every run with one seed."""
        from sklearn.decomposition import TruncatedSVD

        item_ids = tuple(item.item_id for item in dataset.items)
        beside = _beside(dataset, dataset.item_rows)
        totals = np.asarray(beside.sum(axis=1)).ravel()
        rank = min(dim, len(item_ids) - 1) if beside.nnz else 0
        axes = np.zeros((0, len(item_ids)))
        if rank:
            axes = TruncatedSVD(rank, random_state=seed).fit(_damped(beside, totals, totals)).components_
        return cls(item_ids, totals, axes, dim)

    def vectors(self, dataset: Dataset) -> NDArray[np.float32]:
        """Places [N, dim] of a dataset's items: unit rows, or zero for an item beside no known one in training."""
        columns = {item_id: column for column, item_id in enumerate(self.item_ids)}
        beside = _beside(dataset, columns)
        places = _damped(beside, np.asarray(beside.sum(axis=1)).ravel(), self.totals) @ self.axes.T
        norms = np.linalg.norm(places, axis=1, keepdims=True)
        found = np.zeros((len(dataset.items), self.dim), dtype=np.float32)
        found[:, : len(self.axes)] = np.divide(places, norms, out=np.zeros_like(places), where=norms > 1e-12)
        return found

    def save(self, folder: Path) -> None:
        """Write collaborative.json and collaborative.safetensors."""
        from safetensors.numpy import save_file

        facts = {"format": 1, "dim": self.dim, "item_ids": self.item_ids}
        (folder / "collaborative.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
        tensors = {"totals": self.totals, "axes": np.ascontiguousarray(self.axes)}
        save_file(tensors, folder / "collaborative.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Collaborative:
        """Take back what `save` wrote. Raises RunFolderError if it is not there or not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            facts = json.loads((folder / "collaborative.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "collaborative.safetensors")
            item_ids, totals, axes = tuple(facts["item_ids"]), tensors["totals"], tensors["axes"]
            if facts["format"] != 1 or not axes.shape[1:] == totals.shape == (len(item_ids),):
                raise ValueError(f"format {facts['format']}, {len(item_ids)} items, axes {list(axes.shape)}")
            return cls(item_ids, totals, axes, int(facts["dim"]))
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise RunFolderError(f"{folder}: no whole collaborative space is here ({error}); draw SIDs anew") from error


@dataclass
class Spaces:
    """What placed the items for a tokenizer, as far as it was fitted: kept with the SIDs, it places those to come."""

    tfidf: Tfidf | None = None
    collaborative: Collaborative | None = None

    def save(self, folder: Path) -> None:
        """Write what there is into an existing folder."""
        for space in (self.tfidf, self.collaborative):
            if space is not None:
                space.save(folder)

    @classmethod
    def load(cls, folder: Path, *, tfidf: bool) -> Spaces:
        """Take back what `save` wrote; with `tfidf`, that space must be there."""
        asked = (folder / "collaborative.json").exists()
        return cls(Tfidf.load(folder) if tfidf else None, Collaborative.load(folder) if asked else None)


def _beside(dataset: Dataset, columns: Mapping[str, int]) -> sp.csr_matrix:
    """c [N, M]: items of the dataset against those of `columns`, from training histories."""
    histories = dataset.train_sequences().values()
    whose = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    bought = [item_id for history in histories for item_id in history]
    rows = np.array([dataset.item_rows[item_id] for item_id in bought], dtype=np.int64)
    known = np.array([columns.get(item_id, -1) for item_id in bought], dtype=np.int64)
    total = sp.csr_matrix((len(dataset.items), len(columns)), dtype=np.float64)
    for distance in range(1, min(WINDOW, len(bought) - 1) + 1):
        earlier, later = slice(None, -distance), slice(distance, None)
        for one, other in ((earlier, later), (later, earlier)):
            both = (whose[one] == whose[other]) & (known[other] >= 0)
            places = rows[one][both], known[other][both]
            total = total + sp.csr_matrix((np.full(both.sum(), 1 / distance), places), shape=total.shape)
    return total


def _damped(beside: sp.csr_matrix, row_totals: NDArray[np.float64], totals: NDArray[np.float64]) -> sp.csr_matrix:
    left, right = 1 / np.sqrt(row_totals + DAMPING), 1 / np.sqrt(totals + DAMPING)
    return sp.diags(left) @ beside @ sp.diags(right)
