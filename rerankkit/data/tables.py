"""Reading interactions and items from the formats that people have, with every bad row known by file and line."""

from __future__ import annotations

import ast
import csv
import gzip
import html
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

import numpy as np
import pandas as pd

from rerankkit.errors import DataError, did_you_mean
from rerankkit.types import Interaction, Item

OnBadRow: TypeAlias = Literal["refuse", "skip"]

INTERACTION_ALIASES: Mapping[str, tuple[str, ...]] = {
    "user_id": ("user_id", "reviewerID", "userId", "user", "uid"),
    "item_id": ("item_id", "parent_asin", "asin", "itemId", "movieId", "product_id", "item", "iid"),
    "timestamp": ("timestamp", "unixReviewTime", "sort_timestamp", "unix_time", "time", "ts", "position"),
    "rating": ("rating", "overall", "stars"),
    "split": ("split",),
}
"""Our column -> the names it is recognised by, best first. Amazon 2014/2018: reviewerID, asin, unixReviewTime, overall;
2023: user_id, parent_asin (its `asin` is a variant and is not what the item table is keyed by), timestamp in ms."""

ITEM_ALIASES: Mapping[str, tuple[str, ...]] = {
    "item_id": ("item_id", "parent_asin", "asin", "itemId", "movieId", "product_id", "item", "iid"),
    "title": ("title", "item_name", "product_title", "movie_title", "name"),
    "categories": ("categories", "category", "genres", "genre", "class", "main_category", "main_cat"),
    "description": ("description", "desc", "features", "feature"),
    "brand": ("brand", "store", "manufacturer"),
    "price": ("price",),
    "keywords": ("keywords", "tags"),
}

NO_TITLE = "untitled"
"""The title of an item about which nothing at all is known; its raw id is never shown instead."""

_SHOWN = 5
_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".inter", ".item")


@dataclass(frozen=True)
class BadRows:
    """The rows that could not be used: how many, of how many, and what the first few look like."""

    source: str
    count: int = 0
    num_rows: int = 0
    """Rows seen, the bad ones among them."""
    first: tuple[str, ...] = ()
    """`file:line: reason: the row's beginning`, the earliest five."""

    def __str__(self) -> str:
        return "\n".join([f"{self.source}: {self.count:,} of {self.num_rows:,} rows are malformed", *self.first])


@dataclass
class _Raw:
    """A table as it was read: values untouched, each row with its line, and the rows that could not be read."""

    source: str
    unit: Literal["line", "row"]
    columns: dict[str, list[Any]]
    lines: list[int]
    found: list[str]
    """Every column name in the source, wanted or not."""
    problems: list[tuple[int, str, str]] = field(default_factory=list)
    """(line, reason, the row's beginning)"""


def read_interactions(
    source: str | Path, *, columns: Mapping[str, str] | None = None, on_bad_row: OnBadRow = "refuse"
) -> tuple[pd.DataFrame, BadRows]:
    """Read who engaged with what, when: user_id, item_id (str), timestamp, rating (float; NaN if none)[, split].

    `source` is a file (.parquet, .csv, .tsv, .jsonl, .json, RecBole .inter; text also .gz) or
    `hf://owner/name[:config][:split]`. `columns` maps our name to the table's. Rows stay in the order of the source,
    which is what breaks ties of time later. A row without user or item, or without a finite
    number as timestamp, is bad. Raises DataError.
    """
    raw = _read(source, INTERACTION_ALIASES, columns or {})
    names = _resolve(raw, INTERACTION_ALIASES, columns or {}, required=("user_id", "item_id", "timestamp"))
    frame = pd.DataFrame(
        {
            "user_id": [as_id(value) for value in raw.columns[names["user_id"]]],
            "item_id": [as_id(value) for value in raw.columns[names["item_id"]]],
            "timestamp": np.array([_time(value) for value in raw.columns[names["timestamp"]]], dtype=np.float64),
            "rating": _numbers(raw.columns[names["rating"]]) if "rating" in names else np.nan,
        }
    )
    reasons = {
        "no user_id": frame["user_id"] == "",
        "no item_id": frame["item_id"] == "",
        f"{names['timestamp']} is neither a finite number nor an ISO date": ~np.isfinite(frame["timestamp"]),
    }
    if "rating" in names:
        given = np.array([not _is_missing(value) for value in raw.columns[names["rating"]]], dtype=bool)
        reasons[f"{names['rating']} is not a finite number"] = given & ~np.isfinite(frame["rating"])
    if "split" in names:
        frame["split"] = [as_id(value) for value in raw.columns[names["split"]]]
    return _without_bad(raw, frame, reasons, on_bad_row)


