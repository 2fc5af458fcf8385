"""Rows in fixed global blocks: the only view of data that the numerics need.

Work is cut into blocks of `BLOCK_ROWS` rows counted from row 0. Sums are taken a block at a time
in float64 and added in the order of one fixed tree over the block numbers, so that threads,
processes and memory limits cannot change a result.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from semid.quantization.sums import TreeSum

Array = npt.NDArray[np.float32]
BLOCK_ROWS = 65_536


class Blocks(Protocol):
    """What can be clustered: ``(items, dim)`` float32 rows, in order by block or at random."""

    @property
    def dim(self) -> int:
        """Width of a row."""
        ...

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order; every block but the last has ``size`` rows."""
        ...

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``, in that order."""
        ...


class ArrayBlocks:
    """Blocks over a matrix that is already in memory; nothing is copied.

    Args:
        matrix: ``(items, dim)`` floats; other types than float32 are converted a block at a time.
    """

    def __init__(self, matrix: npt.NDArray[np.floating]) -> None:
        self.matrix = matrix

    @property
    def dim(self) -> int:
        """Width of a row."""
        return int(self.matrix.shape[1])

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.matrix)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order."""
        for start in range(0, len(self.matrix), size):
            yield start, np.ascontiguousarray(self.matrix[start : start + size], dtype=np.float32)

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``."""
        return np.ascontiguousarray(self.matrix[indices], dtype=np.float32)


class WritableBlocks(ArrayBlocks):
    """A float32 matrix that nobody else reads, so that what a level leaves can replace it.

    A view of what is left would be held beside it: at a million rows a gigabyte more.

    Args:
        matrix: ``(items, dim)`` float32.
    """

    matrix: Array

    def subtract_(self, codebook: Array, labels: npt.NDArray[np.int64]) -> None:
        """Take from every row its codeword; the same numbers as `ResidualBlocks` gives."""
        for start in range(0, len(self.matrix), BLOCK_ROWS):
            span = slice(start, start + BLOCK_ROWS)
            self.matrix[span] -= codebook[labels[span]]


class Preprocess:
    """Row-wise preparation of vectors, saved with a model and undone where it can be.

    Args:
        center: subtract ``mean`` (dim,), fitted on the training rows; None leaves rows as they are.
        normalize: scale each (centered) row to unit length; zero rows stay zero.
    """

    def __init__(self, *, mean: Array | None = None, normalize: bool = False) -> None:
        self.mean = mean
        self.normalize = normalize

    @classmethod
    def fit(cls, blocks: Blocks, *, center: bool, normalize: bool) -> Preprocess:
        """Fit on training rows: one pass when ``center`` is set, none otherwise."""
        if not center:
            return cls(normalize=normalize)
        tree: TreeSum[_Sum] = TreeSum()
        for number, (_, block) in enumerate(blocks.blocks()):
            tree.add(number, _Sum(block.sum(axis=0, dtype=np.float64)))
        mean = tree.total().values / len(blocks)
        return cls(mean=mean.astype(np.float32), normalize=normalize)

    @property
    def identity(self) -> bool:
        """Whether rows pass unchanged."""
        return self.mean is None and not self.normalize

    def apply(self, block: Array) -> Array:
        """Prepare rows ``(n, dim)``; each row's result depends on that row alone."""
        if self.mean is not None:
            block = block - self.mean
        if self.normalize:
            norms = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
            norms[norms == 0] = 1.0
            block = (block / norms[:, None]).astype(np.float32)
        return block

    def invert(self, block: Array) -> Array:
        """Undo the centring; lengths lost to ``normalize`` are not restored."""
        return block if self.mean is None else block + self.mean


class _Sum:
    """A sum of rows, as `TreeSum` adds it."""

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        self.values = values

    def add_(self, other: _Sum) -> None:
        """Add another sum in place."""
        self.values += other.values


class PreprocessedBlocks:
    """A view of blocks after `Preprocess`."""

    def __init__(self, base: Blocks, preprocess: Preprocess) -> None:
        self.base = base
        self.preprocess = preprocess

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.base.dim

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, prepared rows)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, self.preprocess.apply(block)

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the prepared rows at ``indices``."""
        return self.preprocess.apply(self.base.rows(indices))


class ResidualBlocks:
    """A view of what earlier levels leave of each row, computed as it is read.

    Args:
        base: the rows that level 1 quantized.
        labels: for each earlier level the ``(items,)`` chosen codes.
        codebooks: for each earlier level the ``(codes, dim)`` float32 codewords.
    """

    def __init__(
        self,
        base: Blocks,
        labels: Sequence[npt.NDArray[np.integer]],
        codebooks: Sequence[Array],
    ) -> None:
        self.base = base
        self.labels = tuple(labels)
        self.codebooks = tuple(codebooks)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.base.dim

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    def _subtract(self, rows: Array, at: slice | npt.NDArray[np.int64]) -> Array:
        for labels, codebook in zip(self.labels, self.codebooks, strict=True):
            rows = rows - codebook[labels[at]]
        return rows

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, residual rows)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, self._subtract(block, slice(start, start + len(block)))

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the residuals of the rows at ``indices``."""
        return self._subtract(self.base.rows(indices), indices)


def in_memory(blocks: Blocks, *, limit_bytes: int) -> Blocks:
    """Read ``blocks`` into one float32 matrix if it fits ``limit_bytes``, else return them as is.

    Either way later results are the same; only the time of repeated passes differs.
    """
    if isinstance(blocks, ArrayBlocks) or len(blocks) * blocks.dim * 4 > limit_bytes:
        return blocks
    matrix = np.empty((len(blocks), blocks.dim), dtype=np.float32)
    for start, block in blocks.blocks():
        matrix[start : start + len(block)] = block
    return ArrayBlocks(matrix)


def prefetched(
    blocks: Iterator[tuple[int, Array]], *, depth: int = 1
) -> Iterator[tuple[int, Array]]:
    """Read ahead in a thread, so that disk and decoding overlap with arithmetic."""
    ready: queue.Queue[tuple[int, Array] | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[int, Array] | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for item in blocks:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            put(error)

    reader = threading.Thread(target=read, name="semid-prefetch", daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        reader.join()


def read_ahead(blocks: Blocks) -> Iterator[tuple[int, Array]]:
    """Read blocks in order, ahead of their use unless they already lie in memory."""
    return blocks.blocks() if isinstance(blocks, ArrayBlocks) else prefetched(blocks.blocks())
