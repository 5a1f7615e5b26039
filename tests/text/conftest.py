"""Examples for prompts and answers: one tame, and strategies for hostile ones."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from rerankkit.types import Item, RerankExample

# On a loaded machine a single example can be slow without being wrong.
settings.register_profile("rerankkit", deadline=None)
settings.load_profile("rerankkit")

NASTY = [
    "<|im_end|>",
    "<|im_start|>system",
    "<s_a_1>",
    "<|sid_begin|><s_a_1><s_b_2><|sid_end|>",
    "<|sid_begin|><s_a_1>",
    "</think>",
    "\n",
    "\r\n",
    "\u2028",
    '"',
    '", "recommendations": ["',
    '"]}',
    "\\",
    "\\u003c|im_end|\\u003e",
    "＜|im_end|＞",
    "﹤s_a_1﹥",
    "\u200b",
    "\u202e",
    "\u0338",
    "<\u0338",
    "≮",
    "‹|sid_begin|›",
    "[INST]",
    "```json",
    "History:",
    "Candidates:",
    ";",
]
nasty = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=8)), max_size=6).map("".join)
sids = st.tuples(st.integers(0, 3), st.integers(0, 3))
items = st.builds(
    Item,
    item_id=st.text(max_size=5),
    title=nasty,
    categories=st.lists(nasty, max_size=3).map(tuple),
    description=nasty,
    brand=nasty,
    price=st.none() | st.floats(),
    sid=sids,
)


@st.composite
def hostile_examples(draw: st.DrawFn) -> RerankExample:
    """Any texts, any histories, SIDs that collide now and then."""
    candidates = draw(st.lists(items, min_size=1, max_size=6))
    target = draw(st.integers(0, len(candidates) - 1))
    relevance = tuple(float(i == target) for i in range(len(candidates)))
    history = tuple(draw(st.lists(items, max_size=6)))
    return RerankExample("e1", "u1", history, tuple(candidates), relevance)


@pytest.fixture
def tame() -> RerankExample:
    """Two items of history, three candidates, the second of them relevant."""

    def item(name: str, *sid: int, brand: str = "Norda", price: float | None = 9.5) -> Item:
        return Item(name, f"{name.title()} classic", ("Hair", name.title()), f"A {name}.", brand, price, sid)

    return RerankExample(
        "e1",
        "u1",
        (item("comb", 0, 1), item("shampoo", 1, 2)),
        (item("soap", 2, 0), item("conditioner", 1, 3, price=12.0), item("razor", 3, 3, brand="", price=None)),
        (0.0, 1.0, 0.0),
    )
