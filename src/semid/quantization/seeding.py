"""Greedy k-means++ seeding in batches.

k-means++ (Arthur & Vassilvitskii 2007) draws each center with probability proportional to a row's
squared distance to the centers so far, one pass over the data a center. Here a round draws many
candidates from the distances known at its start and accepts candidate ``x`` with probability
``d_now(x) / d_start(x)``, where ``d_now`` also counts the centers accepted in this round: that is
rejection sampling from the sequential distribution, in far fewer passes. Greedy: candidates are
drawn several a center, and those that lower the total distance most are tried first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.blocks import Blocks
from semid.quantization.engine.routes import working_routes
from semid.quantization.nearest import THREADED_WORK
from semid.quantization.sharding import ShardedMatrix, as_sharded
from semid.quantization.threads import map_blocks

# Candidates a round: more save passes, but more of them are rejected. A quarter of the centers so
# far keeps rejection rare; 256 already runs the distance kernel at full speed.
MAX_ROUND = 256
# Rows of a gain block: with a few hundred candidates it stays in a core's cache.
GAIN_ROWS = 1024
# Rows the gains are added over, a center and at least: they only order candidates, which are drawn
# from all rows.
GAIN_ROWS_PER_CODE = 16
GAIN_ROWS_LEAST = 65_536
# Rows this close, relative to their lengths, count as copies within a round.
COPY = 1e-13


def kmeans_plus_plus(
    blocks: Blocks | ShardedMatrix,
    codes: int,
    *,
    generator: np.random.Generator,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    n_local_trials: int = 4,
) -> npt.NDArray[np.float32]:
    """Choose up to ``codes`` rows as initial centroids.

    Shapes: ``blocks`` (items, dim), ``weights`` (items,), returns (found, dim).
    """
    rows = as_sharded(blocks, weights=weights, threads=threads)
    # The first center is drawn by weight alone.
    centers = rows.rows(rows.draw(rows.start_seeding(), 1, generator))
    accepted = centers
    gains = _Gains(rows, codes, generator, threads) if n_local_trials > 1 else None
    while True:
        # One pass: distances to the nearest center, and their weighted sum per block.
        masses = rows.update_nearest_center(accepted)
        if len(centers) >= codes or not masses.any():
            return centers
        size = min(codes - len(centers), max(1, len(centers) // 4), MAX_ROUND)
        drawn = rows.draw(masses, size * n_local_trials, generator)
        candidates = rows.rows(drawn)
        reduction = None if gains is None else gains(candidates)
        accepted = candidates[
            _accept(candidates, rows.center_distances(drawn), reduction, size, generator)
        ]
        centers = np.concatenate([centers, accepted])


class _Gains:
    """Ranks candidates by how much each alone would lower the total distance of a sample of rows.

    Products are those of rows and candidates rounded to bfloat16, whether or not the chip
    multiplies such numbers itself, so that chips differ in the order of float32 sums alone.

    Args:
        source: ``(items, dim)`` rows.
        codes: centroids wanted.
        generator: draws the sample where the data are larger.
        threads: plain threads.
    """

    def __init__(
        self, source: ShardedMatrix, codes: int, generator: np.random.Generator, threads: int | None
    ) -> None:
        items, size = len(source), max(GAIN_ROWS_LEAST, GAIN_ROWS_PER_CODE * codes)
        chosen = np.arange(items)
        if size < items:
            chosen = np.sort(generator.choice(items, size, replace=False, shuffle=False))
        self.source = source
        self.chosen = chosen.astype(np.int64)
        rows = torch.from_numpy(source.rows(self.chosen))
        self.mean = rows.mean(0)
        rows -= self.mean
        self.norms = (rows**2).sum(1)
        native = any(route.name == "bf16" for route in working_routes())
        self.dtype = torch.bfloat16 if native else torch.float32
        self.rows = rows.to(torch.bfloat16).to(self.dtype)
        weights = source.weights
        self.weights = None if weights is None else torch.from_numpy(weights[self.chosen]).float()
        self.threads = threads

    def __call__(self, candidates: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the gains ``(n,)`` over the distances to the centers so far."""
        centered = torch.from_numpy(candidates) - self.mean
        norms = (centered**2).sum(1)
        transposed = centered.to(torch.bfloat16).to(self.dtype).T.contiguous()
        limits = torch.from_numpy(self.source.center_distances(self.chosen)) - self.norms

        def part(start: int) -> npt.NDArray[np.float64]:
            span = slice(start, start + GAIN_ROWS)
            gain = (self.rows[span] @ transposed).to(torch.bfloat16).float()
            # limit - |x - c|^2 = (limit - |x|^2) + 2 x.c - |c|^2, where it is positive.
            gain.mul_(2).sub_(norms).add_(limits[span, None]).clamp_(min=0)
            if self.weights is not None:
                gain *= self.weights[span, None]
            summed: npt.NDArray[np.float64] = gain.sum(0).double().numpy()
            return summed

        total = np.zeros(len(candidates))
        threads = self.threads if self.rows.numel() * len(centered) >= THREADED_WORK else 1
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
    # Centered in float64, so that |a|^2 + |b|^2 - 2 a.b loses few digits.
    wide = candidates - candidates.mean(axis=0, dtype=np.float64)
    norms = np.einsum("nd,nd->n", wide, wide)
    apart = norms[:, None] + norms - 2 * (wide @ wide.T)
    apart[apart <= COPY * (norms[:, None] + norms)] = 0  # what rounding leaves between copies
    before = start.astype(np.float64)
    now = before.copy()
    coins = generator.random(len(candidates))
    order = np.arange(len(candidates)) if gains is None else np.argsort(-gains, kind="stable")
    accepted: list[int] = []
    for i in order:
        # Candidates were drawn in proportion to `before`; accepting with probability now / before
        # makes them draws in proportion to `now`. A copy of an accepted one has now = 0.
        if coins[i] * before[i] < now[i]:
            accepted.append(int(i))
            if len(accepted) == size:
                break
            np.minimum(now, apart[i], out=now)
    return accepted
