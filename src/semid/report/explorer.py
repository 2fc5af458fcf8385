"""What the page's explorer shows: code trees, titles, describing words, neighbors of codes."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.data.ids import ItemIds
from semid.data.items import ItemTexts
from semid.quantization.nearest import nearest_m
from semid.report.results import Bucket, BucketItem
from semid.report.tree import Tree, build_tree
from semid.seeds import numpy_generator

MAX_ITEMS = 20_000
"""Most items on the page; of a larger catalogue it shows a random sample, with figures of all."""

MAX_NODES = 40_000
TITLE_BYTES = 120
NEIGHBORS = 5
NEIGHBOR_CODES = 4096

_WORD = re.compile(r"[^\W\d_][\w'-]*[^\W_]", re.UNICODE)

# Function words and units, which occur in every text and describe none.
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a about above after all also an and any are as at be been before being below between both
    but by can could did do does down each few for from had has have her here him his how if
    in into is it its just me more most my no nor not now of off on once only or other our out
    over own per same she so some such than that the their them then there these they this
    those through to too under until up very was we were what when where which while who why
    will with would you your count fl fluid inch lb ml ounce ounces oz pack piece pieces set
    size
    """,
    )
)


def shorten(text: str | None) -> str | None:
    """Return a title of at most 120 bytes, cut between characters; None if it is empty."""
    flat = " ".join((text or "").split())
    if len(flat.encode()) <= TITLE_BYTES:
        return flat or None
    return flat.encode()[: TITLE_BYTES - 3].decode(errors="ignore").rstrip() + "…"


def largest_buckets(
    codes: npt.NDArray[Any],
    keys: npt.NDArray[np.uint64],
    hashes: npt.NDArray[np.uint64],
    ids: ItemIds,
    texts: ItemTexts | None,
    *,
    most: int = 100,
    examples: int = 12,
) -> tuple[Bucket, ...]:
    """List the buckets with more than one item, the fullest first.

    Shapes: ``codes`` (items, levels), ``keys`` (items,), ``hashes`` (items,).
    """
    # Sorted by key, a bucket is a run; the stable sort leaves its items in row order.
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(first, len(ordered)))
    collisions = np.flatnonzero(sizes > 1)
    fullest = collisions[np.argsort(-sizes[collisions], kind="stable")[:most]]
    buckets = []
    for start, size in zip(first[fullest].tolist(), sizes[fullest].tolist(), strict=True):
        rows = order[start : start + size]
        buckets.append(
            Bucket(
                codes=tuple(int(code) for code in codes[rows[0]]),
                items=size,
                distinct_inputs=len(np.unique(hashes[rows])),
                examples=tuple(
                    BucketItem(ids[int(row)], _title(texts, int(row))) for row in rows[:examples]
                ),
            )
        )
    return tuple(buckets)


def build_explorer(
    codes: npt.NDArray[Any],
    ids: ItemIds,
    texts: ItemTexts | None,
    codebooks: Sequence[npt.NDArray[np.float32]],
    *,
    hierarchical: bool,
    values: Mapping[str, npt.ArrayLike],
    item_spread: float,
    seed: int,
    most_items: int = MAX_ITEMS,
) -> dict[str, Any]:
    """Gather everything the explorer draws, as JSON-able columns.

    Shapes: ``codes`` (items, levels), ``codebooks`` (codes, latent), ``values`` (items,).
    """
    count = len(codes)
    shown = np.arange(count)
    if count > most_items:
        generator = numpy_generator(seed, "report", "explorer")
        shown = np.sort(generator.choice(count, most_items, replace=False))
    levels = codes.shape[1]
    if hierarchical:
        trees = [build_tree(codes, values=values, most_nodes=MAX_NODES)]
    else:
        nodes_per_tree = MAX_NODES // levels
        trees = [
            build_tree(codes, level=level, depths=1, values=values, most_nodes=nodes_per_tree)
            for level in range(levels)
        ]
    # Position of each item among those shown; -1 for the others.
    place = np.full(count, -1, dtype=np.int64)
    place[shown] = np.arange(len(shown))
    return {
        "hierarchical": hierarchical,
        "levels": levels,
        "items": count,
        "shown": len(shown),
        "ids": [ids[int(row)] for row in shown],
        "titles": None if texts is None else [_title(texts, int(row)) for row in shown],
        "codes": codes[shown].astype(np.int64).ravel().tolist(),
        "trees": [_columns(tree, place, _words(tree, texts, shown)) for tree in trees],
        "neighbors": [
            _neighbors(codebook, codes[:, level], item_spread)
            for level, codebook in enumerate(codebooks)
        ],
    }


