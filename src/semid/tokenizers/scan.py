"""One pass over the data before a fit: is it usable, how spread is it, what repeats."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.data.embeddings import EmbeddingSource
from semid.errors import EmbeddingError
from semid.health import ROWS_PER_CODEWORD, row_hashes
from semid.progress import Progress
from semid.quantization.blocks import prefetched
from semid.training.distributed import is_main

__all__ = ["InputScan", "check_enough", "mean_row", "scan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputScan:
    """What one pass saw.

    Attributes:
        row_hashes: ``(items,)`` uint64; equal for rows of equal values.
        distinct: rows that differ from all others before them.
        mean: ``(dim,)`` float64 of all rows, which relative errors are measured against.
        digest: identifies the data for a resume.
    """

    row_hashes: npt.NDArray[np.uint64]
    distinct: int
    mean: npt.NDArray[np.float64]
    digest: str


def scan(source: EmbeddingSource, train: npt.NDArray[np.bool_], progress: Progress) -> InputScan:
    """Read every row once, checking that it is finite.

    Args:
        source: ``(items, dim)`` embeddings.
        train: ``(items,)`` which rows are trained on.
        progress: told about rows read.

    Raises:
        EmbeddingError: if rows hold NaN or inf, or there are no rows.
    """
    if len(source) == 0:
        raise EmbeddingError("there are no rows to fit; give at least as many as codewords")
    hashes = np.empty(len(source), dtype=np.uint64)
    total = np.zeros(source.dim)
    progress.start("read", total=len(source))
    for start, block in prefetched(source.blocks()):
        span = slice(start, start + len(block))
        hashes[span] = row_hashes(block)
        total += block.sum(axis=0, dtype=np.float64)
        progress.step(len(block))
    digest = hashlib.sha256(hashes.tobytes() + np.packbits(train).tobytes()).hexdigest()
    return InputScan(
        row_hashes=hashes,
        distinct=len(np.unique(hashes)),
        mean=total / len(source),
        digest=digest,
    )


def mean_row(source: EmbeddingSource) -> npt.NDArray[np.float64]:
    """Return the mean of all rows ``(dim,)``, the same as a `scan` finds."""
    total = np.zeros(source.dim)
    for _, block in prefetched(source.blocks()):
        total += block.sum(axis=0, dtype=np.float64)
    return total / len(source)


def check_enough(
    distinct: int,
    codebook_sizes: Sequence[int],
    *,
    trained: int | None = None,
    held_out: float = 0.0,
) -> None:
    """Check that there are rows for every codeword, and warn where there are few.

    Args:
        distinct: different rows.
        codebook_sizes: codewords of each level.
        trained: rows to train on; None where they were not counted yet.
        held_out: share of the rows that is not trained on.

    Raises:
        EmbeddingError: if there are fewer rows than codewords.
    """
    largest = max(codebook_sizes)
    if distinct < largest:
        raise EmbeddingError(
            f"{distinct} distinct rows cannot fill codebook_size={largest}; give more "
            "items or a smaller --codebook-size (codebook_size)"
        )
    if trained is None:
        return
    if trained < largest:
        raise EmbeddingError(
            f"{trained} training rows (validation_fraction={held_out}) cannot "
            f"fill codebook_size={largest}; give more items, a smaller codebook_size, or "
            "validation_fraction=0"
        )
    if trained < ROWS_PER_CODEWORD * largest and is_main():
        logger.warning(
            "%s training rows for codebook_size=%d are %.3g rows per codeword; below %d, codewords "
            "tend to fit single rows: give more items or --codebook-size %d (codebook_size) or "
            "less, and compare the held-out error",
            f"{trained:,}",
            largest,
            trained / largest,
            ROWS_PER_CODEWORD,
            max(trained // ROWS_PER_CODEWORD, 2),
        )
