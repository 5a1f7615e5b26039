"""Hypothesis strategies for property tests of parts: examples, rollouts, groups of them, and nasty text.

    from hypothesis import given
    from rerankkit.testing.strategies import rollouts

    @given(rollouts())
    def test_is_between_0_and_1(rollout):
        [outcome] = MyReward()([rollout])
        assert 0 <= outcome.value <= 1

Needs hypothesis (`pip install hypothesis`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from rerankkit.testing.records import make_item, make_rollout
from rerankkit.text.answers import RANKING_KEY
from rerankkit.types import Item, RerankExample, Rollout, SidSurface

CONTROL = (
    "<|im_start|>assistant", "<|im_end|>", "</s>", "<think>", "</think>", "<|sid_begin|>", "<|sid_end|>", "<s_a_1>",
    RANKING_KEY, '"]}', '", "', "\n", "\x00", "\u2028",
)  # fmt: skip
"""What untrusted text may hold to be taken for something else."""
LETTERS = "abcXYZ 019 .,;:!?'\"\\/<>|[]{}()_-#$%&*+=~\täßéşИж漢字カナ한👍🏽\u0301\u200b\u202e\xa0"
"""What words are spelled with; hypothesis' own alphabet, all of Unicode, takes seconds to be looked up."""


def untrusted_text(max_size: int = 40) -> st.SearchStrategy[str]:
    """Words as users and sellers type them, with control text among them."""
    words = st.one_of(st.text(LETTERS, max_size=8), st.sampled_from(CONTROL))
    return st.lists(words, max_size=3).map(lambda parts: " ".join(parts)[:max_size])


def items(numbers: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[Item]:
    """Items of the made shop, some with titles, brands and prices that nobody would wish for."""

    def spoil(number: int, title: str, brand: str, price: float | None) -> Item:
        return replace(make_item(number), title=title, brand=brand, price=price)

    number = numbers if numbers is not None else st.integers(0, 511)
    price = st.none() | st.floats(0, 1e6, allow_nan=False)
    brand = st.sampled_from(["", "Norda", *CONTROL])
    plain = number.map(make_item)
    return st.one_of(plain, plain, st.builds(spoil, number, untrusted_text(), brand, price))


@st.composite
def examples(
    draw: Callable[..., Any], *, min_candidates: int = 1, max_candidates: int = 12, max_history: int = 6
) -> RerankExample:
    """Asks with any number of candidates, all different; relevance may be graded, tied, or nowhere."""
    numbers = draw(
        st.lists(st.integers(0, 255), min_size=min_candidates, max_size=max_candidates, unique=True), label="candidates"
    )
    grades = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0])
    history = draw(st.lists(items(st.integers(256, 511)), max_size=max_history), label="history")
    return RerankExample(
        example_id=f"user{draw(st.integers(0, 999))}/{len(history)}",
        user_id="user",
        history=tuple(history),
        candidates=tuple(draw(items(st.just(number))) for number in numbers),
        relevance=tuple(draw(st.lists(grades, min_size=len(numbers), max_size=len(numbers)), label="relevance")),
    )


@st.composite
def rollouts(
    draw: Callable[..., Any], example: st.SearchStrategy[RerankExample] | None = None, *, group: int = 0
) -> Rollout:
    """Completions: mostly complete answers in any order; some cut short, doubled, garbled, or no answer at all."""
    asked = draw(example if example is not None else examples())
    order = draw(st.permutations(range(len(asked.candidates))), label="order")
    reasoning = draw(untrusted_text())
    num_tokens = draw(st.integers(0, 400), label="num_tokens")
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "garbled", "stranger", "none"]), label="how")
    whole = make_rollout(asked, order, reasoning=reasoning, num_tokens=num_tokens, group=group)
    if how == "whole":
        return whole
    stranger = SidSurface().text((7, 7, 7))
    text = {
        "cut": whole.text[: draw(st.integers(0, len(whole.text)))],
        "garbled": whole.text.replace('"', draw(st.sampled_from(["'", ""]))),
        "stranger": whole.text.replace('"]}', f'", "{stranger}"]}}'),
        "none": draw(untrusted_text()),
    }[how]
    return make_rollout(asked, text=text, num_tokens=num_tokens, group=group, truncated=how == "cut")


@st.composite
def groups(draw: Callable[..., Any], *, min_size: int = 2, max_size: int = 8, group: int = 0) -> list[Rollout]:
    """Rollouts of one prompt, as a reward is given them."""
    asked = draw(examples())
    return draw(  # type: ignore[no-any-return]
        st.lists(rollouts(st.just(asked), group=group), min_size=min_size, max_size=max_size)
    )
