"""What passes between the contract (`base`) and a tokenizer: a fit's inputs, encoded blocks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.codes import MAX_LEVELS
from semid.data.blocks import Moments
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, InputError, UsageError
from semid.health import ROWS_PER_CODEWORD, row_hashes
from semid.lazy import compiling
from semid.options import MAX_BEAM
from semid.progress import Progress
from semid.quantization import engine
from semid.quantization.blocks import (
    FUSED_SIZE,
    ArrayBlocks,
    prefetched,
    statistics,
    subtract_rows,
)
from semid.quantization.engine.plain import L2
from semid.quantization.least_squares import compile_tables
from semid.quantization.product import draw_centers, part_statistics
from semid.quantization.seeding import kmeans_plus_plus
from semid.tokenizers.behavior import Behavior
from semid.training.checkpoint import Stages, StateStore
from semid.training.distributed import is_main

logger = logging.getLogger(__name__)

Result = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays and JSON-able record of a stage."""


def compile_kernels(progress: Progress, further: Collection[str]) -> None:
    """Compile or fetch from the cache the kernels of search, codes and K-means; test the routes.

    Fits would do so by themselves, silently and for twenty seconds, the first time on a machine:
    ``progress`` counts the kernels that are compiled. ``further`` names those that only some
    tokenizers take: "product" (of `fit_product`), "lists" (of more than the nearest codeword),
    "dense" (layers), "tables" (least squares).
    """
    counts = {"product": 2, "dense": 2, "tables": 2}
    more = sum(counts.get(name) or engine.search.list_kernel_count() for name in further)
    progress.start("prepare kernels", total=engine.search.kernel_count() + 8 + more)
    # A few rows compile what fits call with many.
    rows, labels = np.eye(4, dtype=np.float32), np.arange(4)
    with compiling(progress.step):
        engine.search.working_routes(with_torch=False)
        statistics(rows, labels, rows[0], codes=4)
        engine.levels.search_levels(rows, engine.levels.index_levels([rows, rows]), [1, 1])
        table = engine.table.VectorTable(rows, metric=L2, unique=True)
        engine.narrow.search_narrow(rows, table, threads=1, name="rows")
        engine.bounded.RowBounds(rows, labels, rows).search(rows, threads=1)
        blocks, generator = ArrayBlocks(rows), np.random.default_rng(0)
        kmeans_plus_plus(blocks, 3, generator=generator, n_local_trials=2, threads=1)
        many = np.zeros((FUSED_SIZE, 1), np.float32)
        subtract_rows(many, many, np.zeros(len(many), np.int64))
        if "product" in further:
            draw_centers(rows, np.ones(4), np.zeros((1, 1)))
            part_statistics(rows, labels, rows[0], 4)
        if "lists" in further:
            engine.search.compile_lists()
        if "dense" in further:
            from semid.tokenizers.neural.autoencoder import compile_layers

            compile_layers()
        if "tables" in further:
            compile_tables()


@dataclass(frozen=True)
class InputScan:
    """The result of one pass over the data."""

    row_hashes: npt.NDArray[np.uint64]  # (items,), equal for rows of equal values
    distinct: int  # rows that differ from all rows before them
    mean: npt.NDArray[np.float64]  # (dim,), which relative errors are measured against
    digest: str  # identifies the data for a resume


def scan(source: EmbeddingSource, train: npt.NDArray[np.bool_], progress: Progress) -> InputScan:
    """Read every row once, checking that it is finite; ``train`` (items,) is part of the digest."""
    if len(source) == 0:
        raise EmbeddingError("there are no rows to fit; give at least as many as codewords")
    hashes = np.empty(len(source), dtype=np.uint64)
    total = np.zeros(source.dim)
    progress.start("read", total=len(source))
    for start, block in prefetched(source.blocks()):
        span = slice(start, start + len(block))
        hashes[span] = row_hashes(block)
        # A float32 sum over millions of rows would lose digits of the mean.
        total += block.sum(axis=0, dtype=np.float64)
        progress.step(len(block))
    # The same rows with another held-out share are another run, which must not be continued.
    digest = hashlib.sha256(hashes.tobytes() + np.packbits(train).tobytes()).hexdigest()
    return InputScan(hashes, len(np.unique(hashes)), total / len(source), digest)


def mean_row(source: EmbeddingSource) -> npt.NDArray[np.float64]:
    """Return the mean of all rows ``(dim,)``, the same as a `scan` finds."""
    return Moments.of(prefetched(source.blocks())).mean


