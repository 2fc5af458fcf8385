"""What the explorer asks of the live catalogue: nodes of the code tree, words, search, buckets."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.catalogue.additions import NOVEL
from semid.catalogue.prefixes import PrefixIndex
from semid.quantization.threads import map_blocks
from semid.report.explorer import (
    MAX_BUCKETS,
    MAX_EXAMPLES,
    NEIGHBORS,
    TextWords,
    describing_words,
    shorten,
)
from semid.report.pages import render
from semid.serve.batching import Refused
from semid.serve.versions import Version

MAX_CHILDREN = 400
"""Codes of a node that are drawn, the fullest first: a map of more is slow and shows nothing."""

WORD_ITEMS = 2000
"""Items of a node whose texts are read to describe its children."""

SEARCH_ROWS = 2**17
"""Texts that a thread searches at a time."""

EXAMPLES = 3
KEPT_NODES = 4096
_NUMBERS = re.compile(r"\b\d{1,10}\b")


@cache
def explorer_page() -> str:
    """Return the page; it holds nothing of the catalogue, and asks for everything."""
    return render("live.html.j2", plots=[])


class Tree:
    """The code tree of a version, or that of one parallel codebook, with sums over its items."""

    def __init__(self, version: Version, level: int) -> None:
        self.version, self.level = version, level
        codes, sizes = version.ids.codes, version.ids.info.codebook_sizes
        if version.ids.info.hierarchical:
            self.trie = version.trie
        else:
            self.trie = PrefixIndex.build(
                codes[:, level : level + 1], sizes=sizes[level : level + 1]
            )
        rows = self.trie.rows
        values = {"new": rows >= version.before if version.before else np.zeros(len(rows), bool)}
        if version.novelty is not None:
            values["novel"] = version.novelty[rows] > NOVEL
        # The items of a node are a range of rows: a sum is the difference of two cumulative sums.
        self.sums = {
            name: np.concatenate([[0], np.cumsum(value, dtype=np.int64)])
            for name, value in values.items()
        }
        self.words: dict[tuple[int, ...], dict[int, list[str]]] = {}

    def shares(self, starts: Any, items: Any) -> dict[str, Any]:
        """Return the share of new and novel items of ranges of rows."""
        stops = starts + items
        ratios = {
            name: (total[stops] - total[starts]) / np.maximum(items, 1)
            for name, total in self.sums.items()
        }
        return {name: np.round(ratio, 4).tolist() for name, ratio in ratios.items()}

    def child_words(self, codes: tuple[int, ...]) -> dict[int, list[str]]:
        """Return the words that describe each child of a node, by code."""
        texts = self.version.texts
        if texts is None or len(codes) == self.trie.levels:
            return {}
        if codes not in self.words:
            start, stop = self.trie.row_range(codes)
            count = min(stop - start, WORD_ITEMS)
            rows = self.trie.rows[np.linspace(start, stop - 1, count).astype(np.int64)]
            source = texts.titles if texts.text is None else texts.text
            words = TextWords.of(source.take(pa.array(rows)))
            depth = len(codes) if len(self.trie.sizes) > 1 else self.level
            groups = self.version.ids.codes[rows, depth].astype(np.int64)
            if len(self.words) >= KEPT_NODES:
                self.words.clear()
            self.words[codes] = describing_words(words, groups, top=6 if not codes else 4)
        return self.words[codes]


def tree_of(version: Version, level: int) -> Tree:
    """Return the tree of a version, made at the first use."""
    sizes = version.ids.info.codebook_sizes
    if level >= len(sizes) or (level and version.ids.info.hierarchical):
        raise Refused(422, f"level {level}: there is no tree of this level")
    tree: Tree | None = version.trees.get(level)
    if tree is None:
        tree = version.trees[level] = Tree(version, level)
    return tree


def warm(version: Version) -> None:
    """Make what the first visitor of a version would wait for."""
    tree_of(version, 0).child_words(())
    _ = version.search_texts, version.spread, version.used, version.verdict


def node(version: Version, level: int, codes: list[int]) -> dict[str, Any]:
    """Return the deepest known node on the way along codes, with its children."""
    tree = tree_of(version, level)
    trie = tree.trie
    path = tuple(codes[: trie.levels])
    while path and not trie.count(path):
        path = path[:-1]
    start, stop = trie.row_range(path)
    children = trie.children(path)
    largest = np.argsort(-children.items, kind="stable")[:MAX_CHILDREN]
    shown, starts, items = (column[largest] for column in children)
    words = tree.child_words(path)
    own = tree.child_words(path[:-1]).get(path[-1], []) if path else []
    return {
        "codes": list(path),
        "items": stop - start,
        "metrics": {name: value[0] for name, value in _at(tree, start, stop - start).items()},
        "words": own,
        "children": {
            "code": shown.tolist(),
            "items": items.tolist(),
            "metrics": tree.shares(starts, items),
            "words": [words.get(code, []) for code in shown.tolist()],
            "examples": _examples(tree, starts, items),
        },
        "all_children": len(children.codes),
        "near": _near(version, tree, path) if path else [],
        "hierarchical": version.ids.info.hierarchical,
        "levels": version.ids.levels,
    }


def _at(tree: Tree, start: int, items: int) -> dict[str, Any]:
    return tree.shares(np.array([start]), np.array([items]))


def _examples(tree: Tree, starts: Any, items: Any) -> list[list[str]]:
    """Return the titles of the first items of ranges of rows."""
    texts = tree.version.texts
    if texts is None:
        return [[] for _ in starts]
    counts = np.minimum(items, EXAMPLES)
    places = np.concatenate(
        [
            np.empty(0, np.int64),
            *(start + np.arange(n) for start, n in zip(starts, counts, strict=True)),
        ]
    )
    titles = iter(texts.titles.take(pa.array(tree.trie.rows[places])).to_pylist())
    listed = [[shorten(next(titles)) for _ in range(count)] for count in counts.tolist()]
    return [[title for title in each if title] for each in listed]


def _near(version: Version, tree: Tree, path: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the nearest used codes to the last one of a path; none for an appended token."""
    level = len(path) - 1 if tree.trie.levels > 1 else tree.level
    books = version.tokenizer.codebooks
    spread = version.spread[level] if level < len(books) else 0.0
    if spread <= 0:
        return []
    book = books[level]
    distances = ((book - book[path[-1]]) ** 2).sum(axis=1)
    used = np.flatnonzero(version.used[level])
    used = used[used != path[-1]]
    order = used[np.argsort(distances[used], kind="stable")[:NEIGHBORS]]
    return [
        {
            "code": int(code),
            "distance": float(f"{distances[code] / spread:.3g}"),
            "reached": tree.trie.count([*path[:-1], int(code)]) > 0,
        }
        for code in order
    ]


