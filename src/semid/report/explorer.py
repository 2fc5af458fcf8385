"""What the page's explorer shows: trees, items with titles, words and neighbors of codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.data.ids import ItemIds
from semid.data.items import ItemTexts
from semid.quantization.nearest import nearest_m
from semid.report.tree import Tree, build_tree
from semid.report.words import describing_words, tokens
from semid.seeds import numpy_generator

__all__ = ["MOST_ITEMS", "build_explorer", "largest_buckets", "shorten"]

MOST_ITEMS = 20_000
"""Items on the page; a larger catalogue shows a random sample beside figures of all items."""

MOST_NODES = 40_000
TITLE_BYTES = 120
NEIGHBORS = 5
NEIGHBOR_CODES = 4096


def shorten(text: str | None) -> str | None:
    """Return a title of at most 120 bytes, cut at a character; None for none or an empty one."""
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
) -> tuple[dict[str, Any], ...]:
    """List the buckets with more than one item, the fullest first.

    Args:
        codes: ``(items, levels)``.
        keys: ``(items,)`` equal for equal ids.
        hashes: ``(items,)`` equal for equal inputs.
        ids: the items.
        texts: their titles, or None.
        most: most buckets listed.
        examples: most items named a bucket, in row order.

    Cost: a sort of the items.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(first, len(ordered)))
    shared = np.flatnonzero(sizes > 1)
    chosen = shared[np.argsort(-sizes[shared], kind="stable")[:most]]
    buckets = []
    for start, size in zip(first[chosen].tolist(), sizes[chosen].tolist(), strict=True):
        rows = order[start : start + size]
        buckets.append(
            {
                "codes": [int(code) for code in codes[rows[0]]],
                "items": int(size),
                "distinct_inputs": len(np.unique(hashes[rows])),
                "examples": [
                    {"id": ids[int(row)], "title": _title(texts, int(row))}
                    for row in rows[:examples]
                ],
            }
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
    most_items: int = MOST_ITEMS,
) -> dict[str, Any]:
    """Gather everything the explorer draws, as JSON-able columns.

    Args:
        codes: ``(items, levels)``.
        ids: the items.
        texts: titles and texts, or None.
        codebooks: ``(codes, latent)`` a level.
        hierarchical: one tree of prefixes, else a tree of depth one for each codebook.
        values: name -> ``(items,)`` values to color by.
        item_spread: mean squared distance between two random items in the latent space.
        seed: draws the sample of a catalogue larger than ``most_items``.
        most_items: items shown.

    Memory: a few arrays of one number an item; titles of the items shown only.
    """
    count = len(codes)
    shown = np.arange(count)
    if count > most_items:
        draw = numpy_generator(seed, "report", "explorer")
        shown = np.sort(draw.choice(count, most_items, replace=False))
    levels = codes.shape[1]
    if hierarchical:
        trees = [build_tree(codes, values=values, most_nodes=MOST_NODES)]
    else:
        budget = MOST_NODES // levels
        trees = [
            build_tree(codes, level=level, depths=1, values=values, most_nodes=budget)
            for level in range(levels)
        ]
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
            _neighbors(book, codes[:, level], item_spread) for level, book in enumerate(codebooks)
        ],
    }


def _columns(
    tree: Tree, place: npt.NDArray[np.int64], words: dict[int, list[str]]
) -> dict[str, Any]:
    """Turn a tree into JSON: places count shown items only, sizes count all."""
    order = place[tree.order]
    shown = np.concatenate([[0], np.cumsum(order >= 0)])
    vocabulary = sorted({word for listed in words.values() for word in listed})
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
        "words": {str(node): [number[word] for word in listed] for node, listed in words.items()},
        "left_out": tree.left_out,
    }


def _title(texts: ItemTexts | None, row: int) -> str | None:
    """Return an item's own title, cut to a line; None where it has none."""
    return None if texts is None else shorten(texts.titles[row].as_py())


def _words(
    tree: Tree, texts: ItemTexts | None, shown: npt.NDArray[np.int64]
) -> dict[int, list[str]]:
    """Find the describing words of prefixes of one and two codes, from the texts shown."""
    if texts is None:
        return {}
    source = texts.titles if texts.text is None else texts.text
    chosen = [set(tokens(source[int(row)].as_py())) for row in shown]
    found: dict[int, list[str]] = {}
    for depth in (1, 2):
        found |= describing_words(chosen, tree.groups(depth)[shown], top=6 if depth == 1 else 4)
    return found


def _neighbors(
    book: npt.NDArray[np.float32], codes: npt.NDArray[Any], spread: float
) -> dict[str, Any]:
    """Return the nearest used codewords of the most used ones, nearest first.

    Nearest is the same as overlapping most, whatever the noise: the overlap of two codewords
    falls with their distance alone.
    """
    counts = np.bincount(codes, minlength=len(book))
    active = np.flatnonzero(counts)
    active = np.sort(active[np.argsort(-counts[active], kind="stable")[:NEIGHBOR_CODES]])
    if len(active) < 2 or spread <= 0:
        return {"code": [], "near": [], "distance": []}
    words = torch.from_numpy(np.ascontiguousarray(book[active]))
    found = nearest_m(words, words, min(NEIGHBORS + 1, len(active)))
    labels, distances = found.labels.numpy(), found.distances.numpy()
    near, far = [], []
    for own, (label, distance) in enumerate(zip(labels, distances, strict=True)):
        others = label != own  # a copy of this codeword may come before itself
        near.append(active[label[others][:NEIGHBORS]].tolist())
        far.append([float(f"{d / spread:.3g}") for d in distance[others][:NEIGHBORS]])
    return {"code": active.tolist(), "near": near, "distance": far}