def check_enough(
    distinct: int,
    codebook_sizes: Sequence[int],
    *,
    trained: int | None = None,
    held_out: float = 0.0,
) -> None:
    """Check that there are rows for every codeword, and warn where there are few."""
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


Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FitContext:
    """What a tokenizer's `_fit` works with."""

    source: EmbeddingSource  # all rows
    train: EmbeddingSource  # the rows that may be trained on
    held_out: EmbeddingSource | None  # the rows to evaluate on
    inputs: tuple[int, ...]  # width of each input whose columns lie side by side in a row
    scan: InputScan
    weights: npt.NDArray[np.float64] | None  # (train rows,) item weights
    behavior: Behavior | None  # pairs of training rows to learn from
    checkpoint: StateStore | None  # where the state of the run is stored
    progress: Progress

    @cached_property
    def stages(self) -> Stages:
        """The checkpoint, split between stages that run one after another."""
        return Stages(self.checkpoint)

    def stage(self, name: str, run: Callable[[StateStore | None], Result]) -> Result:
        """Run a stage of the fit, or return what it returned in the run that is continued."""
        return self.stages.run(name, run)


@dataclass(frozen=True)
class EncodedBlock:
    """A block of encoded rows."""

    start: int  # number of its first row
    x: Array  # (n, dim) rows as read
    codes: npt.NDArray[np.int64]  # (n, levels)
    residual_norms: Array  # (n,)


def level_sizes(
    levels: int, codebook_size: int | Sequence[int], *, name: str = "levels"
) -> tuple[int, ...]:
    """Return the codebook size of each level; ``name`` is what the user calls their number."""
    levels = int(levels)
    if not 1 <= levels <= MAX_LEVELS:
        raise UsageError(f"{name}={levels}: give 1 to {MAX_LEVELS}")
    if isinstance(codebook_size, Sequence | np.ndarray):
        sizes = tuple(int(size) for size in codebook_size)
    else:
        sizes = (int(codebook_size),) * levels
    if len(sizes) != levels:
        raise UsageError(
            f"codebook_size has {len(sizes)} entries for {name}={levels}; give one number, or one "
            "each"
        )
    if min(sizes) < 2 or max(sizes) > 2**32:
        raise UsageError(f"codebook_size={codebook_size}: give between 2 and 2**32 codewords")
    return sizes


def codes_within(codes: Any, sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return codes ``(items, levels)`` as int64, each within its codebook."""
    array = np.asarray(codes)
    if array.ndim != 2 or array.shape[1] != len(sizes) or array.dtype.kind not in "iu":
        raise InputError(
            f"codes have shape {array.shape} and type {array.dtype}; give integers of shape "
            f"(items, {len(sizes)})"
        )
    outside = (array < 0) | (array >= np.array(sizes))
    if outside.any():
        row, level = map(int, np.argwhere(outside)[0])
        raise InputError(
            f"{int(outside.any(axis=1).sum())} rows hold codes outside their codebook (first: "
            f"row {row}, level {level}, code {array[row, level]}, allowed 0 to "
            f"{sizes[level] - 1}); were they made by another model?"
        )
    return array.astype(np.int64)


def item_weights(
    weights: npt.ArrayLike | None, items: int, *, name: str = "weights"
) -> npt.NDArray[np.float64] | None:
    """Return item weights ``(items,)`` as float64, or None; errors call them ``name``."""
    if weights is None:
        return None
    advice = f"give {items} finite, non-negative numbers, one per item"
    try:
        array = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{name} holds no numbers; {advice}") from None
    if array.shape != (items,):
        raise UsageError(f"{name} has shape {array.shape}; {advice}")
    bad = np.flatnonzero(~np.isfinite(array) | (array < 0))
    if len(bad):
        raise UsageError(f"{name}[{bad[0]}] is {array[bad[0]]:g} ({len(bad)} such); {advice}")
    return array


def train_weights(
    mass: npt.NDArray[np.float64] | None, train: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64] | None:
    """Return the weights of training rows, from those of all items."""
    weights = None if mass is None else mass[train]
    if weights is not None and not weights.any():
        raise UsageError(
            f"the weights of all {len(weights)} training items are 0, so there is nothing to learn "
            "from; give some of them more, or leave weights out"
        )
    return weights


def data_digest(
    rows: str, weights: npt.NDArray[np.float64] | None, behavior: Behavior | None
) -> str:
    """Identify all data of a run: the rows' own digest, weights and pairs where there are any."""
    if weights is None and behavior is None:
        return rows
    digest = hashlib.sha256(rows.encode())
    digest.update(b"" if weights is None else weights.tobytes())
    digest.update(b"" if behavior is None else behavior.digest().encode())
    return digest.hexdigest()


def check_beam_width(width: int) -> None:
    """Refuse a beam that is no width."""
    if not 1 <= width <= MAX_BEAM:
        raise UsageError(f"beam_width={width}: give 1 to {MAX_BEAM}")
