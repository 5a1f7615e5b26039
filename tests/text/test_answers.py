"""The parser: OK only for exactly the JSON asked for, repairs counted in words, and never an exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.text.answers import RANKING_KEY, parse_answer
from rerankkit.text.prompts import answer_parts, clean_reasoning
from rerankkit.types import Item, Parse, Ranking, RerankExample, SidSurface

from .conftest import NASTY, hostile_examples, nasty

SURFACE = SidSurface()
A, B, C, STRANGER = (SURFACE.text(sid) for sid in [(2, 0), (1, 3), (3, 3), (9, 9)])


def written(*entries: str, explanation: str = "why") -> str:
    return json.dumps({"explanation": explanation, "recommendations": list(entries)})


def test_a_complete_permutation_is_ok(tame: RerankExample) -> None:
    answer = parse_answer(f"\n {written(C, A, B)} ", tame, SURFACE)
    assert answer.reasoning == "why" and answer.ranking == Ranking((2, 0, 1))


@pytest.mark.parametrize(
    ("text", "order", "problem"),
    [
        (written(C), (2, 0, 1), "2 missing"),
        (written(C, C, A, B), (2, 0, 1), "1 repeated"),
        (written(C, STRANGER, A, B), (2, 0, 1), "1 strangers"),
        (written(C, C, STRANGER), (2, 0, 1), "2 missing, 1 repeated, 1 strangers"),
        (written(C, A, f"{B} "), (2, 0, 1), "entries are not bare SIDs"),
        (written(f"{C}{A}", B, B), (2, 0, 1), "1 repeated"),
        (f"Sure! {written(C, A, B)}", (2, 0, 1), "not the JSON asked for"),
        (written(C, A, B)[:-1], (2, 0, 1), "not the JSON asked for"),
        (f'{written(C, A, B)[:-2]}, "{{x', (2, 0, 1), "not the JSON asked for"),
        # two lists, also under one key: the last one is read, and it is not OK
        (
            f'{written(A, B, C)[:-1]}, "recommendations": ["{C}", "{B}", "{A}"]}}',
            (2, 1, 0),
            "not the JSON asked for",
        ),
        (f"{written(A, B, C)} {written(C, B, A)}", (2, 1, 0), "not the JSON asked for"),
        # a key more, and the keys the wrong way round: reasoning after the answer is none
        (f'{written(C, A, B)[:-1]}, "note": 1}}', (2, 0, 1), "not the JSON asked for"),
        (f'{{"recommendations": ["{C}", "{A}", "{B}"], "explanation": "x"}}', (2, 0, 1), "not the JSON asked for"),
        # what is said behind the list is talk
        (f'{{"recommendations": ["{C}"]}} and {B}', (2, 0, 1), "not the JSON asked for, 2 missing"),
        # a forged list in the explanation comes before the last key
        (f'{RANKING_KEY}: [{A}]", "recommendations": ["{C}"', (2, 0, 1), "not the JSON asked for, 2 missing"),
    ],
)
def test_what_can_be_read_is_repaired(tame: RerankExample, text: str, order: tuple[int, ...], problem: str) -> None:
    assert parse_answer(text, tame, SURFACE).ranking == Ranking(order, Parse.REPAIRED, problem)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        f"{A} {B} {C}",
        written(),
        written(STRANGER),
        f'{{"explanation": "{A}", "recommendations": ',
        '{"explanation": "x", "recommendations": 5}',
        '{"recommendations": [' * 50_000,
        "[" * 200_000,
        "9" * 10_000,
        "\ud800",
    ],
    ids=range(12),
)
def test_nothing_usable_is_failed_and_keeps_the_input_order(tame: RerankExample, text: str) -> None:
    ranking = parse_answer(text, tame, SURFACE).ranking
    assert ranking.parse is Parse.FAILED and ranking.identity and ranking.problem


def test_codes_must_be_spelled_as_we_spell_them(tame: RerankExample) -> None:
    padded = B.replace("<s_a_1>", "<s_a_01>")
    assert parse_answer(written(C, A, padded), tame, SURFACE).ranking.parse is Parse.REPAIRED


def test_the_kth_mention_of_a_shared_sid_is_the_kth_candidate() -> None:
    # candidates: x, y, x' where x and x' share a SID
    x, y = SURFACE.text((0, 0)), SURFACE.text((0, 1))
    twins = RerankExample(
        "e", "u", (), tuple(Item(n, n, sid=s) for n, s in [("x", (0, 0)), ("y", (0, 1)), ("z", (0, 0))]), (0, 0, 1)
    )
    assert parse_answer(written(x, x, y), twins, SURFACE).ranking == Ranking((0, 2, 1))
    assert parse_answer(written(y, x), twins, SURFACE).ranking == Ranking((1, 0, 2), Parse.REPAIRED, "1 missing")
    assert parse_answer(written(x, x, x, y), twins, SURFACE).ranking.problem == "1 repeated"


def test_reasoning_is_read_as_far_as_it_goes(tame: RerankExample) -> None:
    reasoning, ranking = answer_parts(f"because of {A}.", (0, 1, 2), tame, SURFACE)
    for text in (reasoning + ranking, reasoning + ranking[:-1], reasoning):
        assert parse_answer(text, tame, SURFACE).reasoning == f"because of {A}."


@given(hostile_examples(), nasty, st.randoms(use_true_random=False))
def test_what_we_write_is_what_we_read(example: RerankExample, talk: str, random: object) -> None:
    order = list(range(len(example.candidates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    reasoning, ranking = answer_parts(talk, order, example, SURFACE)
    assert ranking.startswith(f'", {RANKING_KEY}: [')
    assert list(json.loads(reasoning + ranking)) == ["explanation", "recommendations"]
    answer = parse_answer(reasoning + ranking, example, SURFACE)
    assert answer.ranking.parse is Parse.OK
    assert answer.reasoning == clean_reasoning(talk, example, SURFACE)
    # items that share a SID are told apart by their order only
    assert [example.candidates[i].sid for i in answer.ranking.order] == [example.candidates[i].sid for i in order]
    if len({item.sid for item in example.candidates}) == len(order):
        assert list(answer.ranking.order) == order


FRAGMENTS = [*NASTY, RANKING_KEY, '{"explanation": "', ": [", "[", "]", "{", "}", ",", *(A, B, C, STRANGER)]


@given(
    hostile_examples(),
    st.text() | st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=20).map("".join),
    st.booleans(),
)
def test_any_text_gives_a_complete_permutation(example: RerankExample, text: str, own_sids: bool) -> None:
    if own_sids:  # so that repairs happen
        text = text.replace(A, SURFACE.text(example.candidates[0].sid)).replace(
            B, SURFACE.text(example.candidates[-1].sid)
        )
    ranking = parse_answer(text, example, SURFACE).ranking
    assert sorted(ranking.order) == list(range(len(example.candidates)))
    assert (ranking.parse is Parse.OK) == (ranking.problem == "")
    if ranking.parse is Parse.OK:
        listed = json.loads(text)["recommendations"]
        assert listed == [SURFACE.text(example.candidates[i].sid) for i in ranking.order]
    if ranking.parse is Parse.FAILED:
        assert ranking.identity


def test_by_place_the_answer_and_its_reasoning_name_places(tame: RerankExample) -> None:
    by_place = SidSurface(places=10)
    told = f"best: {A}, not <c_3>, never {STRANGER} or <c_9>"
    reasoning, ranking = answer_parts(told, (0, 2, 1), tame, by_place)
    assert reasoning == '{"explanation": "best: <c_1>, not <c_3>, never or'
    assert ranking == '", "recommendations": ["<c_1>", "<c_3>", "<c_2>"]}'
    answer = parse_answer(reasoning + ranking, tame, by_place)
    assert answer.ranking == Ranking((0, 2, 1))
    repaired = parse_answer(reasoning + ranking.replace("<c_2>", "<c_7>"), tame, by_place)
    assert repaired.ranking == Ranking((0, 2, 1), Parse.REPAIRED, "1 missing, 1 strangers")
    assert parse_answer(written(C, A, B), tame, by_place).ranking.parse is Parse.FAILED  # SIDs are not its names
