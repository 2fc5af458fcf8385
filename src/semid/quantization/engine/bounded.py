"""Nearest codewords of rows that are searched again and again while codewords move: Lloyd's passes.

Each row keeps its codeword and, for every group of 16 codewords that lie close together, a lower
bound on the distance to all of the group but its own (Yinyang K-means, Ding et al. 2015). A pass
lowers the bounds by the largest move of each group and searches only the groups whose bound is
below the distance to the row's own codeword. Canonical keys decide as everywhere, so the answers
are those of the full search, bit for bit (README.md, "Lloyd's passes").
"""

from __future__ import annotations

import math
import time

import numba
import numpy as np
import numpy.typing as npt

from semid.quantization.engine.keys import key
from semid.quantization.engine.narrow import BLOCK, FAR, TILE, bound_tile, center_rows, score_tile
from semid.quantization.engine.plain import LANES, check_entries, padded
from semid.quantization.engine.sweep import F32, I32, I64
from semid.quantization.engine.table import PAD_OFFSET, aligned
from semid.quantization.engine.vector import (
    SHRINK,
    best_other,
    lower_bounds,
    other_hits,
    trailing_zeros,
)
from semid.quantization.threads import map_blocks

MIN_ENTRIES, MIN_ROWS, ROWS_PER_CODE = 64, 1024, 4
"""Smallest codebook, fewest rows, and fewest rows of a codeword for which bounds pay."""
MAX_WIDTH = 8192
"""Widest rows: their sums of float32 products err little enough for the bound of a score."""
ROWS = 256
"""Rows whose searches are collected by group, so that a tile of rows meets the same codewords."""
STEP_ROWS = 16
"""Rows that are measured together; copies of them stay in the first cache."""
MAX_GROWTH, MAX_SHRINK = 4.0, 2.0**-8
"""Radius of the codebook, in radii of the first pass, beyond which bounds start afresh."""

OWN_SHARE = 0.2
"""What measuring the rows' own codewords takes of a pass that searches all groups, about."""
MAX_LOSS = 1.0
"""Full passes that bounds may cost more than they spare before they are given up."""
PROBE_SHARE, MAX_PROBE = 32, 512
"""Of how many rows one is searched both ways, for the time of either, and at most how many."""
POWER_STEPS = 4
"""Steps of power iteration towards the principal direction of some codewords."""

