"""What the page's explorer shows: code trees, titles, describing words, neighbors of codes.

Items are sorted by their codes, so the items of a prefix are contiguous and a node of a tree
stores only the position of the first one and their number.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.ids import ItemIds
from semid.data.items import ItemTexts
from semid.diagnostics.spaces import nearest_entries
from semid.quantization.nearest import index_codebook
from semid.report.results import Bucket, BucketItem
from semid.seeds import numpy_generator

Ints = npt.NDArray[np.int64]

MAX_ITEMS = 20_000
"""Most items on the page; of a larger catalogue it shows a random sample, with figures of all."""

MAX_NODES = 40_000
MAX_BUCKETS = 100
MAX_EXAMPLES = 12
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
) -> tuple[Bucket, ...]:
    """List the buckets with more than one item, the fullest first."""
    # Sorted by key, a bucket is a run; the stable sort leaves its items in row order.
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(first, len(ordered)))
    collisions = np.flatnonzero(sizes > 1)
    fullest = collisions[np.argsort(-sizes[collisions], kind="stable")[:MAX_BUCKETS]]
    buckets = []
    for start, size in zip(first[fullest].tolist(), sizes[fullest].tolist(), strict=True):
        rows = order[start : start + size].tolist()
        examples = tuple(BucketItem(ids[row], _title(texts, row)) for row in rows[:MAX_EXAMPLES])
        bucket_codes = tuple(codes[rows[0]].tolist())
        buckets.append(Bucket(bucket_codes, size, len(np.unique(hashes[rows])), examples))
    return tuple(buckets)


def build_explorer(
    codes: npt.NDArray[Any],
    ids: ItemIds,
    texts: ItemTexts | None,
    codebooks: Sequence[npt.NDArray[np.float32]],
    *,
    hierarchical: bool,
    values: Mapping[str, npt.ArrayLike],
    item_spreads: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """Gather everything the explorer draws, as JSON-able columns.

    ``values`` are per item; ``item_spreads``, one per codebook, are what distances between its
    codewords are relative to.
    """
    count = len(codes)
    shown = np.arange(count)
    if count > MAX_ITEMS:
        generator = numpy_generator(seed, "report", "explorer")
        shown = np.sort(generator.choice(count, MAX_ITEMS, replace=False))
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
    words = _text_words(texts, shown)
    return {
        "hierarchical": hierarchical,
        "levels": levels,
        "items": count,
        "shown": len(shown),
        "ids": [ids[int(row)] for row in shown],
        "titles": None if texts is None else [_title(texts, int(row)) for row in shown],
        "codes": codes[shown].astype(np.int64).ravel().tolist(),
        "trees": [_columns(tree, place, _tree_words(tree, words, shown)) for tree in trees],
        "neighbors": [
            _neighbors(codebook, codes[:, level], spread)
            for level, (codebook, spread) in enumerate(zip(codebooks, item_spreads, strict=True))
        ],
    }


def _columns(tree: Tree, place: Ints, words: dict[int, list[str]]) -> dict[str, Any]:
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
        "words": {str(node): [number[word] for word in listed] for node, listed in words.items()},
        "left_out": tree.left_out,
    }


def _title(texts: ItemTexts | None, row: int) -> str | None:
    """Return the title of an item in one line; None where it has none."""
    return None if texts is None else shorten(texts.titles[row].as_py())


def _text_words(texts: ItemTexts | None, shown: Ints) -> TextWords | None:
    """Return the words of the shown items' texts."""
    if texts is None:
        return None
    source = texts.titles if texts.text is None else texts.text
    return TextWords.of(source.take(pa.array(shown)))


def _tree_words(tree: Tree, words: TextWords | None, shown: Ints) -> dict[int, list[str]]:
    """Return the describing words of prefixes of one and two codes, from the shown texts."""
    if words is None:
        return {}
    by_node: dict[int, list[str]] = {}
    for depth in (1, 2):
        by_node |= describing_words(words, tree.groups(depth)[shown], top=6 if depth == 1 else 4)
    return by_node


