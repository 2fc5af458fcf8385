"""BARQ's head into behavior: tables that are trained on pairs, for the codes as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from semid.quantization.threads import one_blas_thread
from semid.seeds import numpy_generator
from semid.tokenizers.behavior import Behavior, PairSource
from semid.tokenizers.neural.continuous import info_nce

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]

BATCH = 512
"""Pairs per step: as good as 1,024, in half the time."""
LEARNING_RATE = 1e-2
"""At first; it falls linearly to 0."""
FEWEST_STEPS, MOST_STEPS = 100, 600
SELECTION_BATCHES = 8
"""Batches of pairs by which trained tables are compared with those they started from."""


def train_tables(
    tables: Sequence[Array],
    codes: Codes,
    behavior: Behavior,
    *,
    temperature: float,
    seed: int,
) -> tuple[tuple[Array, ...], dict[str, float]]:
    """Train tables so that summed rows of items that go together have a high cosine.

    Least squares tables approach the encoder's directions in all items alike, at the price of the
    cosines between items that are ranked by them. These start from least squares and follow the
    loss of the encoder itself, InfoNCE on the pairs of training users (`info_nce`).

    Args:
        tables: ``(codes, width)`` per level, from least squares.
        codes: ``(items, levels)`` of the training rows, which the pairs number.
        behavior: pairs to train on, and those of users kept for selection, if any.
        temperature: InfoNCE temperature (> 0).
        seed: of the pairs that are drawn.

    Returns:
        The tables, or those given if selection users' loss did not fall; and the two losses, where
        there are selection users. Cost: at most 600 steps, 2 to 4 CPU seconds in all.
    """
    source = behavior.train
    weights = [torch.from_numpy(table.copy()).requires_grad_() for table in tables]
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in codes.T]

    def directions(rows: npt.NDArray[np.int64]) -> Tensor:
        # Summed in level order, as `decode_behavior` does.
        parts = [
            functional.embedding(column[rows], table)
            for column, table in zip(columns, weights, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)

    def loss_on(pairs: PairSource, generator: np.random.Generator) -> Tensor:
        first, second = pairs.draw(BATCH, generator)
        excluded = torch.from_numpy(pairs.positives.excluded(first, second))
        return info_nce(
            directions(first), directions(second), temperature=temperature, excluded=excluded
        )

    @torch.no_grad()
    def selection_loss(pairs: PairSource) -> float:
        generator = numpy_generator(seed, "head selection")  # the same pairs before and after
        losses = [float(loss_on(pairs, generator)) for _ in range(SELECTION_BATCHES)]
        return float(np.mean(losses))

    # A log of few pairs is learned by heart in many steps.
    steps = min(MOST_STEPS, FEWEST_STEPS + 2 * source.count // BATCH)
    generator, losses = numpy_generator(seed, "head"), {}
    with one_blas_thread():  # another number of threads may add in another order
        if behavior.select is not None:
            losses["loss_before_training"] = selection_loss(behavior.select)
        optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1.0 - step / steps)
            optimizer.zero_grad()
            loss_on(source, generator).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if behavior.select is not None:
            losses["loss"] = selection_loss(behavior.select)
            if not losses["loss"] < losses["loss_before_training"]:
                return tuple(tables), losses
    return tuple(weight.detach().numpy() for weight in weights), losses
