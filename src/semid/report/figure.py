"""What a figure is, and the two kinds of traces most are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from semid.report.diagnosis import Diagnosis

__all__ = ["Figure", "bars", "level_name", "line"]


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        id: anchor on the page.
        section: id of the section it stands in.
        title: what it shows.
        caption: one sentence on what is good and what is bad.
        definition: how the quantity is defined.
        traces: plotly traces.
        layout: plotly layout beyond the page's own.
        columns: head of the table of the same numbers.
        rows: its cells, written out.
    """

    id: str
    section: str
    title: str
    caption: str
    definition: str
    traces: Sequence[dict[str, Any]] = ()
    layout: dict[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def to_plot(self) -> dict[str, Any]:
        """Return what the page's script draws."""
        return {"id": self.id, "data": list(self.traces), "layout": self.layout}


def level_name(diagnosis: Diagnosis, level: int) -> str:
    """Name a level (or a parallel codebook) for people, who count from 1."""
    return f"{'Level' if diagnosis.model['hierarchical'] else 'Codebook'} {level + 1}"


def line(
    name: str, x: Sequence[Any], y: Sequence[Any], color: int | str, **more: Any
) -> dict[str, Any]:
    """Return a line trace."""
    marks = more.pop("mode", "lines")
    dash = more.pop("dash", "solid")
    width = more.pop("width", 2)
    return {
        "type": "scatter",
        "mode": marks,
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": f"@{color}", "dash": dash, "width": width},
        "marker": {"color": f"@{color}", "size": 7},
        **more,
    }


def bars(
    name: str, x: Sequence[Any], y: Sequence[Any], color: int | str, **more: Any
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
