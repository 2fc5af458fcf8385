"""Which ways of screening this machine has, and which one suits a table.

A route is tried once before it is trusted: its answers on a small fixed problem must equal those
of the float64 keys. What fails, or what the chip lacks, is logged and left out.
"""

from __future__ import annotations

import functools
import logging
import threading
import time

import numpy as np
import torch

from semid.errors import SemidError, check_choice
from semid.quantization.engine.formats import (
    Bfloat16Gemm,
    Float32Gemm,
    FusedBfloat16,
    FusedInt8,
    FusedShort,
)
from semid.quantization.engine.keys import L2
from semid.quantization.engine.search import Route, search
from semid.quantization.engine.table import Table
from semid.quantization.engine.x86 import AMX, AVX2, AVX512

logger = logging.getLogger(__name__)

ROUTES = ("auto", "int8", "int16", "bf16", "fp32")
"""Names a caller may give."""
PROBE_ROWS = 128
"""Queries a route is timed on."""
PROBE_FIRST = 8
"""Queries of a first look, after which a route far behind is dropped: one that measures nearly all
entries of a large table would take seconds for the rest."""
DROP_RATIO = 4.0
"""How many times slower than the best counts as far behind."""
PROBE_ROUNDS = 3
"""Times it is timed; the shortest counts."""
REUSED_TABLES = 7
"""Tables of one shape that take over the last choice before the routes are timed again."""
MIN_PROBED_QUERIES = 4096
"""Queries from which on timing the routes costs less than a wrong choice could."""

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
    """Compare a route with brute force on a fixed problem that no shortcut solves.

    Returns whether all labels agree.
    """
    generator = np.random.default_rng(20240229)
    entries = generator.normal(size=(333, 75)).astype(np.float32)
    queries = np.concatenate([entries[:40], generator.normal(size=(60, 75)).astype(np.float32)])
    queries[:40] += generator.normal(size=(40, 75)).astype(np.float32) * np.float32(0.5)
    wide = queries.astype(np.float64)[:, None] - entries.astype(np.float64)[None]
    truth = (wide**2).sum(axis=2).argmin(axis=1)
    table = Table(torch.from_numpy(entries), metric=L2, unique=True)
    found = search(torch.from_numpy(queries), table, route, threads=1)
    return bool((found.labels[:, 0] == truth).all()) and found.measured < 0.5 * wide[..., 0].size


@functools.cache
def _probe_machine() -> tuple[tuple[Route, ...], tuple[str, ...]]:
    working: list[Route] = []
    notes: list[str] = []
    for route in _candidates():
        title = f"{route.name} ({route.library})"
        if any(other.name == route.name for other in working):
            continue
        reason = route.unavailable()
        if reason is None:
            try:
                reason = None if self_test(route) else "its self-test gave a wrong answer"
            except Exception as error:  # noqa: BLE001 (any failure means: do not use this route)
                reason = f"its self-test failed: {type(error).__name__}: {error}"
        if reason is None:
            working.append(route)
            notes.append(f"{title}: works")
        else:
            notes.append(f"{title}: left out, {reason}")
    return tuple(working), tuple(notes)


def working_routes() -> tuple[Route, ...]:
    """Return the routes that passed their self-test here, one a name.

    The first call runs the tests and logs what was found.
    """
    with _lock:
        first = _probe_machine.cache_info().currsize == 0
        if first:
            logger.info("testing the nearest-codeword routes (the very first time compiles them)")
        routes, notes = _probe_machine()
        if first:
            logger.info("nearest-codeword routes: %s", "; ".join(notes))
    if all(route.name != "fp32" for route in routes):
        raise SemidError("float32 screening failed its self-test: " + "; ".join(notes))
    return routes


def _suits(route: Route, table: Table) -> bool:
    return table.operand(route.name + route.library, route.prepare) is not None


_recent: dict[tuple[int, int, int, int], tuple[Route, int]] = {}


def _recalled(table: Table, k: int) -> Route | None:
    """Return the route chosen lately for a table of this shape, if there is one.

    K-means makes a new table each iteration, much like the one before.
    """
    shape = (table.metric, len(table), table.dim, k)
    route, uses = _recent.get(shape, (None, 0))
    if route is None or uses == 0 or not _suits(route, table):
        return None
    _recent[shape] = (route, uses - 1)
    return route


def choose(route: str, queries: torch.Tensor, table: Table, *, k: int = 1) -> Route:
    """Pick the route for a table: the one asked for, or the fastest on a few of the queries.

    The choice changes the time and never the result. It is made on `PROBE_ROWS` evenly
    spaced queries and kept for the table and the next `REUSED_TABLES` of its shape. A few queries
    take the first working route untimed.
    """
    check_choice("route", route, ROUTES)
    working = working_routes()
    if route != "auto":
        named = {found.name: found for found in working}
        wanted = named.get(route)
        return wanted if wanted is not None and _suits(wanted, table) else named["fp32"]
    chosen: Route | None = table.routes.get(k)
    if chosen is not None:
        return chosen
    if len(queries) < MIN_PROBED_QUERIES:
        return next(found for found in working if _suits(found, table))
    chosen = _recalled(table, k)
    if chosen is not None:
        table.routes[k] = chosen
        return chosen
    routes = [found for found in working if _suits(found, table)]
    sample = queries[:: max(1, len(queries) // PROBE_ROWS)][:PROBE_ROWS].contiguous()
    times = np.full(len(routes), np.inf)
    for rows, rounds in ((PROBE_FIRST, 1), (len(sample), PROBE_ROUNDS)):
        hopeful = np.flatnonzero(times <= DROP_RATIO * times.min())
        times[hopeful] = np.inf
        for _ in range(rounds):  # in turn, so that a busy moment does not fall on one alone
            for at in hopeful:
                start = time.thread_time()
                search(sample[:rows], table, routes[at], k=k, threads=1)
                times[at] = min(times[at], (time.thread_time() - start) / min(rows, len(sample)))
    size = (len(table), table.dim)
    best = routes[int(times.argmin())]
    seen = ", ".join(
        f"{found.name} {spent * 1e6:.2f} us a row"
        for found, spent in zip(routes, times, strict=True)
    )
    logger.info("route %s (%s) for %d x %d: %s", best.name, best.library, *size, seen)
    table.routes[k] = best
    _recent[(table.metric, len(table), table.dim, k)] = (best, REUSED_TABLES)
    return best