def _neighbors(
    codebook: npt.NDArray[np.float32], codes: npt.NDArray[Any], spread: float
) -> dict[str, Any]:
    """Return the nearest used codewords of the most used ones, nearest first."""
    # The nearest also overlap most, whatever the noise: overlap falls with distance alone.
    # The most used codewords, in the order of their codes.
    counts = np.bincount(codes, minlength=len(codebook))
    active = np.flatnonzero(counts)
    active = np.sort(active[np.argsort(-counts[active], kind="stable")[:NEIGHBOR_CODES]])
    if len(active) < 2 or spread <= 0:
        return {"code": [], "near": [], "distance": []}
    codewords = np.ascontiguousarray(codebook[active])
    table = index_codebook(codewords).full_table()
    labels, distances = nearest_entries(codewords, table, min(NEIGHBORS + 1, len(active)))
    near, relative_distances = [], []
    for index, (label, distance) in enumerate(zip(labels, distances, strict=True)):
        others = label != index  # a copy of this codeword may come before itself
        near.append(active[label[others][:NEIGHBORS]].tolist())
        relative = distance[others][:NEIGHBORS] / spread
        relative_distances.append([float(f"{value:.3g}") for value in relative])
    return {"code": active.tolist(), "near": near, "distance": relative_distances}


