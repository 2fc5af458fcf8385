"""Training rows at random: in memory when they fit, from a memory map when they do not."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.data.source import write_npy
from semid.quantization.blocks import ArrayBlocks, Blocks, in_memory

__all__ = ["MEMORY_BYTES", "TrainingRows"]

logger = logging.getLogger(__name__)

MEMORY_BYTES = 2 << 30
"""Rows are held as float32 up to this size."""


class TrainingRows:
    """Rows ``(rows, dim)`` to draw batches from.

    Args:
        blocks: where they come from.
        memory_bytes: held in memory as float32 up to this size. Above it, sources from which a row
            at random costs no more than the row (`.npy`, Arrow) are read as they are; others are
            written once to a temporary ``.npy`` file.

    The values, and so the training, are the same either way.
    """

    def __init__(self, blocks: Blocks, *, memory_bytes: int = MEMORY_BYTES) -> None:
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

    def take(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return rows ``(n, dim)`` float32, in the order asked for."""
        return torch.from_numpy(self.blocks.rows(rows))
