"""Semantic IDs: every item gets a short tuple of codes, once and for good (GR2, stage 1a)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rerankkit.config import Embeddings, RunConfig, Sids, TableData
from rerankkit.errors import ConfigError, DataError, RerankkitError, RunFailed, RunFolderError
from rerankkit.protocols import Tokenizer
from rerankkit.stages.scorecard import make_scorecard
from rerankkit.store import finished_stage, read_json, write_json
from rerankkit.types import Catalog, Item, RunInfo, Sid, SidSurface

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.side import Spaces


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

    def codes_of(self, item_ids: Sequence[str]) -> NDArray[np.int32]:
        """[n, L]; all must be in the table."""
        return self.codes[np.array([self._rows[item_id] for item_id in item_ids], dtype=np.int64)]

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
    """How good they are, as `stages.scorecard` measures it."""
    tokenizer: Tokenizer | None = None
    """The fitted tokenizer, where there is one to save; its folder lies beside the map."""
    surface: SidSurface = field(default_factory=SidSurface)
    """How they are spelled."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """What they were drawn with: `tokenizer` (its settings), `plugin`, `seed`, `embeddings`, `dimensions`, `side`."""
    spaces: Spaces | None = None
    """What placed the items, as far as it was fitted; saved beside the map, for items that come later."""

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
        """sids.parquet, sids.json, scorecard.json, and the files of tokenizer and spaces in folders of their names."""
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
        facts = {"codebook_sizes": self.codebook_sizes, "surface": asdict(self.surface), "made": dict(self.made)}
        write_json(folder / "sids.json", facts)
        write_json(folder / "scorecard.json", dict(self.scorecard))
        for name, part in (("tokenizer", self.tokenizer), ("spaces", self.spaces)):
            if part is not None:
                (folder / name).mkdir()
                part.save(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> SidMap:
        """Read the map in a run's `stages/2-sids`, or in what `rerankkit sids add` wrote.

        Raises RunFolderError if it is not there or not whole.
        """
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
            card, made = read_json(folder / "scorecard.json"), facts["made"]
            return cls(SidTable(table["item_id"].to_pylist(), codes), sizes, card, surface=surface, made=made)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise RunFolderError(f"{folder}: no whole item <-> SID map is here ({error})") from error


def sids_folder(where: str | Path) -> Path:
    """The folder that holds the map: a run's sids stage, or `where` itself. Raises RunFolderError if there is none."""
    where = Path(where)
    if (where / "sids.json").is_file():
        return where
    if not where.is_dir():
        raise RunFolderError(f"{where}: no such folder; name a run folder, or one of `rerankkit sids add`.")
    return finished_stage(where, "sids")


def drawn_with(config: RunConfig) -> dict[str, Any]:
    """What else decides the SIDs: the stage's fingerprint covers it, and `SidMap.made` keeps it.

    Raises ConfigError if the SIDs of `sids.keep` are not there, or were drawn in another way.
    """
    tokenizer, side = config.tokenizer.resolved(), dict(config.data.side)
    how = {"tokenizer": tokenizer, "plugin": config.tokenizer.provenance(), "seed": config.seed, "side": side}
    how["plugin_files"] = list(config.plugin_files)
    if isinstance(config.data, TableData):  # how tables of later items are read, unless they say otherwise
        how["items"] = {"item_columns": dict(config.data.item_columns), "on_bad_row": config.data.on_bad_row}
    if not config.sids.keep:
        return how
    try:
        folder = sids_folder(config.sids.keep)
    except RunFolderError as error:
        raise ConfigError(f"sids.keep: {error}") from error
    try:
        made = read_json(folder / "sids.json")["made"]
        with (folder / "sids.parquet").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, KeyError) as error:
        raise ConfigError(f"sids.keep: {folder}: no whole item <-> SID map is here ({error}); draw it anew.") from error
    _check_alike(config.sids.keep, made, {**how, "embeddings": config.data.embeddings.model_dump(mode="json")})
    return {**how, "kept": digest}


