"""Charts for the report: small SVG figures drawn by hand, coloured by the page's own CSS variables.

Hand-made, so that they follow the reader's light or dark theme, need no plotting library, and equal data gives
equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 10.0, 36.0
MAX_POINTS = 240
SMOOTH_FROM = 40
"""Series with more points than this get a running mean, with the raw values faint behind it."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` round numbers inside [low, high], one, two, two and a half or five apart."""
    if not high > low:
        return [low]
    step = _step(low, high, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """`1200` -> `1,200`, `0.25` -> `0.25`, `3e-05` -> `3e-05`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", "\N{MINUS SIGN}", value < 0)


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a twentieth of the series, narrower at its ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means of neighbours, so that nothing between two drawn points is lost.

    What is not a number is left out of a mean; a bin of nothing else stays not a number.
    """
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    kept = [[p for p in b if math.isfinite(p[1])] for b in bins]
    return [
        (sum(x for x, _ in k) / len(k), sum(y for _, y in k) / len(k)) if k else (b[0][0], math.nan)
        for b, k in zip(bins, kept, strict=True)
    ]


def finite(points: Points) -> list[list[tuple[float, float]]]:
    """The runs of points between values that are not numbers: a gap in the data stays a gap in the line."""
    runs = groupby(points, key=lambda p: math.isfinite(p[0]) and math.isfinite(p[1]))
    return [list(run) for good, run in runs if good]


def line_chart(
    series: Mapping[str, Points],
    title: str,
    y_label: str,
    span: tuple[float, float] | None = None,
    x_label: str = "step",
    behind: Mapping[str, Points] | None = None,
) -> str:
    """A figure with one line for each series, as HTML; empty when there is nothing finite to draw.

    `span` is a least range of the y axis; data outside widens it. `behind` are dotted lines to compare series of the
    same name with. The x axis counts steps, epochs, codes: whole numbers.
    """
    runs = {name: finite(thin(points)) for name, points in series.items()}
    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        return ""
    dotted = {name: finite((behind or {}).get(name, ())) for name in runs}
    every = [point for found in (*runs.values(), *dotted.values()) for run in found for point in run]
    x_low, x_high = _range([x for x, _ in every], None, margin=0.0)
    y_low, y_high = _range([y for _, y in every], span)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def path(run: Points, css: str) -> str:
        if len(run) == 1:
            return f'<circle class="{css}" cx="{px(run[0][0]):.1f}" cy="{py(run[0][1]):.1f}" r="2.5"/>'
        return f'<path class="{css}" d="M{" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in run)}"/>'

    body = []
    for tick in ticks(y_low, y_high, 5):
        y = f"{py(tick):.1f}"
        body.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y}" y2="{y}"/>')
        body.append(f'<text class="tick" x="{LEFT - 7:g}" y="{y}" dy=".32em" text-anchor="end">{number(tick)}</text>')
    axis = HEIGHT - BOTTOM
    body.append(f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{axis:g}" y2="{axis:g}"/>')
    for tick in filter(float.is_integer, map(float, ticks(x_low, x_high, 5))):
        x = f"{px(tick):.1f}"
        body.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{axis:g}" y2="{axis + 4:g}"/>')
        body.append(f'<text class="tick" x="{x}" y="{axis + 16:g}" text-anchor="middle">{number(tick)}</text>')
    body.append(
        f'<text class="tick" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 5:g}" text-anchor="end">{escape(x_label)}</text>'
    )
    smoothed = False
    for index, (name, found) in enumerate(runs.items()):
        body += [path(run, f"behind c{index % 6}") for run in dotted[name]]
        for run in found:
            if len(run) > SMOOTH_FROM:
                smoothed = True
                body.append(path(run, f"raw c{index % 6}"))
                run = [(x, y) for (x, _), y in zip(run, smooth([y for _, y in run]), strict=True)]
            body.append(path(run, f"line c{index % 6}"))
    names = ", ".join(runs)
    note = " · running mean" if smoothed else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>'
        f'<span class="unit">{escape(y_label)}{note}</span>{_legend(list(runs))}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(f"{title}: {names}")}">'
        f"{''.join(body)}</svg></figure>"
    )


def interval_chart(groups: Mapping[str, Mapping[str, tuple[float, float, float]]], title: str, unit: str) -> str:
    """A forest plot: for each row of `groups` a (middle, low, high) whisker per series, around a line at zero."""
    names = list(dict.fromkeys(name for row in groups.values() for name in row))
    values = [v for row in groups.values() for whisker in row.values() for v in whisker]
    if not values or not all(math.isfinite(v) for v in values):
        return ""
    low, high = _range([*values, 0.0], None)
    width, left, pitch = 640.0, 76.0, 12.0
    row_height = pitch * len(names) + 12
    height = row_height * len(groups) + 30

    def px(x: float) -> float:
        return left + (x - low) / (high - low) * (width - left - 16)

    body = []
    bottom = row_height * len(groups) + 4
    for tick in ticks(low, high, 7):
        x, css = f"{px(tick):.1f}", "zero" if tick == 0 else "grid"
        body.append(f'<line class="{css}" x1="{x}" x2="{x}" y1="0" y2="{bottom:g}"/>')
        sign = "+" if tick > 0 else ""
        body.append(f'<text class="tick" x="{x}" y="{bottom + 15:g}" text-anchor="middle">{sign}{number(tick)}</text>')
    for index, (label, row) in enumerate(groups.items()):
        top = index * row_height + 6
        middle = top + (row_height - 12) / 2
        if index:
            edge = f"{top - 6:g}"
            body.append(f'<line class="grid" x1="0" x2="{width - 16:g}" y1="{edge}" y2="{edge}"/>')
        body.append(
            f'<text class="name" x="{left - 12:g}" y="{middle:g}" dy=".32em" text-anchor="end">{escape(label)}</text>'
        )
        for name, (mean, least, most) in row.items():
            y = top + pitch * (names.index(name) + 0.5)
            css = f"c{names.index(name) % 6}"
            body.append(f'<line class="whisker {css}" x1="{px(least):.1f}" x2="{px(most):.1f}" y1="{y:g}" y2="{y:g}"/>')
            body.append(f'<circle class="dot {css}" cx="{px(mean):.1f}" cy="{y:g}" r="3.6"/>')
    return (
        f'<figure class="chart wide"><figcaption><b>{escape(title)}</b><span class="unit">{escape(unit)}</span>'
        f"{_legend(names)}</figcaption>"
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title + ": " + ", ".join(names))}">'
        f"{''.join(body)}</svg></figure>"
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    keys = (f'<span><i class="c{i % 6}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<span class="legend">{"".join(keys)}</span>'


def _range(values: Sequence[float], span: tuple[float, float] | None, margin: float = 0.04) -> tuple[float, float]:
    """From smallest to largest with a little air, wide enough for `span`, and never empty."""
    low, high = min(values), max(values)
    if span is not None and span[0] < span[1] and span[0] <= low and high <= span[1]:
        return span
    air = margin * (high - low) if high > low else abs(low) * 0.5 or 0.5
    low, high = low - air, high + air
    if span is None:
        return low, high
    low = span[0] if low + air >= span[0] else low
    high = span[1] if high - air <= span[1] else high
    return (low, high) if high > low else (low, low + 1.0)


def _step(low: float, high: float, count: int) -> float:
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
