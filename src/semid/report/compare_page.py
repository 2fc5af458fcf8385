"""A comparison as a page and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from semid.markdown import escaped
from semid.report.compare import Comparison, MetricRow
from semid.report.figure import Figure, line
from semid.report.markdown import figure_markdown, table
from semid.report.numbers import count, number, share
from semid.report.page import render
from semid.report.prose import VERDICTS
from semid.report.views import AGREEMENT_SCALE, VIEWS

__all__ = ["comparison_figures", "comparison_markdown", "comparison_page"]

_WRITE: dict[str, Callable[[float | None], str]] = {
    "share": share,
    "number": number,
    "count": count,
}
_ARROWS = {"lower": "lower is better", "higher": "higher is better", "neither": "not ranked"}


def view_rows(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the table of each view: metric, which way is good, values and ranks written out."""
    views = []
    for key, title in VIEWS.items():
        rows = [
            {
                "name": row.name,
                "sense": _ARROWS[row.better],
                "lead": row.lead,
                "cells": [
                    {"text": _WRITE[row.kind](value), "rank": rank}
                    for value, rank in zip(row.values, row.ranks, strict=True)
                ],
            }
            for row in comparison.metrics
            if row.view == key
        ]
        if rows:
            views.append((title, rows))
    return views


def comparison_figures(c: Comparison) -> list[Figure]:
    """Return the figures of a comparison."""
    figures = []
    pairs = [("relative_error", "id_flips"), ("relative_error", "weighted_auc")]
    pairs.append(("id_flips", "weighted_auc"))
    known = {row.key for row in c.metrics}
    for a, b in pairs:
        if {a, b} <= known:
            figures.append(_pareto(c, c.metric(a), c.metric(b)))
    figures += [figure for figure in (_flips(c), _spectra(c)) if figure is not None]
    return [*figures, _agreement(c)]


def _front(x: MetricRow, y: MetricRow) -> list[int]:
    """Return the models that no other beats in both metrics, by rank of the first."""
    ranks = [
        (rx, ry, place)
        for place, (rx, ry) in enumerate(zip(x.ranks, y.ranks, strict=True))
        if rx is not None and ry is not None
    ]
    free = [
        (rx, ry, place)
        for rx, ry, place in ranks
        if not any(
            ox <= rx and oy <= ry and (ox < rx or oy < ry)
            for ox, oy, other in ranks
            if other != place
        )
    ]
    return [place for _, _, place in sorted(free)]


def _axis(row: MetricRow) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": f"{row.name}, {_ARROWS[row.better]}"}}
    return {**axis, "tickformat": ".0%"} if row.kind == "share" else axis


def _pareto(c: Comparison, x: MetricRow, y: MetricRow) -> Figure:
    front = _front(x, y)
    traces: list[dict[str, Any]] = [
        line(
            "nobody better in both",
            [x.values[place] for place in front],
            [y.values[place] for place in front],
            "muted",
            dash="dot",
            width=1,
            hoverinfo="skip",
        )
    ]
    for place, name in enumerate(c.names):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [x.values[place]],
                "y": [y.values[place]],
                "marker": {
                    "color": f"@{place % 7 + 1}",
                    "size": 13,
                    "symbol": "circle" if place in front else "circle-open",
                    "line": {"width": 2, "color": f"@{place % 7 + 1}"},
                },
                "hovertemplate": "%{x:.3f}, %{y:.3f}",
            }
        )
    return Figure(
        f"pareto-{x.key}-{y.key}",
        "trade",
        f"{x.name[0].upper()}{x.name[1:]} against {y.name}",
        "Good: full dots on the dotted line, which no other model beats in both. Bad: open dots, "
        "for which some other model is at least as good in both.",
        "Each dot is a model. The dotted line joins the models that are best for some weighting of "
        "the two; along it, one is paid for with the other.",
        traces,
        {"xaxis": {**_axis(x), "showgrid": True}, "yaxis": _axis(y)},
        ["", x.name, y.name, "Beaten in both by another"],
        [
            [
                name,
                _WRITE[x.kind](x.values[place]),
                _WRITE[y.kind](y.values[place]),
                "no" if place in front else "yes",
            ]
            for place, name in enumerate(c.names)
        ],
    )


