"""Tokenizers: residual k-means, and GR2's RQ-VAE.

An item's SID is for life: both keep the SIDs they gave in a `SidBook`, which is part of the artifact, and answer from
it. Only items that are not in it are encoded, and they take no SID that is taken while there is room.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rerankkit.errors import DataError, RunFailed, RunFolderError
from rerankkit.types import Catalog, Item, RunInfo
from rerankkit_gr2.collisions import LastLevel, OnFull, Settled, settle
from rerankkit_gr2.kmeans import (
    CHUNK,
    distances,
    fast_products,
    fit_residual_kmeans,
    residual_codes,
    sample_rows,
)
from rerankkit_gr2.rqvae import Contrast, RqVaeNet, Training, train

_FORMAT = 2
_WORDS = {
    "moved": "items whose SID is not their nearest codes",
    "spilled": "of these, items whose prefix was full",
    "shared": "items that share a SID",
}
_TENSORS, _FACTS = "tokenizer.safetensors", "tokenizer.json"


class SidBook:
    """Who holds which SID. Entries are added, never changed."""

    def __init__(self, item_ids: Sequence[str], codes: NDArray[np.int64]) -> None:
        self._rows = {item_id: row for row, item_id in enumerate(item_ids)}
        self.codes = codes
        """[M, L], in the order of `item_ids`."""

    @property
    def item_ids(self) -> list[str]:
        """[M]"""
        return list(self._rows)

    def strangers(self, items: Sequence[Item]) -> NDArray[np.int64]:
        """Positions, in `items`, of those that are not in the book. Raises DataError if an id occurs twice."""
        if len({item.item_id for item in items}) < len(items):
            [(item_id, times)] = Counter(item.item_id for item in items).most_common(1)
            raise DataError(f"catalogue: item_id {item_id!r} occurs {times} times; give every item one row")
        return np.array([i for i, item in enumerate(items) if item.item_id not in self._rows], dtype=np.int64)

    def add(self, item_ids: Sequence[str], codes: NDArray[np.int64]) -> None:
        """Write down the SIDs [n, L] of items that have none yet."""
        self._rows.update({item_id: row for row, item_id in enumerate(item_ids, start=len(self._rows))})
        self.codes = np.concatenate([self.codes, codes])

    def sids(self, items: Sequence[Item]) -> NDArray[np.int64]:
        """[N, L]; all must be in the book."""
        return self.codes[np.fromiter((self._rows[item.item_id] for item in items), np.int64, len(items))]


@dataclass(kw_only=True, eq=False)
class _Residual(ABC):
    """What the two have in common: a space with a codebook for each level, and how last codes are dealt out.

    Embeddings are read in chunks; beside the catalogue's own there are never more than a chunk and the sample that the
    codebooks are fitted on.
    """

    kind: ClassVar[str]
    levels: int = 4
    codes: int = 256
    seed: int = 0
    last_level: LastLevel
    random_levels: int = 1
    on_full: OnFull = "spill"
    _book: SidBook = field(init=False, repr=False)
    _told: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes at each level, coarse to fine."""
        return (self.codes,) * self.levels

    def fit(self, catalog: Catalog) -> None:
        """Learn the codebooks, and give every item its SID."""
        _check(catalog)
        with fast_products():
            self._learn(catalog)
        self._book = SidBook([], np.empty((0, self.levels), dtype=np.int64))
        self._told = dict.fromkeys((each.name for each in fields(Settled)), 0)
        self.encode(catalog)

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """SIDs [N, L]: those given before; an item that is new takes its own now, and keeps it."""
        codebooks = self._codebooks()
        new = self._book.strangers(catalog.items)
        if len(new):
            _check(catalog, self._dimensions())
            with fast_products():
                codes = np.empty((len(new), self.levels), dtype=np.int64)
                for some in _chunks(len(new)):
                    codes[some] = residual_codes(self._latents(_rows(catalog, new[some])), codebooks).numpy()

                def near(rows: NDArray[np.int64], level: int) -> NDArray[np.float32]:
                    parts = []
                    for some in _chunks(len(rows)):
                        left = self._latents(_rows(catalog, new[rows[some]]))
                        for above in range(level):
                            left = left - codebooks[above][torch.from_numpy(codes[rows[some], above])]
                        parts.append(distances(left, codebooks[level]).numpy())
                    return np.concatenate(parts)

                settled = settle(
                    codes,
                    self._book.codes,
                    self.codes,
                    near,
                    how=self.last_level,
                    products=(codebooks[-2] @ codebooks[-1].T).numpy()
                    if self.last_level == "search" and self.levels > 1
                    else None,
                    on_full=self.on_full,
                    random_levels=self.random_levels,
                    seed=self.seed,
                )
            self._book.add([catalog.items[i].item_id for i in new], codes)
            self._told = {name: self._told[name] + count for name, count in asdict(settled).items()}
        return self._book.sids(catalog.items)

    @torch.inference_mode()
    def reconstruct(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings [n, D] as the SIDs [n, L] remember them."""
        codebooks = self._codebooks()
        total = torch.zeros(len(codes), codebooks.shape[2])
        for level, codebook in enumerate(codebooks):
            total += codebook[torch.from_numpy(codes[:, level])]
        restored: NDArray[np.float32] = self._restored(total).numpy()
        return restored

    def facts(self) -> Mapping[str, int]:
        """How many items' SIDs are not their nearest codes, and why: counted over all items ever encoded."""
        return {_WORDS[name]: count for name, count in self._told.items()}

    def save(self, folder: Path) -> None:
        """Write tensors and facts; no pickle."""
        settings = {each.name: getattr(self, each.name) for each in fields(self) if each.init and each.name != "bar"}
        facts = {
            "format": _FORMAT,
            "kind": self.kind,
            "settings": settings,
            "told": self._told,
            "item_ids": self._book.item_ids,
        }
        tensors = {**self._tensors(), "book": torch.from_numpy(self._book.codes.astype(np.int32))}
        save_file(tensors, folder / _TENSORS)
        (folder / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, settings included. Raises RunFolderError if it is not there or not whole."""
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
            if (facts["format"], facts["kind"]) != (_FORMAT, self.kind):
                raise RunFolderError(
                    f"{folder / _FACTS}: holds a {facts['kind']!r} tokenizer in format {facts['format']},"
                    f" not {self.kind!r} in format {_FORMAT}; fit it again or name the other one"
                )
            for name, value in facts["settings"].items():
                if name in {each.name for each in fields(self) if each.init}:
                    setattr(self, name, tuple(value) if isinstance(value, list) else value)
            codes = tensors.pop("book").numpy().astype(np.int64)
            if codes.shape != (len(facts["item_ids"]), self.levels):
                raise ValueError(f"{len(facts['item_ids'])} items and SIDs {codes.shape}")
            self._take(tensors)
            self._book, self._told = SidBook(facts["item_ids"], codes), facts["told"]
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise RunFolderError(
                f"{folder}: no whole {self.kind!r} tokenizer is here ({error}); fit it again"
            ) from error

    @abstractmethod
    def _learn(self, catalog: Catalog) -> None:
        """Fit codebooks and whatever else `_tensors` holds."""

    @abstractmethod
    def _codebooks(self) -> torch.Tensor:
        """[L, C, Z]; raises RuntimeError before `fit` and `load`."""

    @abstractmethod
    def _dimensions(self) -> int:
        """D of the embeddings it was fitted on."""

    def _latents(self, points: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, D] in the space of the codebooks: [n, Z]."""
        return points

    def _restored(self, latents: torch.Tensor) -> torch.Tensor:
        """Back again: [n, Z] to [n, D]."""
        return latents

    @abstractmethod
    def _tensors(self) -> dict[str, torch.Tensor]:
        """What `_take` needs."""

    @abstractmethod
    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Be what `_tensors` told."""


@dataclass(kw_only=True, eq=False)
class ResidualKMeans(_Residual):
    """Residual k-means: fast, and the same for the same input. Fitted on at most 512 rows a code."""

    kind: ClassVar[str] = "residual-kmeans"
    last_level: LastLevel = "reassign"
    iterations: int = 10
    balanced: bool = False
    _fitted: torch.Tensor | None = field(default=None, init=False, repr=False)
    """[L, C, D]"""

    def _learn(self, catalog: Catalog) -> None:
        points = _rows(catalog, sample_rows(len(catalog.items), self.codes, np.random.default_rng(self.seed)))
        self._fitted = fit_residual_kmeans(
            points, self.levels, self.codes, self.iterations, self.seed, balanced=self.balanced
        )

    def _codebooks(self) -> torch.Tensor:
        codebooks: torch.Tensor = _ready(self._fitted)
        return codebooks

    def _dimensions(self) -> int:
        return self._codebooks().shape[2]

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"codebooks": self._codebooks()}

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        self._fitted = tensors["codebooks"]


@dataclass(kw_only=True, eq=False)
class RqVae(_Residual):
    """GR2's tokenizer (Liang et al. 2026, 2602.07774): a residual-quantised autoencoder, each technique its own switch.

    `settings.RqVaeConfig` says what each field means.
    """

    kind: ClassVar[str] = "rqvae"
    last_level: LastLevel = "random"
    latent: int = 32
    hidden: tuple[int, ...] = (256, 128)
    epochs: int = 40
    min_steps: int = 400
    max_steps: int = 8000
    batch_size: int = 256
    learning_rate: float = 1e-3
    commitment: float = 0.25
    kmeans_init: bool = True
    ema: str = "residuals"
    decay: float = 0.95
    diversity: float = 0.01
    dead_code_reset: int = 50
    contrastive: float = 0.0
    contrastive_temperature: float = 0.1
    bar: Callable[..., Iterator[Any]] = field(default=RunInfo.progress, repr=False)
    """`RunInfo.progress`."""
    _net: RqVaeNet | None = field(default=None, init=False, repr=False)

    def _learn(self, catalog: Catalog) -> None:
        if self.contrastive and not len(catalog.pairs):
            raise DataError(
                f"contrastive = {self.contrastive:g} needs items that follow one another in a training history, and "
                "the catalogue has no such pair; set it to 0, or give longer histories"
            )
        self._net = self._new_net(catalog.embeddings.shape[1])
        how = Training(**{each.name: getattr(self, each.name) for each in fields(Training)})
        contrast = Contrast.of(catalog.pairs, len(catalog.items)) if self.contrastive else None
        train(catalog.embeddings, self._net, how, contrast, self.bar)
        if not all(bool(tensor.isfinite().all()) for tensor in self._net.state_dict().values()):
            raise RunFailed(
                f"tokenizer: the RQ-VAE diverged, its weights are not finite; lower tokenizer.learning_rate "
                f"({self.learning_rate:g})"
            )

    def _codebooks(self) -> torch.Tensor:
        return self._ready_net().codebooks.detach()

    def _dimensions(self) -> int:
        return len(self._ready_net().centre)

    @torch.no_grad()
    def _latents(self, points: torch.Tensor) -> torch.Tensor:
        return self._ready_net().latents(points)

    def _restored(self, latents: torch.Tensor) -> torch.Tensor:
        return self._ready_net().restored(latents)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._ready_net().state_dict()

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        self._net = self._new_net(len(tensors["centre"]))
        self._net.load_state_dict(tensors)

    def _ready_net(self) -> RqVaeNet:
        net: RqVaeNet = _ready(self._net)
        return net

    def _new_net(self, dimensions: int) -> RqVaeNet:
        with torch.random.fork_rng(devices=[]):  # nobody else's random numbers may depend on whether we fit or load
            torch.manual_seed(self.seed)
            return RqVaeNet(dimensions, self.levels, self.codes, self.latent, self.hidden)


def _ready(state: Any) -> Any:
    if state is None:
        raise RuntimeError("a tokenizer has no SIDs before fit() or load()")
    return state


def _check(catalog: Catalog, dimensions: int | None = None) -> None:
    shape = catalog.embeddings.shape
    if len(shape) != 2 or shape[0] != len(catalog.items) or not all(shape):
        raise DataError(f"catalogue: embeddings must be [N, D] with N = {len(catalog.items)} items, not {shape}")
    if dimensions is not None and shape[1] != dimensions:
        raise DataError(f"catalogue: embeddings have {shape[1]} dimensions; the tokenizer was fitted on {dimensions}")
    for some in _chunks(shape[0]):
        finite = np.isfinite(catalog.embeddings[some]).all(axis=1)
        if not finite.all():
            item_id = catalog.items[some.start + int(np.argmin(finite))].item_id
            raise DataError(f"catalogue: the embedding of item {item_id!r} holds NaN or infinity")


def _chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, CHUNK):
        yield slice(start, min(start + CHUNK, num_rows))


def _rows(catalog: Catalog, rows: NDArray[np.int64]) -> torch.Tensor:
    """Those embeddings [k, D], copied, as float32."""
    if len(rows) and (np.diff(rows) == 1).all():  # one stretch is copied faster than many rows
        return torch.from_numpy(np.array(catalog.embeddings[rows[0] : rows[-1] + 1], dtype=np.float32))
    return torch.from_numpy(catalog.embeddings[rows].astype(np.float32, copy=False))
