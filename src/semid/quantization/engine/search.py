"""The search: routes of this machine, blocks of queries through one, candidates through the key.

A route is tried once before it is trusted: its answers on a small fixed problem must equal those
of the float64 keys. What fails, or what the chip lacks, is logged and left out.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from semid.errors import SemidError, UsageError, check_choice
from semid.lazy import is_imported
from semid.quantization.engine.formats import (
    Bfloat16Gemm,
    Float32Gemm,
    FusedBfloat16,
    FusedInt8,
    FusedInteger,
    FusedShort,
    QueryBlock,
)
from semid.quantization.engine.keys import drop_rows_without, norms, resolve_best, resolve_many
from semid.quantization.engine.plain import L2, Rows, float32_rows, padded
from semid.quantization.engine.sweep import F32, F64, trim_rows
from semid.quantization.engine.table import Operand, VectorTable
from semid.quantization.engine.x86 import AMX, AVX2, AVX512, ROW_TILE
from semid.quantization.threads import map_blocks

logger = logging.getLogger(__name__)

BLOCK = 1024
"""Queries per block: enough to reuse the table from cache, few enough to share among threads."""
ROUTES = ("auto", "int8", "int16", "bf16", "fp32")
"""Names a caller may give."""
# Queries a route is timed on, and rounds, of which the shortest counts.
PROBE_ROWS, PROBE_ROUNDS = 128, 3
# Queries of a first look, after which a route that many times slower than the best is dropped: one
# that measures nearly all entries of a large table would take seconds for the rest.
PROBE_FIRST, DROP_RATIO = 8, 4.0
# Tables of one shape that reuse the last choice before the routes are timed again.
REUSED_TABLES = 7
# Queries from which on timing the routes costs less than a wrong choice could.
MIN_PROBED_QUERIES = 4096


# Kernels that every route needs: lengths of rows, centering of tables and of queries.
SHARED_KERNELS = 3
# Seconds that a search must be expected to take before the routes of torch are tried too: their
# kernels have to be fetched or compiled, and torch may have to be imported.
SECONDS, IMPORT_SECONDS = 0.2, 1.5


class SearchResult(NamedTuple):
    """Result of `search`."""

    labels: npt.NDArray[np.int64]  # (queries, k), best first
    keys: npt.NDArray[np.float64]  # (queries, k) canonical keys
    measured: int  # pairs whose canonical key was computed


class Route(Protocol):
    """A way to score all entries for a block of queries and to bound the scores' error."""

    name: str
    library: str
    uses_torch: bool
    kernels: int  # that it compiles for itself

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""

    def prepare(self, table: VectorTable) -> Operand | None:
        """Make the table's copy for this route; None where it cannot hold this table."""

    def screen(self, table: VectorTable, operand: Operand, queries: QueryBlock) -> None:
        """Fill the candidates of ``queries`` so that every possible winner is among them."""


# Fresh buffers cost page faults, which for a small block take longer than the search.
_buffers = threading.local()


def _query_block(limit: int, width: int, k: int, best_only: bool) -> QueryBlock:
    """Return this thread's buffers, those of its last search where they fit."""
    block: QueryBlock | None = getattr(_buffers, "block", None)
    sizes = (limit, width, k, best_only)
    if block is None or (block.limit, block.width, block.k, block.best_only) != sizes:
        block = _buffers.block = QueryBlock(limit, width, k=k, best_only=best_only)
    return block


def _operand(route: Route, table: VectorTable) -> Operand | None:
    return table.operand(route.name + route.library, route.prepare)


