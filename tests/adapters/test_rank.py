"""A trained run asked as one asks rerankers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rerankkit.adapters import Document, Reranker
from rerankkit.data.lists import CandidateLists
from rerankkit.errors import DataError
from rerankkit.stages.rankings import Rankings
from rerankkit.store import finished_stage


@pytest.fixture(scope="module")
def reranker(tiny_run: Path) -> Reranker:
    return Reranker(tiny_run, policy="rl", device="cpu")


def test_items_by_id_are_ranked_as_the_run_ranked_them(reranker: Reranker, tiny_run: Path) -> None:
    own = Rankings.load(finished_stage(tiny_run, "rank-rl"))
    one = next(
        x for x in CandidateLists.load(tiny_run / "stages" / "4-candidates").of("test") if x.example_id in own.rankings
    )

    found = reranker.rank(list(one.history), doc_ids=list(one.candidates))

    expected = [one.candidates[place] for place in own.rankings[one.example_id].order]
    assert [result.doc_id for result in found] == expected
    assert [result.rank for result in found] == list(range(1, len(expected) + 1))
    assert [found[0].score, found[1].score] == [1.0, 0.5] and not found.has_scores
    assert found.top_k(2) == list(found)[:2] and found.results_count() == len(found) == len(expected)
    assert found.get_score_by_docid(expected[1]) == 0.5 and found.get_result_by_docid("nobody") is None
    assert reranker.rank(",".join(one.history), doc_ids=list(one.candidates)) == found


def test_documents_are_handed_back_with_their_text_and_ids(reranker: Reranker) -> None:
    docs = ["Tavi Everyday Scrub Travel Size", "Norda Luxe Shampoo"]

    by_number = reranker.rank(["item1", "item2"], docs)
    by_id = reranker.rank(["item1"], docs, doc_ids=["mine", "item3"], metadata=[{"a": 1}, {}])

    assert sorted(result.doc_id for result in by_number) == [0, 1]
    assert {result.text for result in by_number} == set(docs)
    mine = by_id.get_result_by_docid("mine")
    assert mine is not None and mine.text == docs[0] and mine.document.metadata == {"a": 1}
    assert reranker.rank([], [Document("item3", "")])[0].doc_id == "item3"


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({}, "docs: give texts, doc_ids"),
        ({"docs": []}, "docs: there is nothing to rank"),
        ({"docs": ["a"], "doc_ids": ["x", "y"]}, "doc_ids: 2 of them for 1 documents"),
        ({"doc_ids": ["nobody"]}, "doc_ids: 'nobody' is no item of .*; give its text in docs"),
        ({"docs": ["a", "b"], "doc_ids": ["x", "x"]}, "'x' stands in the list twice"),
    ],
)
def test_what_cannot_be_ranked_is_said(reranker: Reranker, how: dict[str, list[str]], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        reranker.rank(["item1"], **how)  # type: ignore[arg-type]