def read_items(
    source: str | Path, *, columns: Mapping[str, str] | None = None, on_bad_row: OnBadRow = "refuse"
) -> tuple[pd.DataFrame, BadRows]:
    """Read the catalogue: item_id, title, categories (list of str, broad to narrow), description, brand, price, titled.

    Same sources as `read_interactions`, and RecBole .item. Of several category paths the first is taken. An item
    without title is called by its keywords, else its brand and narrowest categories, else `untitled`, and has `titled`
    False. `price` is a float, NaN where the table has none that can be read. Raises DataError.
    """
    raw = _read(source, ITEM_ALIASES, columns or {})
    names = _resolve(raw, ITEM_ALIASES, columns or {}, required=("item_id",))
    if not {"title", "keywords", "categories", "brand"} & names.keys():
        raise DataError(_missing_column(raw, "title", ITEM_ALIASES))
    size = len(raw.lines)

    def values(name: str) -> list[Any]:
        return raw.columns[names[name]] if name in names else [None] * size

    item_ids = [as_id(value) for value in values("item_id")]
    categories = [_category_path(value) for value in values("categories")]
    for fallback in ("main_category", "main_cat"):  # 2023 and 2018 rows whose path is an empty list
        if fallback in raw.columns and fallback != names.get("categories"):
            rough = raw.columns[fallback]
            categories = [path or _category_path(value) for path, value in zip(categories, rough, strict=True)]
    brands = [_text(value) for value in values("brand")]
    own_titles = [_text(value) for value in values("title")]
    titled = [title not in ("", item_id) for title, item_id in zip(own_titles, item_ids, strict=True)]
    titles = [
        title if ok else _text(keywords) or " ".join([brand, *path[-2:]]).strip() or NO_TITLE
        for title, ok, keywords, brand, path in zip(
            own_titles, titled, values("keywords"), brands, categories, strict=True
        )
    ]
    frame = pd.DataFrame(
        {
            "item_id": item_ids,
            "title": titles,
            "categories": pd.Series(categories, dtype=object),
            "description": [_text(value) for value in values("description")],
            "brand": brands,
            "price": np.array([_price(value) for value in values("price")], dtype=np.float64),
            "titled": np.array(titled, dtype=bool),
        }
    )
    return _without_bad(raw, frame, {"no item_id": frame["item_id"] == ""}, on_bad_row)


# ---- sources ---------------------------------------------------------------------------------------------------------


def _read(source: str | Path, aliases: Mapping[str, tuple[str, ...]], columns: Mapping[str, str]) -> _Raw:
    for name in columns:
        if name not in aliases:
            raise DataError(f"{_key(aliases)}: {name!r} is none of our columns; {did_you_mean(name, aliases)}")
    wanted = {alias for group in aliases.values() for alias in group} | set(columns.values())
    if str(source).startswith("hf://"):
        return _read_hub(str(source), wanted)
    path = Path(source)
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in _SUFFIXES:
        raise DataError(f"{path}: a table ends in {', '.join(_SUFFIXES)} (text also .gz), or is hf://owner/name")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if kind == ".parquet":
        return _read_parquet(path, wanted)
    try:
        # surrogateescape: a row that is no UTF-8 is then one bad row, found below, and not the end of the reading
        with _open(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="") as text:
            if kind in (".jsonl", ".json"):
                return _read_json(path, text, wanted)
            return _read_delimited(path, text, wanted, "," if kind == ".csv" else "\t", kind in (".inter", ".item"))
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({error})") from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_hub(source: str, wanted: set[str]) -> _Raw:
    data = hub_dataset(source)
    kept = data.select_columns([column for column in data.column_names if column in wanted])
    return _from_arrow(source, kept.with_format("arrow")[:], list(data.column_names))