@dataclass(frozen=True)
class TextWords:
    """The different words of each text: lower case, two letters or more, no function words."""

    vocabulary: list[str]  # sorted
    text: Ints  # ``(pairs,)`` ascending number of the text
    word: Ints  # ``(pairs,)`` index in ``vocabulary``; a pair occurs once

    @classmethod
    def of(cls, texts: Any) -> TextWords:
        """Find the words of texts: an Arrow array or a list of strings."""
        # No word has white space in it, so words are looked for once per different piece between.
        if not isinstance(texts, pa.Array | pa.ChunkedArray):
            texts = pa.array(texts, pa.large_string())
        pieces = pc.utf8_split_whitespace(texts.cast(pa.large_string()))
        text = np.repeat(np.arange(len(texts)), pc.list_value_length(pieces).to_numpy())
        encoded = pc.list_flatten(pieces).dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        piece = encoded.indices.to_numpy()
        words = [
            [word for word in map(str.lower, _WORD.findall(each)) if word not in _STOP_WORDS]
            for each in encoded.dictionary.to_pylist()
        ]
        vocabulary = sorted(set(itertools.chain(*words)))
        index = {word: place for place, word in enumerate(vocabulary)}
        # Each text has all words of its pieces.
        flat = np.array([index[word] for word in itertools.chain(*words)], dtype=np.int64)
        counts = np.array([len(each) for each in words], dtype=np.int64)
        starts, repeats = np.cumsum(counts) - counts, counts[piece]
        place = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        word = flat[np.repeat(starts[piece], repeats) + place]
        size = max(len(vocabulary), 1)
        # With counts numpy sorts, which takes a tenth of the time of its hash table.
        pairs, _ = np.unique(np.repeat(text, repeats) * size + word, return_counts=True)
        return cls(vocabulary, pairs // size, pairs % size)


def describing_words(words: TextWords, groups: Ints, *, top: int = 6) -> dict[int, list[str]]:
    """Return the words that distinguish each group of texts ``(texts,)``; -1 is no group.

    Source: class-based tf-idf, Grootendorst 2022 (arXiv:2203.05794), eq. 2.
    """
    # A word scores tf * log(1 + A / f): its uses in the group, times the log of the mean number of
    # words per group over the word's uses in all groups. It counts once per item, and must occur in
    # two items of the group, so that one odd title cannot name a code.
    group_of_pair = groups[words.text]
    grouped = group_of_pair >= 0
    names, first = np.unique(group_of_pair[grouped], return_index=True)
    names = names[np.argsort(first)]  # groups in the order of their first texts
    place = np.full(int(groups.max(initial=-1)) + 1, -1)
    place[names] = np.arange(len(names))
    size = max(len(words.vocabulary), 1)
    keys = place[group_of_pair[grouped]] * size + words.word[grouped]
    keys, uses = np.unique(keys, return_counts=True)
    group, word = keys // size, keys % size
    overall = np.bincount(word, weights=uses, minlength=size)
    mean_words = uses.sum() / max(len(names), 1)
    rarity = np.array([math.log1p(mean_words / each) if each else 0.0 for each in overall.tolist()])
    scores = uses * rarity[word]
    # The best words of a group come first, those of equal scores in word order.
    repeated = np.flatnonzero(uses >= 2)
    order = repeated[np.lexsort((word[repeated], -scores[repeated], group[repeated]))]
    described: dict[int, list[str]] = {}
    for name, index in zip(names[group[order]].tolist(), word[order].tolist(), strict=True):
        best = described.setdefault(name, [])
        if len(best) < top:
            best.append(words.vocabulary[index])
    return described


# The code tree as flat columns -----------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Prefixes in order of depth, then of their parent, then the fullest first."""

    level: int  # level of the first codes: 0, or the codebook of a parallel tokenizer
    order: Ints  # ``(items,)`` row numbers sorted by codes
    parent: Ints  # ``(nodes,)`` node of the shorter prefix, -1 for the first level
    depth: Ints  # ``(nodes,)`` from 1
    code: Ints  # ``(nodes,)`` last code of the prefix
    first: Ints  # ``(nodes,)`` position of its first item in ``order``
    items: Ints  # ``(nodes,)`` number of its items
    metrics: dict[str, npt.NDArray[np.float64]]  # name -> ``(nodes,)`` value
    left_out: int  # number of prefixes beyond the budget, which are not in the tree

    def groups(self, depth: int) -> Ints:
        """Return ``(items,)`` the node of each row at a depth; -1 where there is none."""
        nodes = np.full(len(self.order), -1, dtype=np.int64)
        for node in np.flatnonzero(self.depth == depth):
            start = self.first[node]
            nodes[self.order[start : start + self.items[node]]] = node
        return nodes


def build_tree(
    codes: npt.NDArray[Any],
    *,
    level: int = 0,
    depths: int | None = None,
    values: Mapping[str, npt.ArrayLike] | None = None,
    most_nodes: int = 40_000,
) -> Tree:
    """Build the tree of prefixes of codes (items, levels) with the means of values (items,)."""
    prefix_codes = codes[:, level:] if depths is None else codes[:, level : level + depths]
    # Sort by the codes of the prefixes and then by the whole id. The tree of a parallel codebook
    # sees one code, but items of one whole id must be contiguous to be counted once.
    sort_keys = np.concatenate([prefix_codes, codes], axis=1)
    order = np.lexsort(sort_keys.T[::-1]).astype(np.int64)
    is_new_id = np.ones(len(order), dtype=bool)
    is_new_id[1:] = (sort_keys[order][1:] != sort_keys[order][:-1]).any(axis=1)
    # The items of a node are a range of this order, so its sum of anything is the difference of
    # two cumulative sums.
    sums = {"unique": _cumulative(is_new_id)}
    for name, value in (values or {}).items():
        sums[name] = _cumulative(np.asarray(value, dtype=np.float64)[order])
    columns, left_out = _grow(prefix_codes[order], most_nodes)
    first, items = columns["first"], columns["items"]
    metrics = {name: (total[first + items] - total[first]) / items for name, total in sums.items()}
    return Tree(level=level, order=order, metrics=metrics, left_out=left_out, **columns)


def _cumulative(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _grow(codes: npt.NDArray[Any], most_nodes: int) -> tuple[dict[str, Ints], int]:
    """Split sorted codes (items, depths); return the nodes' columns and how many are missing."""
    count = len(codes)
    # Node of each position at the depth before; -1 where it must not be split further.
    node_of = np.zeros(count, dtype=np.int64)
    levels: list[tuple[Ints, ...]] = []
    nodes, left_out = 0, 0
    for depth in range(codes.shape[1]):
        # Codes are sorted, so a prefix is a run: it begins where its last code or its parent
        # changes, and it ends where the next one begins.
        column = codes[:, depth].astype(np.int64)
        begins = np.ones(count, dtype=bool)
        begins[1:] = (column[1:] != column[:-1]) | (node_of[1:] != node_of[:-1])
        first = np.flatnonzero(begins)
        items = np.diff(np.append(first, count))
        # Runs below a node that is missing or has a single item are no nodes.
        has_parent = node_of[first] >= 0
        first, items = first[has_parent], items[has_parent]
        within_budget = _fullest(items, most_nodes - nodes)
        left_out += len(items) - len(within_budget)
        first, items = first[within_budget], items[within_budget]
        parent = node_of[first] if depth else np.full(len(first), -1, dtype=np.int64)
        # Children of one parent are contiguous, the fullest first: the order the page draws.
        order = np.lexsort((first, -items, parent))
        first, items, parent = first[order], items[order], parent[order]
        levels.append((parent, np.full(len(first), depth + 1), column[first], first, items))
        # Only nodes with several items are split at the next depth.
        node_of = np.full(count, -1, dtype=np.int64)
        for node in np.flatnonzero(items > 1):
            node_of[first[node] : first[node] + items[node]] = nodes + node
        nodes += len(first)
    names = ("parent", "depth", "code", "first", "items")
    columns = map(np.concatenate, zip(*levels, strict=True))
    return dict(zip(names, columns, strict=True)), left_out


def _fullest(items: Ints, budget: int) -> Ints:
    """Return the positions of the ``budget`` largest, the earlier first among equals."""
    if len(items) <= budget:
        return np.arange(len(items))
    return np.sort(np.argsort(-items, kind="stable")[: max(budget, 0)])
