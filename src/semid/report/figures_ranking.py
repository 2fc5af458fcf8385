"""Figures of a ranking model's code embeddings: information on labels, and directions in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from semid.recommenders.ranking.analysis import CodeAnalysis, Discriminability
from semid.report.figure import Column, Figure, Plot, bars, declared, line, palette

SECTION = "ranking"

POINT_COLUMNS: tuple[Column[Discriminability], ...] = (
    Column("clusters", lambda point: point.clusters),
    Column("NMI", lambda point: point.nmi, "{:.5f}".format),
    Column("adjusted MI", lambda point: point.ami, "{:.5f}".format),
    Column("NMI by chance", lambda point: point.shuffled_nmi, "{:.5f}".format),
)
CLUSTERS: Plot[Discriminability] = declared(
    "ranking-clusters",
    columns=POINT_COLUMNS,
)
LEVELS: Plot[Discriminability] = declared(
    "ranking-levels",
    columns=(replace(POINT_COLUMNS[0], head="groups"), *POINT_COLUMNS[1:]),
)
SPECTRA: Plot[CodeAnalysis] = declared(
    "ranking-spectra",
    columns=(
        Column("largest", lambda a: _positive_values(a)[0], "{:.4g}".format),
        Column(
            "above 1e-8 of it",
            lambda a: (
                f"{sum(v is not None for v in _positive_values(a)[1])} of {len(a.singular_values)}"
            ),
        ),
    ),
    x=lambda a: range(1, len(a.singular_values) + 1),
    y=lambda a: _positive_values(a)[1],
)
CORRELATION: Plot[tuple[float, float]] = declared(
    "ranking-correlation",
    columns=(
        Column("correlation", lambda pair: pair[0], "{:.3f}".format),
        Column("CKA", lambda pair: pair[1], "{:.3f}".format),
    ),
)


def ranking_figures(analyses: Mapping[str, CodeAnalysis]) -> list[Figure]:
    """Draw the MoC paper's figures for one or several models."""
    figures = [_clusters(analyses), _levels(analyses), SPECTRA.figure(analyses)]
    return [*figures, *(_correlation(name, a) for name, a in analyses.items())]


def _clusters(analyses: Mapping[str, CodeAnalysis]) -> Figure:
    traces: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for place, (name, a) in enumerate(analyses.items()):
        for points, label, dash in ((a.sweep, "all codes", "solid"), (a.first, "code 1", "dash")):
            x, y = [p.clusters for p in points], [p.ami for p in points]
            title = f"{name}, {label}"
            traces.append(line(title, x, y, palette(place), dash=dash, mode="lines+markers"))
            rows += [CLUSTERS.row(title, point) for point in points]
    return replace(CLUSTERS.figure({}, traces=traces), rows=rows)


def _levels(analyses: Mapping[str, CodeAnalysis]) -> Figure:
    traces = []
    for place, (name, a) in enumerate(analyses.items()):
        levels = [p.name.removeprefix("level ") for p in a.levels]
        traces.append(bars(name, levels, [p.ami for p in a.levels], palette(place)))
    points = {f"{name}, {p.name}": p for name, a in analyses.items() for p in (*a.levels, *a.codes)}
    return LEVELS.figure(points, traces=traces)


def _positive_values(a: CodeAnalysis) -> tuple[float, list[float | None]]:
    """Return the largest singular value, and all without those that a log axis cannot show."""
    top = float(a.singular_values[0]) or 1.0
    return top, [float(v) if v > 1e-8 * top else None for v in a.singular_values]


def _correlation(name: str, a: CodeAnalysis) -> Figure:
    codes = [field.removeprefix("code:") for field in a.fields]
    heat = {
        "type": "heatmap",
        "x": codes,
        "y": codes,
        "z": a.cka.tolist(),
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": "%{y} and %{x}: %{z:.3f}<extra></extra>",
    }
    pairs = {
        f"{codes[i]} and {codes[j]}": (float(a.correlation[i, j]), float(a.cka[i, j]))
        for i in range(len(codes))
        for j in range(i + 1, len(codes))
    }
    anchor = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    return CORRELATION.figure(pairs, traces=[heat], anchor=anchor, name=name)
