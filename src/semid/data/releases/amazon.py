"""Amazon reviews as released in 2014 (and 2018) and in 2023, with ratings and item metadata."""

from __future__ import annotations

import ast
import html
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from semid.data.releases.release import Release, interaction, make_release, text_lines
from semid.errors import InputError

__all__ = ["read_amazon"]

# user, item, rating, time, and how many of the time's units make a second
_LAYOUTS = {
    "2014": ("reviewerID", "asin", "overall", "unixReviewTime", 1),
    "2023": ("user_id", "parent_asin", "rating", "timestamp", 1000),
}


def read_amazon(
    reviews: str | os.PathLike[str],
    *,
    items: str | os.PathLike[str] | None = None,
    core: int = 5,
) -> Release:
    """Read a category of the Amazon reviews.

    Args:
        reviews: a line of JSON a review, ``.json.gz`` or ``.jsonl.gz``, or not compressed. The
            layout is recognized by its keys: ``reviewerID``/``asin``/``overall`` (2014, 2018) or
            ``user_id``/``parent_asin``/``rating`` with milliseconds (2023; items are the parents,
            as the metadata has them).
        items: the category's ``meta_*`` file: JSON or, in 2014, Python literals.
        core: users and items with fewer interactions are left out, again and again until none
            is left (the papers' 5-core); 0 keeps all.

    Raises:
        UsageError: no such file.
        InputError: a line is of neither layout.
        InteractionsError: nothing is left.
    """
    described = {} if items is None else dict(_items(Path(items)))
    return make_release(_reviews(Path(reviews)), described, core=core, label=f"'{reviews}'")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            try:
                document = ast.literal_eval(line)  # the 2014 metadata are Python literals
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                document = None
        if not isinstance(document, dict):
            raise InputError(f"line {number} of '{path}' is no JSON object; is it cut short?")
        yield number, document


def _reviews(path: Path) -> Iterator[tuple[str, str, int, float]]:
    for number, review in _lines(path):
        where = f"line {number} of '{path}'"
        for user, item, rating, time, unit in _LAYOUTS.values():
            if user in review and item in review:
                if rating not in review or time not in review:
                    raise InputError(f"{where} has no number in '{rating}' or '{time}'")
                yield interaction(
                    review[user],
                    review[item],
                    review[time],
                    review[rating],
                    where=where,
                    unit=unit,
                )
                break
        else:
            listed = " or ".join(f"{names[0]}, {names[1]}" for names in _LAYOUTS.values())
            raise InputError(f"{where} has neither {listed}")


def _items(path: Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for number, item in _lines(path):
        key = item.get("parent_asin") or item.get("asin")
        if not key:
            raise InputError(f"line {number} of '{path}' names no item: no asin, no parent_asin")
        yield str(key), (_text(item.get("title")), _brand(item), _categories(item))


def _brand(item: Mapping[str, Any]) -> str:
    details = item.get("details")
    named = details.get("Brand") if isinstance(details, Mapping) else None
    return _text(item.get("brand") or named or item.get("store"))


def _categories(item: Mapping[str, Any]) -> str:
    """Write the path of categories; of several paths the longest."""
    categories = item.get("categories") or item.get("category") or []
    if not isinstance(categories, list | tuple):
        return _text(categories)
    paths = [path for path in categories if isinstance(path, list | tuple)] or [categories]
    return " > ".join(_text(name) for name in max(paths, key=len))


def _text(value: Any) -> str:
    """Return one line of plain text."""
    if not value:
        return ""
    text = value if isinstance(value, str) else reprlib.repr(value)
    # Half a surrogate pair, which JSON can spell, is no character.
    return " ".join(html.unescape(text).encode("utf8", "replace").decode("utf8").split())
