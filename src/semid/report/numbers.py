"""How numbers are written for people: one rule a kind of number, on every page and table."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["count", "number", "share", "spoken"]

MISSING = "\N{EN DASH}"


def count(value: float | None) -> str:
    """Write a whole number with thousands separators: ``12,101``."""
    return MISSING if value is None else f"{round(value):,}"


def share(value: float | None) -> str:
    """Write a share in [0, 1] as a percentage with one decimal, two below one per cent."""
    if value is None or not math.isfinite(value):
        return MISSING
    percent = 100 * value
    if 0 < abs(percent) < 0.01:
        return "<0.01%" if percent > 0 else ">-0.01%"
    return f"{percent:.2f}%" if 0 < abs(percent) < 1 else f"{percent:.1f}%"


def number(value: float | None) -> str:
    """Write a measure with three significant digits, thousands separated, tiny ones as powers."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.0005:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{min(digits, 4)}f}"


def spoken(value: Any) -> str:
    """Write any value of a table: text as it is, integers as counts, floats as measures."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    return number(value) if isinstance(value, float) else str(value)
