"""What the policy and teachers read, and what hostile titles can't do to it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.errors import ConfigError
from rerankkit.text.prompts import (
    PromptStyle,
    answer_parts,
    caption_document,
    clean_reasoning,
    item_line,
    language_document,
    persona_document,
    rerank_messages,
    sequence_document,
    sequence_prompt,
    targeted_messages,
)
from rerankkit.types import Item, RerankExample, SidSurface

from .conftest import hostile_examples, items, nasty

SURFACE = SidSurface()
TERSE = PromptStyle(terse=True)
ALL = PromptStyle(fields=("title", "categories", "brand", "price"))
styles = st.builds(
    PromptStyle,
    fields=st.permutations(ALL.fields).map(tuple),
    max_title_words=st.integers(0, 4),
    max_history=st.integers(0, 4),
    knowledge=st.booleans(),
    terse=st.booleans(),
)


def test_item_line_holds_the_chosen_fields(tame: RerankExample) -> None:
    sid = "<|sid_begin|><s_a_1><s_b_3><|sid_end|>"
    item = tame.candidates[1]
    assert item_line(item, SURFACE, ALL) == f"{sid} Conditioner classic; Hair > Conditioner; Norda; $12.00"
    assert item_line(item, SURFACE, PromptStyle(fields=("price", "brand"))) == f"{sid} $12.00; Norda"
    assert item_line(item, SURFACE, PromptStyle(fields=())) == sid
    assert item_line(tame.candidates[2], SURFACE, ALL).endswith(" Razor classic; Hair > Razor")  # no brand, no price
    assert item_line(Item("x", "a b c", sid=(1, 3)), SURFACE, PromptStyle(max_title_words=2)) == f"{sid} a b"


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'brand'"):
        PromptStyle(fields=("title", "brands"))


def test_terse_prompt_is_the_lists_and_little_else(tame: RerankExample) -> None:
    system, user = rerank_messages(tame, SURFACE, TERSE)
    assert (system["role"], user["role"]) == ("system", "user")
    assert len(system["content"].split()) < 8
    assert user["content"].splitlines() == [
        "History:",
        "<|sid_begin|><s_a_0><s_b_1><|sid_end|> Comb classic; Hair > Comb",
        "<|sid_begin|><s_a_1><s_b_2><|sid_end|> Shampoo classic; Hair > Shampoo",
        "Candidates:",
        "<|sid_begin|><s_a_2><s_b_0><|sid_end|> Soap classic; Hair > Soap",
        "<|sid_begin|><s_a_1><s_b_3><|sid_end|> Conditioner classic; Hair > Conditioner",
        "<|sid_begin|><s_a_3><s_b_3><|sid_end|> Razor classic; Hair > Razor",
        "Rerank.",
    ]


def test_history_shows_the_latest_items(tame: RerankExample) -> None:
    lines = rerank_messages(tame, SURFACE, PromptStyle(max_history=1))[1]["content"].splitlines()
    assert lines[1].endswith("Hair > Shampoo") and lines[2] == "Candidates:"
    assert rerank_messages(tame, SURFACE, PromptStyle(max_history=0))[1]["content"].startswith("History:\nCandidates:")


def test_by_place_the_instruction_asks_for_places(tame: RerankExample) -> None:
    by_place = SidSurface(places=10)
    for surface, asked, other in ((by_place, "<c_1>", "identifier"), (SURFACE, "identifier", "<c_1>")):
        said = rerank_messages(tame, surface, PromptStyle())[0]["content"]
        assert said.count(asked) == 2 and other not in said
    assert rerank_messages(tame, by_place, TERSE)[0] == rerank_messages(tame, SURFACE, TERSE)[0]


def test_knowledge_priming_is_a_switch(tame: RerankExample) -> None:
    primed, plain = (rerank_messages(tame, SURFACE, PromptStyle(knowledge=k))[0]["content"] for k in (True, False))
    assert "conditioner" in primed and "conditioner" not in plain
    for word in ("expert", "compare", "identifier", "three short steps", "JSON", "recommendations"):
        assert word in plain


def test_only_targeted_messages_give_the_answer_away(tame: RerankExample) -> None:
    target = SURFACE.text(tame.candidates[1].sid)
    assert rerank_messages(tame, SURFACE, TERSE)[1]["content"].count(target) == 1
    assert f"next purchase was {target}." in targeted_messages(tame, SURFACE, TERSE)[1]["content"]


def test_answer_is_json_cut_before_the_ranking(tame: RerankExample) -> None:
    cited = "<|sid_begin|><s_a_1><s_b_3><|sid_end|>"
    reasoning, ranking = answer_parts(f'pattern: "hair".\nmatch: {cited}.', (1, 0, 2), tame, SURFACE)
    assert reasoning == f'{{"explanation": "pattern: \'hair\'. match: {cited}.'
    assert ranking == (
        f'", "recommendations": ["{cited}", "<|sid_begin|><s_a_2><s_b_0><|sid_end|>", '
        '"<|sid_begin|><s_a_3><s_b_3><|sid_end|>"]}'
    )


def test_reasoning_keeps_own_sids_and_drops_strangers(tame: RerankExample) -> None:
    own, other = SURFACE.text((0, 1)), SURFACE.text((9, 9))
    assert clean_reasoning(f"{own},{other} then <s_a_1>", tame, SURFACE) == f"{own}, then (s_a_1)"
    padded = "<|sid_begin|><s_a_00><s_b_1><|sid_end|>"  # reads as (0, 1), but is not how we spell it
    assert SURFACE.find(clean_reasoning(f"{padded} and {own}", tame, SURFACE)) == [(0, 1)]


def test_sequence_document_is_prompt_and_target(tame: RerankExample) -> None:
    context, goal = sequence_document(tame.history, tame.candidates[1], SURFACE, TERSE)
    assert context.text == sequence_prompt(tame.history, SURFACE, TERSE)
    assert SURFACE.find(context.text) == [(0, 1), (1, 2)] and context.weight == 0
    assert SURFACE.find(goal.text) == [(1, 3)] and goal.weight == 1


def test_sequence_document_can_learn_from_the_history_too(tame: RerankExample) -> None:
    document = sequence_document(tame.history, tame.candidates[1], SURFACE, TERSE, history_weight=0.5)
    assert [(SURFACE.find(part.text), part.weight) for part in document] == [
        ([(0, 1)], 0.0),
        ([(1, 2)], 0.5),
        ([(1, 3)], 1.0),
    ]
    plain = sequence_document(tame.history, tame.candidates[1], SURFACE, TERSE)
    assert "".join(part.text for part in document) == "".join(part.text for part in plain)


def test_caption_persona_and_language_documents(tame: RerankExample) -> None:
    sid, words = caption_document(tame.candidates[1], SURFACE, ALL)
    assert (sid.text, sid.weight, words.weight) == (SURFACE.text((1, 3)), 0, 1)
    assert words.text == (
        " Title: Conditioner classic; Categories: Hair > Conditioner; Brand: Norda; Price: $12.00; "
        "Description: A conditioner."
    )
    (persona,) = persona_document(tame.history, SURFACE, TERSE)
    assert persona.text.endswith(
        f'{SURFACE.text((1, 2))}, its title is "Shampoo classic", its categories are "Hair > Shampoo".'
    )
    (language,) = language_document(tame.candidates[1], TERSE)
    assert language.text == "Conditioner classic; Hair > Conditioner; A conditioner." and language.weight == 1


@given(hostile_examples(), styles)
def test_titles_neither_forge_sids_nor_lines(example: RerankExample, style: PromptStyle) -> None:
    system, user = rerank_messages(example, SURFACE, style)
    shown = [*example.history[max(0, len(example.history) - style.max_history) :], *example.candidates]
    for form in ("NFC", "NFKC", "NFD"):  # whatever a text tokenizer normalises to
        content = unicodedata.normalize(form, user["content"])
        assert SURFACE.find(content) == [item.sid for item in shown]
        assert content.count("<") == content.count("|") / 2 + 2 * len(shown) == 4 * len(shown)
    assert len(user["content"].splitlines()) == len(shown) + 3
    assert SURFACE.find(system["content"]) == [] and "<" not in system["content"]


@given(hostile_examples(), styles, items)
def test_titles_forge_nothing_in_documents(example: RerankExample, style: PromptStyle, item: Item) -> None:
    shown = [i.sid for i in example.history[max(0, len(example.history) - style.max_history) :]]
    documents = {
        "sequence": (sequence_document(example.history, item, SURFACE, style, 0.5), [*shown, item.sid]),
        "caption": (caption_document(item, SURFACE, style), [item.sid]),
        "persona": (persona_document(example.history, SURFACE, style), shown),
        "language": (language_document(item, style), []),
    }
    for document, expected in documents.values():
        text = "".join(part.text for part in document)
        assert SURFACE.find(text) == expected
        assert text.count("<") == 4 * len(expected)
        assert len(text.splitlines()) <= 1


@given(hostile_examples(), nasty)
def test_reasoning_cites_own_items_only(example: RerankExample, talk: str) -> None:
    own = {item.sid for item in (*example.history, *example.candidates)}
    safe = clean_reasoning(talk, example, SURFACE)
    assert set(SURFACE.find(safe)) <= own
    assert safe.count("<") == 4 * len(SURFACE.find(safe))
    assert clean_reasoning(safe, example, SURFACE) == safe
