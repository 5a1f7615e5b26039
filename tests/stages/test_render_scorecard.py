"""The scorecard as a page, and in the report: drawn, escaped, whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rerankkit.stages.render import render_html, render_scorecard
from rerankkit.stages.scorecard import make_scorecard
from rerankkit.types import Catalog, Item

from .test_report import HOSTILE, METRICS, Page, report


def card(titles: list[str], codes: Any, path: tuple[str, ...] = ("Hair", "Shampoo")) -> dict[str, Any]:
    codes = np.asarray(codes)
    items = tuple(Item(f"i{n}", title, path if n % 2 else ("Face",)) for n, title in enumerate(titles))
    points = np.random.default_rng(0).standard_normal((len(items), 3)).astype(np.float32)
    catalog = Catalog(items, points, np.empty((0, 2), np.int64))
    return make_scorecard(codes, tuple(codes.max(axis=0) + 1), catalog, seed=0)


CROWDED = card(["Norda Gel", "Velis Gel", "Tavi Mask", "Oriel Mask"], [[0, 0], [0, 0], [1, 0], [1, 1]])


def test_the_page_shows_every_part() -> None:
    page = Page(render_scorecard(CROWDED))
    assert page.open == [] and "script" not in page.tags and page.links == []
    assert "50.0% of 4 items have a SID of their own." in page.text and "2 levels of 2 codes" in page.text.replace(
        "\n", " "
    )
    for heading in ("By prefix length", "Neighbours", "The most crowded SIDs", "What the first codes mean"):
        assert heading in page.text
    assert "Norda Gel · Velis Gel" in page.text and "The tokenizer’s own account" not in page.text
    assert page.tags.count("details") == 2 + 1  # codes 0 and 1; of longer prefixes only (0, 0) has two items
    assert page.tags.count("svg") == 2


def test_the_report_holds_it_in_place_of_the_small_table() -> None:
    whole = report() | {"scorecard": CROWDED}
    page = Page(render_html(whole, METRICS, []))
    assert page.open == [] and "The most crowded SIDs" in page.text and "perplexity3.5" not in page.text
    assert "The most crowded SIDs" not in Page(render_html(report(), METRICS, [])).text


def test_what_others_wrote_is_text() -> None:
    poisoned = card([HOSTILE] * 4, [[0, 0], [0, 0], [1, 0], [1, 0]], (HOSTILE, HOSTILE))
    poisoned["account"] = {HOSTILE: HOSTILE}
    poisoned["tree"][0]["words"] = [HOSTILE]
    poisoned["missed_gate"] = HOSTILE
    page = Page(render_scorecard(poisoned))
    assert "script" not in page.tags and "b" not in page.tags[page.tags.index("details") :] and page.open == []
    assert "{{ 7*7 }}" in page.text and "49" not in page.text


@pytest.mark.parametrize(
    ("titles", "codes"), [(["a"], [[0]]), (["a", "b"], [[0], [1]]), (["a"] * 3, [[0, 0, 0]] * 3)], ids=str
)
def test_the_smallest_catalogues_have_a_page(titles: list[str], codes: Any) -> None:
    assert Page(render_scorecard(card(titles, codes))).open == []