def _columns(
    tree: Tree, place: npt.NDArray[np.int64], words: dict[int, list[str]]
) -> dict[str, Any]:
    """Turn a tree into JSON columns: positions count shown items only, sizes count all items."""
    order = place[tree.order]
    # Shown items before each position of the tree's order; differences count those of a node.
    shown = np.concatenate([[0], np.cumsum(order >= 0)])
    vocabulary = sorted({word for node_words in words.values() for word in node_words})
    number = {word: index for index, word in enumerate(vocabulary)}
    return {
        "level": tree.level,
        "order": order[order >= 0].tolist(),
        "parent": tree.parent.tolist(),
        "code": tree.code.tolist(),
        "items": tree.items.tolist(),
        "first": shown[tree.first].tolist(),
        "shown": (shown[tree.first + tree.items] - shown[tree.first]).tolist(),
        "metrics": {
            name: [float(f"{value:.4g}") for value in column]
            for name, column in tree.metrics.items()
        },
        "vocabulary": vocabulary,
        "words": {str(node): [number[word] for word in own] for node, own in words.items()},
        "left_out": tree.left_out,
    }


def _title(texts: ItemTexts | None, row: int) -> str | None:
    """Return the title of an item in one line; None where it has none."""
    return None if texts is None else shorten(texts.titles[row].as_py())


def _words(
    tree: Tree, texts: ItemTexts | None, shown: npt.NDArray[np.int64]
) -> dict[int, list[str]]:
    """Return the describing words of prefixes of one and two codes, from the shown texts."""
    if texts is None:
        return {}
    source = texts.titles if texts.text is None else texts.text
    words = [set(tokens(source[int(row)].as_py())) for row in shown]
    by_node: dict[int, list[str]] = {}
    for depth in (1, 2):
        by_node |= describing_words(words, tree.groups(depth)[shown], top=6 if depth == 1 else 4)
    return by_node


def _neighbors(
    codebook: npt.NDArray[np.float32], codes: npt.NDArray[Any], spread: float
) -> dict[str, Any]:
    """Return the nearest used codewords of the most used ones, nearest first.

    The nearest codewords also overlap most, whatever the noise: overlap falls with distance alone.
    """
    # The most used codewords, in the order of their codes.
    counts = np.bincount(codes, minlength=len(codebook))
    active = np.flatnonzero(counts)
    active = np.sort(active[np.argsort(-counts[active], kind="stable")[:NEIGHBOR_CODES]])
    if len(active) < 2 or spread <= 0:
        return {"code": [], "near": [], "distance": []}
    codewords = torch.from_numpy(np.ascontiguousarray(codebook[active]))
    nearest = nearest_m(codewords, codewords, min(NEIGHBORS + 1, len(active)))
    labels, distances = nearest.labels.numpy(), nearest.distances.numpy()
    near, relative_distances = [], []
    for index, (label, distance) in enumerate(zip(labels, distances, strict=True)):
        others = label != index  # a copy of this codeword may come before itself
        near.append(active[label[others][:NEIGHBORS]].tolist())
        relative = distance[others][:NEIGHBORS] / spread
        relative_distances.append([float(f"{value:.3g}") for value in relative])
    return {"code": active.tolist(), "near": near, "distance": relative_distances}


def tokens(text: str) -> list[str]:
    """Return the lower-case words of a text: two letters or more, no function words, no numbers."""
    return [w for w in (m.group().lower() for m in _WORD.finditer(text)) if w not in _STOP_WORDS]


def describing_words(
    words: Sequence[Collection[str]],
    groups: npt.NDArray[np.int64],
    *,
    top: int = 6,
    smallest: int = 2,
) -> dict[int, list[str]]:
    """Return the words that distinguish each group of items from the others.

    A word scores ``tf * log(1 + A / f)``: its uses in the group, times the log of the mean number
    of words per group over the word's uses in all groups. A word counts once per item, and must
    occur in two items of the group, so that one odd title cannot name a code.

    Source: class-based tf-idf, Grootendorst 2022 (arXiv:2203.05794), eq. 2.

    Shapes: ``groups`` (items,).
    """
    by_group: dict[int, Counter[str]] = {}
    sizes: Counter[int] = Counter()
    for item_words, group in zip(words, groups.tolist(), strict=True):
        if group < 0 or not item_words:
            continue
        by_group.setdefault(group, Counter()).update(item_words)
        sizes[group] += 1
    overall: Counter[str] = Counter()
    for counter in by_group.values():
        overall.update(counter)
    mean_words = sum(overall.values()) / max(len(by_group), 1)
    described = {}
    for group, counter in by_group.items():
        if sizes[group] < smallest:
            continue
        # Negative scores, so that the smallest tuple is the best and ties are in word order.
        scores = [
            (-uses * math.log1p(mean_words / overall[word]), word)
            for word, uses in counter.items()
            if uses >= 2
        ]
        if scores:
            described[group] = [word for _, word in heapq.nsmallest(top, scores)]
    return described
