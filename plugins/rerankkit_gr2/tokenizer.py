"""Tokenizers: residual k-means, and GR2's RQ-VAE.

An item's SID is for life: both keep the SIDs they gave in a `SidBook`, which is part of the artifact, and answer from
it. Only items that are not in it are encoded, and they take no code that is taken.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment

from rerankkit.errors import DataError, RunFolderError
from rerankkit.types import Catalog, Item
from rerankkit_gr2.kmeans import CHUNK, POINTS_PER_CODE, fit_residual_kmeans, residual_codes
from rerankkit_gr2.rqvae import RqVaeNet, Training, train

_FORMAT = 1
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
        return self.codes[[self._rows[item.item_id] for item in items]]


@dataclass(kw_only=True, eq=False)
class ResidualKMeans:
    """Residual k-means: fast, and the same for the same input.

    With `reassign`, items that would share a SID get the last codes of their prefix dealt out so that all differ and
    the sum of squared errors is least (a linear assignment). Room lasts for `codes` items a prefix; those beyond it
    keep their nearest code, and share it. Fitted on at most 256 rows a code; encoded in chunks.
    """

    levels: int = 4
    codes: int = 256
    seed: int = 0
    iterations: int = 25
    reassign: bool = True
    _codebooks: torch.Tensor | None = field(default=None, init=False, repr=False)
    """[L, C, D]"""
    _book: SidBook = field(init=False, repr=False)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes at each level, coarse to fine."""
        return (self.codes,) * self.levels

    def fit(self, catalog: Catalog) -> None:
        """Learn the codebooks, and give every item its SID."""
        _check(catalog)
        rng = np.random.default_rng(self.seed)
        rows = np.arange(len(catalog.items))
        if len(rows) > self.codes * POINTS_PER_CODE:
            rows = np.sort(rng.choice(rows, self.codes * POINTS_PER_CODE, replace=False))
        points = torch.from_numpy(catalog.embeddings[rows].astype(np.float32, copy=False))  # an index is a copy
        self._codebooks = fit_residual_kmeans(points, self.levels, self.codes, self.iterations, self.seed)
        self._book = SidBook([], np.empty((0, self.levels), dtype=np.int64))
        self.encode(catalog)

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """SIDs [N, L]: those given before; an item that is new takes its own now, and keeps it."""
        codebooks = _fitted(self._codebooks)
        new = self._book.strangers(catalog.items)
        if len(new):
            _check(catalog, codebooks.shape[2])
            codes = _in_chunks(catalog, new, lambda points: residual_codes(points, codebooks))
            if self.reassign:
                self._settle(catalog, new, codes)
            self._book.add([catalog.items[i].item_id for i in new], codes)
        return self._book.sids(catalog.items)

    def _settle(self, catalog: Catalog, new: NDArray[np.int64], codes: NDArray[np.int64]) -> None:
        """Change last codes, in place, until nobody of `codes` [n, L] shares a SID while there is room."""
        codebooks = _fitted(self._codebooks)
        for prefix, taken, rows in _by_prefix(self._book.codes, codes, self.codes):
            wanted = codes[rows, -1]
            if len(np.unique(wanted)) == len(rows) and not np.isin(wanted, taken).any():
                continue
            free = np.setdiff1d(np.arange(self.codes), taken)
            left = torch.from_numpy(catalog.embeddings[new[rows]].astype(np.float32, copy=False))
            for level, code in enumerate(prefix):
                left = left - codebooks[level, code]
            last = codebooks[-1][torch.from_numpy(free)]
            costs = last.square().sum(dim=1) - 2 * left @ last.T  # |left - last|^2 but for |left|^2
            who, what = linear_sum_assignment(costs.double().numpy())
            codes[rows[who], -1] = free[what]

    def save(self, folder: Path) -> None:
        """Write tensors and facts; no pickle."""
        _save(folder, "residual-kmeans", self, self._book, {"codebooks": _fitted(self._codebooks)})

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, settings included. Raises RunFolderError if it is not there or not whole."""
        tensors, self._book = _load(folder, "residual-kmeans", self)
        self._codebooks = tensors["codebooks"]


@dataclass(kw_only=True, eq=False)
class RqVae:
    """GR2's tokenizer (Liang et al. 2026, 2602.07774): a residual-quantised autoencoder, each technique its own switch.

    With `random_last` the last code is not the nearest one: each prefix deals its codes out from a deck of its own,
    shuffled by (seed, prefix), unused ones first. SIDs are then unique while no prefix has more than `codes` items.
    """

    levels: int = 4
    codes: int = 256
    seed: int = 0
    latent: int = 32
    hidden: tuple[int, ...] = (256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    epochs: int = 40
    min_steps: int = 400
    """A small catalogue gets more epochs, until it has seen this many batches."""
    batch_size: int = 256
    learning_rate: float = 1e-3
    commitment: float = 0.25
    kmeans_init: bool = True
    ema: bool = True
    decay: float = 0.95
    diversity: float = 0.01
    """Weight of the diversity loss; 0 = off."""
    dead_code_reset: int = 50
    """Batches after which an unused code moves to where the error is worst; 0 = off."""
    random_last: bool = True
    _net: RqVaeNet | None = field(default=None, init=False, repr=False)
    _book: SidBook = field(init=False, repr=False)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes at each level, coarse to fine."""
        return (self.codes,) * self.levels

    def fit(self, catalog: Catalog) -> None:
        """Train the autoencoder, and give every item its SID."""
        _check(catalog)
        self._net = self._new_net(catalog.embeddings.shape[1])
        how = Training(**{each.name: getattr(self, each.name) for each in fields(Training)})
        train(catalog.embeddings, self._net, how)
        self._book = SidBook([], np.empty((0, self.levels), dtype=np.int64))
        self.encode(catalog)

    def encode(self, catalog: Catalog) -> NDArray[np.int64]:
        """SIDs [N, L]: those given before; an item that is new takes its own now, and keeps it."""
        net = _fitted(self._net)
        new = self._book.strangers(catalog.items)
        if len(new):
            _check(catalog, len(net.centre))
            codes = _in_chunks(catalog, new, net.codes)
            if self.random_last:
                self._deal(codes)
            self._book.add([catalog.items[i].item_id for i in new], codes)
        return self._book.sids(catalog.items)

    def _deal(self, codes: NDArray[np.int64]) -> None:
        """Replace the last codes of `codes` [n, L], in place, by the next free ones of each prefix's deck."""
        for prefix, taken, rows in _by_prefix(self._book.codes, codes, self.codes):
            deck = np.random.default_rng([self.seed, *prefix]).permutation(self.codes)
            free = np.concatenate([deck[~np.isin(deck, taken)], deck])
            codes[rows, -1] = np.resize(free, len(rows)) if len(rows) > len(free) else free[: len(rows)]

    def save(self, folder: Path) -> None:
        """Write tensors and facts; no pickle."""
        _save(folder, "rqvae", self, self._book, _fitted(self._net).state_dict())

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote, settings included. Raises RunFolderError if it is not there or not whole."""
        tensors, self._book = _load(folder, "rqvae", self)
        self.hidden = tuple(self.hidden)  # JSON gives a list
        self._net = self._new_net(len(tensors["centre"]))
        self._net.load_state_dict(tensors)

    def _new_net(self, dimensions: int) -> RqVaeNet:
        with torch.random.fork_rng(devices=[]):  # nobody else's random numbers may depend on whether we fit or load
            torch.manual_seed(self.seed)
            return RqVaeNet(dimensions, self.levels, self.codes, self.latent, self.hidden)


def _fitted(state: Any) -> Any:
    if state is None:
        raise RuntimeError("a tokenizer has no SIDs before fit() or load()")
    return state


def _check(catalog: Catalog, dimensions: int | None = None) -> None:
    shape = catalog.embeddings.shape
    if len(shape) != 2 or shape[0] != len(catalog.items) or not all(shape):
        raise DataError(f"catalogue: embeddings must be [N, D] with N = {len(catalog.items)} items, not {shape}")
    if dimensions is not None and shape[1] != dimensions:
        raise DataError(f"catalogue: embeddings have {shape[1]} dimensions; the tokenizer was fitted on {dimensions}")
    for start in range(0, shape[0], CHUNK):
        finite = np.isfinite(catalog.embeddings[start : start + CHUNK]).all(axis=1)
        if not finite.all():
            item_id = catalog.items[start + int(np.argmin(finite))].item_id
            raise DataError(f"catalogue: the embedding of item {item_id!r} holds NaN or infinity")


def _in_chunks(catalog: Catalog, rows: NDArray[np.int64], codes_of: Any) -> NDArray[np.int64]:
    """Codes [n, L] of those rows, few embeddings at a time."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        points = catalog.embeddings[rows[start : start + CHUNK]].astype(np.float32, copy=False)
        parts.append(codes_of(torch.from_numpy(points)).numpy())
    return np.concatenate(parts)


