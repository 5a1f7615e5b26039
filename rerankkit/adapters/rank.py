"""A trained run behind the interface that the rerankers library made common: `rank(query, docs, doc_ids)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit.errors import DataError

if TYPE_CHECKING:
    from rerankkit.stages.rank_asks import Ranker


@dataclass(frozen=True)
class Document:
    """What was ranked."""

    doc_id: str | int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A document, its rank from 1, and a score that falls with it."""

    document: Document
    rank: int
    score: float

    @property
    def doc_id(self) -> str | int:
        """The document's id."""
        return self.document.doc_id

    @property
    def text(self) -> str:
        """The document's text."""
        return self.document.text


@dataclass(frozen=True)
class RankedResults:
    """Results, best first."""

    results: Sequence[Result]
    query: Sequence[str]
    parse: str
    """`ok`; `repaired` or `failed`: what could not be read of the answer follows in the given order."""
    reasoning: str
    has_scores: bool = False
    """False: the policy writes an order, no scores. `score` is 1 / rank, for code that wants one."""

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    def results_count(self) -> int:
        """How many there are."""
        return len(self.results)

    def top_k(self, k: int) -> list[Result]:
        """The best k."""
        return list(self.results[:k])

    def get_result_by_docid(self, doc_id: str | int) -> Result | None:
        """The result of a document, or None."""
        return next((result for result in self.results if result.doc_id == doc_id), None)

    def get_score_by_docid(self, doc_id: str | int) -> float | None:
        """The score of a document, or None."""
        found = self.get_result_by_docid(doc_id)
        return None if found is None else found.score


class Reranker:
    """A policy of a finished run: `Reranker("runs/mine").rank(["item3", "item9"], docs, doc_ids)`.

    A query is what a user did: item ids, oldest first (or one text of ids with commas between them); there is no
    language in it. A document is an item: `doc_ids` are item ids, and `docs` their texts, which are used for items that
    the run does not know. `how` goes to `rerankkit.Ranker.load`: `policy`, `device`, `batch_size`, ...
    """

    ranker: Ranker
    """What it asks."""

    def __init__(self, run: str | Path, **how: Any) -> None:
        from rerankkit.stages.rank_asks import Ranker

        self.ranker = Ranker.load(run, **how)

    def rank(
        self,
        query: str | Sequence[str],
        docs: Sequence[str | Document] | None = None,
        doc_ids: Sequence[str | int] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> RankedResults:
        """Documents, best first. With `docs` alone they are numbered from 0, as in rerankers, and are new items.

        Raises DataError for lists that do not fit together, and for an item in the history that the run does not know.
        """
        documents = _documents(docs, doc_ids, metadata)
        history = [part.strip() for part in query.split(",")] if isinstance(query, str) else list(query)
        known = self.ranker.sids.sids
        asked: list[Any] = []
        for document in documents:
            name = str(document.doc_id)
            if docs is not None and doc_ids is None and not isinstance(docs[0], Document):
                name = f"document {name}"  # its number is no item id, whatever items there are
            asked.append(name if name in known or not document.text else {"item_id": name, "title": document.text})
        wordless = [name for name in asked if isinstance(name, str) and name not in known]
        if wordless:
            raise DataError(f"doc_ids: {wordless[0]!r} is no item of {self.ranker.run}; give its text in docs.")
        ask = {"history": [item for item in history if item], "candidates": asked}
        [answer] = self.ranker.rank([ask], unknown="text")
        results = [Result(documents[place], rank, 1 / rank) for rank, place in enumerate(answer.order, start=1)]
        return RankedResults(results, history, answer.parse, answer.reasoning)


def _documents(
    docs: Sequence[str | Document] | None,
    doc_ids: Sequence[str | int] | None,
    metadata: Sequence[Mapping[str, Any]] | None,
) -> list[Document]:
    if docs is None and doc_ids is None:
        raise DataError("docs: give texts, doc_ids (item ids), or both.")
    size = len(docs if docs is not None else doc_ids or ())
    for name, values in (("doc_ids", doc_ids), ("metadata", metadata)):
        if values is not None and len(values) != size:
            raise DataError(f"{name}: {len(values)} of them for {size} documents.")
    if not size:
        raise DataError("docs: there is nothing to rank.")
    ids = list(doc_ids) if doc_ids is not None else list(range(size))
    about = list(metadata) if metadata is not None else [{}] * size
    texts = list(docs) if docs is not None else [""] * size
    return [
        text if isinstance(text, Document) else Document(doc_id, text, told)
        for text, doc_id, told in zip(texts, ids, about, strict=True)
    ]