def hub_dataset(source: str) -> Any:
    """The data set that `hf://owner/name[:config][:split]` names. Raises DataError."""
    from datasets import load_dataset

    name, config, split, *rest = [*source.removeprefix("hf://").split(":"), "", ""]
    if name.count("/") != 1 or any(rest):
        raise DataError(f"{source}: write hf://owner/name, hf://owner/name:config or hf://owner/name:config:split")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets raises a dozen kinds; each is the user's to read
        raise DataError(f"{source}: cannot be read from the Hub: {error}") from error


def _read_parquet(path: Path, wanted: set[str]) -> _Raw:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = list(pq.read_schema(path).names)
        table = pq.read_table(path, columns=[column for column in found if column in wanted])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a parquet file that can be read: {error}") from error
    return _from_arrow(str(path), table, found)


def _from_arrow(source: str, table: Any, found: list[str]) -> _Raw:
    import pyarrow as pa

    kept: dict[str, list[Any]] = {}
    for column in table.column_names:
        values = table[column]
        if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
            micros = values.cast(pa.timestamp("us")).cast(pa.int64()).to_pylist()
            kept[column] = [None if value is None else value / 1e6 for value in micros]  # seconds
        else:
            kept[column] = values.to_pylist()
    return _Raw(source, "row", kept, list(range(1, table.num_rows + 1)), found)


def _read_delimited(path: Path, text: TextIO, wanted: set[str], delimiter: str, atomic: bool) -> _Raw:
    tab_separated = delimiter == "\t"  # where a lone quote is just a character
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tab_separated else csv.reader(text)
    header = next(reader, None)
    if not header:
        raise DataError(f"{path}: is empty; its first line should name the columns")
    kinds = {name: kind for name, _, kind in (cell.partition(":") for cell in header)} if atomic else {}
    found = [cell.partition(":")[0] if atomic else cell.strip() for cell in header]
    if len(set(found)) < len(found):
        raise DataError(f"{path}:1: a column name stands twice: {', '.join(found)}")
    places = [(place, name, kinds.get(name) == "token_seq") for place, name in enumerate(found) if name in wanted]
    raw = _Raw(str(path), "line", {name: [] for _, name, _ in places}, [], found)
    last = reader.line_num
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return raw
        except csv.Error as error:
            raw.problems.append((last + 1, str(error), ""))
            last = reader.line_num
            continue
        start, last = last + 1, reader.line_num
        if not row or row == [""]:
            continue
        if len(row) != len(header):
            span = f" (the row runs to line {last}: an unclosed quote?)" if last > start else ""
            raw.problems.append((start, f"{len(row)} fields instead of {len(header)}{span}", delimiter.join(row)))
        elif not _is_utf8(joined := delimiter.join(row)):
            raw.problems.append((start, "is not UTF-8", joined))
        else:
            for place, name, sequence in places:
                raw.columns[name].append(row[place].split(" ") if sequence else row[place])
            raw.lines.append(start)


def _read_json(path: Path, text: TextIO, wanted: set[str]) -> _Raw:
    records: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str, str]] = []
    found: dict[str, None] = {}
    for number, line in _json_lines(path, text):
        if isinstance(line, str):
            try:
                record = _loads(line)
            except ValueError as error:
                problems.append((number, f"is no JSON object ({error})", line))
                continue
        else:
            record = line
        if not isinstance(record, dict):
            problems.append((number, "is no JSON object", str(line)))
            continue
        found.update(dict.fromkeys(record))
        records.append((number, {name: value for name, value in record.items() if name in wanted}))
    kept = {name: [record.get(name) for _, record in records] for name in found if name in wanted}
    return _Raw(str(path), "line", kept, [number for number, _ in records], list(found), problems)


