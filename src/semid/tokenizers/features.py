"""Several inputs of one catalogue side by side: embeddings by name, and categories (DRQ §4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.data.blocks import RawBlock
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds, hash_strings
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, UsageError

Array = npt.NDArray[np.float32]

CATEGORY_WIDTH = 64
"""Width of a category's vector: random directions in it are nearly orthogonal."""


def category_vectors(values: Sequence[str | None], *, name: str, width: int) -> Array:
    """Return unit vectors ``(items, width)`` that depend on the category and the column alone."""
    known = sorted({value for value in values if value is not None})
    row = {value: number for number, value in enumerate(known)}
    strings = pa.array(known, pa.large_string())
    # A hash gives 64 signs, one per bit; wider vectors take another salt for every 64 columns.
    signs = np.zeros((len(known) + 1, width), dtype=np.float32)
    for start in range(0, width, 64):
        bits = hash_strings(strings, salt=f"semid/category/{name}/{start}")
        span = np.arange(min(64, width - start), dtype=np.uint64)
        signs[:-1, start : start + len(span)] = 2.0 * ((bits[:, None] >> span) & np.uint64(1)) - 1.0
    # None has a row of zeros, after those of the known values.
    rows = [len(known) if value is None else row[value] for value in values]
    return np.asarray(signs[rows] / np.float32(np.sqrt(width)))


class FusedSource(EmbeddingSource):
    """Sources of the same items side by side; neural tokenizers project each part by itself."""

    def __init__(self, parts: Mapping[str, EmbeddingSource], ids: ItemIds) -> None:
        self.parts, self.ids = dict(parts), ids
        self.inputs = tuple(part.dim for part in self.parts.values())
        self.dim = sum(self.inputs)
        self.label = " + ".join(part.label for part in self.parts.values())
        self.cheap_rows = all(part.cheap_rows for part in self.parts.values())

    def describe(self) -> dict[str, Any]:
        """Return the parts' names and widths."""
        return {
            "kind": "fused",
            "items": len(self),
            "dim": self.dim,
            "parts": dict(zip(self.parts, self.inputs, strict=True)),
        }

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        for blocks in zip(*(p.blocks(size, first=first) for p in self.parts.values()), strict=True):
            yield RawBlock(np.concatenate([block for _, block in blocks], axis=1))

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        rows = [part.rows(indices) for part in self.parts.values()]
        return RawBlock(np.concatenate(rows, axis=1))


def fuse(
    embeddings: Mapping[str, Any],
    *,
    categories: Mapping[str, Sequence[str | None]] | None = None,
    ids: Any = None,
    category_width: int = CATEGORY_WIDTH,
) -> FusedSource:
    """Lay several embeddings and categories of the same items side by side.

    Args:
        embeddings: name -> anything `semid.open_embeddings` reads, ``(items, width)`` each. Scales
            stay: longer vectors count more.
        categories: name -> ``(items,)`` values; see `category_vectors`.
        ids: item ids; None takes those of the first embedding.
        category_width: width of a category's vector, at least 1.

    Returns:
        A source of width ``sum(widths)`` that every tokenizer fits and encodes.

    Raises:
        UsageError: nothing given, or a width below 1.
        EmbeddingError: parts of different lengths.
    """
    if not embeddings:
        raise UsageError("fuse needs at least one embedding; give {'text': vectors}")
    if category_width < 1:
        raise UsageError(f"category_width={category_width}: give at least 1")
    parts: dict[str, EmbeddingSource] = {
        name: open_embeddings(source) for name, source in embeddings.items()
    }
    for name, values in (categories or {}).items():
        if name in parts:
            raise UsageError(f"'{name}' names an embedding and a category; rename one")
        parts[name] = open_embeddings(
            category_vectors(list(values), name=name, width=category_width)
        )
    lengths = {name: len(part) for name, part in parts.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"'{name}' has {length}" for name, length in lengths.items())
        raise EmbeddingError(f"the inputs have different numbers of rows: {counts}; give the same")
    # Rows are matched by their place; the ids are those of the first embedding.
    first = next(iter(parts.values()))
    named = first if ids is None else open_embeddings(first, ids=ids)
    return FusedSource(parts, named.ids)
