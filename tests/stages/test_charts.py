from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from rerankkit.stages import charts


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert charts.ticks(-3.0, 12.0, 4) == [0.0, 5.0, 10.0]
    assert charts.ticks(2.0, 2.0) == [2.0]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(width=32)), max_size=400))
def test_any_numbers_draw_a_figure_inside_its_frame_or_none(points: list[tuple[float, float]]) -> None:
    figure = charts.line_chart({"a": points}, "t", "y")
    assert ("nan" in figure or "inf" in figure) is False
    assert (figure == "") == (not any(math.isfinite(y) for _, y in charts.thin(points)))


def test_nothing_but_zeros_has_an_axis_of_its_own() -> None:
    """Entropy, say, drawn from 0 upwards, of a run in which it was 0 throughout."""
    figure = charts.line_chart({"a": [(1, 0.0), (2, 0.0)]}, "t", "y", (0.0, 0.0))
    assert "<path" in figure


def test_a_line_breaks_where_numbers_are_missing() -> None:
    figure = charts.line_chart({"a": [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, 4.0)]}, "t", "y")
    assert figure.count("<path") == 2


def test_means_of_neighbours_keep_every_value_in_the_picture() -> None:
    thin = charts.thin([(i, float(i)) for i in range(480)])
    assert len(thin) == 240
    assert thin[0] == (0.5, 0.5)  # mean of steps 0 and 1


def test_labels_are_escaped() -> None:
    figure = charts.line_chart({"<b>": [(1, 1.0)], "&": [(1, 2.0)]}, "<i>", '"y"', x_label="<x>")
    whiskers = charts.interval_chart({"<u>": {"<b>": (1.0, 0.0, 2.0), "&": (1.0, 0.0, 2.0)}}, "<i>", "<s>")
    for tag in ("<b>&", "<i>", "<x>", "<u>", "<s>"):
        assert tag not in (figure + whiskers).replace("<figcaption><b>", "").replace("<i class", "")


def test_what_to_compare_with_is_dotted_in_the_same_colour_and_widens_the_axis() -> None:
    lines = {"a": [(1, 0.5), (2, 1.0)], "b": [(1, 0.4), (2, 0.6)]}
    figure = charts.line_chart(lines, "t", "y", behind={"b": [(1, 0.0), (2, 0.2)], "c": [(1, 9.0)]})
    assert figure.count('class="behind c1"') == figure.count('class="behind') == 1
    # y from -.04 to 1.04 (a margin of .04 of the range), 174 px high above 184: 0 is at 184 - .04 / 1.08 * 174 = 177.6
    assert figure.split('class="behind c1" d="M48.0,')[1].startswith("177.6")
    alone = charts.line_chart({"a": [(1, 0.5), (2, 1.0)]}, "t", "y")
    ticks = [part.split("<")[0] for part in alone.split('text-anchor="middle">')[1:]]
    assert ticks == ["1", "2"]  # steps and codes are whole numbers


def test_bars_stand_side_by_side_and_are_as_high_as_their_values() -> None:
    figure = charts.bar_chart({"then": [0.5, 0.25], "now": [0.0, 1.0]}, "t", "share", "place")
    bars = re.findall(r'<rect class="c(\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"/>', figure)
    # plot from y = 10 to 184: 174 high; two slots of 190 from x = 48, each with two bars of .38 * 190
    assert [(series, float(x), float(height)) for series, x, _, _, height in bars] == [
        ("0", 70.8, 87.0),
        ("0", 260.8, 43.5),
        ("1", 333.0, 174.0),
    ]
    assert all(float(width) == 72.2 for _, _, _, width, _ in bars)
    assert charts.bar_chart({"then": []}, "t", "share", "place") == charts.bar_chart({}, "t", "s", "p") == ""
