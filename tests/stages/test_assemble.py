"""The end of a run: what the report tells."""

from __future__ import annotations

from rerankkit.data.dataset import build_dataset
from rerankkit.data.lists import CandidateLists
from rerankkit.data.tables import tables_of
from rerankkit.stages.assemble import _choice, _notes
from rerankkit.types import Interaction, Item


def test_items_that_share_a_text_are_told_of() -> None:
    titles = {"a": "Olive soap", "b": "olive  Soap", "c": "Comb", "d": "Gel", "e": "gel", "f": "gel"}
    rows = [Interaction("u", item_id, time) for time, item_id in enumerate(titles)]
    dataset = build_dataset(*tables_of(rows, [Item(*pair) for pair in titles.items()]), k_core=0)
    told = _notes(dataset, CandidateLists((), {}))
    assert (told["equal text groups"], told["items sharing text"]) == (2, 5)


def test_a_reader_is_told_on_whom_the_policy_was_chosen() -> None:
    told = _choice({"metric": "MRR", "users": 1500})["exported policy"]
    assert told == "chosen by MRR on 1,500 validation users; test users had no part in it"
    assert _choice({"metric": "MRR", "users": 0})["exported policy"] == "not chosen but taken: RL's end"
