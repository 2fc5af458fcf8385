"""Figures of a ranking model's code embeddings: what they know, how many directions they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semid.recommenders.ranking.analysis import CodeAnalysis, Discriminability
from semid.report.figure import Figure, bars, line

__all__ = ["SECTION", "ranking_figures"]

SECTION = "ranking"


def ranking_figures(analyses: Mapping[str, CodeAnalysis]) -> list[Figure]:
    """Draw the MoC paper's figures for one or several models.

    Args:
        analyses: by the name of the model, for example ``"MoC 3x"``; of the same rows.

    Returns:
        Clusters against labels (figs. 1b, 1c, 2), each level alone (fig. 3), singular spectra
        (figs. 4, 10), and correlation with CKA (fig. 7), each with a table of its numbers.
    """
    found = [_sweep(analyses), _levels(analyses), _spectra(analyses)]
    return [*found, *(_correlation(name, a) for name, a in analyses.items())]


def _sweep(analyses: Mapping[str, CodeAnalysis]) -> Figure:
    traces: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for color, (name, a) in enumerate(analyses.items()):
        for points, label, dash in ((a.sweep, "all codes", "solid"), (a.first, "code 1", "dash")):
            x = [p.clusters for p in points]
            title = f"{name}, {label}"
            traces.append(
                line(
                    title,
                    x,
                    [p.ami for p in points],
                    color % 7 + 1,
                    dash=dash,
                    mode="lines+markers",
                )
            )
            rows += [[title, *_cells(p)] for p in points]
    return Figure(
        "ranking-clusters",
        SECTION,
        "What clusters of code embeddings know of clicks",
        "Higher is better; at 0 the clusters know what chance knows.",
        "K-means over the embeddings of all codes side by side, and of the first code alone; the "
        "mutual information of the clusters with the label, adjusted for chance. The MoC paper "
        "shows the unadjusted one, which grows with the number of clusters; it is in the table "
        "beside its value for shuffled labels.",
        traces,
        {"xaxis": {"title": "clusters", "type": "log"}, "yaxis": {"title": "adjusted MI"}},
        ["embedding", "clusters", "NMI", "adjusted MI", "NMI by chance"],
        rows,
    )


def _levels(analyses: Mapping[str, CodeAnalysis]) -> Figure:
    traces: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for color, (name, a) in enumerate(analyses.items()):
        names = [p.name.removeprefix("level ") for p in a.levels]
        traces.append(bars(name, names, [p.ami for p in a.levels], color % 7 + 1))
        rows += [[f"{name}, {p.name}", *_cells(p)] for p in (*a.levels, *a.codes)]
    return Figure(
        "ranking-levels",
        SECTION,
        "Each code alone",
        "Even bars: every code tells something. Falling bars: later codes tell little.",
        "The same for the embedding of one code at a time; the table has the codes themselves too.",
        traces,
        {"xaxis": {"title": "code"}, "yaxis": {"title": "adjusted MI"}, "barmode": "group"},
        ["embedding", "groups", "NMI", "adjusted MI", "NMI by chance"],
        rows,
    )


def _spectra(analyses: Mapping[str, CodeAnalysis]) -> Figure:
    traces, rows = [], []
    for color, (name, a) in enumerate(analyses.items()):
        values = a.singular_values
        top = float(values[0]) or 1.0
        # A logarithmic axis cannot show the exact zeros of a collapsed spectrum.
        y = [float(v) if v > 1e-8 * top else None for v in values]
        traces.append(line(name, range(1, len(y) + 1), y, color % 7 + 1))
        used = sum(v is not None for v in y)
        rows.append([name, f"{top:.4g}", f"{used} of {len(y)}"])
    return Figure(
        "ranking-spectra",
        SECTION,
        "Singular values of the code embeddings",
        "A curve that falls off a cliff uses few of its dimensions: the embedding has collapsed.",
        "Of the matrix of rows by all code embeddings side by side, not centered.",
        traces,
        {"xaxis": {"title": "index"}, "yaxis": {"title": "singular value", "type": "log"}},
        ["model", "largest", "above 1e-8 of it"],
        rows,
    )


def _correlation(name: str, a: CodeAnalysis) -> Figure:
    names = [field.removeprefix("code:") for field in a.fields]
    rows = [
        [f"{names[i]} and {names[j]}", f"{a.correlation[i, j]:.3f}", f"{a.cka[i, j]:.3f}"]
        for i in range(len(names))
        for j in range(i + 1, len(names))
    ]
    heat = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": a.cka.tolist(),
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": "%{y} and %{x}: %{z:.3f}<extra></extra>",
    }
    return Figure(
        f"ranking-correlation-{_anchor(name)}",
        SECTION,
        f"How alike the codes' embeddings are: {name}",
        "Bright off the diagonal means that two codes carry the same.",
        "Linear CKA, which no rotation of an embedding changes. The MoC paper's correlation (eq. "
        "9) depends on the basis each table happens to have; it is in the table.",
        [heat],
        {"xaxis": {"title": "code"}, "yaxis": {"title": "code"}},
        ["codes", "correlation", "CKA"],
        rows,
    )


def _cells(point: Discriminability) -> Sequence[str]:
    return [
        str(point.clusters),
        f"{point.nmi:.5f}",
        f"{point.ami:.5f}",
        f"{point.shuffled_nmi:.5f}",
    ]


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
