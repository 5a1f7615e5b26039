from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.lm import TrainSequence, document_sequence, pack, trace_sequence
from rerankkit.text.prompts import Segment


def sequence(length: int) -> TrainSequence:
    return TrainSequence((1,) * length, (1.0,) * length)


def test_first_fit_decreasing_by_hand() -> None:
    # lengths 5 3 7 2 4, room 9: 7 opens row 0; 5 opens row 1; 4 fits row 1 (9); 3 opens row 2; 2 fits row 0 (9)
    assert pack([sequence(n) for n in (5, 3, 7, 2, 4)], 9) == [[2, 3], [0, 4], [1]]


@given(st.lists(st.integers(1, 20)), st.integers(1, 25))
def test_every_sequence_is_packed_once_and_rows_keep_to_the_limit(lengths: list[int], limit: int) -> None:
    rows = pack([sequence(n) for n in lengths], limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= limit or len(row) == 1 for row in rows)
    firsts = [sum(lengths[i] for i in row) for row in rows]
    assert sum(total * 2 <= limit for total in firsts) <= 1  # two half-empty rows would have been one


def test_a_document_sits_between_bos_and_eos(tiny) -> None:
    made = document_sequence(tiny, (Segment("red", 0.0), Segment(" soap", 0.5)))
    red, soap = tiny.encode("red"), tiny.encode(" soap")
    assert made.token_ids == (tiny.bos_id, *red, *soap, tiny.eos_id)
    assert made.weights == (0.0, *[0.0] * len(red), *[0.5] * len(soap), 0.5)
    assert list(made.token_ids[: 1 + len(red)]) == tiny.document_ids("red")


def test_a_trace_weighs_reasoning_and_ranking_apart(tiny) -> None:
    messages = [{"role": "user", "content": "soap"}]
    made = trace_sequence(tiny, messages, '{"explanation": "red', '", "recommendations": []}', 0.1, 2.0)
    prompt, reasoning = tiny.prompt_ids(messages), tiny.encode('{"explanation": "red')
    ranking = tiny.encode('", "recommendations": []}')
    assert made.token_ids == (*prompt, *reasoning, *ranking, tiny.end_id)
    assert made.weights == (*[0.0] * len(prompt), *[0.1] * len(reasoning), *[2.0] * len(ranking), 2.0)


def test_weights_must_match() -> None:
    with pytest.raises(ValueError, match="2 token ids but 1 weights"):
        TrainSequence((1, 2), (1.0,))