def _check_alike(keep: str, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first setting that would place or spell new items otherwise than the kept ones."""
    for block, name in (("tokenizer", "tokenizer"), ("embeddings", "data.embeddings")):
        before, here = made.get(block, {}), now[block]
        keys = sorted(before.keys() & here.keys(), key=lambda key: (key != "use", key))
        if block == "embeddings":
            keys = ["use", *{"tfidf": ["dim"], "sentence-transformers": ["model"]}.get(here["use"], [])]
        for key in keys:
            if before.get(key) != here[key]:
                was = f"{name}.{key} = {json.dumps(before.get(key))}"
                raise ConfigError(
                    f"sids.keep: {keep} was drawn with {was}, and this config says {json.dumps(here[key])}; "
                    f"set {was}, or leave sids.keep out and have all SIDs drawn anew."
                )


def draw_sids(
    tokenizer: Tokenizer,
    sids: Sids,
    embeddings: Embeddings,
    dataset: Dataset,
    how: Mapping[str, Any] | None = None,
    *,
    info: RunInfo,
) -> SidMap:
    """Fit the tokenizer on the catalogue and encode it; or, with `sids.keep`, give SIDs to what is new in it.

    `how` is what `drawn_with` told. Raises RunFailed for codes outside the codebooks, and for a kept SID that changed.
    """
    from rerankkit.data.side import Spaces

    how = how or {}
    spaces, old, folder = Spaces(), None, None
    if sids.keep:
        folder = sids_folder(sids.keep)
        old, spaces = SidMap.load(folder), Spaces.load(folder / "spaces", tfidf=embeddings.use == "tfidf")
        tokenizer.load(folder / "tokenizer")
    catalog = make_catalog(embeddings, dataset, info, how.get("side", {}), spaces)
    dimensions = catalog.embeddings.shape[1]
    if old is None:
        tokenizer.fit(catalog)
    elif dimensions != old.made.get("dimensions", dimensions):
        raise DataError(
            f"sids.keep: {folder} was drawn from vectors of {old.made['dimensions']} dimensions, not {dimensions}; "
            "new items need vectors of the same kind."
        )
    codes = _codes(tokenizer, catalog, how)
    sizes, item_ids = tuple(tokenizer.codebook_sizes), [item.item_id for item in catalog.items]
    table = SidTable(item_ids, codes) if old is None else _extended(old, item_ids, codes, sizes, how)
    made = {**how, "embeddings": embeddings.model_dump(mode="json"), "dimensions": dimensions}
    fitted = spaces if spaces.tfidf or spaces.collaborative else None
    card = make_scorecard(codes, sizes, catalog, tokenizer, seed=info.seed)
    return SidMap(table, sizes, card, tokenizer, info.surface, made, fitted)


def like_those_of(folder: Path, items: str = "") -> dict[str, Any]:
    """A config, not yet checked, that gives the items of a table SIDs as those of `folder`'s map were given theirs.

    Raises RunFolderError if the map does not tell how.
    """
    made = read_json(folder / "sids.json").get("made", {})
    if "tokenizer" not in made:
        raise RunFolderError(f"{folder / 'sids.json'} does not tell which tokenizer drew these SIDs; draw them anew.")
    like = {**made.get("items", {}), "embeddings": made["embeddings"], "side": made["side"]}
    return {
        "seed": made["seed"],
        "plugin_files": made.get("plugin_files", []),
        "data": {"use": "tables", "items": items, **like},
        "sids": {"keep": str(folder)},
        "tokenizer": made["tokenizer"],
    }


def items_to_add(config: RunConfig) -> tuple[Item, ...]:
    """The items of `config.data.items`, each once. Raises ConfigError if they could not join those of `sids.keep`."""
    from rerankkit.data.dataset import items_in
    from rerankkit.data.tables import read_items

    data = config.data
    if not isinstance(data, TableData):
        raise ConfigError(f'data.use: {data.use!r} has no new items; set data.use = "tables" and data.items.')
    drawn_with(config)
    rows, _ = read_items(data.items, columns=data.item_columns, on_bad_row=data.on_bad_row)
    return tuple(items_in(rows[~rows.duplicated("item_id")]))


def add_items(config: RunConfig, items: tuple[Item, ...], **info: Any) -> tuple[SidMap, list[str]]:
    """The map of `sids.keep` with SIDs for those items that it has not, in the order of `items`; and who was known.

    Its tokenizer and spaces stand. `info` sets fields of RunInfo. Raises RunFailed for what a plugin raises.
    """
    from rerankkit.data.dataset import Dataset
    from rerankkit.math.sids import sid_scorecard

    how, about = drawn_with(config), RunInfo(config.seed, **info)
    had = SidMap.load(sids_folder(config.sids.keep)).sids
    try:
        tokenizer = config.tokenizer.build(about)
        extended = draw_sids(tokenizer, config.sids, config.data.embeddings, Dataset(items, {}, {}), how, info=about)
    except RerankkitError:
        raise
    except Exception as error:
        if config.tokenizer.spec.distribution == "rerankkit":
            raise
        raise RunFailed(f"{_named(how)}: {type(error).__name__}: {error}. Nothing was written.") from error
    card = sid_scorecard(extended.table.codes, extended.codebook_sizes)  # of all, not of `items` alone
    return replace(extended, scorecard=card), [item.item_id for item in items if item.item_id in had]


def _codes(tokenizer: Tokenizer, catalog: Catalog, how: Mapping[str, Any]) -> NDArray[np.int64]:
    codes = np.asarray(tokenizer.encode(catalog))
    sizes = tuple(tokenizer.codebook_sizes)
    fits = codes.shape == (len(catalog.items), len(sizes)) and np.issubdtype(codes.dtype, np.integer)
    if not fits or (codes < 0).any() or (codes >= np.array(sizes)).any():
        values = f"from {codes.min()} to {codes.max()}" if codes.size else "none"
        raise RunFailed(
            f"{_named(how)}: encode gave codes of shape {codes.shape}, {codes.dtype} {values}; "
            f"expected whole numbers [{len(catalog.items)}, {len(sizes)}] below the codebook sizes {sizes}. "
            "Its plugin is at fault."
        )
    return codes


def _extended(
    old: SidMap, item_ids: Sequence[str], codes: NDArray[np.int64], sizes: tuple[int, ...], how: Mapping[str, Any]
) -> SidTable:
    """The old map and what is new, in this order. Raises RunFailed if an item that had a SID has another now."""
    if sizes != old.codebook_sizes:
        raise RunFailed(
            f"{_named(how)}: codebook sizes {sizes} after load; the kept SIDs have {old.codebook_sizes}. "
            "Its plugin is at fault."
        )
    rows = {item_id: row for row, item_id in enumerate(item_ids) if item_id in old.sids}
    now, before = codes[list(rows.values())], old.table.codes_of(list(rows))
    moved = np.flatnonzero((now != before).any(axis=1)).tolist()
    if moved:
        here, there = (tuple(found[moved[0]].tolist()) for found in (now, before))
        raise RunFailed(
            f"{_named(how)}: gave another SID to {len(moved):,} of {len(rows):,} items that have one, the first of "
            f"them {list(rows)[moved[0]]!r}: {here} in place of {there}. A SID is for life: its plugin is at fault."
        )
    new = {item_id: row for row, item_id in enumerate(item_ids) if item_id not in old.sids}
    return SidTable([*old.table.item_ids, *new], np.concatenate([old.table.codes, codes[list(new.values())]]))


def _named(how: Mapping[str, Any]) -> str:
    """`tokenizer 'rqvae' (plugin gr2, rerankkit 0.1.0)`, as far as it is known."""
    plugin = how.get("plugin")
    if not plugin:
        return "tokenizer"
    whose = f"plugin {plugin['plugin']}, {plugin['distribution']} {plugin['version']}".strip(" ,")
    return f"tokenizer {plugin['name']!r} ({whose})"


def make_catalog(
    embeddings: Embeddings,
    dataset: Dataset,
    info: RunInfo,
    side: Mapping[str, str] | None = None,
    spaces: Spaces | None = None,
) -> Catalog:
    """Items, their vectors, which follow one another in training, and side matrices for who asks.

    Spaces that are not fitted yet are fitted, and left in `spaces`. Vectors that are made or copied lie in `info.work`.
    """
    from rerankkit.data.dataset import co_engaged_pairs
    from rerankkit.data.embed import Tfidf, embed, item_text, read_vectors
    from rerankkit.data.side import Collaborative, SideMatrices, Spaces

    spaces = spaces if spaces is not None else Spaces()
    texts = [item_text(item) for item in dataset.items]
    item_ids = [item.item_id for item in dataset.items]

    def file(name: str) -> Path | None:
        return info.work / f"{name}.npy" if info.work is not None else None

    if embeddings.use == "tfidf":
        spaces.tfidf = spaces.tfidf or Tfidf.fit(texts, embeddings.dim, info.seed)
        vectors = spaces.tfidf.vectors(texts, into=file("embeddings"), progress=info.progress)
    else:
        vectors = embed(
            texts,
            use=embeddings.use,
            model=embeddings.model,
            device=info.device,
            path=embeddings.path or None,
            item_ids=item_ids,
            into=file("embeddings"),
            progress=info.progress,
        )

    def collaborative() -> NDArray[np.float32]:
        spaces.collaborative = spaces.collaborative or Collaborative.fit(dataset, seed=info.seed)
        return spaces.collaborative.vectors(dataset)

    makers: dict[str, Callable[[], NDArray[np.float32]]] = {"collaborative": collaborative}
    for name, path in (side or {}).items():
        makers[name] = partial(read_vectors, path, len(item_ids), item_ids, into=file(f"side-{name}"))
    return Catalog(dataset.items, np.asarray(vectors), co_engaged_pairs(dataset), SideMatrices(makers))
