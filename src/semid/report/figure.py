"""What a figure is, how one is declared, and how numbers are written for people.

Colors are names (``@1`` to ``@7``, ``@muted``) that the page replaces by those of its theme.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from operator import attrgetter
from typing import Any, Generic, TypeVar

from semid.diagnostics.pairs import Estimate, Proportion

REFERENCE: dict[str, Any] = {"dash": "dot", "width": 1}
"""Style of lines that others are compared with."""

DECLARATIONS: dict[str, Any] = tomllib.loads(
    resources.files("semid.report").joinpath("declarations.toml").read_text("utf8")
)
"""Texts and layouts of figures, sections, verdicts and metrics."""

Entry = TypeVar("Entry")
MISSING = "\N{EN DASH}"


def count(value: float | None) -> str:
    """Write a whole number with thousands separators: ``12,101``."""
    return MISSING if value is None else f"{round(value):,}"


def share(value: float | None) -> str:
    """Write a share in [0, 1] as a percentage with one decimal, two below one percent."""
    if value is None or not math.isfinite(value):
        return MISSING
    percent = 100 * value
    if 0 < abs(percent) < 0.01:
        return "<0.01%" if percent > 0 else ">-0.01%"
    return f"{percent:.2f}%" if 0 < abs(percent) < 1 else f"{percent:.1f}%"


def number(value: float | None) -> str:
    """Write a measure with three significant digits, thousands separated, tiny ones as powers."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.0005:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{min(digits, 4)}f}"


WRITERS = {"share": share, "number": number, "count": count}
"""Kind of a value -> how it is written."""


def spoken(value: Any) -> str:
    """Write any value of a table: text as it is, integers as counts, floats as measures."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    return number(value) if isinstance(value, float) else str(value)


Estimated = Estimate | Proportion
"""A value with its interval."""


def interval(estimate: Estimated | None) -> str:
    """Write an estimate with its interval where it has one."""
    if estimate is None:
        return MISSING
    value = number(estimate.value)
    if estimate.low is None:
        return value
    return f"{value} ({number(estimate.low)} to {number(estimate.high)})"


@dataclass(frozen=True)
class Figure:
    """One figure with the table of its numbers."""

    id: str  # anchor on the page
    section: str  # id of the section it belongs to
    title: str
    caption: str  # one sentence on what is good and what is bad
    definition: str  # how the quantity is defined
    traces: Sequence[dict[str, Any]] = ()  # plotly traces
    layout: Mapping[str, Any] = field(default_factory=dict)  # plotly layout beyond the page's own
    columns: Sequence[str] = ()  # heads of the table
    rows: Sequence[Sequence[str]] = ()  # its cells, written out

    def to_plot(self) -> dict[str, Any]:
        """Return what the page's script draws."""
        return {"id": self.id, "data": list(self.traces), "layout": self.layout}


def palette(place: int) -> int:
    """Return the color of the n-th series, counted from 0; seven colors repeat."""
    return place % 7 + 1


def line(
    name: str,
    x: Iterable[Any],
    y: Iterable[Any],
    color: int | str,
    *,
    mode: str = "lines",
    dash: str = "solid",
    width: int = 2,
    **more: Any,
) -> dict[str, Any]:
    """Return a line trace."""
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": f"@{color}", "dash": dash, "width": width},
        "marker": {"color": f"@{color}", "size": 7},
        **more,
    }


def bars(
    name: str, x: Iterable[Any], y: Iterable[Any], color: int | str, **more: Any
) -> dict[str, Any]:
    """Return a bar trace."""
    return {
        "type": "bar",
        "name": name,
        "x": list(x),
        "y": list(y),
        "marker": {"color": f"@{color}"},
        **more,
    }


def error_bars(
    estimates: Sequence[Estimated | None], *, color: int | str = "muted", along: str = "y"
) -> dict[str, Any]:
    """Return the intervals of estimates as a part of a trace; empty if one has none."""
    known = [
        (e.value, e.low, e.high)
        for e in estimates
        if e is not None and e.low is not None and e.high is not None
    ]
    if len(known) < len(estimates):
        return {}
    return {
        f"error_{along}": {
            "type": "data",
            "symmetric": False,
            "array": [high - value for value, _, high in known],
            "arrayminus": [value - low for value, low, _ in known],
            "thickness": 1,
            "width": 2,
            "color": f"@{color}",
        }
    }


