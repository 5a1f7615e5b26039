"""The dataset: the shop that ships, or the user's tables."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rerankkit.config import FileLists, TableData, WorldData
from rerankkit.errors import DataError
from rerankkit.types import RunInfo

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset

TABLE_KINDS = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv.gz")


def make_dataset(config: WorldData | TableData, digests: dict[str, str], *, info: RunInfo) -> Dataset:
    """Read or simulate, filter, order and split. `digests` are the tables' hashes: they only mark the stage."""
    from rerankkit.data.dataset import build_dataset
    from rerankkit.data.tables import read_interactions, read_items

    if isinstance(config, WorldData):
        return world_dataset(config)
    interactions, items = table_sources(config)
    rows, bad_rows = read_interactions(interactions, columns=config.columns, on_bad_row=config.on_bad_row)
    catalogue, bad_items = read_items(items, columns=config.item_columns, on_bad_row=config.on_bad_row)
    dataset = build_dataset(rows, catalogue, k_core=config.k_core, split=config.split, min_rating=config.min_rating)
    if len(dataset.items) < 2:
        raise DataError(f"data: the catalogue has {len(dataset.items)} item; there must be two to put in an order.")
    bad = {"bad_interaction_rows": bad_rows.count, "bad_item_rows": bad_items.count}
    shown = {"bad_rows_first": [*bad_rows.first, *bad_items.first]} if any(bad.values()) else {}
    return replace(dataset, notes={**dataset.notes, **bad, **shown})


def world_dataset(config: WorldData) -> Dataset:
    """The simulated shop as a Dataset."""
    from rerankkit.data.dataset import build_dataset
    from rerankkit.data.tables import tables_of
    from rerankkit.data.world import make_world

    world = make_world(num_users=config.num_users, seed=config.world_seed)
    return build_dataset(*tables_of(world.interactions, world.items), k_core=0)


def table_sources(config: TableData) -> tuple[str, str]:
    """Where interactions and items are. Raises DataError when a folder does not hold them, or holds several."""
    return (
        config.interactions or _in_folder(config.folder, "interactions", ".inter"),
        config.items or _in_folder(config.folder, "items", ".item"),
    )


def source_digests(*configs: object) -> dict[str, str]:
    """sha256 of every local file that these blocks name: a changed table under an old name is a new input."""
    sources: list[str] = []
    for config in configs:
        if isinstance(config, TableData):
            sources += table_sources(config)
        if isinstance(config, TableData | WorldData):
            sources += [config.embeddings.path, *config.side.values()]
        elif isinstance(config, FileLists):
            sources += [config.train, config.valid, config.test]
    return {source: _sha256(Path(source)) for source in sources if source and not source.startswith("hf://")}


def _in_folder(folder: str, stem: str, atomic: str) -> str:
    if not folder:
        raise DataError(f'data: say where the {stem} are: data.folder = "..." or data.{stem} = "...".')
    if not Path(folder).is_dir():
        raise DataError(f"data.folder: {folder!r} is not a folder (relative paths start at the current directory).")
    found = [
        p for p in sorted(Path(folder).iterdir()) if p.name.startswith(stem + ".") and p.name.endswith(TABLE_KINDS)
    ]
    found += sorted(Path(folder).glob(f"*{atomic}"))
    if len(found) != 1:
        seen = ", ".join(path.name for path in found) or ", ".join(sorted(p.name for p in Path(folder).iterdir())[:10])
        problem = "several" if found else "no"
        raise DataError(
            f"data.folder: {folder} holds {problem} {stem}.* or *{atomic} (found: {seen}); name one with data.{stem}."
        )
    return str(found[0])


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"data: {str(path)!r} is not a file (relative paths start at the current directory).")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