def _json_lines(path: Path, text: TextIO) -> Iterator[tuple[int, Any]]:
    """(line number, line), or (place, record) when the whole file is one JSON list."""
    for number, line in enumerate(text, 1):
        if number == 1 and line.lstrip().startswith("["):
            try:
                yield from enumerate(json.loads(line + text.read()), 1)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: begins with a list but is no JSON: {error}") from error
            return
        if line.strip():
            yield number, line.rstrip("\r\n")


def _loads(line: str) -> Any:
    """One JSON value; or a Python literal, which the loose lines of the 2014 dumps are. Never evaluated."""
    if not _is_utf8(line):
        raise ValueError("not UTF-8")
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as strict:
        if not line.lstrip().startswith("{"):
            raise
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # '\d' in a description is text here
                return ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise strict from None


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- columns and rows ------------------------------------------------------------------------------------------------


def _resolve(
    raw: _Raw, aliases: Mapping[str, tuple[str, ...]], columns: Mapping[str, str], required: Sequence[str]
) -> dict[str, str]:
    """Our name -> the table's, for every column that is there."""
    if not raw.found and raw.problems:
        raise DataError(_report(_bad_rows(raw)))
    names: dict[str, str] = {}
    for name, tried in aliases.items():
        if name in columns:
            if columns[name] not in raw.found:
                raise DataError(
                    f"{raw.source}: {_key(aliases)}.{name} = {columns[name]!r}, but there is no such column; "
                    f"{did_you_mean(columns[name], raw.found)}"
                )
            names[name] = columns[name]
        elif hit := next((alias for alias in tried if alias in raw.found), None):
            names[name] = hit
    for name in required:
        if name not in names:
            raise DataError(_missing_column(raw, name, aliases))
    return names


def _missing_column(raw: _Raw, name: str, aliases: Mapping[str, tuple[str, ...]]) -> str:
    return (
        f"{raw.source}: no column for {name}; tried {', '.join(aliases[name])}; {did_you_mean(name, raw.found)} "
        f'Say which it is: {_key(aliases)}.{name} = "..."'
    )


def _key(aliases: Mapping[str, tuple[str, ...]]) -> str:
    """Where a config maps these columns."""
    return "data.columns" if aliases is INTERACTION_ALIASES else "data.item_columns"


def _without_bad(
    raw: _Raw, frame: pd.DataFrame, reasons: Mapping[str, Any], on_bad_row: OnBadRow
) -> tuple[pd.DataFrame, BadRows]:
    bad = np.zeros(len(frame), dtype=bool)
    for reason, rows in reasons.items():
        for index in np.flatnonzero(np.asarray(rows, dtype=bool) & ~bad):
            row = ", ".join(f"{name}={values[index]!r:.40}" for name, values in raw.columns.items())
            raw.problems.append((raw.lines[index], reason, row))
        bad |= np.asarray(rows, dtype=bool)
    bad_rows = _bad_rows(raw)
    if bad_rows.count and on_bad_row == "refuse":
        raise DataError(_report(bad_rows))
    kept = frame[~bad].reset_index(drop=True)
    if kept.empty:
        raise DataError(f"{bad_rows}\nNo usable row is left." if bad_rows.count else f"{raw.source}: has no rows")
    return kept, bad_rows


def _bad_rows(raw: _Raw) -> BadRows:
    worst = sorted(raw.problems)[:_SHOWN]
    parse_problems = len(raw.problems) - sum(line in set(raw.lines) for line, _, _ in raw.problems)
    first = tuple(f"{raw.source}:{line}: {reason}: {_shown(row)}" for line, reason, row in worst)
    if raw.unit == "row":
        first = tuple(f"{raw.source}, row {line}: {reason}: {_shown(row)}" for line, reason, row in worst)
    return BadRows(raw.source, len(raw.problems), len(raw.lines) + parse_problems, first)


