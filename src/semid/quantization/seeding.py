"""Greedy k-means++ seeding in batches.

k-means++ (Arthur & Vassilvitskii 2007) draws each centre with probability proportional to a row's
squared distance to the centres so far, one pass over the data a centre. Here a round draws many
candidates from the distances known at its start and accepts candidate ``x`` with probability
``d_now(x) / d_start(x)``, where ``d_now`` also counts the centres accepted in this round: that is
rejection sampling from the sequential distribution, in far fewer passes. Greedy: candidates are
drawn several a centre, and those that lower the total distance most are tried first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.assign import THREADED_WORK, assign
from semid.quantization.blocks import BLOCK_ROWS, Blocks, read_ahead
from semid.quantization.engine.routes import working_routes
from semid.quantization.threads import map_blocks

__all__ = ["kmeans_plus_plus"]

# Candidates a round: more save passes, but more of them are rejected. A quarter of the centres so
# far keeps rejection rare; 256 already runs the distance kernel at full speed.
MAX_ROUND = 256
# Rows of a gain block: with a few hundred candidates it stays in a core's cache.
GAIN_ROWS = 1024
# Rows the gains are added over, a centre and at least: they only order candidates, which are drawn
# from all rows.
GAIN_ROWS_PER_CODE = 16
GAIN_ROWS_LEAST = 65_536
# Rows this close, relative to their lengths, count as copies within a round.
COPY = 1e-13


def kmeans_plus_plus(
    blocks: Blocks,
    codes: int,
    *,
    generator: np.random.Generator,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    trials: int = 4,
) -> npt.NDArray[np.float32]:
    """Choose up to ``codes`` rows as initial centroids.

    Args:
        blocks: ``(items, dim)`` rows.
        codes: centroids wanted, at least 1.
        generator: source of randomness.
        weights: ``(items,)`` non-negative item weights that multiply the squared distances.
        threads: plain threads; None takes what the machine allows.
        trials: candidates drawn a centre; 1 is plain k-means++.

    Returns:
        ``(found, dim)`` float32 distinct rows; ``found < codes`` only if the data hold no more
        distinct rows of positive weight. Time about one exact assignment of the data to ``codes``
        centroids and ``trials`` bfloat16 products of `GAIN_ROWS_PER_CODE` rows a code with them;
        memory O(items + codes dim) beside those rows.
    """
    items = len(blocks)
    mass = np.ones(items) if weights is None else weights.astype(np.float64, copy=True)
    first = _draw(mass, 1, generator)
    centres = blocks.rows(first)
    closest = np.full(items, np.inf, dtype=np.float32)
    fresh = centres
    gains = _Gains(blocks, codes, generator, weights, threads) if trials > 1 else None
    while True:
        for start, block in read_ahead(blocks):
            stop = start + len(block)
            _, distances = assign(block, fresh, threads=threads)
            np.minimum(closest[start:stop], distances, out=closest[start:stop])
        if len(centres) >= codes:
            return centres
        mass = closest.astype(np.float64)
        if weights is not None:
            mass *= weights
        if not mass.any():
            return centres
        size = min(codes - len(centres), max(1, len(centres) // 4), MAX_ROUND)
        drawn = _draw(mass, size * trials, generator)
        candidates = blocks.rows(drawn)
        worth = None if gains is None else gains(candidates, closest)
        kept = _accept(candidates, closest[drawn], worth, size, generator)
        fresh = candidates[kept]
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


class _Gains:
    """Ranks candidates by how much each alone would lower the total distance of a sample of rows.

    Products are those of rows and candidates rounded to bfloat16, whether or not the chip
    multiplies such numbers itself, so that chips differ in the order of float32 sums alone.

    Args:
        blocks: ``(items, dim)`` rows.
        codes: centroids wanted.
        generator: draws the sample where the data are larger.
        weights: ``(items,)`` weights or None.
        threads: plain threads.
    """

    def __init__(
        self,
        blocks: Blocks,
        codes: int,
        generator: np.random.Generator,
        weights: npt.NDArray[np.float64] | None,
        threads: int | None,
    ) -> None:
        items, size = len(blocks), max(GAIN_ROWS_LEAST, GAIN_ROWS_PER_CODE * codes)
        self.chosen = np.arange(items)
        if size < items:
            self.chosen = np.sort(generator.choice(items, size, replace=False, shuffle=False))
        rows = torch.from_numpy(blocks.rows(self.chosen.astype(np.int64)))
        self.middle = rows.mean(0)
        rows -= self.middle
        self.norms = (rows**2).sum(1)
        native = any(route.name == "bf16" for route in working_routes())
        self.dtype = torch.bfloat16 if native else torch.float32
        self.rows = rows.to(torch.bfloat16).to(self.dtype)
        self.weights = None if weights is None else torch.from_numpy(weights[self.chosen]).float()
        self.threads = threads

    def __call__(
        self, candidates: npt.NDArray[np.float32], closest: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """Return the gains ``(n,)`` given the distances ``(items,)`` to the centres so far."""
        words = torch.from_numpy(candidates) - self.middle
        norms = (words**2).sum(1)
        turned = words.to(torch.bfloat16).to(self.dtype).T.contiguous()
        limits = torch.from_numpy(closest[self.chosen]) - self.norms

        def part(start: int) -> npt.NDArray[np.float64]:
            span = slice(start, start + GAIN_ROWS)
            gain = (self.rows[span] @ turned).to(torch.bfloat16).float()
            gain.mul_(2).sub_(norms).add_(limits[span, None]).clamp_(min=0)
            if self.weights is not None:
                gain *= self.weights[span, None]
            summed: npt.NDArray[np.float64] = gain.sum(0).double().numpy()
            return summed

        total = np.zeros(len(candidates))
        threads = self.threads if self.rows.numel() * len(words) >= THREADED_WORK else 1
        # Added in row order, so that threads cannot change the sum.
        for gain in map_blocks(part, range(0, len(self.rows), GAIN_ROWS), threads=threads):
            total += gain
        return total


def _accept(
    candidates: npt.NDArray[np.float32],
    start: npt.NDArray[np.float32],
    gains: npt.NDArray[np.float64] | None,
    size: int,
    generator: np.random.Generator,
) -> list[int]:
    """Accept up to ``size`` candidates one after another, each with probability now / start."""
    wide = candidates - candidates.mean(axis=0, dtype=np.float64)
    norms = np.einsum("nd,nd->n", wide, wide)
    apart = norms[:, None] + norms - 2 * (wide @ wide.T)
    apart[apart <= COPY * (norms[:, None] + norms)] = 0  # what rounding leaves between copies
    before = start.astype(np.float64)
    now = before.copy()
    coins = generator.random(len(candidates))
    order = np.arange(len(candidates)) if gains is None else np.argsort(-gains, kind="stable")
    kept: list[int] = []
    for i in order:
        if coins[i] * before[i] < now[i]:
            kept.append(int(i))
            if len(kept) == size:
                break
            np.minimum(now, apart[i], out=now)
    return kept
