"""Lines, columns and cells of a paper's tables, written from the rows of a ledger."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from semid.reproduce.claims import Metric, Rows, inside


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    label: str  # first cell
    # Selection of the rows that its columns read, and the path to the part of a row.
    where: Mapping[str, Any] = field(default_factory=dict)
    at: tuple[Any, ...] = ()
    # Selection of the rows that differences are taken to.
    against: Mapping[str, Any] = field(default_factory=dict)

    def values(self, rows: Rows, metric: Metric, **more: Any) -> list[float]:
        """Return a metric of the line's part of the rows, one value per seed."""
        read = inside(self.at, metric) if self.at else metric
        return rows.values(read, **{**self.where, **more})


Lines = Callable[[Rows], Iterable[Line]]
Cell = Callable[[Rows, Line], str]


@dataclass(frozen=True)
class Column:
    """One column of a table: its head, and what writes the cell of a line."""

    name: str
    cell: Cell


def average(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Write mean and standard deviation; one value alone; a dash for none."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{average(values):.{digits}f}{deviation}"


def mean_and_deviation(metric: Metric, digits: int = 4) -> Cell:
    """Return cells with the mean over seeds and the standard deviation."""
    return lambda rows, line: spread(line.values(rows, metric), digits)


def mean(metric: Metric, form: str) -> Cell:
    """Return cells with the mean over seeds in a format."""

    def write(rows: Rows, line: Line) -> str:
        values = line.values(rows, metric)
        return f"{average(values):{form}}" if values else "-"

    return write


def count_seeds(metric: Metric) -> Cell:
    """Return cells with the number of seeds that have a metric."""
    return lambda rows, line: str(len(line.values(rows, metric)))


def difference(metric: Metric, **more: Any) -> Cell:
    """Return cells with the paired difference of a line's rows to those it stands against."""

    def write(rows: Rows, line: Line) -> str:
        result = rows.difference(metric, {**line.where, **more}, {**line.against, **more})
        return "-" if result is None else str(result)

    return write
