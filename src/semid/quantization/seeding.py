"""Seeding of K-means: greedy k-means++ in batches, on a sample of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.lazy import kernel, torch
from semid.quantization import engine
from semid.quantization.blocks import Blocks
from semid.quantization.sharding import ShardedMatrix, as_sharded
from semid.quantization.threads import THREADED_WORK, map_blocks

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

# Rows the centers are drawn from, per center and at least. Lloyd's iterations see all rows.
# With half of 32,768 rows, three levels of 256 codes fitted in 5 iterations have 0.6 % more error.
SAMPLE_PER_CODE = 64
SAMPLE_LEAST = 65_536
# Rows of the sample that the gains are added over: they only order candidates.
GAIN_PER_CODE = 16
GAIN_LEAST = 32_768
# Candidates per round: more save passes, but more of them are rejected. A quarter of the centers
# so far keeps rejection rare.
MAX_ROUND = 256
# Rows multiplied at once: with a few hundred candidates their products stay in a core's cache.
BLOCK = 1024
# Rows this close, relative to their lengths, count as copies within a round.
COPY = 1e-13


def kmeans_plus_plus(
    blocks: Blocks | ShardedMatrix,
    codes: int,
    *,
    generator: np.random.Generator,
    weights: Doubles | None = None,
    threads: int | None = None,
    n_local_trials: int = 4,
) -> Array:
    """Choose up to ``codes`` rows as initial centroids, by greedy k-means++ in batches.

    k-means++ (Arthur & Vassilvitskii 2007) draws each center with probability proportional to a
    row's squared distance to the centers so far, one pass over the data per center. Here a round
    draws many candidates from the distances known at its start and accepts candidate ``x`` with
    probability ``d_now(x) / d_start(x)``, where ``d_now`` also counts the centers accepted in this
    round: that is rejection sampling from the sequential distribution, in far fewer passes.
    Greedy: several candidates are drawn per center, and those that lower the total distance most
    are tried first.

    The rows are a sample in this process. Fewer than ``codes`` centers mean that all distinct rows
    are centers.

    Shapes: ``blocks`` (items, dim), ``weights`` (items,), returns (centers, dim).
    """
    rows = as_sharded(blocks, weights=weights, threads=threads)
    sample = _Sample(rows, codes, generator, threads)
    # The first center is drawn by weight alone.
    centers = sample.draw(1, generator)
    fresh = centers
    while True:
        sample.add_centers(fresh)
        left = codes - len(centers)
        if not left or not (sample.mass * sample.closest).any():
            break
        # Draw by the distances at the start of the round, then accept by those of the moment.
        size = min(left, max(1, len(centers) // 4), MAX_ROUND)
        drawn = sample.draw(size * n_local_trials, generator)
        gains = sample.gains(drawn) if n_local_trials > 1 else None
        candidates, before = sample.y[drawn], sample.closest[drawn]
        fresh = drawn[_accept(candidates, before, gains, size, generator)]
        centers = np.concatenate([centers, fresh])
    chosen = rows.rows(sample.numbers[centers])
    return chosen if sample.is_whole else _complete(rows, chosen, codes)


def _complete(rows: ShardedMatrix, centers: Array, codes: int) -> Array:
    """Add rows that are on no center, where the sample held too few distinct ones."""
    while len(centers) < codes:
        rows.assign(centers)
        farthest = rows.rows(rows.farthest(2 * (codes - len(centers))))
        if not len(farthest):
            break  # all distinct rows are centers
        centers = np.concatenate([centers, farthest[engine.table.first_copies(farthest)]])[:codes]
    return centers


class _Sample:
    """Rows and their squared distances to the nearest center so far.

    Rows ``y`` are centered and scaled. They and centers are called by their places in the sample,
    which stand for the row ``numbers`` of the source. ``mass`` is the weight of all copies of a row
    in the first of them, and 0 in the others, which are never drawn.
    """

    def __init__(
        self,
        source: ShardedMatrix,
        codes: int,
        generator: np.random.Generator,
        threads: int | None,
    ) -> None:
        weights = source.weights
        numbers = np.arange(len(source)) if weights is None else np.flatnonzero(weights)
        size = max(SAMPLE_LEAST, SAMPLE_PER_CODE * codes)
        self.is_whole = size >= len(numbers)
        if not self.is_whole:
            numbers = np.sort(generator.choice(numbers, size, replace=False, shuffle=False))
        mass = np.ones(len(numbers)) if weights is None else weights[numbers]
        # Centered and scaled, so that float32 products lose little and never overflow.
        y = source.rows(numbers)
        mean = y.mean(axis=0, dtype=np.float64).astype(np.float32)
        y *= np.float32(0.5)
        y -= mean * np.float32(0.5)
        largest = max(float(y.max()), -float(y.min())) * math.sqrt(source.dim)
        y *= np.float32(2.0 ** -min(math.frexp(largest)[1], 126))
        self.mass = _merge_copies(y, mass)
        self.y, self.numbers, self.threads = y, numbers, threads
        self.weights = self.mass.astype(np.float32)
        self.norms = np.einsum("nd,nd->n", y, y)
        self.closest: Array = np.full(len(y), np.inf, dtype=np.float32)
        # Gains only order candidates, so products of bfloat16 are enough. They are rounded whether
        # or not the chip multiplies such numbers, so that chips differ in the order of sums alone.
        self.dtype = torch.bfloat16 if engine.search.has_bfloat16() else torch.float32
        self.gain_rows, count = np.arange(len(y)), max(GAIN_LEAST, GAIN_PER_CODE * codes)
        if count < len(y):
            self.gain_rows = np.sort(generator.choice(len(y), count, replace=False, shuffle=False))
        self.coarse = self._round(self.gain_rows)

    def _round(self, places: Numbers) -> torch.Tensor:
        """Return rows rounded to bfloat16."""
        return torch.from_numpy(self.y[places]).to(torch.bfloat16).to(self.dtype)

    def draw(self, size: int, generator: np.random.Generator) -> Numbers:
        """Draw places independently, in proportion to mass times distance."""
        mass = self.mass
        if np.isfinite(self.closest[0]):
            mass = mass * self.closest
        running = np.cumsum(mass)
        places = np.searchsorted(running, generator.random(size) * running[-1], side="right")
        # Rounding may point past the end: the last row that has some mass.
        clipped: Numbers = np.minimum(places, np.flatnonzero(mass)[-1])
        return clipped

    def add_centers(self, places: Numbers) -> None:
        """Lower the distances to those to new centers; a center itself has 0."""
        lower = engine.centers.lower_distances
        packed = engine.centers.pack_centers(self.y[places], self.norms[places] / 2)

        def work(start: int) -> None:
            span = slice(start, start + BLOCK)
            lower(self.y[span], self.norms[span], *packed, self.closest[span])

        self._map(work, len(self.y), len(places))
        self.closest[places] = 0.0

    def gains(self, places: Numbers) -> Doubles:
        """Return by how much each row ``(n,)``, alone, would lower the total distance."""
        candidates, norms = self._round(places), self.norms[places]
        columns = candidates.T.contiguous()
        packed = engine.centers.pack_centers(candidates.float().numpy(), norms)

        def work(start: int) -> Doubles:
            coarse, at = self.coarse[start : start + BLOCK], self.gain_rows[start : start + BLOCK]
            limits, weights = self.closest[at] - self.norms[at], self.weights[at]
            total = np.zeros(len(packed[1]), dtype=np.float32)
            if self.dtype == torch.float32:
                engine.centers.add_gains(coarse.numpy(), limits, weights, *packed, total)
            else:
                products = (coarse @ columns).float().numpy()
                _add_gains(products, limits, norms, weights, total)
            return total[: len(places)].astype(np.float64)

        # Added in row order, so that threads cannot change the sum.
        return sum(self._map(work, len(self.coarse), len(places)), start=np.zeros(len(places)))

    def _map(self, work: Callable[[int], Any], rows: int, candidates: int) -> list[Any]:
        small = rows * candidates * self.y.shape[1] < THREADED_WORK
        return map_blocks(work, range(0, rows, BLOCK), threads=1 if small else self.threads)


def _merge_copies(rows: Array, mass: Doubles) -> Doubles:
    """Return the mass of all copies of each row at the first of them, and 0 at the others.

    With mass in several, a copy of a center could be drawn.
    """
    rows += np.float32(0.0)  # -0 becomes 0
    first = engine.table.first_copies(rows)
    if len(first) == len(rows):
        return mass
    copies = np.delete(np.arange(len(rows)), first)
    hashes = engine.table.hash_rows(rows)
    place = {rows[at].tobytes(): at for at in first[np.isin(hashes[first], hashes[copies])]}
    merged = mass.copy()
    merged[copies] = 0.0
    np.add.at(merged, [place[rows[copy].tobytes()] for copy in copies], mass[copies])
    return merged


@kernel()
def _add_gains(products: Array, limits: Array, norms: Array, mass: Array, total: Array) -> None:
    """Add the positive parts of ``limit - |y - c|^2``, plus ``|y|^2`` on both sides."""
    for i in range(products.shape[0]):
        for j in range(products.shape[1]):
            gain = limits[i] + np.float32(2.0) * products[i, j] - norms[j]
            total[j] += mass[i] * max(gain, np.float32(0.0))


def _accept(
    candidates: Array,
    start: Array,
    gains: Doubles | None,
    size: int,
    generator: np.random.Generator,
) -> list[int]:
    """Accept up to ``size`` candidates one after another, each with probability now / start."""
    # Centered in float64, so that |a|^2 + |b|^2 - 2 a.b loses few digits.
    wide = candidates - candidates.mean(axis=0, dtype=np.float64)
    norms = np.einsum("nd,nd->n", wide, wide)
    distances = norms[:, None] + norms - 2 * (wide @ wide.T)
    # Set to 0 what rounding leaves between copies.
    distances[distances <= COPY * (norms[:, None] + norms)] = 0
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
            np.minimum(now, distances[i], out=now)
    return accepted