F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def arrange(
    codewords: F32, former: F32, order: I64, center: F32, scale: float, rows: F32, panels: F32,
    offsets: F32, moves: F32,
) -> float:  # fmt: skip
    """Lay out centered and scaled codewords ``(codes, dim)`` for `nearest_bounded`.

    Place ``p`` takes codeword ``order[p]``. Writes ``rows`` ``(codes, width)``, unscaled, and
    ``panels`` and ``offsets`` as in `narrow.nearest_narrow`, and to ``moves`` ``(groups,)`` at
    least how far a codeword of each group lies from its ``former`` place, in scaled units. Returns
    the largest scaled length, NaN where a codeword is not finite.
    """
    dim = codewords.shape[1]
    rows[:], panels[:], offsets[:], moves[:] = 0, 0, PAD_OFFSET, 0
    largest = 0.0
    for place in range(len(order)):
        square, moved = 0.0, 0.0
        for d in range(dim):
            value = codewords[order[place], d]
            apart = np.float64(value) - np.float64(former[order[place], d])
            moved += apart * apart
            rows[place, d] = value
            scaled = (np.float64(value) - np.float64(center[d])) * scale
            panels[place // LANES, d, place % LANES] = scaled
            square += scaled * scaled
        offsets[place] = square / 2.0
        if not square <= largest:
            largest = square
        # Rounded up: less than the move would not be a bound.
        move = np.float32(math.sqrt(moved) * scale * (1.0 + 2.0**-20) + 2.0**-60)
        moves[place // LANES] = max(moves[place // LANES], move)
    return math.sqrt(largest)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def measure_own(
    x: F32, rows: F32, order: I64, center: F32, scale: float, radius: float, places: I32,
    lower: F32, distances: F64, raw: F32, y: F32, halves: F32, floors: F32, reaches: F32,
) -> None:  # fmt: skip
    """Measure each row's own codeword; write what other codewords have to reach.

    Shapes: ``x`` ``(n, dim)``; the last five, of `ROWS` rows, are written: the rows as they are and
    centered and scaled ``(ROWS, width)``; half the square of a row less the bound of a score; the
    least score of a codeword that may be as near as the row's own; the bound of a group above
    which all of it is farther. The rest is as in `nearest_bounded`.
    """
    # The bound of a score (README.md, "Lloyd's passes") is slope |y|^2 + constant.
    slope = (x.shape[1] + 64.0) * 2.0**-23
    constant = np.float32(2.0 * slope * radius * radius + 2.0**-60)
    half, shift, factor = np.float32(0.5 - slope), np.float32(0.5), np.float32(scale)
    grow, tiny = np.float32(1.0 + 2.0**-20), np.float32(2.0**-60)
    limit, square_scale = np.float32(FAR * FAR), scale * scale
    for first in range(0, x.shape[0], STEP_ROWS):
        last = min(first + STEP_ROWS, x.shape[0])
        center_rows(x[first:last], center, factor, raw[first:], y[first:], halves[first:])
        for i in range(first, last):
            distances[i] = key(0, raw, i, 0.0, rows, places[i], 0.0)
            if not halves[i] < limit:
                # Not finite or too far for scores: every codeword is measured.
                for k in range(rows.shape[0]):
                    value = key(0, raw, i, 0.0, rows, k, 0.0)
                    if value < distances[i] or (
                        value == distances[i] and order[k] < order[places[i]]
                    ):
                        distances[i], places[i] = value, k
        for i in range(first, last):
            square, apart = halves[i], np.float32(distances[i] * square_scale)
            halves[i] = half * square - constant
            floors[i] = halves[i] - shift * apart
            # Above by more than what rounds in float32 and in canonical keys.
            reaches[i] = np.sqrt(apart) * grow + tiny
            if not square < limit:  # no bound holds
                lower[i] = np.float32(-1.0)
                halves[i], floors[i], reaches[i] = np.float32(-np.inf), np.float32(np.inf), 0.0


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def collect(
    count: int, lower: F32, moves: F32, reaches: F32, masks: U64, lists: I64, counts: I64
) -> None:
    """Lower the bounds of ``count`` rows by the moves and list, by group, those it must search."""
    groups = lower.shape[1]
    # A loop of its own: a wrong guess of how many groups come would cost all that has begun.
    for i in range(count):
        for block in range(groups // LANES):
            g = block * LANES
            masks[i, block] = lower_bounds(lower, i * groups + g, moves, g, reaches[i])
    counts[:] = 0
    for i in range(count):
        for block in range(groups // LANES):
            mask = masks[i, block]
            while mask != 0:
                g = block * LANES + trailing_zeros(mask)
                mask &= mask - np.uint64(1)
                lists[g, counts[g]] = i
                counts[g] += 1
    for g in range(groups):
        # The last tile of a group repeats a row.
        for i in range(TILE if counts[g] > 0 else 0):
            lists[g, counts[g] + i] = lists[g, counts[g] - 1]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def measure_hits(
    scores: F32, t: int, g: int, i: int, raw: F32, rows: F32, order: I64, square_scale: float,
    places: I32, lower: F32, distances: F64, halves: F32, floors: F32,
) -> None:  # fmt: skip
    """Measure the codewords of group ``g`` whose score, in line ``t``, may beat row ``i``'s own."""
    one = np.uint64(1)
    shrink, tiny, half = np.float32(SHRINK), np.float32(2.0**-60), np.float32(0.5)
    mask = other_hits(scores, t * LANES, places[i] - g * LANES, floors[i])
    while mask != 0:
        # The best score first: its key raises the threshold of the others.
        at, rest = trailing_zeros(mask), mask & (mask - one)
        while rest != 0:
            other = trailing_zeros(rest)
            rest &= rest - one
            if scores[t, other] > scores[t, at]:
                at = other
        if scores[t, at] < floors[i]:
            break
        mask &= ~(one << np.uint64(at))
        k, place = g * LANES + at, places[i]
        if k >= rows.shape[0]:  # a padding column
            continue
        value, nearest = key(0, raw, i, 0.0, rows, k, 0.0), distances[i]
        if value < nearest or (value == nearest and order[k] < order[place]):
            # The former codeword counts among the others of its group from now on.
            apart = math.sqrt(np.float32(nearest * square_scale)) * shrink - tiny
            former = place // LANES
            lower[i, former] = min(lower[i, former], apart)
            places[i], distances[i] = k, value
            floors[i] = halves[i] - half * np.float32(value * square_scale)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def nearest_bounded(
    x: F32, rows: F32, order: I64, panels: F32, offsets: F32, moves: F32, center: F32,
    scale: float, radius: float, places: I32, lower: F32, labels: I64, distances: F64,
) -> int:  # fmt: skip
    """Find the codeword nearest to each row by the canonical key, ties to the lowest index.

    Shapes: ``x`` ``(n, dim)``; ``rows``, ``order``, ``panels``, ``offsets``, ``moves`` and
    ``radius`` of `arrange`. ``places`` ``(n,)`` and ``lower`` ``(n, groups)`` are each row's
    codeword and bounds, which are updated; ``labels`` and ``distances`` ``(n,)`` are written.
    Returns the number of pairs of rows and groups searched.
    """
    groups, dim, width = panels.shape[0], panels.shape[1], rows.shape[1]
    raw, y = np.zeros((ROWS, width), np.float32), np.zeros((ROWS, width), np.float32)
    halves, floors = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    reaches, masks = np.empty(ROWS, np.float32), np.empty((ROWS, groups // LANES), np.uint64)
    lists, counts = np.zeros((groups, ROWS + TILE), np.int64), np.zeros(groups, np.int64)
    scores = np.empty((TILE, LANES), np.float32)
    shrink, tiny = np.float32(SHRINK), np.float32(2.0**-60)
    two, zero = np.float32(2.0), np.float32(0.0)
    searched = 0
    for start in range(0, x.shape[0], ROWS):
        end = min(start + ROWS, x.shape[0])
        mine, bounds, keys = places[start:end], lower[start:end], distances[start:end]
        measure_own(
            x[start:end], rows, order, center, scale, radius, mine, bounds, keys, raw, y, halves,
            floors, reaches,
        )  # fmt: skip
        collect(end - start, bounds, moves, reaches, masks, lists, counts)
        for g in range(groups):
            size = counts[g]
            searched += size
            for tile in range(0, size, TILE):
                score_tile(y, lists, g * (ROWS + TILE) + tile, panels, g, offsets, dim, scores, 0)
                mask = bound_tile(
                    scores, lists, g * (ROWS + TILE) + tile, mine, g, halves, floors, bounds, groups
                )
                while mask != 0:
                    t = trailing_zeros(mask)
                    mask &= mask - np.uint64(1)
                    if tile + t >= size:  # repeats the last row
                        break
                    i = lists[g, tile + t]
                    measure_hits(
                        scores, t, g, i, raw, rows, order, scale * scale, mine, bounds, keys,
                        halves, floors,
                    )  # fmt: skip
                    top = best_other(scores, t * LANES, mine[i] - g * LANES)
                    apart = max(two * (halves[i] - top), zero)
                    bounds[i, g] = math.sqrt(apart) * shrink - tiny
        for i in range(end - start):
            labels[start + i] = order[mine[i]]
    return searched


def group_order(codewords: F32) -> I64:
    """Return all codewords in an order in which each 16 lie close together.

    Cuts the codewords in two halves along their first principal direction, again and again.
    """
    order = np.arange(len(codewords))

    def cut(first: int, last: int) -> None:
        panels = -(-(last - first) // LANES)
        if panels < 2:
            return
        part = codewords[order[first:last]].astype(np.float64)
        part -= part.mean(axis=0)
        direction = part[np.argmax((part**2).sum(axis=1))]
        for _ in range(POWER_STEPS):
            direction = part.T @ (part @ (direction / max(np.abs(direction).max(), 1e-300)))
        order[first:last] = order[first:last][np.argsort(part @ direction, kind="stable")]
        middle = first + panels // 2 * LANES
        cut(first, middle)
        cut(middle, last)

    cut(0, len(codewords))
    return order


def suits(rows: int, codes: int, dim: int) -> bool:
    """Return whether rows of a shape are quicker searched with bounds."""
    return (
        rows >= max(MIN_ROWS, ROWS_PER_CODE * codes) and codes >= MIN_ENTRIES and dim <= MAX_WIDTH
    )


def size(x: F32, codes: int) -> int:
    """Return the bytes that `RowBounds` hold: bounds, and rows that are no view of others."""
    bounds = 4 * len(x) * (1 + padded(codes, LANES * LANES) // LANES)
    return bounds + (x.nbytes if x.flags.owndata else 0)


class RowBounds:
    """What passes remember of some rows: the codeword of each, and its bounds."""

    def __init__(self, x: F32, labels: I64, codewords: F32) -> None:
        """Keep C-contiguous rows ``(n, dim)``; choose groups, center and scale by codewords.

        ``codewords`` ``(codes, dim)`` are any, and ``labels`` ``(n,)`` any of them to start
        from; the nearer, the quicker.
        """
        self.x, self.searched = x, 1.0
        self.cost = 1.0  # of a pass that searches all groups, in full passes; see `time_rows`
        self.loss = 0.0  # full passes that bounds have cost more than they spared
        self._start(codewords, labels)

    @property
    def bytes(self) -> int:
        """Bytes of the rows and their bounds, see `size`."""
        return size(self.x, len(self.former))

    def suits(self, codewords: F32) -> bool:
        """Whether `search` takes such codewords, and has not cost more than it spared."""
        return codewords.shape == self.former.shape and self.loss <= MAX_LOSS

    def _start(self, codewords: F32, labels: I64) -> None:
        codes, dim = codewords.shape
        groups, width = padded(codes, LANES * LANES) // LANES, padded(dim, LANES)
        self.order = group_order(codewords)
        places = np.empty(codes, np.int32)
        places[self.order] = np.arange(codes)
        self.places: I32 = places[labels]
        wide = codewords.astype(np.float64)
        center = wide.mean(axis=0).astype(np.float32)
        self.center: F32 = np.pad(center, (0, width - dim))
        longest = math.sqrt(((wide - center) ** 2).sum(axis=1).max())
        self.scale = 2.0 ** -min(max(math.frexp(longest)[1], -100), 100)
        # Bounds below 0 exclude nothing, so all groups are searched at first but those of padding.
        self.lower: F32 = np.full((len(self.x), groups), -1.0, np.float32)
        self.lower[:, -(-codes // LANES) :] = FAR
        self.former = codewords  # of the last pass
        # What `arrange` writes.
        self.rows: F32 = aligned((codes, width), np.float32)
        self.panels: F32 = aligned((groups, dim, LANES), np.float32)
        self.offsets: F32 = aligned((groups * LANES,), np.float32)
        self.moves: F32 = aligned((groups,), np.float32)

    def _arrange(self, codewords: F32) -> float:
        return float(arrange(
            codewords, self.former, self.order, self.center, self.scale, self.rows, self.panels,
            self.offsets, self.moves,
        ))  # fmt: skip

    def search(self, codewords: F32, *, threads: int | None) -> tuple[I64, F64]:
        """Return label ``(n,)`` and canonical key of the codeword nearest to each row.

        ``codewords`` ``(codes, dim)`` are any; the less they have moved, the quicker.
        """
        radius = self._arrange(codewords)
        if not MAX_SHRINK < radius < MAX_GROWTH:
            check_entries(codewords, name="codebook")
            self._start(codewords, self.order[self.places])
            radius = self._arrange(codewords)
        count = len(self.x)
        labels, keys = np.empty(count, np.int64), np.empty(count)
        size = count if threads == 1 else BLOCK

        def work(start: int) -> int:
            at = slice(start, start + size)
            return self._search_rows(
                at, radius, self.places[at], self.lower[at], labels[at], keys[at]
            )

        searched = sum(map_blocks(work, range(0, count, size), threads=threads))
        self.former, self.searched = codewords, searched * LANES / (count * len(codewords))
        cost = self.cost * (OWN_SHARE + (1.0 - OWN_SHARE) * self.searched)
        self.loss = max(0.0, self.loss + cost - 1.0)
        return labels, keys

    def _search_rows(
        self, at: slice, radius: float, places: I32, lower: F32, labels: I64, keys: F64
    ) -> int:
        return int(nearest_bounded(
            self.x[at], self.rows, self.order, self.panels, self.offsets, self.moves, self.center,
            self.scale, radius, places, lower, labels, keys,
        ))  # fmt: skip

    def time_rows(self, codewords: F32, rows: int) -> float:
        """Return the CPU seconds in which one thread searches all groups for the first rows."""
        radius = self._arrange(codewords)
        for count in (1, rows):  # the first call may have to fetch the kernel
            at = slice(0, count)
            places, lower = self.places[at].copy(), self.lower[at].copy()
            start = time.thread_time()
            self._search_rows(at, radius, places, lower, np.empty(count, np.int64), np.empty(count))
        return time.thread_time() - start
