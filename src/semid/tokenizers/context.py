"""What passes between the contract (`base`) and a tokenizer: a fit's inputs, encoded blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.embeddings import EmbeddingSource
from semid.errors import UsageError
from semid.progress import Progress
from semid.tokenizers.scan import InputScan
from semid.training.checkpoint import Checkpoint

__all__ = ["EncodedBlock", "FitContext", "item_weights", "level_sizes"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FitContext:
    """What a tokenizer's `_fit` works with.

    Attributes:
        source: all rows.
        train: the rows that may be trained on.
        scan: what the first pass over all rows saw.
        weights: ``(train rows,)`` item weights, or None.
        interactions: as given to `fit`.
        pairs: as given to `fit`.
        checkpoint: where to keep the state of the run, or None.
        progress: told about every step.
    """

    source: EmbeddingSource
    train: EmbeddingSource
    scan: InputScan
    weights: npt.NDArray[np.float64] | None
    interactions: Any
    pairs: Any
    checkpoint: Checkpoint | None
    progress: Progress


@dataclass(frozen=True)
class EncodedBlock:
    """A block of encoded rows.

    Attributes:
        start: row number of its first row.
        x: ``(n, dim)`` float32 rows as read.
        codes: ``(n, levels)`` int64.
        residual_norms: ``(n,)`` float32.
    """

    start: int
    x: Array
    codes: npt.NDArray[np.int64]
    residual_norms: Array


def level_sizes(levels: int, codebook_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return the codebook size of each level.

    Raises:
        UsageError: if a value is out of range or the lengths differ.
    """
    if levels < 1:
        raise UsageError(f"levels={levels}: give at least 1")
    sizes = (codebook_size,) * levels if isinstance(codebook_size, int) else tuple(codebook_size)
    if len(sizes) != levels:
        raise UsageError(
            f"codebook_size has {len(sizes)} entries for {levels} levels; give one number, or one "
            "a level"
        )
    if min(sizes) < 2 or max(sizes) > 2**32:
        raise UsageError(f"codebook_size={codebook_size}: give between 2 and 2**32 codewords")
    return sizes


def item_weights(weights: npt.ArrayLike | None, items: int) -> npt.NDArray[np.float64] | None:
    """Return item weights ``(items,)`` as float64, or None.

    Raises:
        UsageError: if they are of another length, negative, or not finite.
    """
    if weights is None:
        return None
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (items,) or not np.isfinite(array).all() or (array < 0).any():
        raise UsageError(
            f"weights have shape {array.shape}; give {items} finite, non-negative numbers, one an "
            "item"
        )
    return array
