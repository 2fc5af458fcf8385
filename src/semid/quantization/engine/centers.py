"""Distances of rows to new centers, for the seeding of K-means: products that no memory holds."""

from __future__ import annotations

import numba
import numpy as np

from semid.quantization.engine.narrow import TILE, score_tile
from semid.quantization.engine.plain import LANES, padded
from semid.quantization.engine.sweep import F32
from semid.quantization.engine.table import PAD_OFFSET, aligned
from semid.quantization.engine.vector import best_other

ROWS = 96
"""Rows that go past a panel of centers together: both stay in cache."""


def pack_centers(centers: F32, values: F32) -> tuple[F32, F32]:
    """Lay out ``(centers, dim)``, and a number of each, in panels of 16."""
    count, dim = centers.shape
    wide = np.zeros((padded(count, LANES), dim), np.float32)
    wide[:count] = centers
    panels = aligned((len(wide) // LANES, dim, LANES), np.float32)
    panels[:] = wide.reshape(-1, LANES, dim).transpose(0, 2, 1)
    return panels, np.pad(values, (0, len(wide) - count), constant_values=PAD_OFFSET)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def lower_distances(y: F32, norms: F32, panels: F32, halves: F32, closest: F32) -> None:
    """Lower ``closest`` ``(n,)`` to the squared distances of rows ``(n, dim)`` to centers.

    ``norms`` ``(n,)`` are the squares of the rows, ``halves`` half those of centers; see
    `pack_centers`.
    """
    count, dim = y.shape
    # What rounding leaves of a distance between different rows.
    least, two = np.float32(1e-38), np.float32(2.0)
    numbers = np.minimum(np.arange(count + TILE), count - 1)
    scores = np.empty((TILE, LANES), np.float32)
    for start in range(0, count, ROWS):
        end = min(start + ROWS, count)
        for panel in range(panels.shape[0]):
            for first in range(start, end, TILE):
                score_tile(y, numbers, first, panels, panel, halves, dim, scores, 0)
                for i in range(first, min(first + TILE, end)):
                    # |y - c|^2 = |y|^2 - 2 (y . c - |c|^2 / 2)
                    top = best_other(scores, (i - first) * LANES, -1)
                    closest[i] = min(closest[i], max(norms[i] - two * top, least))


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def add_gains(y: F32, limits: F32, mass: F32, panels: F32, norms: F32, total: F32) -> None:
    """Add to ``total`` the positive parts of ``limit - |y - c|^2``, plus ``|y|^2`` on both sides.

    ``y`` ``(n, dim)``, ``limits`` and ``mass`` ``(n,)``; ``norms`` are the squares of candidates c,
    see `pack_centers`, and ``total`` is as long. Products are rounded to 8 bits, as bfloat16.
    """
    count, dim = y.shape
    two, zero, split = np.float32(2.0), np.float32(0.0), np.float32(2.0**16 + 1)
    numbers = np.minimum(np.arange(count + TILE), count - 1)
    scores, zeros = np.empty((TILE, LANES), np.float32), np.zeros(len(norms), np.float32)
    for start in range(0, count, ROWS):
        end = min(start + ROWS, count)
        for panel in range(panels.shape[0]):
            for first in range(start, end, TILE):
                score_tile(y, numbers, first, panels, panel, zeros, dim, scores, 0)
                for i in range(first, min(first + TILE, end)):
                    for j in range(LANES):
                        product = scores[i - first, j]
                        # The upper 8 bits, rounded (Veltkamp).
                        upper = split * product
                        upper -= upper - product
                        gain = limits[i] + two * upper - norms[panel * LANES + j]
                        total[panel * LANES + j] += mass[i] * max(gain, zero)
