"""Tables of a paper as data, and the renderer that makes figures of them from a ledger's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from semid.report.figure import Figure
from semid.reproduce.claims import Metric, Rows, inside


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        label: first cell.
        where: selection of the rows that its columns read.
        at: path inside a row to the part that its columns read.
        against: selection of the rows that differences are taken to.
    """

    label: str
    where: Mapping[str, Any] = field(default_factory=dict)
    at: tuple[Any, ...] = ()
    against: Mapping[str, Any] = field(default_factory=dict)

    def values(self, rows: Rows, metric: Metric, **more: Any) -> list[float]:
        """Return a metric of the line's part of the rows, one value per seed."""
        read = inside(self.at, metric) if self.at else metric
        return rows.values(read, **{**self.where, **more})


Lines = Callable[[Rows], Iterable[Line]]
Cell = Callable[[Rows, Line], str]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: its head.
        cell: writes the cell of a line.
    """

    name: str
    cell: Cell


def average(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Write mean and standard deviation; one value alone; a dash for none."""
    if not values:
        return "-"
    mean = average(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


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


Chart = Callable[[Rows, Sequence[Line]], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Table:
    """A table, and the curves of the same numbers, for every data set of a ledger.

    Attributes:
        id: start of the anchor; the data set follows.
        title: what it shows; the data set follows.
        caption: what is good and what is bad; ``{key}`` stands for a value of the first row.
        definition: how the quantity is defined; as ``caption``.
        lines: the lines, given the rows of the data set.
        columns: the columns, given the rows of the data set.
        where: selection of the rows that it is about.
        per: ``variant`` makes one table per variant instead.
        printed: the paper's own values by line, which follow ours where the columns agree.
        chart: makes plotly traces.
        layout: plotly layout of the traces.
    """

    id: str
    title: str
    caption: str
    definition: str
    lines: Lines
    columns: Callable[[Rows], Sequence[Column]]
    where: Mapping[str, Any] = field(default_factory=dict)
    per: str = "data"
    printed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    chart: Chart | None = None
    layout: dict[str, Any] = field(default_factory=dict)

    def render(self, rows: Rows, section: str, name: str) -> Figure | None:
        """Return the figure of one data set; None where no line has a number."""
        part = Rows(rows.where(**self.where, **{self.per: name}))
        lines = list(self.lines(part))
        columns = self.columns(part)
        cells: list[list[str]] = []
        for line in lines:
            measured = [column.cell(part, line) for column in columns]
            if all(cell in ("-", "") for cell in measured):
                continue
            cells.append([line.label, *measured])
            beside = self.printed.get(line.label, ())
            if len(beside) == len(columns) - 1:  # all but the number of seeds
                numbers = [f"{value:g}" if value != "" else "" for value in beside]
                cells.append([f"paper: {line.label}", "", *numbers])
        if not cells:
            return None
        return Figure(
            f"{self.id}-{''.join(c if c.isalnum() else '-' for c in name)}",
            section,
            f"{self.title}, {name}",
            self.caption.format_map(part.rows[0]),
            self.definition.format_map(part.rows[0]),
            list(self.chart(part, lines)) if self.chart else (),
            self.layout,
            ["", *(column.name for column in columns)],
            cells,
        )