def _flips(c: Comparison) -> Figure | None:
    if any(d.flips is None for d in c.diagnoses):
        return None
    traces, rows, scales = [], [], []
    for place, (name, d) in enumerate(zip(c.names, c.diagnoses, strict=True)):
        points = (d.flips or {})["input"]["flips"]["points"]
        scales = [point["scale"] for point in points]
        values = [point["prefix"][-1]["value"] for point in points]
        traces.append(
            line(
                name,
                scales,
                values,
                place % 7 + 1,
                mode="lines+markers",
                hovertemplate="noise %{x}: %{y:.1%}",
            )
        )
        rows.append([name, *(share(value) for value in values)])
    return Figure(
        "flips",
        "trade",
        "Ids that change under noise on the input",
        "Good: a low line. Bad: a line that rises at small noise; such ids will not survive a "
        "refreshed embedding.",
        "Share of the items whose whole id changes when Gaussian noise is added to the embedding, "
        "in units of its standard deviation; the same noise for all models. Noise on the input "
        "compares models of different latent width, noise on the latent does not.",
        traces,
        {
            "xaxis": {
                "title": {"text": "noise, in input standard deviations"},
                "type": "log",
                "tickvals": scales,
                "ticktext": [f"{scale:g}" for scale in scales],
            },
            "yaxis": {"title": {"text": "share of items"}, "tickformat": ".0%", "range": [0, 1]},
        },
        ["", *(f"{scale:g}" for scale in scales)],
        rows,
    )


def _spectra(c: Comparison) -> Figure | None:
    if any(d.geometry is None for d in c.diagnoses):
        return None
    spaces = [
        (name, (d.geometry or {})["spaces"][-1])
        for name, d in zip(c.names, c.diagnoses, strict=True)
    ]
    source = (c.diagnoses[0].geometry or {})["spaces"][0]
    return Figure(
        "spectra",
        "trade",
        "Directions that survive in decoder(codes)",
        "Good: a line close to that of the input. Bad: a line that drops early.",
        "Eigenvalues of the covariance as shares of their sum, largest first.",
        [
            line(
                name,
                space["spectrum"]["rank"],
                [value if value > 1e-9 else None for value in space["spectrum"]["share"]],
                "muted" if name == "input" and place == 0 else (place - 1) % 7 + 1,
                dash="dot" if place == 0 else "solid",
                hovertemplate="direction %{x}: %{y:.2%}",
            )
            for place, (name, space) in enumerate([("input", source), *spaces])
        ],
        {
            "xaxis": {"title": {"text": "direction, strongest first"}},
            "yaxis": {
                "title": {"text": "share of variance"},
                "type": "log",
                "tickformat": ".3~%",
                "dtick": 1,
            },
        },
        ["", "Participation ratio", "Effective rank", "Top share"],
        [
            [
                name,
                number(space["participation_ratio"]),
                number(space["effective_rank"]),
                share(space["top_share"]),
            ]
            for name, space in [("input", source), *spaces]
        ],
    )


def _agreement(c: Comparison) -> Figure:
    names = {
        "overlap": "expected overlap rate R",
        "geometry": "geometry's part of R",
        "margins": "margin proxy",
    }
    return Figure(
        "agreement",
        "trade",
        "What predicts flips here",
        "Good: near 1, where the figure ranks models and levels as the measured flips do. Bad: "
        "near 0 or below, where it misleads.",
        f"Spearman's rank correlation with the measured flips at noise {AGREEMENT_SCALE:g} over "
        f"{count(c.agreement['rows'])} models and levels. R is mostly the evenness of use, and "
        "evenly used codes have smaller cells, so it can rank flips the wrong way round.",
        (),
        {},
        ["", "Rank correlation"],
        [[label, number(c.agreement[key])] for key, label in names.items()],
    )


def comparison_page(c: Comparison) -> str:
    """Return the comparison as an HTML page."""
    figures = comparison_figures(c)
    return render(
        "compare.html.j2",
        c=c,
        views=view_rows(c),
        words=[VERDICTS[d.verdict.level][0] for d in c.diagnoses],
        figures=figures,
        plots=[figure.to_plot() for figure in figures if figure.traces],
    )


def comparison_markdown(c: Comparison) -> str:
    """Return the comparison as Markdown."""
    parts = [f"# {len(c.names)} models on {count(c.diagnoses[0].data['items'])} items\n"]
    parts += [f"- {escaped(finding)}.\n" for finding in c.findings]
    for title, rows in view_rows(c):
        parts.append(f"## {title}\n")
        body = [
            [
                f"{row['name']} ({row['sense']})",
                *(
                    cell["text"] + (f" (rank {cell['rank']})" if cell["rank"] else "")
                    for cell in row["cells"]
                ),
            ]
            for row in rows
        ]
        parts.append(table(["", *c.names], body))
    parts += ["## Trade-offs\n", *(figure_markdown(figure) for figure in comparison_figures(c))]
    parts += ["## Notes\n", *(f"- {escaped(note)}.\n" for note in c.notes)]
    return "\n".join(parts)