def _by_prefix(
    taken: NDArray[np.int64], codes: NDArray[np.int64], num_codes: int
) -> Iterator[tuple[tuple[int, ...], NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of `codes` [n, L] by all but the last code: prefix, last codes that `taken` [M, L] has there, rows."""
    both = np.concatenate([taken, codes])
    groups = np.zeros(len(both), dtype=np.int64)
    for level in range(both.shape[1] - 1):  # numbered anew at each level: the product of all sizes may overflow
        _, groups = np.unique(groups * num_codes + both[:, level], return_inverse=True)
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        rows = members[members >= len(taken)] - len(taken)
        if len(rows):
            yield tuple(codes[rows[0], :-1].tolist()), taken[members[members < len(taken)], -1], rows


def _save(folder: Path, kind: str, tokenizer: Any, book: SidBook, tensors: dict[str, torch.Tensor]) -> None:
    settings = {each.name: getattr(tokenizer, each.name) for each in fields(tokenizer) if each.init}
    facts = {"format": _FORMAT, "kind": kind, "settings": settings, "item_ids": book.item_ids}
    save_file({**tensors, "book": torch.from_numpy(book.codes.astype(np.int32))}, folder / _TENSORS)
    (folder / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _load(folder: Path, kind: str, tokenizer: Any) -> tuple[dict[str, torch.Tensor], SidBook]:
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
        if (facts["format"], facts["kind"]) != (_FORMAT, kind):
            raise RunFolderError(
                f"{folder / _FACTS}: holds a {facts['kind']!r} tokenizer in format {facts['format']},"
                f" not {kind!r} in format {_FORMAT}; fit it again or name the other one"
            )
        known = {each.name for each in fields(tokenizer) if each.init}
        for name in known:
            setattr(tokenizer, name, facts["settings"][name])
        codes = tensors.pop("book").numpy().astype(np.int64)
        if codes.shape != (len(facts["item_ids"]), tokenizer.levels):
            raise ValueError(f"{len(facts['item_ids'])} items and SIDs {codes.shape}")
        return tensors, SidBook(facts["item_ids"], codes)
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise RunFolderError(f"{folder}: no whole {kind!r} tokenizer is here ({error}); fit it again") from error