def _report(bad_rows: BadRows) -> str:
    return f'{bad_rows}\nMend them, or leave them out with data.on_bad_row = "skip" (they are then counted).'


def _shown(row: str) -> str:
    """The beginning of a row, safe to print."""
    return ascii(row[:80])[1:-1] if not _is_utf8(row) else "".join(c if c.isprintable() else " " for c in row[:80])


# ---- values ----------------------------------------------------------------------------------------------------------


def as_id(value: Any) -> str:
    """An id as text: `7`, `7.0` and `"7"` are the same one; `"007"` is another. Empty when there is none."""
    if _is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)) or value == ""


def _numbers(values: list[Any]) -> Any:
    """Float64 [N]; NaN where a value is missing or no number."""
    return np.array([_number(value) for value in values], dtype=np.float64)


def _number(value: Any) -> float:
    try:
        return float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _time(value: Any) -> float:
    """Seconds since 1970 of a date or an ISO text of one (UTC unless it says otherwise); numbers as they are."""
    if isinstance(value, str) and math.isnan(_number(value)):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            return math.nan
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return _number(value)


def _text(value: Any) -> str:
    """Plain text on one line of whatever a table holds: text, a list of texts, nothing. HTML entities are resolved."""
    if isinstance(value, (list, tuple)):
        return " ".join(filter(None, (_text(part) for part in value)))
    if isinstance(value, Mapping) or _is_missing(value):
        return ""
    text = str(value)
    return " ".join((html.unescape(text) if "&" in text else text).split())


def _category_path(value: Any) -> list[str]:
    """The first path, broad to narrow: of a list of lists, of a list, of `A > B | A > C`; flat `A|B` is taken whole."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                return _category_path(_loads('{"path": ' + text + "}")["path"])
            except (ValueError, TypeError, KeyError):
                pass
        parts: Sequence[Any] = text.split("|")[0].split(">") if ">" in text else text.split("|")
    elif isinstance(value, (list, tuple)):
        first = next((part for part in value if part), None)
        if isinstance(first, (list, tuple)):
            return _category_path(first)
        parts = value
    else:
        return []
    return [text for text in (_text(part) for part in parts) if text]


_AMOUNT = r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?)"
_MARK = r"(?:[A-Z]{3}|[$€£¥₹]|US\$)?"
_PRICE = re.compile(rf"(?:from\s+)?{_MARK}\s*{_AMOUNT}\s*{_MARK}(?:\s*[-–]\s*{_MARK}\s*{_AMOUNT}\s*{_MARK})?", re.I)


def _price(value: Any) -> float:
    """A number of `$1,299.00`, `12,99 €`, `$5.00 - $9.00` (its lower end); NaN for anything else (2018 has CSS)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) and value >= 0 else math.nan
    match = _PRICE.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 100 else None
    if not match:
        return math.nan
    amount = match.group(1)
    thousands = re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", amount)
    return float(amount.replace(",", "" if thousands else "."))


# ---- records ---------------------------------------------------------------------------------------------------------


def tables_of(interactions: Iterable[Interaction], items: Iterable[Item]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables of records made in Python (the shipped world's, say), as `build_dataset` takes them."""
    rows = [
        {"user_id": i.user_id, "item_id": i.item_id, "timestamp": float(i.timestamp), "rating": i.rating}
        for i in interactions
    ]
    described = [
        {
            "item_id": item.item_id,
            "title": item.title or NO_TITLE,
            "categories": list(item.categories),
            "description": item.description,
            "brand": item.brand,
            "price": math.nan if item.price is None else item.price,
            "titled": bool(item.title),
        }
        for item in items
    ]
    if not rows or not described:
        raise DataError("a dataset needs at least one interaction and one item")
    return pd.DataFrame(rows).astype({"rating": "float64"}), pd.DataFrame(described)