def search(
    queries: Rows,
    table: VectorTable,
    route: Route,
    *,
    k: int = 1,
    exclude: npt.NDArray[np.int64] | None = None,
    within: npt.NDArray[np.float64] | None = None,
    targets: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
    threads: int | None = None,
    name: str = "x",
) -> SearchResult:
    """Find the ``k`` entries with the smallest canonical keys, ties to the lowest index.

    Shapes: ``queries`` (queries, dim), ``exclude`` and ``within`` (queries,). ``targets`` are
    entries and bounds (queries + 1,) of those of each query, for tables without ``unique``: a query
    that has none of its targets among the ``k`` best may get keys of infinity instead, which spares
    measuring its candidates.
    """
    count, width = len(queries), table.rows.shape[1]
    labels = np.empty((count, k), np.int64)
    keys = np.empty((count, k))
    best_only = k == 1 and exclude is None and within is None and table.metric == L2
    screened = k if exclude is None else k + 1  # the excluded entry may be the best
    operand = _operand(route, table)
    if operand is None:
        raise UsageError(f"route '{route.name}' cannot hold a table {table.dim} columns wide")
    limit = min(BLOCK, padded(max(count, 1), ROW_TILE))

    def work(start: int) -> int:
        span = slice(start, min(start + limit, count))
        # Screening: cheap scores leave the candidates that the bound cannot rule out.
        x = float32_rows(queries[span], name=name)
        block = _query_block(limit, width, screened, best_only)
        block.load(x, table, None if within is None else within[span])
        route.screen(table, operand, block)
        # Canonical keys decide among them.
        if best_only:
            measured = resolve_best(
                x, table.rows, block.rows, block.counts, block.candidates, block.scores, block.unit,
                block.shift, block.bound, block.half_square, 0.5 * 4.0**-table.exponent,
                labels[span, 0], keys[span, 0],
            )  # fmt: skip
            return int(measured)
        # Drop what the final k-th best score of each row rules out.
        trim_rows(
            block.rows, block.k, block.margin, block.top, block.counts, block.candidates,
            block.scores, block.scratch,
        )  # fmt: skip
        if targets is not None:
            drop_rows_without(*targets, start, len(x), block.counts, block.candidates)
        lengths = np.empty(len(x))
        norms(x, lengths)
        excluded = np.full(len(x), -1) if exclude is None else exclude[span]
        measured = resolve_many(
            table.metric, x, lengths, table.rows, table.norms, block.rows, excluded, block.counts,
            block.candidates, within is not None or targets is not None, labels[span], keys[span],
        )  # fmt: skip
        return int(measured)

    measured = sum(map_blocks(work, range(0, count, limit), threads=threads))
    return SearchResult(table.original[labels], keys, measured)


# Routes ---------------------------------------------------------------------------------------

_lock = threading.Lock()


def _candidates() -> list[Route]:
    """All routes; of each name the best first, and first of all what few queries should take."""
    return [
        FusedBfloat16(AMX(), features=("amx-bf16",), library="AMX tiles"),
        FusedInt8(AMX(), features=("amx-int8",), library="AMX tiles"),
        FusedInt8(AVX512(), features=("avx512vnni", "avx512bw"), library="AVX-512 VNNI"),
        FusedBfloat16(AVX512(), features=("avx512bf16", "avx512bw"), library="AVX-512 BF16"),
        FusedShort(AVX2(), features=("avx2",), library="AVX2"),
        Float32Gemm(),
        Bfloat16Gemm(),
    ]


def self_test(route: Route) -> bool:
    """Compare a route with brute force on a fixed problem that no shortcut solves."""
    # Queries near entries and far from all, at a width that is padded.
    generator = np.random.default_rng(20240229)
    entries = generator.normal(size=(333, 75)).astype(np.float32)
    queries = np.concatenate([entries[:40], generator.normal(size=(60, 75)).astype(np.float32)])
    queries[:40] += generator.normal(size=(40, 75)).astype(np.float32) * np.float32(0.5)
    wide = queries.astype(np.float64)[:, None] - entries.astype(np.float64)[None]
    truth = (wide**2).sum(axis=2).argmin(axis=1)
    table = VectorTable(entries, metric=L2, unique=True)
    result = search(queries, table, route, threads=1)
    return bool((result.labels[:, 0] == truth).all()) and result.measured < 0.5 * wide[..., 0].size


@functools.cache
def _probe_machine(use_torch: bool) -> tuple[tuple[Route, ...], tuple[str, ...]]:
    working: list[Route] = []
    notes: list[str] = []
    if use_torch:  # and the routes without
        others, records = _probe_machine(False)
        working, notes = [*others], [*records]
    for route in _candidates():
        if any(other.name == route.name for other in working) or route.uses_torch != use_torch:
            continue
        reason = route.unavailable()
        if reason is None:
            try:
                reason = None if self_test(route) else "its self-test gave a wrong answer"
            except Exception as error:  # noqa: BLE001 (any failure means: do not use this route)
                reason = f"its self-test failed: {type(error).__name__}: {error}"
        if reason is None:
            working.append(route)
        outcome = f"left out, {reason}" if reason else "works"
        notes.append(f"{route.name} ({route.library}): {outcome}")
    return tuple(working), tuple(notes)


def _available(*, use_torch: bool) -> list[Route]:
    """Return the routes that this chip has instructions for, one per name."""
    routes: dict[str, Route] = {}
    for route in _candidates():
        if (use_torch or not route.uses_torch) and route.unavailable() is None:
            routes.setdefault(route.name, route)
    return list(routes.values())


def has_bfloat16() -> bool:
    """Whether this chip multiplies bfloat16 numbers."""
    return any(route.name == "bf16" for route in _available(use_torch=True))


def list_kernel_count() -> int:
    """Return how many kernels `compile_lists` compiles where none is cached."""
    routes = _available(use_torch=False) or _available(use_torch=True)
    # A sweep or scan for each route, what trims scores of a type, and what measures.
    return len(routes) + _score_types(routes) + 1


def _score_types(routes: Sequence[Route]) -> int:
    """Return whether routes have integer or float scores (1) or both (2)."""
    return len({isinstance(route, FusedInteger) for route in routes})


