"""Arrow lists of floats as rows of a matrix, without copying where the layout allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.blocks import Flag, RawBlock
from semid.data.columns import float_list_width

__all__ = ["list_rows", "most_common_width", "row_lengths"]


def row_lengths(array: Any) -> np.ndarray:
    """Return the lengths of the lists (n,) of an Arrow array of variable lists, nulls left out."""
    lengths: np.ndarray = pc.list_value_length(_plain(array)).drop_null().to_numpy()
    return lengths


def most_common_width(lengths: Iterable[np.ndarray], rows: int) -> int | None:
    """Return the most frequent length of lists, the width that an embedding column should have.

    Args:
        lengths: lengths of the lists, in pieces; read only until one length has a majority.
        rows: number of all rows.

    Returns:
        The length; of several that are equally frequent the one that comes first. Empty lists
        count only where there are no others. None without any list.
    """
    votes: Counter[int] = Counter()
    empty = False
    for part in lengths:
        empty |= bool((part == 0).any())
        widths, first, counts = np.unique(part[part > 0], return_index=True, return_counts=True)
        for place in np.argsort(first):
            votes[int(widths[place])] += int(counts[place])
        if votes and 2 * max(votes.values()) > rows:
            break
    # max() returns the first of equals, and a Counter keeps the order of insertion.
    return max(votes, key=votes.__getitem__, default=0 if empty else None)


def list_rows(array: Any, dim: int) -> RawBlock:
    """View an Arrow array of float lists as a matrix.

    Args:
        array: (n,) FixedSizeList, List or LargeList of float16, float32 or float64; slices with
            offsets included.
        dim: width that the rows should have.

    Returns:
        A block (n, dim). A null row, a null value and a row of another width become NaN and a
        flag. A float32 array without any of these is viewed, not copied.
    """
    array = _plain(array)
    if float_list_width(array.type) is not None:
        return _fixed(array, dim)
    return _variable(array, dim)


def _fixed(array: Any, dim: int) -> RawBlock:
    n, width = len(array), array.type.list_size
    if width != dim:
        flags = np.full(n, Flag.RAGGED, dtype=np.uint8)
        flags[_nulls(array)] = Flag.NULL_ROW
        return RawBlock(np.full((n, dim), np.nan, dtype=np.float32), flags)
    # `.values` forgets the slice the array is, `.flatten()` drops null rows: cut by hand.
    children = array.values.slice(array.offset * width, n * width)
    values, shared, broken = _floats(children, n, width)
    if not array.null_count and broken is None:
        return RawBlock(values, None, shared)
    flags = np.zeros(n, dtype=np.uint8)
    if broken is not None:
        flags[broken] = Flag.NULL_VALUE
    flags[_nulls(array)] = Flag.NULL_ROW
    return _flagged(values, flags, shared)


def _variable(array: Any, dim: int) -> RawBlock:
    n = len(array)
    offsets = array.offsets.to_numpy().astype(np.int64, copy=False)
    lengths = np.diff(offsets)
    nulls = _nulls(array) if array.null_count else None
    if nulls is None and (lengths == dim).all():
        children = array.values.slice(int(offsets[0]), n * dim)
        values, shared, broken = _floats(children, n, dim)
        if broken is None:
            return RawBlock(values, None, shared)
        flags = np.zeros(n, dtype=np.uint8)
        flags[broken] = Flag.NULL_VALUE
        return _flagged(values, flags, shared)
    flags = np.zeros(n, dtype=np.uint8)
    flags[lengths != dim] = Flag.RAGGED
    if nulls is not None:
        flags[nulls] = Flag.NULL_ROW
    values = np.full((n, dim), np.nan, dtype=np.float32)
    whole = np.flatnonzero(flags == 0)
    if len(whole):
        where = (offsets[whole][:, None] + np.arange(dim)).reshape(-1)
        children = array.values.take(pa.array(where))
        part, _, broken = _floats(children, len(whole), dim)
        values[whole] = part
        if broken is not None:
            flags[whole[broken]] = Flag.NULL_VALUE
    return _flagged(values, flags, shared=False)


def _floats(children: Any, n: int, width: int) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Return child values as (n, width) float32, whether shared, and the rows holding a null."""
    broken = None
    if children.null_count:
        rows = children.is_null().to_numpy(zero_copy_only=False).reshape(n, width).any(axis=1)
        broken = rows if rows.any() else None
    flat = children.to_numpy(zero_copy_only=not children.null_count)
    with np.errstate(over="ignore"):
        values = flat.reshape(n, width).astype(np.float32, copy=False)
    shared = not children.null_count and values.dtype == flat.dtype
    return values, shared, broken


def _flagged(values: np.ndarray, flags: np.ndarray, shared: bool) -> RawBlock:
    if not flags.any():
        return RawBlock(values, None, shared)
    values = values.copy() if shared else values
    values[flags != 0] = np.nan
    return RawBlock(values, flags)


def _nulls(array: Any) -> np.ndarray:
    mask: np.ndarray = array.is_null().to_numpy(zero_copy_only=False)
    return mask


def _plain(array: Any) -> Any:
    return array.storage if isinstance(array, pa.ExtensionArray) else array
