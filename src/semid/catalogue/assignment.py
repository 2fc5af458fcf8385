"""Rows to columns at the least total cost, each column with a capacity: exact.

Shortest augmenting paths over dual prices (Jonker and Volgenant 1987), started from every row's
cheapest column, so that only rows that meet at a full column cost more than a look. With capacity 1
this is the linear assignment problem; rows beyond the capacity are left out where that is cheapest.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from semid.errors import UsageError

__all__ = ["assign_rows"]

_NONE = -1


def assign_rows(
    cost: npt.ArrayLike, capacity: npt.ArrayLike | None = None
) -> npt.NDArray[np.int64]:
    """Give rows columns so that as many as possible get one, at the least total cost.

    Args:
        cost: ``(rows, columns)`` finite numbers.
        capacity: ``(columns,)`` rows a column may take; None is one each. A column with capacity 0
            is never used.

    Returns:
        ``(rows,)`` int64 columns, -1 for rows left out, which happens only when every place is
        taken. Deterministic; among equally good answers it depends on the order of the rows.

    Raises:
        UsageError: for shapes that do not fit, costs that are not finite, or capacities below 0.

    Cost: ``O(rows columns)`` for rows whose cheapest column has room; each other row costs
    ``O(visited columns)``, at most ``O(columns^2 capacity)``. Memory: ``cost`` in float64.
    """
    table = np.ascontiguousarray(cost, dtype=np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise UsageError(f"cost has shape {table.shape}; give finite numbers (rows, columns)")
    rows, columns = table.shape
    room = np.ones(columns, np.int64) if capacity is None else np.array(capacity, dtype=np.int64)
    if room.shape != (columns,) or (room < 0).any():
        raise UsageError(f"capacity has shape {room.shape}; give {columns} numbers, none below 0")
    open_ = np.flatnonzero(room > 0)
    if rows == 0 or len(open_) == 0:
        return np.full(rows, _NONE, np.int64)
    if len(open_) < columns:
        table, room = np.ascontiguousarray(table[:, open_]), room[open_]
    labels: npt.NDArray[np.int64] = _solve(table, room)
    return np.where(labels < 0, labels, open_[labels])


@numba.njit(nogil=True, cache=True)
def _solve(cost: npt.NDArray[np.float64], room: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    rows, columns = cost.shape
    price_row = np.zeros(rows)
    price = np.zeros(columns)
    label = np.full(rows, -1, np.int64)
    first = np.full(columns, -1, np.int64)  # rows of a column: a linked list
    after = np.full(rows, -1, np.int64)
    left = room.sum()
    for row in range(rows):
        best = np.argmin(cost[row])
        price_row[row] = cost[row, best]
        if room[best] > 0:
            _attach(row, best, label, first, after)
            room[best] -= 1
            left -= 1
    distance = np.empty(columns)
    via = np.empty(columns, np.int64)
    done = np.empty(columns, np.bool_)
    for start in range(rows):
        if label[start] >= 0:
            continue
        price_row[start] = (cost[start] - price).min()
        distance[:] = cost[start] - price_row[start] - price
        via[:] = start
        done[:] = False
        end = -1
        for _ in range(columns):
            here = -1
            for column in range(columns):
                if not done[column] and (here < 0 or distance[column] < distance[here]):
                    here = column
            done[here] = True
            if room[here] > 0:
                end = here
                break
            row = first[here]
            while row >= 0:
                base = distance[here] - price_row[row]
                for column in range(columns):
                    if not done[column]:
                        reach = base + cost[row, column] - price[column]
                        if reach < distance[column]:
                            distance[column] = reach
                            via[column] = row
                row = after[row]
        _finish(start, end, left, distance, via, done, price_row, price, label, first, after)
        if end >= 0:
            room[end] -= 1
            left -= 1
    return label


@numba.njit(nogil=True, cache=True)
def _finish(  # type: ignore[no-untyped-def]
    start, end, left, distance, via, done, price_row, price, label, first, after
) -> None:
    """Move the prices, then the rows along the path; with no place left, drop one row."""
    columns = len(price)
    if end >= 0:
        total = distance[end]
    else:
        total = distance.max()
        # Dropping a row ends the path at its column; the cheapest path of all drops the row whose
        # path is shortest after what keeping it was worth.
        out, least = start, -price_row[start]
        for column in range(columns):
            row = first[column]
            while row >= 0:
                if distance[column] - price_row[row] < least:
                    out, least = row, distance[column] - price_row[row]
                row = after[row]
        if out == start:
            return
    price_row[start] += total
    for column in range(columns):
        if done[column] and column != end:
            row = first[column]
            while row >= 0:
                price_row[row] += total - distance[column]
                row = after[row]
            price[column] -= total - distance[column]
    column = end
    if end < 0:
        column = label[out]
        _detach(out, label, first, after)
    while True:
        row = via[column]
        before = label[row]
        if row != start:
            _detach(row, label, first, after)
        _attach(row, column, label, first, after)
        if row == start:
            return
        column = before


@numba.njit(nogil=True, cache=True)
def _attach(row, column, label, first, after) -> None:  # type: ignore[no-untyped-def]
    label[row] = column
    after[row] = first[column]
    first[column] = row


@numba.njit(nogil=True, cache=True)
def _detach(row, label, first, after) -> None:  # type: ignore[no-untyped-def]
    column = label[row]
    if first[column] == row:
        first[column] = after[row]
    else:
        before = first[column]
        while after[before] != row:
            before = after[before]
        after[before] = after[row]
    label[row] = -1
