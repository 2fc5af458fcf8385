"""Catalogues of valid ids for engines that serve generative recommenders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.matching import item_counts
from semid.catalogue.prefixes import PrefixIndex
from semid.codes import SemanticIds
from semid.data.interactions import Interactions
from semid.data.items import read_items
from semid.errors import UsageError
from semid.exports.formats import ExportFormat
from semid.exports.id_files import numbered_items

MAX_DENSE_CELLS = 2**30
"""Cells of STATIC's dense tables, of 5 bytes each: 5 GB."""


# FlashRec: ``--sid-vocab-file``, ``{"12,7,3": 1, ...}`` with the codes of each valid id.


def _write_flashrec(path: Path, *, ids: SemanticIds, end_code: int | None = None) -> None:
    """Write each id once, in order; ``end_code`` is a further level that ends every id.

    Models such as OneRec generate an end token in a codebook of two, where its code is 1.
    """
    if end_code is not None and (isinstance(end_code, bool) or end_code < 0):
        raise UsageError(f"end_code={end_code!r}: give the code of the end token, 0 or more")
    end = "" if end_code is None else f",{end_code}"
    unique = np.unique(ids.codes, axis=0).tolist()
    with path.open("w", encoding="utf8") as file:
        file.write("{")
        for row, codes in enumerate(unique):
            file.write(f'{"," if row else ""}\n"{",".join(map(str, codes))}{end}": 1')
        file.write("\n}\n")


FLASHREC = ExportFormat(_write_flashrec, options=("end_code",), distinct=True)


# OpenOneRec, vLLM-GR: ``sid2pid.json``, an id packed into one number -> its items, the most popular
# first: ``{"67125255": [{"pid": 17, "count": 90, "count_after_downsample": 90}], ...}``.


def _write_sid2pid(
    path: Path, *, ids: SemanticIds, interactions: Interactions | None = None, base: int = 8192
) -> None:
    """Write the items of each id; ``base`` is the engine's number of codes per level.

    Counts are interactions, 0 without a log. ``pid`` is the item id where all are integers,
    otherwise the row number.
    """
    largest = max(ids.info.codebook_sizes)
    if isinstance(base, bool) or not isinstance(base, int) or base < largest:
        raise UsageError(f"base={base!r}: codes are packed with a base of at least {largest}")
    counts = np.zeros(len(ids), np.int64)
    if interactions is not None:
        counts = item_counts(interactions, ids.items).astype(np.int64)
    pids, _ = numbered_items(ids)
    items: dict[str, list[dict[str, int]]] = {}
    # The most popular first; among equals, the order of the file.
    for row in np.argsort(-counts, kind="stable").tolist():
        packed = 0  # Python's integers: 64 bits are too few for five levels of 8,192
        for code in ids.codes[row].tolist():
            packed = packed * base + code
        count = int(counts[row])
        entry = {"pid": int(pids[row]), "count": count, "count_after_downsample": count}
        items.setdefault(str(packed), []).append(entry)
    path.write_text(json.dumps(items) + "\n", encoding="utf8")


SID2PID = ExportFormat(_write_sid2pid, interactions="optional", options=("base",))


# NVIDIA SID-GR (recsys-examples): ``--catalog-jsonl``, ``POST /catalog/reload``; a line per item,
# ``{"item_id": 17, "token_ids": [12, 263, 515], "metadata": {"title": ...}}``.


def _write_sid_gr(
    path: Path,
    *,
    ids: SemanticIds,
    offsets: Sequence[int] | None = None,
    vocab_size: int | None = None,
    items: Any = None,
) -> None:
    """Write the items; a token is a code plus the offset of its level, 0 by default.

    ``vocab_size`` is that of the engine's model, which the tokens are checked against; ``items``
    is a table of titles.
    """
    first_tokens, _ = _token_range(ids.info.codebook_sizes, offsets, vocab_size)
    numbers, names = numbered_items(ids)
    item_ids = ids.items.strings().to_pylist() if names else numbers.tolist()
    titles = None if items is None else read_items(items, ids=ids.items).titles
    with path.open("w", encoding="utf8") as file:
        for row, item_id in enumerate(item_ids):
            tokens = (ids.codes[row] + first_tokens).tolist()
            line = {"item_id": item_id, "token_ids": tokens}
            if titles is not None:
                line["metadata"] = {"title": titles[row].as_py()}
            file.write(json.dumps(line) + "\n")


SID_GR = ExportFormat(_write_sid_gr, options=("offsets", "vocab_size", "items"), distinct=True)


