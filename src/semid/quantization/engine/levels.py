"""Codes over residual levels: the children of partial codes, scored by one product of each row.

A partial code ``b`` leaves ``r = x - sum b`` of a row, so half of ``|r|^2 - |r - c|^2`` is
``x.c - |c|^2 / 2 - sum b.c``. Rows are rounded once for all levels and never become residuals; the
products ``b.c`` between codebooks are a table. README.md ("Beams") has the bound.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from semid.lazy import torch
from semid.quantization.engine.children import extend_rows
from semid.quantization.engine.formats import WIDEST, Float32Gemm, FusedInteger, rounds_float32
from semid.quantization.engine.plain import SCAN, float32_rows, padded
from semid.quantization.engine.search import BLOCK, Route, working_routes
from semid.quantization.engine.sweep import F32, F64, I64
from semid.quantization.engine.table import (
    PAD_OFFSET,
    aligned,
    center_queries,
    first_copies,
    pack,
    quantize_tiles,
    slack,
)
from semid.quantization.engine.x86 import (
    AMX,
    LINE,
    ROW_TILE,
    pitch,
)
from semid.quantization.threads import THREADED_WORK, map_blocks

logger = logging.getLogger(__name__)

PROBE_ROWS = 256
"""Rows that routes are timed on."""
LENGTHS = (1e-12, 1e12)
"""Lengths of rows and codewords whose squares float32 holds, in which partial codes compare."""
REDUCED = 16
"""Most partial codes whose threshold is found by repeated maxima."""


class LevelCodes(NamedTuple):
    """Result of `search_levels`."""

    codes: I64  # (rows, kept, levels), best first
    # (rows, kept) squared length of what each leaves of its row; undefined where one code is kept
    distances: F32
    lengths: F32  # (rows,) length of what the best code leaves of its row


# Fresh memory costs page faults, which for a few rows take longer than their search.
_buffers = threading.local()


def _buffer(name: str, shape: tuple[int, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return memory of this thread that is reused by the next call; its contents are undefined."""
    size = shape[0] * shape[1]
    buffer: npt.NDArray[Any] | None = getattr(_buffers, name, None)
    if buffer is None or buffer.size < size:
        buffer = aligned((size,), dtype)
        setattr(_buffers, name, buffer)
    return buffer[:size].reshape(shape)


@dataclass(frozen=True)
class _Operand:
    """The codewords' copy for one route."""

    panels: Any  # packed integers of all levels; for float32 the scaled codewords themselves
    step: F64  # (levels,) size of an integer step
    residual: F64  # (levels,) largest norm of what rounding took from a codeword, scaled units


@dataclass
class Levels:
    """Codebooks of all levels, indexed for `search_levels`. "Scaled" is as in `VectorTable`.

    A line is a codeword's number among those of all levels.
    """

    dim: int
    distinct: bool  # no level holds a codeword twice
    codewords: F32  # (lines, width), as given
    # (levels, 5): columns, codes, first line, first column, and where its part of `products` starts
    shape: I64
    scaled: F32  # (columns of all levels, width), the first level centered; padding is zero
    # Per level one row of products with its codewords for each line of the levels before; those of
    # the first level hold half the codewords' squares too. The first level has these alone.
    products: F32
    center: F32  # (width,) subtracted from rows and from the first codebook
    exponent: int
    reach: F64  # (levels,) longest scaled codeword
    operands: dict[str, _Operand] = field(default_factory=dict)
    route: Any = None  # the fastest one, once it is known

    @property
    def comparable(self) -> bool:
        """Whether float32 holds the squared lengths of what several partial codes leave."""
        reach = self.reach * math.ldexp(1.0, self.exponent)
        return bool(LENGTHS[0] < reach.min() and reach.max() < LENGTHS[1])

    def margins(self, length: F64, residual: F64, entry_residual: F64, kept: Sequence[int]) -> F32:
        """Return how far apart two scores may be by rounding alone, ``(levels, rows)``.

        Shapes: ``length`` and ``residual`` (rows,) of rows and of what rounding took from them,
        ``entry_residual`` (levels,).
        """
        levels, width = len(self.shape), self.scaled.shape[1]
        reach = self.reach[:, None]
        before = np.cumsum(reach, axis=0) - reach
        bound = residual * reach + (length + residual) * entry_residual[:, None]
        # Float32 sums of products in any order.
        whole = length + before + reach
        bound += (width + 32) * 2.0**-23 * whole * reach
        # Children of several partial codes differ in what the levels before made of those, too.
        for level in range(1, levels):
            if kept[level - 1] > 1:
                bound[level] += bound[level - 1]
        # The few sums of scores, the rounding of residuals and of the float32 distances in which
        # ties are told.
        bound += (8 + 2 * levels) * 2.0**-23 * whole * whole + 2.0**-60
        return np.asarray(2.0 * bound, dtype=np.float32)


