"""Which rows make up which step: a function of the seed, the epoch and the step, nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from semid.seeds import numpy_generator

__all__ = ["epoch_batches", "own_share", "steps_per_epoch"]

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
    """Deal the rows of an epoch into batches.

    Args:
        rows: rows to train on.
        batch_size: rows a batch, about.
        seed: any integer.
        epoch: number of the epoch.
        weights: ``(rows,)`` non-negative; rows are then drawn with replacement in proportion, so
            that a row of weight 2 is seen twice as often as one of weight 1.

    Returns:
        Row numbers of each batch. Memory: 8 bytes a row.
    """
    generator = numpy_generator(seed, "order", epoch)
    order = (
        generator.permutation(rows)
        if weights is None
        else generator.choice(rows, rows, p=weights / weights.sum())
    )
    return list(np.array_split(order, steps_per_epoch(rows, batch_size)))


def own_share(batch: Rows, *, rank: int, world: int) -> tuple[Rows, float]:
    """Return one process's part of a batch and the weight that makes averages exact.

    Args:
        batch: ``(n,)`` rows of the whole batch, at least one a process.
        rank: number of this process.
        world: number of processes.

    Returns:
        Its rows, and ``own / (n / world)``: a mean over its rows times this, averaged over the
        processes, is the mean over the batch.
    """
    own = np.array_split(batch, world)[rank]
    return own, len(own) * world / len(batch)
