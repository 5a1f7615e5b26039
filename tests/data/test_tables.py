"""Every format gives the same two tables, and every bad row is known by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.data.tables import _category_path, _price, as_id, read_interactions, read_items
from rerankkit.errors import DataError

ROWS = [("u1", "i1", 5.0), ("u1", "i2", 6.0), ("007", "i1", 1.5)]


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def delimited(header: str, sep: str) -> str:
    return "\n".join([header, *(sep.join(map(str, row)) for row in ROWS)]) + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", delimited("user_id,item_id,timestamp", ",")),
        ("a.tsv", delimited("user_id\titem_id\ttimestamp", "\t")),
        ("a.csv.gz", delimited("reviewerID,asin,unixReviewTime", ",")),
        ("a.inter", delimited("user_id:token\titem_id:token\ttimestamp:float", "\t")),
        ("a.jsonl", "\n".join(json.dumps(dict(zip(("userId", "itemId", "ts"), row, strict=True))) for row in ROWS)),
        ("a.json", json.dumps([dict(zip(("user_id", "parent_asin", "timestamp"), row, strict=True)) for row in ROWS])),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    frame, bad = read_interactions(write(tmp_path / name, text))
    assert list(frame[["user_id", "item_id", "timestamp"]].itertuples(index=False, name=None)) == ROWS
    assert frame["rating"].isna().all()
    assert bad.count == 0 and bad.num_rows == 3


def test_parquet_ids_become_text_and_times_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    times = pd.to_datetime(["2020-01-01", "2020-01-02"])
    pd.DataFrame({"user_id": [1, 2], "asin": ["x", "y"], "time": times, "rating": [5, None]}).to_parquet(path)
    frame, _ = read_interactions(path)
    assert frame["user_id"].tolist() == ["1", "2"]
    assert np.diff(frame["timestamp"]).tolist() == [86400.0]  # a day in seconds
    assert frame["rating"][0] == 5.0 and np.isnan(frame["rating"][1])


def test_malformed_rows_are_refused_by_file_and_line_or_skipped_and_counted(tmp_path: Path) -> None:
    text = 'user_id,item_id,timestamp\nu1,i1,1\nu1,i2\n,i3,3\nu2,"i,4",yesterday\nu3,i5,nan\nu4,i6,7\n'
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError) as caught:
        read_interactions(path)
    message = str(caught.value)
    assert "4 of 6 rows are malformed" in message
    assert f"{path}:3: 2 fields instead of 3: u1,i2" in message
    assert f"{path}:4: no user_id" in message
    assert f"{path}:5: timestamp is neither a finite number nor an ISO date" in message and "i,4" in message
    assert 'data.on_bad_row = "skip"' in message

    frame, bad = read_interactions(path, on_bad_row="skip")
    assert frame["user_id"].tolist() == ["u1", "u4"]
    assert (bad.count, bad.num_rows) == (4, 6) and len(bad.first) == 4


def test_lines_are_counted_right_across_a_quoted_line_break(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'item_id,title\n1,"two\nlines"\n2\n')
    frame, bad = read_items(path, on_bad_row="skip")
    assert frame["title"].tolist() == ["two lines"]
    assert bad.first[0].startswith(f"{path}:4: 1 fields instead of 2")


def test_bad_bytes_bad_json_and_strangers_are_single_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"user_id": "u", "item_id": "i", "timestamp": 1}\n'
    path.write_bytes(good + b'{"user_id": "\xff", "item_id": "i", "timestamp": 1}\n{"user_id": \n[1, 2]\n' + good)
    frame, bad = read_interactions(path, on_bad_row="skip")
    assert len(frame) == 2 and bad.count == 3
    assert [line.split(":")[1] for line in bad.first] == ["2", "3", "4"]


def test_python_literal_lines_are_read_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = f"{{'asin': __import__('pathlib').Path({str(marker)!r}).touch(), 'title': 'x'}}"
    path = write(
        tmp_path / "meta.json", "{'asin': 'B1', 'title': 'It\\'s', 'categories': [['A', 'B'], ['C']]}\n" + evil
    )
    frame, bad = read_items(path, on_bad_row="skip")
    assert frame["title"].tolist() == ["It's"]
    assert frame["categories"].tolist() == [["A", "B"]]
    assert bad.count == 1 and not marker.exists()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (  # 2014
            {"asin": "B1", "title": "Soap &amp; Co", "price": 3.5, "brand": "X", "categories": [["Beauty", "Bath"]]},
            ("B1", "Soap & Co", ["Beauty", "Bath"], "X", 3.5),
        ),
        (  # 2018
            {"asin": "B1", "title": "Soap", "price": "$12.99", "brand": "X", "category": ["Beauty", "Bath"]},
            ("B1", "Soap", ["Beauty", "Bath"], "X", 12.99),
        ),
        (  # 2023
            {
                "parent_asin": "B1",
                "title": "Soap",
                "price": None,
                "store": "X",
                "categories": [],
                "main_category": "All",
            },
            ("B1", "Soap", ["All"], "X", None),
        ),
    ],
)
def test_amazon_metadata_of_every_vintage(tmp_path: Path, record: dict[str, object], expected: tuple[object]) -> None:
    frame, _ = read_items(write(tmp_path / "m.jsonl", json.dumps(record)))
    item_id, title, categories, brand, price = frame.loc[0, ["item_id", "title", "categories", "brand", "price"]]
    assert (item_id, title, categories, brand, None if np.isnan(price) else price) == expected


def test_amazon_2023_reviews_are_keyed_by_the_parent(tmp_path: Path) -> None:
    record = {"user_id": "A", "asin": "variant", "parent_asin": "B1", "rating": 4.0, "timestamp": 1600000000000}
    frame, _ = read_interactions(write(tmp_path / "r.jsonl", json.dumps(record)))
    assert frame.loc[0, ["item_id", "rating", "timestamp"]].tolist() == ["B1", 4.0, 1.6e12]


def test_an_item_without_title_is_named_by_what_is_known_and_never_by_its_id(tmp_path: Path) -> None:
    text = (
        "item_id\ttitle\tkeywords\tbrand\tcategories\n1\t\thunting cart\t\t\n2\t2\t\tAcme\tA > B > C | D\n3\t\t\t\t\n"
    )
    frame, _ = read_items(write(tmp_path / "i.tsv", text))
    assert frame["title"].tolist() == ["hunting cart", "Acme B C", "untitled"]
    assert frame["titled"].tolist() == [False, False, False]


def test_recbole_items_have_token_sequences(tmp_path: Path) -> None:
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    frame, _ = read_items(write(tmp_path / "ml.item", f"{header}\n1\tToy Story\t1995\tAnimation Comedy\n"))
    assert frame.loc[0, ["title", "categories"]].tolist() == ["Toy Story", ["Animation", "Comedy"]]


def test_a_missing_column_names_what_was_found_tried_and_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "usr_id,item_id,timestamp\n1,2,3\n")
    with pytest.raises(DataError, match=r"reviewerID.*known: item_id, timestamp, usr_id.*Did you mean 'usr_id'"):
        read_interactions(path)
    assert len(read_interactions(path, columns={"user_id": "usr_id"})[0]) == 1
    with pytest.raises(DataError, match=r"data.columns.user_id = 'usrid'.*Did you mean 'usr_id'"):
        read_interactions(path, columns={"user_id": "usrid"})
    with pytest.raises(DataError, match=r"data.columns: 'usr' .*Did you mean 'user_id'"):
        read_interactions(path, columns={"usr": "usr_id"})


@pytest.mark.parametrize(("name", "text"), [("a.csv", ""), ("a.csv", "user_id,item_id,timestamp\n"), ("a.xml", "")])
def test_empty_and_unknown_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError):
        read_interactions(write(tmp_path / name, text))


def test_hub_names_are_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"user": [1, 2], "asin": ["a", None], "ts": [1, 2], "note": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    frame, bad = read_interactions("hf://who/what:small:test", on_bad_row="skip")
    assert frame.loc[0, ["user_id", "item_id", "timestamp"]].tolist() == ["1", "a", 1.0]
    assert bad.first[0].startswith("hf://who/what:small:test, row 2: no item_id")
    with pytest.raises(DataError, match="hf://owner/name"):
        read_interactions("hf://what")
    read_interactions("hf://who/what", on_bad_row="skip")
    assert asked == [("who/what", "small", "test"), ("who/what", None, "train")]


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"user_id,item_id,timestamp\n1,2,3\n" * 99)[:40])
    for name in ("a.parquet", "a.csv.gz", "absent.csv"):
        with pytest.raises(DataError, match=name):
            read_interactions(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("$12.99", 12.99),
        ("$1,299.00", 1299.0),
        ("12,99 €", 12.99),
        ("$5.00 - $9.00", 5.0),
        ("from 7.5", 7.5),
        (3, 3.0),
        (".a-box-inner{background-color:#fff}", None),
        ("free", None),
        (float("inf"), None),
        (-1.0, None),
        (None, None),
        (True, None),
    ],
)
def test_prices(value: object, expected: float | None) -> None:
    price = _price(value)
    assert np.isnan(price) if expected is None else price == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("A > B > C | D > E", ["A", "B", "C"]),
        ("Action|Comedy", ["Action", "Comedy"]),
        ("['A', 'B']", ["A", "B"]),
        ([["A", "B"], ["C"]], ["A", "B"]),
        ([], []),
        (None, []),
        ("[unclosed", ["[unclosed"]),
    ],
)
def test_category_paths(value: object, expected: list[str]) -> None:
    assert _category_path(value) == expected


def test_ids_of_numbers() -> None:
    assert [as_id(value) for value in (7, 7.0, "7", " 7 ", "007", float("nan"), None, "")] == ["7"] * 4 + ["007"] + [
        ""
    ] * 3


@given(st.binary(max_size=200))
def test_any_bytes_after_a_header_are_rows_bad_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.inter"):
        start = (
            b'{"user_id":"u","item_id":"i","timestamp":1}\n' if name == "a.jsonl" else b"user_id\titem_id\ttimestamp\n"
        )
        (folder / name).write_bytes((start if name != "a.csv" else start.replace(b"\t", b",")) + junk)
        try:
            frame, bad = read_interactions(folder / name, on_bad_row="skip")
        except DataError:
            continue
        assert len(frame) + bad.count == bad.num_rows
        assert all(line.isprintable() for line in bad.first)
        frame["user_id"].str.encode("utf-8")  # what is kept can be written


def test_iso_dates_order_a_history(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "user_id,item_id,timestamp\nu,a,1970-01-02\nu,b,1970-01-01T00:00:01\nu,c,1970-01-01T01:00:00+01:00\n"
    )
    table, _ = read_interactions(path)
    assert table["timestamp"].tolist() == [86400.0, 1.0, 0.0]
