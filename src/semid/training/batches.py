"""Batches: the rows of each step, a function of seed and epoch, and access to these rows."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from semid.data.source import write_npy
from semid.lazy import torch
from semid.quantization.blocks import ArrayBlocks, Blocks, in_memory
from semid.seeds import numpy_generator

Rows = npt.NDArray[np.int64]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of steps; batches of an epoch differ by at most one row."""
    return max(1, round(rows / batch_size))


def epoch_batches(
    rows: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    weights: npt.NDArray[np.float64] | None = None,
) -> list[Rows]:
    """Deal the rows of an epoch into batches, or draw them in proportion to weights ``(rows,)``."""
    # A row of weight 2 is drawn twice as often as one of weight 1, with replacement.
    generator = numpy_generator(seed, "order", epoch)
    order = (
        generator.permutation(rows)
        if weights is None
        else generator.choice(rows, rows, p=weights / weights.sum())
    )
    return list(np.array_split(order, steps_per_epoch(rows, batch_size)))


def process_share(batch: Rows, *, rank: int, world: int) -> tuple[Rows, float]:
    """Return one process's part of a batch ``(n,)`` and the weight that makes averages exact."""
    # A mean over the part times this weight, averaged over processes, is the mean over the batch.
    share = np.array_split(batch, world)[rank]
    return share, len(share) * world / len(batch)


logger = logging.getLogger(__name__)

MEMORY_BYTES = 2 << 30
"""Rows are held as float32 up to this size."""


class TrainingRows:
    """Rows ``(rows, dim)`` to draw batches from, in memory or mapped."""

    def __init__(self, blocks: Blocks, *, memory_bytes: int = MEMORY_BYTES) -> None:
        # Up to the limit rows are held as float32. Above it, sources from which a row at random
        # costs no more than the row (`.npy`, Arrow) are read as they are; others are written once
        # to a temporary file. The values, and so the training, are the same either way.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.blocks = in_memory(blocks, limit_bytes=memory_bytes)
        base = getattr(blocks, "base", blocks)
        if self.blocks is blocks and not getattr(base, "cheap_rows", True):
            self.blocks = self._mapped(blocks)

    def _mapped(self, blocks: Blocks) -> Blocks:
        self._folder = tempfile.TemporaryDirectory(prefix="semid-rows-")
        path = Path(self._folder.name) / "rows.npy"
        logger.info("training rows do not fit in memory; mapped from '%s'", path)
        write_npy(path, (rows for _, rows in blocks.blocks()), shape=(len(blocks), blocks.dim))
        return ArrayBlocks(np.load(path, mmap_mode="r"))

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.blocks)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.blocks.dim

    def take(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return rows ``(n, dim)`` float32, in the order asked for."""
        return torch.from_numpy(self.blocks.rows(rows))