def _token_range(
    sizes: Sequence[int], offsets: Sequence[int] | None, vocab_size: int | None
) -> tuple[npt.NDArray[np.int64], int]:
    """Return the first token of each level and the number of tokens, after checking both."""
    levels = len(sizes)
    starts = [0] * levels if offsets is None else list(offsets)
    if len(starts) != levels or any(isinstance(o, bool) or o < 0 for o in starts):
        raise UsageError(f"offsets={starts}: give {levels} numbers of 0 or more, one per level")
    least = max(start + size for start, size in zip(starts, sizes, strict=True))
    if vocab_size is not None and vocab_size < least:
        raise UsageError(f"vocab_size={vocab_size}: the tokens need at least {least}")
    return np.array(starts, np.int64), vocab_size or least


# STATIC (youtube/static-constraint-decoding): the arrays of a trie whose first levels are dense
# tables and whose other levels are sparse rows, by the names of its `build_static_index`.


def _write_static(
    path: Path,
    *,
    ids: SemanticIds,
    offsets: Sequence[int] | None = None,
    vocab_size: int | None = None,
    dense_lookup_layers: int | None = None,
) -> None:
    """Write an .npz, see `static_arrays`."""
    arrays: dict[str, Any] = static_arrays(
        PrefixIndex.build(ids), offsets=offsets, vocab_size=vocab_size, layers=dense_lookup_layers
    )
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def static_arrays(
    index: PrefixIndex,
    *,
    offsets: Sequence[int] | None = None,
    vocab_size: int | None = None,
    layers: int | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Return STATIC's arrays of a prefix index.

    A token is a code plus the offset of its level; there are V tokens. State 0 is the end, states 1
    to V are the prefixes of one token, the others follow in order of depth and tokens.

    Args:
        index: the valid ids, levels in their order.
        offsets: first token of each level; 0 for all by default.
        vocab_size: V; by default just enough.
        layers: levels in dense tables of V ** layers cells; by default 2, or all but the last.

    Raises:
        UsageError: for offsets that do not fit, fewer levels than ``layers + 1``, or tables too
            large.
    """
    levels = index.levels
    first_tokens, vocabulary = _token_range(index.sizes, offsets, vocab_size)
    layers = min(2, levels - 1) if layers is None else layers
    if not 1 <= layers < levels:
        raise UsageError(
            f"dense_lookup_layers={layers}: give 1 to the levels less one, which are {levels}; "
            "STATIC needs two levels or more"
        )
    if vocabulary**layers > MAX_DENSE_CELLS:
        raise UsageError(
            f"{vocabulary} tokens and dense_lookup_layers={layers} need tables of more than "
            f"{MAX_DENSE_CELLS:,} cells; give fewer layers, or smaller offsets"
        )
    # Nodes of the index are numbered by depth and codes, and edge e ends in node e + 1: states are
    # the same order, but for the first level, which has a state per token.
    depths = np.repeat(np.arange(levels + 1), np.diff(index.depth_starts))
    tokens = index.child_codes + first_tokens[depths[1:] - 1]
    state = np.zeros(len(depths), np.int64)
    first, second, leaves = index.depth_starts[[1, 2, levels]]
    state[first:second] = tokens[first - 1 : second - 1] + 1
    state[second:leaves] = vocabulary + 1 + np.arange(leaves - second)
    branches = np.diff(index.child_starts)
    # Edges out of the root are in the mask alone.
    edges = slice(second - 1, None)
    parents = np.repeat(state, branches)[edges]
    counts = np.bincount(parents, minlength=vocabulary + 1 + leaves - second)
    # One row of V invalid tokens behind the last, for reads beyond the end.
    packed = np.concatenate(
        [
            np.stack([tokens[edges], state[1:][edges]], axis=1),
            np.stack([np.full(vocabulary, vocabulary), np.zeros(vocabulary, int)], axis=1),
        ]
    )
    row_ends = np.cumsum(counts)
    start_mask = np.zeros(vocabulary, bool)
    start_mask[tokens[first - 1 : second - 1]] = True
    # The tokens that lead to each node of the last dense level, from its parents upward.
    nodes = np.arange(index.depth_starts[layers], index.depth_starts[layers + 1])
    parent_of = np.repeat(np.arange(len(depths)), branches)
    place, node = [], nodes
    for _ in range(layers):
        place.append(tokens[node - 1])
        node = parent_of[node - 1]
    where = tuple(reversed(place))
    dense_mask = np.zeros((vocabulary,) * layers, bool)
    dense_states = np.zeros(dense_mask.shape, np.int32)
    dense_mask[where] = True
    dense_states[where] = state[nodes]
    starts = index.depth_starts
    return {
        "packed_csr": np.ascontiguousarray(packed, dtype=np.int32),
        "indptr": np.concatenate([[0], row_ends, [row_ends[-1] + vocabulary]]).astype(np.int32),
        "layer_max_branches": np.array(
            [branches[starts[depth] : starts[depth + 1]].max() for depth in range(levels)], np.int32
        ),
        "start_mask": start_mask,
        "dense_mask": dense_mask,
        "dense_states": dense_states,
    }


STATIC = ExportFormat(
    _write_static, options=("offsets", "vocab_size", "dense_lookup_layers"), distinct=True
)
