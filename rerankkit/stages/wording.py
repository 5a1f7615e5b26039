"""How numbers and names of a report are written, wherever they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

BOUNDS = ("ceiling", "oracle")
"""Rows that nobody competes with: what the best possible ranker reaches on average, and one that knows the target."""
LABELS = {"mid-train": "mid-training", "midtrain": "mid-training", "sft": "SFT", "rl": "RL"}
LABELS |= {"no-reasoning": "the exported policy without reasoning"}


def label(name: str) -> str:
    """A system's or stage's name in a sentence."""
    if name.startswith("rl@"):
        return f"RL at step {name.removeprefix('rl@')}"
    return LABELS.get(name, name)


def capital(text: str) -> str:
    """The text as the start of a sentence."""
    return text[:1].upper() + text[1:]


def value_text(value: Any) -> str:
    """A value of a small table as people write it: 1,234, 0.987, yes, a, b."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(value_text(inner) for inner in value)
    return str(value)


def number(value: float) -> str:
    """A metric: `0.523`."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """`0.4%`, `12%`, never `0%` for something that is not nothing."""
    points = 100 * value
    return f"{points:.0f}%" if points == 0 or abs(points) >= 9.95 else f"{points:.1f}%"


def uniqueness(share: float) -> str:
    """A share near 1, as finely as it takes, and 100% for all only: `98.7%`, `99.996%`, `100%`."""
    for digits in range(1, 8):
        text = f"{100 * share:.{digits}f}"
        if share >= 1 or float(text) < 100:
            break
    return f"{text.rstrip('0').rstrip('.') if share in (0, 1) else text}%"


def points(value: float) -> str:
    """A difference in points: 0.081 is `8.1`."""
    return f"{100 * value + 0.0:.1f}"


def signed(found: Mapping[str, Any]) -> str:
    """A comparison's difference in points, with its sign."""
    return f"{100 * found['difference'] + 0.0:+.1f}"


def interval(found: Mapping[str, Any]) -> str:
    """A comparison's interval in points: `[5.2, 11.0]`."""
    return f"[{points(found['low'])}, {points(found['high'])}]"


def change(found: Mapping[str, Any]) -> str:
    """A comparison in points: `+8.1 [5.2, 11.0]`."""
    return f"{signed(found)} {interval(found)}"


def plain(value: Any) -> Any:
    """JSON's own types only, floats to 6 places and never NaN (null instead): what may stand in `report.json`."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, str | bool | int | None):
        return str(value) if isinstance(value, str) else value
    if hasattr(value, "tolist"):  # numpy's scalars and arrays, without importing it
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None
    return str(value)