def axis(title: str = "", *, ticks: Iterable[float] = (), **more: Any) -> dict[str, Any]:
    """Return a plotly axis; ``ticks`` are labeled values of a logarithmic one."""
    result: dict[str, Any] = {"title": {"text": title}} if title else {}
    if values := list(ticks):
        labels = [f"{value:g}" for value in values]
        result |= {"type": "log", "tickvals": values, "ticktext": labels}
    return result | more


@dataclass(frozen=True)
class Column(Generic[Entry]):
    """A column of a figure's table: its head, the value of an entry, and how that is written."""

    head: str
    read: Callable[[Entry], Any]
    write: Callable[[Any], str] = str

    def cell(self, entry: Entry) -> str:
        """Return the cell of an entry."""
        return self.write(self.read(entry))


@dataclass(frozen=True)
class Plot(Generic[Entry]):
    """Declaration of a figure: a series and a row of the table per entry.

    Texts may hold ``{name}`` for facts that `figure` is given.
    """

    id: str  # as in `Figure`, like section, title, caption, definition and layout
    section: str
    title: str
    caption: str
    definition: str
    columns: tuple[Column[Entry], ...] = ()  # of the table, after the first, which names the entry
    # the values of an entry along x; None draws nothing
    x: Callable[[Entry], Iterable[Any]] | None = None
    y: Callable[[Entry], Iterable[Any]] | None = None  # the values along y
    mark: str = "lines"  # ``bars`` or the plotly mode of a line
    hover: str = ""  # template of the text under the pointer
    # gives the series error bars
    estimates: Callable[[Entry], Sequence[Estimated | None]] | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""  # head of the first column

    def series(self, name: str, entry: Entry, color: int | str, **more: Any) -> dict[str, Any]:
        """Return the trace of one entry."""
        if self.x is None or self.y is None:
            raise TypeError(f"figure '{self.id}' declares no series")
        if self.hover:
            more["hovertemplate"] = self.hover
        if self.estimates is not None:
            more |= error_bars(self.estimates(entry))
        x, y = self.x(entry), self.y(entry)
        if self.mark == "bars":
            return bars(name, x, y, color, **more)
        return line(name, x, y, color, mode=self.mark, **more)

    def row(self, name: str, entry: Entry) -> list[str]:
        """Return the row of one entry in the table."""
        return [name, *(column.cell(entry) for column in self.columns)]

    def figure(
        self,
        entries: Mapping[str, Entry],
        *,
        traces: Sequence[dict[str, Any]] | None = None,
        layout: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> Figure:
        """Return the figure of some entries."""
        if traces is None:
            traces = [
                self.series(name, entry, palette(place))
                for place, (name, entry) in enumerate(entries.items())
                if self.x is not None
            ]
        return Figure(
            id=self.id.format(**facts),
            section=self.section.format(**facts),
            title=self.title.format(**facts),
            caption=self.caption.format(**facts),
            definition=self.definition.format(**facts),
            traces=traces,
            layout={**self.layout, **(layout or {})},
            columns=[self.head, *(column.head for column in self.columns)],
            rows=[self.row(name, entry) for name, entry in entries.items()],
        )


def declared(
    key: str,
    *,
    columns: tuple[Column[Entry], ...] = (),
    x: Callable[[Entry], Iterable[Any]] | None = None,
    y: Callable[[Entry], Iterable[Any]] | None = None,
    estimates: Callable[[Entry], Sequence[Estimated | None]] | None = None,
) -> Plot[Entry]:
    """Return the figure that `declarations.toml` describes under a key, with its data."""
    texts = dict(DECLARATIONS["figures"][key])
    columns += tuple(
        Column(c["head"], attrgetter(c["read"]), WRITERS[c["write"]])
        for c in texts.pop("columns", ())
    )
    return Plot(**texts, columns=columns, x=x, y=y, estimates=estimates)