def search(version: Version, query: str, level: int, offset: int, limit: int) -> dict[str, Any]:
    """Return the items whose id or title has all words of a query, then those of a prefix.

    An item that is called just so comes first.
    """
    words = query.lower().split()
    rows = np.arange(len(version.ids)) if words else np.empty(0, np.int64)
    texts = version.search_texts
    for word in sorted(words, key=len, reverse=True):  # a long word leaves little to the others
        # To gather texts takes as long as to search four times as many where they lie.
        if len(rows) > len(texts) // 4:
            rows = rows[_contains(texts, word)[rows]]
        else:
            rows = rows[_contains(texts.take(pa.array(rows)), word)]
    exact = version.ids.items.index_of([query.strip()])
    rows = np.concatenate([exact[exact >= 0], rows[~np.isin(rows, exact)]])
    tree = tree_of(version, level)
    numbers = _NUMBERS.findall(query)
    if numbers and version.ids.info.hierarchical and not _NUMBERS.sub("", query).strip(" .,·-"):
        codes = [int(number) for number in numbers[: version.trie.levels + 1]]
        if len(codes) <= version.trie.levels:
            below = version.trie.items(codes)
            rows = np.concatenate([rows, below[~np.isin(below, rows)]])
    # The words of the first codes, each named by its best.
    described = tree.child_words(()).items() if len(query) > 2 else ()
    chips = [
        {"code": code, "word": each[0]}
        for code, each in described
        if any(word.startswith(query.lower().strip()) for word in each)
    ]
    return {
        "total": len(rows),
        "offset": offset,
        "items": [version.item(row) for row in rows[offset : offset + limit].tolist()],
        "codes": chips[:12],
    }


def _contains(texts: Any, word: str) -> Any:
    """Return which texts ``(items,)`` contain a word; every core reads a part."""

    def work(start: int) -> Any:
        part = texts.slice(start, SEARCH_ROWS)
        return pc.match_substring(part, word).to_numpy(zero_copy_only=False)

    starts = range(0, max(len(texts), 1), SEARCH_ROWS)
    return np.concatenate(map_blocks(work, starts))


def buckets(version: Version) -> list[dict[str, Any]]:
    """Return the fullest ids with more than one item."""
    trie = version.trie
    sizes = np.diff(trie.row_starts)
    shared = np.flatnonzero(sizes > 1)
    fullest = shared[np.argsort(-sizes[shared], kind="stable")[:MAX_BUCKETS]]
    listed = []
    for leaf in fullest.tolist():
        rows = trie.rows[trie.row_starts[leaf] : trie.row_starts[leaf + 1]]
        examples = [version.item(row) for row in rows[:MAX_EXAMPLES].tolist()]
        listed.append(
            {
                "codes": version.ids.codes[rows[0]].tolist(),
                "items": int(sizes[leaf]),
                "examples": [{"id": e["item_id"], "title": shorten(e["title"])} for e in examples],
            }
        )
    return listed
