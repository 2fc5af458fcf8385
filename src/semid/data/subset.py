"""Some rows of another source, read from it when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from semid.data.blocks import BLOCK, RawBlock, reblock
from semid.data.source import EmbeddingSource
from semid.errors import UsageError

__all__ = ["SubsetSource"]


class SubsetSource(EmbeddingSource):
    """A lazy view of rows of another source; see `EmbeddingSource.subset`.

    Args:
        base: where the rows come from.
        indices: (n,) int64 unique rows of ``base``, in the order wanted.
    """

    def __init__(self, base: EmbeddingSource, indices: np.ndarray) -> None:
        self.base = base
        self.indices = indices
        self.ids = base.ids.take(indices)
        self.dim = base.dim
        self.label = base.label
        self._rising = bool((indices[1:] > indices[:-1]).all())

    @classmethod
    def of(cls, base: EmbeddingSource, mask_or_indices: Any) -> SubsetSource:
        """Check the mask or the row numbers, and flatten a subset of a subset."""
        chosen = np.asarray(mask_or_indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(base),):
                raise UsageError(
                    f"the mask has shape {chosen.shape} and there are {len(base)} rows; give one "
                    "value a row"
                )
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise UsageError(
                f"a subset is chosen by a mask or row numbers, not {chosen.dtype} of shape "
                f"{chosen.shape}"
            )
        chosen = chosen.astype(np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(base)):
            raise UsageError(
                f"row numbers run from {chosen.min()} to {chosen.max()}; the rows are 0 to "
                f"{len(base) - 1}"
            )
        if len(np.unique(chosen)) != len(chosen):
            raise UsageError("the row numbers of a subset repeat; name every row once")
        if isinstance(base, SubsetSource):
            ids = base.ids
            flat = cls(base.base, base.indices[chosen])
            flat.ids = ids.take(chosen)
            return flat
        return cls(base, chosen)

    def describe(self) -> dict[str, Any]:
        """Return the base's facts with this subset's number of items."""
        return {**self.base.describe(), "items": len(self), "subset_of": len(self.base)}

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        if not self._rising or self.base.cheap_rows:
            for start in range(first, len(self), size):
                yield self.base._raw_rows(self.indices[start : start + size])
            return
        yield from reblock(self._in_order(first), size, self.dim)

    def _in_order(self, first: int) -> Iterator[RawBlock]:
        """Pass over the base once and keep the rows of this subset."""
        if first >= len(self):
            return
        start = int(self.indices[first]) // BLOCK * BLOCK
        for raw in self.base._raw_blocks(BLOCK, start):
            stop = start + len(raw.values)
            low, high = np.searchsorted(self.indices, (start, stop))
            low = max(int(low), first)
            if high > low:
                local = self.indices[low:high] - start
                flags = None if raw.flags is None else raw.flags[local]
                # Flags say that a row cannot be used: none, where all such rows were left out.
                yield RawBlock(
                    raw.values[local], flags if flags is not None and flags.any() else None
                )
            if high == len(self.indices):
                return
            start = stop

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return self.base._raw_rows(self.indices[indices])
