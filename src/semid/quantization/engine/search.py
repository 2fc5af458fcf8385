"""The search itself: blocks of queries through a route, candidates through the canonical key."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.engine.canonical import L2, norms, resolve_best, resolve_many
from semid.quantization.engine.state import ROW_TILE, State
from semid.quantization.engine.table import Table, float32_rows, padded
from semid.quantization.threads import map_blocks

if TYPE_CHECKING:
    from semid.quantization.engine.routes import Route

__all__ = ["BLOCK", "Found", "search"]

BLOCK = 1024
"""Queries a block: enough to reuse the table from cache, few enough to share among threads."""


class Found(NamedTuple):
    """What `search` found.

    Attributes:
        labels: ``(queries, k)`` int64, best first.
        keys: ``(queries, k)`` float64 canonical keys.
        measured: pairs whose canonical key was computed.
    """

    labels: npt.NDArray[np.int64]
    keys: npt.NDArray[np.float64]
    measured: int


# Fresh buffers cost page faults, which for a small block take longer than the search.
_kept = threading.local()


def _state(limit: int, width: int, k: int, best_only: bool) -> State:
    """Return this thread's buffers, those of its last search where they fit."""
    found: State | None = getattr(_kept, "state", None)
    if found is None or not found.fits(limit, width, k, best_only):
        found = _kept.state = State(limit, width, k=k, best_only=best_only)
    return found


def search(
    queries: torch.Tensor,
    table: Table,
    route: Route,
    *,
    k: int = 1,
    exclude: npt.NDArray[np.int64] | None = None,
    within: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    name: str = "x",
) -> Found:
    """Find the ``k`` entries with the smallest canonical keys, ties to the lowest index.

    Args:
        queries: ``(queries, dim)`` float32, float16 or bfloat16 on the CPU.
        table: what to search; at least ``k`` entries (``k + 1`` with ``exclude``).
        route: how to screen; it never changes the result.
        k: entries wanted.
        exclude: ``(queries,)`` entry to leave out for each query, -1 for none.
        within: ``(queries,)`` squared distances: entries that do not lie nearer may be missing, as
            entry 0 at infinity. Without ``exclude``.
        threads: see `semid.quantization.threads.resolve_threads`.
        name: the queries' argument name for messages.

    Returns:
        Labels, keys and the number of pairs measured. A query with NaN or infinity gets some
        label and a key that is not finite.
    """
    count, width = len(queries), table.rows.shape[1]
    labels = np.empty((count, k), np.int64)
    keys = np.empty((count, k))
    best_only = k == 1 and exclude is None and within is None and table.metric == L2
    wanted = k if exclude is None else k + 1
    operand = table.operand(route.name + route.library, route.prepare)
    if operand is None:
        raise UsageError(f"route '{route.name}' cannot hold a table {table.dim} columns wide")
    limit = min(BLOCK, padded(max(count, 1), ROW_TILE))

    def work(start: int) -> int:
        stop = min(start + limit, count)
        x = float32_rows(queries[start:stop], name=name)
        state = _state(limit, width, wanted, best_only)
        state.load(x, table, None if within is None else within[start:stop])
        route.screen(table, operand, state)
        found, ranked = labels[start:stop], keys[start:stop]
        if best_only:
            return int(
                resolve_best(
                    x, table.rows, state.rows, state.counts, state.candidates, state.kept,
                    state.unit, state.shift, state.bound, state.half_square,
                    0.5 * 4.0**-table.exponent, found[:, 0], ranked[:, 0],
                )
            )  # fmt: skip
        state.trim_all()
        lengths = np.empty(len(x))
        norms(x, lengths)
        left_out = np.full(len(x), -1) if exclude is None else exclude[start:stop]
        return int(
            resolve_many(
                table.metric, x, lengths, table.rows, table.norms, state.rows, left_out,
                state.counts, state.candidates, within is not None, found, ranked,
            )
        )  # fmt: skip

    measured = sum(map_blocks(work, range(0, count, limit), threads=threads))
    return Found(table.original[labels], keys, measured)
