"""The rows of a neural fit after preprocessing, and their moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.quantization.blocks import Blocks, PreparedBlocks, Preprocess
from semid.tokenizers.context import FitContext
from semid.training.rows import TrainingRows

__all__ = ["PreparedRows", "moments"]


def moments(blocks: Blocks) -> tuple[npt.NDArray[np.float64], float]:
    """Return the mean of rows and their mean squared distance to it."""
    mean, squares = np.zeros(blocks.dim), 0.0
    for _, block in blocks.blocks():
        mean += block.sum(axis=0, dtype=np.float64)
        squares += float(np.einsum("nd,nd->", block, block, dtype=np.float64))
    mean /= len(blocks)
    return mean, max(squares / len(blocks) - float(mean @ mean), 0.0)


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a fit after preprocessing, and their moments.

    Attributes:
        preprocess: fitted on the training rows.
        train: rows to train on.
        held_out: rows to judge on, or None.
        mean: ``(dim,)`` float64 of the training rows.
        variance: mean squared distance to it.
    """

    preprocess: Preprocess
    train: TrainingRows
    held_out: TrainingRows | None
    mean: npt.NDArray[np.float64]
    variance: float

    @classmethod
    def of(cls, context: FitContext, *, center: bool, normalize: bool) -> PreparedRows:
        """Prepare the rows of a fit."""
        preprocess = Preprocess.fit(context.train, center=center, normalize=normalize)

        def ready(blocks: Blocks) -> TrainingRows:
            return TrainingRows(
                blocks if preprocess.identity else PreparedBlocks(blocks, preprocess)
            )

        train = ready(context.train)
        held = None if context.held_out is None else ready(context.held_out)
        mean, variance = moments(train.blocks)
        return cls(preprocess, train, held, mean, variance)
