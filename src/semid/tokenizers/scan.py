"""One pass over the data before a fit: is it usable, how spread is it, what repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.data.embeddings import EmbeddingSource
from semid.errors import EmbeddingError
from semid.health import row_hashes
from semid.progress import Progress
from semid.quantization.blocks import prefetched

__all__ = ["InputScan", "check_enough", "scan"]


@dataclass(frozen=True)
class InputScan:
    """What one pass saw.

    Attributes:
        row_hashes: ``(items,)`` uint64; equal for rows of equal values.
        distinct: rows that differ from all others before them.
        mean: ``(dim,)`` float64 of the training rows.
        variance: mean squared distance of the training rows to ``mean``.
        digest: identifies the data for a resume.
    """

    row_hashes: npt.NDArray[np.uint64]
    distinct: int
    mean: npt.NDArray[np.float64]
    variance: float
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
    squares = 0.0
    progress.start("read", total=len(source))
    for start, block in prefetched(source.blocks()):
        span = slice(start, start + len(block))
        hashes[span] = row_hashes(block)
        kept = block[train[span]]
        total += kept.sum(axis=0, dtype=np.float64)
        squares += float(np.einsum("nd,nd->n", kept, kept, dtype=np.float64).sum())
        progress.step(len(block))
    count = max(int(train.sum()), 1)
    mean = total / count
    digest = hashlib.sha256(hashes.tobytes() + np.packbits(train).tobytes()).hexdigest()
    return InputScan(
        row_hashes=hashes,
        distinct=len(np.unique(hashes)),
        mean=mean,
        variance=max(squares / count - float(mean @ mean), 0.0),
        digest=digest,
    )


def check_enough(
    seen: InputScan, trained: int, codebook_sizes: Sequence[int], *, held_out: float
) -> None:
    """Check that there are rows for every codeword.

    Args:
        seen: what a scan found.
        trained: rows to train on.
        codebook_sizes: codewords a level.
        held_out: share of the rows that is not trained on.

    Raises:
        EmbeddingError: if there are too few.
    """
    largest = max(codebook_sizes)
    if seen.distinct < largest:
        raise EmbeddingError(
            f"{seen.distinct} distinct rows cannot fill codebook_size={largest}; give more "
            "items or a smaller --codebook-size (codebook_size)"
        )
    if trained < largest:
        raise EmbeddingError(
            f"{trained} training rows (validation_fraction={held_out}) cannot "
            f"fill codebook_size={largest}; give more items, a smaller codebook_size, or "
            "validation_fraction=0"
        )
