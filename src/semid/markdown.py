"""Markdown: names of the user's data inside it, the same for cards, reports and tables."""

from __future__ import annotations

import re

__all__ = ["code_span", "escaped"]


def escaped(text: str) -> str:
    """Keep a text from ending its cell or becoming markup of its own."""
    flat = " ".join(text.split())
    for character in "\\|<>`*_[]":
        flat = flat.replace(character, "\\" + character)
    return flat


def code_span(text: str) -> str:
    """Return a text as inline code, fenced by more backticks than it holds in a row."""
    flat = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", flat)), default=0)
    fence = "`" * (longest + 1)
    inner = f" {flat} " if flat.startswith("`") or flat.endswith("`") else flat
    return f"{fence}{inner}{fence}"