def compile_lists() -> None:
    """Compile, or fetch, the kernels that lists of the nearest take beyond the nearest alone."""
    rows = np.eye(4, dtype=np.float32)
    for route in working_routes(with_torch=False):
        search(rows, VectorTable(rows, metric=L2, unique=False), route, k=2, threads=1)


def kernel_count() -> int:
    """Return how many kernels testing the routes compiles where none is cached."""
    routes = _available(use_torch=False) or _available(use_torch=True)
    searches = sum(route.kernels for route in routes) + _score_types(routes)  # and what measures
    # Encoding in levels has a kernel for each route of integers, or one.
    integers = sum(isinstance(route, FusedInteger) for route in routes)
    return SHARED_KERNELS + searches + max(1, integers)


def working_routes(*, with_torch: bool = True) -> tuple[Route, ...]:
    """Return the routes that passed their self-test here, one per name.

    The first call runs the tests and logs their outcome. Without ``with_torch``, the routes that
    multiply with torch are left out where others work.
    """
    with _lock:
        use_torch = with_torch or not _probe_machine(False)[0]
        known = _probe_machine.cache_info().currsize
        if not known:
            logger.info("testing the nearest-codeword routes (the very first time compiles them)")
        routes, notes = _probe_machine(use_torch)
        if known < _probe_machine.cache_info().currsize:
            logger.info("nearest-codeword routes: %s", "; ".join(notes))
    if use_torch and all(route.name != "fp32" for route in routes):
        raise SemidError("float32 screening failed its self-test: " + "; ".join(notes))
    return routes


# K-means makes a new table each iteration, much like the one before: the last choice for a shape,
# and how many more tables reuse it.
_recent: dict[tuple[int, int, int, int], tuple[Route, int]] = {}


def choose(route: str, queries: Rows, table: VectorTable, *, k: int = 1) -> Route:
    """Pick the route for a table: the one asked for, or the fastest on a few of the queries.

    The choice changes the time and never the result. It is made on `PROBE_ROWS` evenly
    spaced queries and reused for the table and the next `REUSED_TABLES` of its shape. A few queries
    take the first working route untimed.
    """
    check_choice("route", route, ROUTES)
    if route != "auto":
        named = {each.name: each for each in working_routes()}
        asked = named.get(route, named["fp32"])
        return asked if _operand(asked, table) is not None else named["fp32"]
    if k in table.routes:
        known: Route = table.routes[k]
        return known
    routes = _usable(table, with_torch=False)
    if len(queries) < MIN_PROBED_QUERIES:
        return routes[0]
    shape = (table.metric, len(table), table.dim, k)
    recent, uses = _recent.get(shape, (None, 0))
    if recent is not None and uses and _operand(recent, table) is not None:
        _recent[shape] = (recent, uses - 1)
        table.routes[k] = recent
        return recent
    sample = float32_rows(queries[:: max(1, len(queries) // PROBE_ROWS)][:PROBE_ROWS], name="x")
    times = _time_routes(routes, sample, table, k)
    if times.min() * len(queries) > (SECONDS if is_imported("torch") else IMPORT_SECONDS):
        routes = _usable(table, with_torch=True)
        times = _time_routes(routes, sample, table, k)
    best = routes[int(times.argmin())]
    measured = ", ".join(
        f"{each.name} {seconds * 1e6:.2f} us a row"
        for each, seconds in zip(routes, times, strict=True)
    )
    size = (len(table), table.dim)
    logger.info("route %s (%s) for %d x %d: %s", best.name, best.library, *size, measured)
    table.routes[k] = best
    _recent[shape] = (best, REUSED_TABLES)
    return best


def _usable(table: VectorTable, *, with_torch: bool) -> list[Route]:
    """Return the working routes that can hold a table; one of torch can hold any."""
    for use_torch in (with_torch, True):
        working = working_routes(with_torch=use_torch)
        if routes := [each for each in working if _operand(each, table) is not None]:
            break
    return routes


def _time_routes(routes: Sequence[Route], sample: F32, table: VectorTable, k: int) -> F64:
    """Return the CPU seconds per row of each route, infinite for those far behind."""
    # A short look at all, then more rows for those not far behind.
    times = np.full(len(routes), np.inf)
    for rows, rounds in ((PROBE_FIRST, 1), (len(sample), PROBE_ROUNDS)):
        hopeful = np.flatnonzero(times <= DROP_RATIO * times.min())
        times[hopeful] = np.inf
        for _ in range(rounds):  # in turn, so that a busy moment does not fall on one alone
            for at in hopeful.tolist():
                start = time.thread_time()
                search(sample[:rows], table, routes[at], k=k, threads=1)
                times[at] = min(times[at], (time.thread_time() - start) / min(rows, len(sample)))
    return times
