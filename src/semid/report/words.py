"""Words that describe a group of items: class-based tf-idf over their texts."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["describing_words", "tokens"]

_WORD = re.compile(r"[^\W\d_][\w'-]*[^\W_]", re.UNICODE)

# Function words and units, which sit in every text and describe none.
_STOP = frozenset(
    [
        "a",
        "about",
        "above",
        "after",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "down",
        "each",
        "few",
        "for",
        "from",
        "had",
        "has",
        "have",
        "her",
        "here",
        "him",
        "his",
        "how",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "just",
        "me",
        "more",
        "most",
        "my",
        "no",
        "nor",
        "not",
        "now",
        "of",
        "off",
        "on",
        "once",
        "only",
        "or",
        "other",
        "our",
        "out",
        "over",
        "own",
        "per",
        "same",
        "she",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "to",
        "too",
        "under",
        "until",
        "up",
        "very",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
        "count",
        "fl",
        "fluid",
        "inch",
        "lb",
        "ml",
        "ounce",
        "ounces",
        "oz",
        "pack",
        "piece",
        "pieces",
        "set",
        "size",
    ]
)


def tokens(text: str) -> list[str]:
    """Return the lower-case words of a text: two letters or more, no function words, no numbers."""
    return [w for w in (m.group().lower() for m in _WORD.finditer(text)) if w not in _STOP]


def describing_words(
    words: Sequence[Collection[str]],
    groups: npt.NDArray[np.int64],
    *,
    top: int = 6,
    smallest: int = 2,
) -> dict[int, list[str]]:
    """Find the words that tell each group of items from the others.

    A word scores ``tf * log(1 + A / f)``: its uses in the group, times the log of the mean number
    of words a group over the word's number of uses in all groups. A word counts once an item, and
    must occur in two items of the group, so one odd title cannot name a code.

    Args:
        words: the different words of each item, from `tokens`.
        groups: ``(items,)`` group of each item; negative ones are left out.
        top: most words a group.
        smallest: groups with fewer items get no words.

    Returns:
        Group -> its words, the most telling first. Groups without telling words are left out.

    Time and memory grow with the number of words.

    Source: class-based tf-idf, Grootendorst 2022 (arXiv:2203.05794), eq. 2.
    """
    by_group: dict[int, Counter[str]] = {}
    sizes: Counter[int] = Counter()
    for own, group in zip(words, groups.tolist(), strict=True):
        if group < 0 or not own:
            continue
        by_group.setdefault(group, Counter()).update(own)
        sizes[group] += 1
    if not by_group:
        return {}
    overall: Counter[str] = Counter()
    for counter in by_group.values():
        overall.update(counter)
    mean_words = sum(overall.values()) / len(by_group)
    found = {}
    for group, counter in by_group.items():
        if sizes[group] < smallest:
            continue
        scores = [
            (-uses * math.log1p(mean_words / overall[word]), word)
            for word, uses in counter.items()
            if uses >= 2
        ]
        best = heapq.nsmallest(top, scores)
        if best:
            found[group] = [word for _, word in best]
    return found
