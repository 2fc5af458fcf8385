"""Batched k-means++ seeding that draws from exactly the sequential distribution.

k-means++ (Arthur & Vassilvitskii 2007) draws each centre with probability proportional to a row's
squared distance to the centres so far, which costs one pass over the data a centre. Here a round
draws many candidates from the distances known at its start and accepts candidate ``x`` with
probability ``d_now(x) / d_start(x)``, where ``d_now`` also counts the centres accepted in this
round. That is rejection sampling from the sequential distribution: same quality, far fewer passes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.blocks import BLOCK_ROWS, Blocks
from semid.quantization.nearest import nearest

__all__ = ["kmeans_plus_plus"]

# Candidates a round: more save passes, but more of them are rejected. A quarter of the centres so
# far keeps rejection rare; 256 already runs the distance kernel at full speed.
MAX_ROUND = 256


def kmeans_plus_plus(
    blocks: Blocks,
    codes: int,
    *,
    generator: np.random.Generator,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.float32]:
    """Choose up to ``codes`` rows as initial centroids.

    Args:
        blocks: ``(items, dim)`` rows.
        codes: centroids wanted, at least 1.
        generator: source of randomness.
        weights: ``(items,)`` non-negative item weights that multiply the squared distances.
        threads: threads for the distance kernel; None takes what the machine allows.

    Returns:
        ``(found, dim)`` float32 distinct rows; ``found < codes`` only if the data hold no more
        distinct rows of positive weight. Time about one exact assignment of the data to ``codes``
        centroids, memory O(items + codes dim).
    """
    items = len(blocks)
    mass = np.ones(items) if weights is None else weights.astype(np.float64, copy=True)
    first = _draw(mass, 1, generator)
    centres = blocks.rows(first)
    closest = np.full(items, np.inf, dtype=np.float32)
    fresh = centres
    while True:
        for start, block in blocks.blocks():
            stop = start + len(block)
            found = nearest(torch.from_numpy(block), torch.from_numpy(fresh), threads=threads)
            np.minimum(closest[start:stop], found.distances.numpy(), out=closest[start:stop])
        if len(centres) >= codes:
            return centres
        mass = closest.astype(np.float64)
        if weights is not None:
            mass *= weights
        if not mass.any():
            return centres
        size = min(codes - len(centres), max(1, len(centres) // 4), MAX_ROUND)
        fresh = _accept(blocks, _draw(mass, size, generator), closest, generator)
        centres = np.concatenate([centres, fresh])


def _draw(
    mass: npt.NDArray[np.float64], size: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw row numbers independently, in proportion to ``mass``; the sum runs in block order."""
    edges = np.add.reduceat(mass, np.arange(0, len(mass), BLOCK_ROWS))
    total = np.cumsum(edges)
    targets = generator.random(size) * total[-1]
    drawn = np.empty(size, dtype=np.int64)
    chosen = np.minimum(np.searchsorted(total, targets, side="right"), len(total) - 1)
    for block in np.unique(chosen):
        part = mass[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
        mine = chosen == block
        inside = targets[mine] - (total[block] - edges[block])
        running = np.cumsum(part)
        place = np.searchsorted(running, inside, side="right")
        # Rounding may point past the end or at a row of no mass: take the last row that has some.
        last = int(np.flatnonzero(part)[-1]) if part.any() else 0
        drawn[mine] = block * BLOCK_ROWS + np.minimum(place, last)
    return drawn


def _accept(
    blocks: Blocks,
    drawn: npt.NDArray[np.int64],
    closest: npt.NDArray[np.float32],
    generator: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Accept candidates one after another with probability ``d_now / d_start``."""
    candidates = blocks.rows(drawn)
    wide = candidates.astype(np.float64)
    start = closest[drawn].astype(np.float64)
    now = start.copy()
    coins = generator.random(len(drawn))
    kept: list[int] = []
    for i in range(len(drawn)):
        if coins[i] * start[i] < now[i]:
            kept.append(i)
            difference = wide - wide[i]
            np.minimum(now, np.einsum("nd,nd->n", difference, difference), out=now)
    return candidates[kept]
