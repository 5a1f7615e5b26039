"""`rerankkit sids`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rerankkit.stages.sids import SidMap
    from rerankkit.types import Sid

app = typer.Typer(
    help="Look at a run's semantic IDs, and give some to new items.", no_args_is_help=True, rich_markup_mode=None
)
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder whose sids stage is done, or one of `sids add`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NEIGHBOURS = 5
SHOWN = 10


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder whose sids stage is done, or was stopped.")],
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as a page of its own.")] = None,
) -> None:
    """Show how good a run's SIDs are: uniqueness, use of codes, neighbours, categories, what codes mean."""
    from rerankkit.cli.console import print_scorecard
    from rerankkit.errors import UsageError
    from rerankkit.stages.scorecard import load_scorecard
    from rerankkit.store import write_text

    card = load_scorecard(run)
    if html is not None:
        from rerankkit.stages.render import render_scorecard

        try:
            write_text(html, render_scorecard(card))
        except OSError as error:
            raise UsageError(f"--html {html}: cannot be written ({error.strerror}).") from error
    if as_json:
        print(json.dumps(card))
    else:
        print_scorecard(card)
        if html is not None:
            print(f"\npage: {html}")


@app.command("add")
def add(
    run: Run,
    items: Annotated[str, typer.Argument(metavar="ITEMS", help="A table of items: a file, or hf://owner/name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE ...]", help="Settings, such as data.embeddings.path=new.parquet"),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the extended SIDs go: a new or empty folder.")],
    as_json: Json = False,
) -> None:
    """Give SIDs to new items and change none: FOLDER holds the old ones and the new ones, and suits `sids.keep`."""
    from rerankkit.cli.console import progress_bar
    from rerankkit.config import find_plugins, make_config, overridden
    from rerankkit.errors import RunFolderError
    from rerankkit.stages.sids import add_items, items_to_add, like_those_of, sids_folder
    from rerankkit.store import publish
    from rerankkit.system import prepare

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is there already; name a new or empty folder with --out.")
    raw = overridden(like_those_of(sids_folder(run), items), overrides or ())
    checked = make_config(raw, find_plugins(raw))
    table = items_to_add(checked)
    with progress_bar() as bar, prepare(checked, out) as (device, _):
        extended, known = add_items(checked, table, device=device, progress=bar)
    publish(out, extended.save)
    new = extended.table.item_ids[len(extended.sids) + len(known) - len(table) :]
    sharing = [item_id for item_id in new if len(extended.items_of(extended.sids[item_id])) > 1]
    if as_json:
        print(
            json.dumps({"out": str(out), "items": len(extended.sids), "new": new, "known": known, "sharing": sharing})
        )
        return
    print(f"{len(new):,} new items have a SID now; {len(extended.sids):,} items have one.")
    if known:
        print(f"{len(known):,} items had one already and keep it: {_some(known)}")
    if sharing:
        print(f"{len(sharing):,} new items share theirs with another item: {_some(sharing)}")
    print(f'A run takes them over with sids.keep = "{out}".')


@app.command("show")
def show(
    run: Run,
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ITEM_ID|SID ...]", help="Items, or SIDs or their beginnings: 5,7,2 or as spelled."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look SIDs up, from item to SID and back, with the items that share the longest beginning."""
    from rerankkit.stages.sids import SidMap, sids_folder

    sids = SidMap.load(sids_folder(run))
    if not what:
        facts = {"items": len(sids.sids), "codebook_sizes": sids.codebook_sizes, "made": sids.made}
        tokenizer = sids.made.get("tokenizer", {}).get("use", "unknown")
        shape = " x ".join(map(str, sids.codebook_sizes))
        print(json.dumps(facts) if as_json else f"{len(sids.sids):,} items, codebooks {shape}, tokenizer {tokenizer}")
        return
    found = [_item(sids, word) if word in sids.sids else _prefix(sids, word) for word in what]
    wanted = {row["item_id"] for one in found for row in (one, *one["items"]) if "item_id" in row}
    titles = _titles(run, wanted)
    for one in found:
        for row in (one, *one["items"]):
            if "item_id" in row:
                row["title"] = titles.get(row["item_id"], "")
    if as_json:
        print(json.dumps(found))
        return
    for one in found:
        codes = " ".join(map(str, one["sid"]))
        if "item_id" in one:
            print(f"{one['item_id']}  {one['title']}".rstrip())
            print(f"    {codes}    {one['text']}")
        else:
            print(f"{codes}  {one['num_items']:,} items")
        for row in one["items"]:
            print(f"    {' '.join(map(str, row['sid']))}  {row['item_id']}  {row['title']}".rstrip())


def _item(sids: SidMap, item_id: str) -> dict[str, Any]:
    """An item and its nearest by prefix: those that share most codes first."""
    sid = sids.sid_of(item_id)
    near: dict[str, None] = {}
    for depth in range(len(sid), 0, -1):
        near.update(dict.fromkeys(other for other in sids.items_under(sid[:depth]) if other != item_id))
        if len(near) >= NEIGHBOURS:
            break
    rows = _rows(sids, list(near)[:NEIGHBOURS])
    return {"item_id": item_id, "sid": sid, "text": sids.surface.text(sid), "items": rows}


def _prefix(sids: SidMap, word: str) -> dict[str, Any]:
    """The items under a SID or the beginning of one. Raises DataError if `word` is none."""
    import re

    from rerankkit.errors import DataError

    spelled = sids.surface.find(word)
    if spelled:
        prefix: Sid = spelled[0]
    elif re.fullmatch(r"\d{1,9}([ ,]+\d{1,9})*,?", word):
        prefix = tuple(map(int, re.findall(r"\d+", word)))
    else:
        example = next(iter(sids.sids), "")
        raise DataError(
            f"{word!r} is no item that has a SID, and no SID; an item is {example!r}, a SID "
            f"{','.join(map(str, sids.sids[example])) if example else 'such as 5,7,2'}, its beginning as well."
        )
    sizes = sids.codebook_sizes
    if len(prefix) > len(sizes) or any(code >= size for code, size in zip(prefix, sizes, strict=False)):
        raise DataError(f"{word!r}: no SID begins so; codebooks are {' x '.join(map(str, sizes))}, codes from 0.")
    under = sids.items_under(prefix)
    return {"sid": prefix, "num_items": len(under), "items": _rows(sids, under[:SHOWN])}


def _rows(sids: SidMap, item_ids: list[str]) -> list[dict[str, Any]]:
    return [{"item_id": item_id, "sid": sids.sids[item_id]} for item_id in item_ids]


def _titles(run: Path, item_ids: set[str]) -> dict[str, str]:
    """Titles of items, cleaned for the terminal, where `run` has its item table; a folder of `sids add` has none."""
    import pyarrow.parquet as pq

    from rerankkit.errors import RunFolderError
    from rerankkit.store import finished_stage
    from rerankkit.text.clean import clean

    if not item_ids:  # Arrow cannot tell the type of an empty list
        return {}
    try:
        table = finished_stage(run, "data") / "items.parquet"
    except RunFolderError:
        return {}
    rows = pq.read_table(table, columns=["item_id", "title"], filters=[("item_id", "in", sorted(item_ids))])
    return {row["item_id"]: clean(row["title"]) for row in rows.to_pylist()}


def _some(item_ids: list[str]) -> str:
    return ", ".join(item_ids[:3]) + (" ..." if len(item_ids) > 3 else "")