def table_bytes(sizes: Sequence[int]) -> int:
    """Return the memory that products between codebooks take."""
    return sum(4 * sum(sizes[:at]) * padded(size, SCAN) for at, size in enumerate(sizes))


def index_levels(codebooks: Sequence[F32]) -> Levels:
    """Index codebooks ``(codes, dim)`` of all levels."""
    wide = [float32_rows(book, name="codebook") + np.float32(0.0) for book in codebooks]
    sizes = [len(book) for book in wide]
    columns = [padded(size, SCAN) for size in sizes]
    lines, starts = np.cumsum([0, *sizes]), np.cumsum([0, *columns])
    # Shorter vectors have smaller rounding errors.
    center = wide[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    exact = [book.astype(np.float64) for book in wide]
    exact[0] -= center
    lengths = [np.sqrt(np.einsum("kd,kd->k", book, book)) for book in exact]
    exponent = math.frexp(max(float(each.max()) for each in lengths))[1]
    factor = math.ldexp(1.0, -exponent)
    scaled = aligned((int(starts[-1]), wide[0].shape[1]), np.float32)
    scaled[:] = 0.0
    shape, at = [], 0
    products = np.empty(columns[0] + table_bytes(sizes) // 4, np.float32)
    for level, book in enumerate(exact):
        start, size = int(starts[level]), sizes[level]
        scaled[start : start + size] = book * factor
        shape.append((columns[level], size, lines[level], start, at))
        rows = 1 if level == 0 else int(lines[level])
        part = products[at : at + rows * columns[level]].reshape(rows, columns[level])
        for before in range(level):
            earlier = scaled[starts[before] : starts[before] + sizes[before]]
            here = scaled[start : start + columns[level]]
            np.matmul(earlier, here.T, out=part[lines[before] : lines[before + 1]])
        if level == 0:
            part[:] = 0.0
        halves = np.full(columns[level], PAD_OFFSET, np.float32)
        halves[:size] = 0.5 * np.square(lengths[level] * factor)
        part[: sizes[0]] += halves
        at += part.size
    return Levels(
        dim=codebooks[0].shape[1],
        distinct=all(len(first_copies(book)) == len(book) for book in wide),
        codewords=np.concatenate(wide),
        shape=np.array(shape, dtype=np.int64),
        scaled=scaled,
        products=products,
        center=center,
        exponent=exponent,
        reach=np.array([float(each.max()) * factor for each in lengths]),
    )


def _operand(levels: Levels, route: Route) -> _Operand:
    """Return the codewords' copy for a route; integers of each level have a step of their own."""
    if not isinstance(route, FusedInteger):
        panels = torch.from_numpy(levels.scaled)
        return _Operand(panels, np.ones(len(levels.reach)), levels.reach * 2.0**-22)
    rounded = []
    for (columns, _, _, start, _), reach in zip(levels.shape.tolist(), levels.reach, strict=True):
        rounded.append(route.round_entries(levels.scaled[start : start + columns], float(reach)))
    codes, steps, lost = zip(*rounded, strict=True)
    return _Operand(pack(np.concatenate(codes)), np.array(steps), np.array(lost))


def _routes(dim: int) -> list[Route]:
    """Return the routes with integers for rows this wide; else the one of float32."""
    working = working_routes(with_torch=False)
    integers = [route for route in working if isinstance(route, FusedInteger)]
    if integers and dim <= WIDEST:
        return [*integers]
    return [each for each in working_routes() if isinstance(each, Float32Gemm)]


def _scratch(kept: Sequence[int], levels: Levels) -> tuple[tuple[npt.NDArray[Any], ...], ...]:
    """Return the scratch memory of `extend_rows`."""
    wide, depth, most = max(kept), len(kept), int(levels.shape[:, 0].max())
    capacity = 4 * max(wide, SCAN) + 2 * SCAN

    def empty(dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        return np.empty(shape, dtype)

    row = (1, levels.codewords.shape[1])
    return (
        empty(np.int64, ROW_TILE, wide, depth), empty(np.float32, ROW_TILE, wide),
        empty(np.int64, wide, depth), empty(np.float32, most),
        _buffer("scores", (1, wide * most), np.float32), empty(np.float32, *row),
        empty(np.float32, *row), empty(np.int32, wide), empty(np.float64, wide),
        empty(np.float64, wide),
    ), (
        empty(np.int32, capacity), empty(np.float32, capacity),
        _buffer("pivots", (1, max(wide * most, capacity)), np.float32)[0], empty(np.float32, SCAN),
    )  # fmt: skip


def search_levels(
    rows: F32, levels: Levels, keep: Sequence[int], *, threads: int | None = None
) -> LevelCodes:
    """Find the ``keep`` best partial codes of rows ``(n, dim)`` at each level.

    They are those of exact searches: children compare by the canonical keys of the residuals,
    rounded to float32 where their parents differ; ties go to the better parent, then to the lower
    code.
    """
    if levels.route is None:
        routes = _routes(levels.dim)
        taken = []
        for route in routes if len(routes) > 1 else ():
            _search(rows[:PROBE_ROWS], levels, route, keep, 1)  # compiles
            start = time.thread_time()
            _search(rows[:PROBE_ROWS], levels, route, keep, 1)
            taken.append(time.thread_time() - start)
        levels.route = routes[int(np.argmin(taken)) if taken else 0]
        logger.info("levels are encoded by %s (%s)", levels.route.name, levels.route.library)
    return _search(rows, levels, levels.route, keep, threads)


def _search(
    rows: F32, levels: Levels, route: Route, keep: Sequence[int], threads: int | None
) -> LevelCodes:
    if route.name not in levels.operands:
        levels.operands[route.name] = _operand(levels, route)
    operand = levels.operands[route.name]
    # No level can keep more than its children.
    kept: list[int] = []
    for level, most in enumerate(keep):
        kept.append(min(most, (kept[-1] if level else 1) * int(levels.shape[level, 1])))
    codes = np.empty((len(rows), kept[-1], len(kept)), np.int64)
    distances = np.zeros((len(rows), kept[-1]), np.float32)
    lengths = np.empty(len(rows), np.float32)

    def work(start: int) -> None:
        part = slice(start, start + BLOCK)
        x = float32_rows(rows[part], name="x")
        count, width = x.shape
        tiled = padded(count, ROW_TILE)
        y, half = _buffer("y", (tiled, width), np.float32), np.empty(count)
        center_queries(x, count, levels.center, 2.0**-levels.exponent, False, y, half)
        if max(kept) > 1:
            far = half > 0.5 * (LENGTHS[1] * 2.0**-levels.exponent) ** 2
            half[far], y[:count][far] = -1.0, 0.0
        length, residual, steps, sums = np.zeros((4, tiled))
        length[:count] = np.sqrt(2.0 * np.maximum(half, 0.0))
        chip = saved = rounded = None
        entry_lost = operand.residual
        if isinstance(route, FusedInteger):
            chip = route.chip
            line = pitch(padded(width, 64), np.dtype(route.integer).itemsize)
            rounded = _buffer(route.name, (tiled, line), route.integer)
            quantize_tiles(
                y, length if route.by_length else np.empty(0), count, route.limit, 2.0**-60,
                np.empty(0, np.float32), 1.0, rounded, steps, sums, residual,
                np.empty((tiled // ROW_TILE, 0), np.int32),
            )  # fmt: skip
            if isinstance(chip, AMX):
                saved = _buffer("tiles", (1, LINE), np.uint8)[0]
            scores = _buffer("base", (ROW_TILE, int(levels.shape[:, 0].max())), np.int32)
            lost = slack(residual, length, width)
        else:
            scores = _buffer("products", (count, len(levels.scaled)), np.float32)
            torch.mm(torch.from_numpy(y[:count]), operand.panels.T, out=torch.from_numpy(scores))
            lost, steps[:] = length * 2.0**-22, 1.0
            if rounds_float32():
                lost, entry_lost = lost + length * 2.0**-8, entry_lost + levels.reach * 2.0**-8
        extend_rows(
            chip, saved, rounded, None if chip is None else operand.panels,
            None if chip is None else np.zeros((1, scores.shape[1]), np.int32), scores,
            (steps * operand.step[:, None]).astype(np.float32),
            (getattr(route, "zero", 0) * sums).astype(np.int32),
            levels.margins(length, lost, entry_lost, kept), half,
            0.5 * 4.0**-levels.exponent, x, levels.codewords, levels.shape, levels.products,
            np.array(kept), _scratch(kept, levels), codes[part], distances[part], lengths[part],
        )  # fmt: skip

    small = rows.size * len(levels.codewords) < THREADED_WORK
    map_blocks(work, range(0, len(rows), BLOCK), threads=1 if small else threads)
    return LevelCodes(codes, distances, lengths)
