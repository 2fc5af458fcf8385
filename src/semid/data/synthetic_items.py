"""The words of the synthetic catalogue, and the titles, brands and categories made of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Department:
    """A part of the shop with its own vocabulary.

    Attributes:
        name: what it is called.
        aisles: the subtopics, each with the things sold there (the niches), in the singular.
        styles: what stands before a thing in a title.
        finishes: what stands after it.
        brands: the makers, invented.
    """

    name: str
    aisles: dict[str, list[str]]
    styles: list[str]
    finishes: list[str]
    brands: list[str]


def plural(noun: str) -> str:
    """Return the plural of a noun of these lists."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


_WORDS = tomllib.loads(Path(__file__).with_name("synthetic_words.toml").read_text("utf8"))

VARIANTS: tuple[str, ...] = tuple(_WORDS["variants"])
"""What may close a title; most have nothing."""

DEPARTMENTS = tuple(Department(**words) for words in _WORDS["departments"])

PATHS = [(d, a, n) for d in DEPARTMENTS for a, niches in d.aisles.items() for n in niches]
"""Every niche with its department and aisle, neighbors side by side."""

NICHES_OF_DEPARTMENT = len(PATHS) // len(DEPARTMENTS)
STYLES = len(DEPARTMENTS[0].styles)
FINISHES = len(DEPARTMENTS[0].finishes)
BRANDS = len(DEPARTMENTS[0].brands)


class Attributes(NamedTuple):
    """What items are like: one number per item, (n,) each; words as places in their lists."""

    niche: np.ndarray
    style: np.ndarray
    finish: np.ndarray
    variant: np.ndarray
    brand: np.ndarray
    popularity: np.ndarray
    quality: np.ndarray


def item_table(attributes: Attributes, *, start: int, count: int) -> pa.Table:
    """Describe the first ``count`` of some items, which are numbered from ``start``."""
    a = Attributes(*(values[:count] for values in attributes))
    words = _words()
    department = a.niche // NICHES_OF_DEPARTMENT

    def join(*parts: pa.Array | str) -> pa.Array:
        return pc.binary_join_element_wise(*parts, "")

    title = join(
        words["style"].take(pa.array(department * STYLES + a.style)),
        " ",
        words["noun"].take(pa.array(a.niche)),
        ", ",
        words["finish"].take(pa.array(department * FINISHES + a.finish)),
        words["variant"].take(pa.array(a.variant)),
    )
    brand = words["brand"].take(pa.array(department * BRANDS + a.brand))
    categories = words["categories"].take(pa.array(a.niche))
    return pa.table(
        {
            "item_id": numbered("P", start, count),
            "title": title,
            "brand": brand,
            "categories": categories,
            "text": join("Title: ", title, "; Brand: ", brand, "; Categories: ", categories),
            "popularity": pa.array(a.popularity.astype(np.float32)),
        }
    )


def numbered(letter: str, start: int, count: int) -> pa.Array:
    """Return the ids of ``count`` things from number ``start``, such as ``P0000012``."""
    return named(letter, np.arange(start, start + count))


def named(letter: str, numbers: np.ndarray) -> pa.Array:
    """Return the ids of things by their numbers (n,)."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 7, "0")
    return pc.binary_join_element_wise(letter, digits, "")


@cache
def _words() -> dict[str, pa.Array]:
    """Return the word lists in the order in which attributes count them."""
    lists = {
        "style": [s for d in DEPARTMENTS for s in d.styles],
        "finish": [f for d in DEPARTMENTS for f in d.finishes],
        "brand": [b for d in DEPARTMENTS for b in d.brands],
        "noun": [noun for _, _, noun in PATHS],
        "categories": [
            f"{d.name} > {aisle} > {plural(noun).capitalize()}" for d, aisle, noun in PATHS
        ],
        "variant": ["" if not v else f", {v}" for v in VARIANTS],
    }
    return {name: pa.array(words) for name, words in lists.items()}
