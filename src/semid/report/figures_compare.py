"""The figures of a comparison: trade-offs, flips, spectra, agreement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from semid.report.figure import (
    REFERENCE,
    Column,
    Figure,
    Plot,
    axis,
    count,
    line,
    number,
    palette,
    share,
)
from semid.report.figures import COMPARED_FLIPS, COMPARED_SPECTRA, noise_axis
from semid.report.results import Comparison, MetricRow, NoiseResponse

__all__ = ["SENSES", "WRITERS", "comparison_figures"]

WRITERS = {"share": share, "number": number, "count": count}
"""Kind of a metric -> how its values are written."""

SENSES = {"lower": "lower is better", "higher": "higher is better", "neither": "not ranked"}

PARETO = Plot[int](
    "pareto-{x.key}-{y.key}",
    "trade",
    "{title} against {y.name}",
    "Good: full dots on the dotted line, which no other model beats in both. Bad: open dots, for "
    "which some other model is at least as good in both.",
    "Each dot is a model. The dotted line joins the models that are best for some weighting of the "
    "two; along it, one is paid for with the other.",
)
AGREEMENT = Plot[float | None](
    "agreement",
    "trade",
    "What predicts flips here",
    "Good: near 1, where the figure ranks models and levels as the measured flips do. Bad: near 0 "
    "or below, where it misleads.",
    "Spearman's rank correlation with the measured flips at noise {scale:g} over {rows} models and "
    "levels. R is mostly the evenness of use, and evenly used codes have smaller cells, so it can "
    "rank flips the wrong way round.",
    columns=(Column("Rank correlation", lambda value: value, number),),
)


def comparison_figures(c: Comparison) -> list[Figure]:
    """Return the figures of a comparison."""
    keys = {row.key for row in c.metrics}
    trades = [
        ("relative_error", "id_flips"),
        ("relative_error", "weighted_auc"),
        ("id_flips", "weighted_auc"),
    ]
    figures = [_pareto(c, c.metric(a), c.metric(b)) for a, b in trades if {a, b} <= keys]
    responses = {name: d.flips.input for name, d in c.diagnoses.items() if d.flips is not None}
    if len(responses) == len(c.names):
        first = responses[c.names[0]]
        columns: tuple[Column[NoiseResponse], ...] = tuple(
            _flipped_ids(n, point.scale) for n, point in enumerate(first.flips.points)
        )
        flips = replace(COMPARED_FLIPS, columns=columns)
        figures.append(flips.figure(responses, layout=noise_axis(first)))
    spaces = {name: d.geometry.spaces for name, d in c.diagnoses.items() if d.geometry is not None}
    if len(spaces) == len(c.names):
        source = spaces[c.names[0]][0]
        traces = [COMPARED_SPECTRA.series("input", source, "muted", dash="dot")]
        rows = [COMPARED_SPECTRA.row("input", source)]
        for place, (name, (*_, decoded)) in enumerate(spaces.items()):
            traces.append(COMPARED_SPECTRA.series(name, decoded, palette(place)))
            rows.append(COMPARED_SPECTRA.row(name, decoded))
        figures.append(replace(COMPARED_SPECTRA.figure({}, traces=traces), rows=rows))
    proxies = {
        "expected overlap rate R": c.agreement.overlap,
        "geometry's part of R": c.agreement.geometry,
        "margin proxy": c.agreement.margins,
    }
    agreement = AGREEMENT.figure(
        proxies, traces=[], scale=c.agreement.scale, rows=count(c.agreement.rows)
    )
    return [*figures, agreement]


def _flipped_ids(place: int, scale: float) -> Column[NoiseResponse]:
    return Column(f"{scale:g}", lambda r: r.flips.points[place].prefix[-1].value, share)


def _metric_value(row: MetricRow) -> Column[int]:
    return Column(row.name, lambda place: row.values[place], WRITERS[row.kind])


def _pareto(c: Comparison, x: MetricRow, y: MetricRow) -> Figure:
    front = c.front(x, y)
    xs, ys = ([row.values[place] for place in front] for row in (x, y))
    traces = [line("nobody better in both", xs, ys, "muted", **REFERENCE, hoverinfo="skip")]
    for place, name in enumerate(c.names):
        color = f"@{palette(place)}"
        marker = {
            "color": color,
            "size": 13,
            "symbol": "circle" if place in front else "circle-open",
            "line": {"width": 2, "color": color},
        }
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [x.values[place]],
                "y": [y.values[place]],
                "marker": marker,
                "hovertemplate": "%{x:.3f}, %{y:.3f}",
            }
        )
    columns = (
        *(_metric_value(row) for row in (x, y)),
        Column[int]("Beaten in both by another", lambda n: "no" if n in front else "yes"),
    )
    return replace(PARETO, columns=columns).figure(
        {name: place for place, name in enumerate(c.names)},
        traces=traces,
        layout={"xaxis": {**_metric_axis(x), "showgrid": True}, "yaxis": _metric_axis(y)},
        x=x,
        y=y,
        title=f"{x.name[0].upper()}{x.name[1:]}",
    )


def _metric_axis(row: MetricRow) -> dict[str, Any]:
    title = f"{row.name}, {SENSES[row.better]}"
    return axis(title, tickformat=".0%") if row.kind == "share" else axis(title)
