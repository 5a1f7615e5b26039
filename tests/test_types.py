"""How SIDs and places are spelled and found."""

from __future__ import annotations

import pytest

from rerankkit.errors import UsageError
from rerankkit.testing import make_example
from rerankkit.types import SidSurface

BY_PLACE = SidSurface(places=10)


def test_names_are_sids_or_places() -> None:
    example = make_example()
    assert SidSurface().names(example) == [SidSurface().text(item.sid) for item in example.candidates]
    assert BY_PLACE.names(example)[:2] == ["<c_1>", "<c_2>"]
    assert BY_PLACE.tokens((2,))[-10:] == [f"<c_{n}>" for n in range(1, 11)]
    assert not any("<c_" in token for token in SidSurface().tokens((2, 2)))
    with pytest.raises(UsageError, match="10 candidates, but the policy cites them by place and knows 4 places"):
        SidSurface(places=4).names(example)


def test_citations_in_order_of_appearance() -> None:
    sid = BY_PLACE.text((1, 2))
    text = f"<c_2> {sid} <c_12> <s_a_1> <c_x>"
    assert BY_PLACE.citations(text) == ["<c_2>", sid, "<c_12>"] and BY_PLACE.find(text) == [(1, 2)]
    assert SidSurface().citations(text) == [sid]


def test_another_order_moves_all_that_is_aligned() -> None:
    example = make_example(3)
    turned = example.in_order(range(9, -1, -1))
    assert turned.candidates == example.candidates[::-1] and turned.target_index == 6
