"""The figures of reports and comparisons: series and columns; texts are declarations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from semid.diagnostics.overlap import REPORT_SCALE, LevelOverlap
from semid.diagnostics.pairs import Proportion
from semid.report import figure as fig
from semid.report.figures_pairs import pair_figures, popularity_figure
from semid.report.results import (
    Comparison,
    Diagnosis,
    Flips,
    MetricRow,
    NoiseResponse,
    RankedUsage,
    SpaceGeometry,
    Spaces,
)

UNLISTED = {**fig.REFERENCE, "showlegend": False, "hoverinfo": "skip"}


def level_name(diagnosis: Diagnosis, level: int) -> str:
    """Name a level (or a parallel codebook) for people, who count from 1."""
    return f"{'Level' if diagnosis.model.hierarchical else 'Codebook'} {level + 1}"


def report_figures(d: Diagnosis) -> list[fig.Figure]:
    """Return the figures of a diagnosis, in the order of the page."""
    # What was not measured for want of data or spread has no figure.
    figures = [_usage(d), _buckets(d), _reconstruction(d)]
    if d.overlap:
        figures.append(_effective_size(d))
    if d.flips is not None:
        figures.append(_flips(d, d.flips))
    if d.geometry is not None:
        figures.append(_spectra(d.geometry))
    if d.behavior is not None:
        if d.behavior.measured is not None:
            figures += pair_figures(d.behavior.measured, "behavior", "behavior", "")
        if d.behavior.popularity is not None:
            figures.append(popularity_figure(d.behavior.popularity))
    for place, (kind, measured) in enumerate((d.relations or {}).items()):
        suffix = ", " + kind.replace("_", " ")
        figures += pair_figures(measured, f"relations-{place}", "relations", suffix)
    return figures


# Codes ---------------------------------------------------------------------------------------

USAGE: fig.Plot[RankedUsage] = fig.declared(
    "usage",
    x=lambda u: u.rank_frequency.rank,
    y=lambda u: [value or None for value in u.rank_frequency.share],
)


def _usage(d: Diagnosis) -> fig.Figure:
    figure = USAGE.figure({level_name(d, u.level): u for u in d.usage})
    # A level whose codes are used evenly is a flat line at 1 / K.
    even = [
        fig.line(f"even use of {size:,}", [1, size], [1 / size] * 2, "muted", **fig.REFERENCE)
        for size in sorted({u.codebook_size for u in d.usage})
    ]
    return replace(figure, traces=[*figure.traces, *even])


BUCKETS: fig.Plot[tuple[int, int, float]] = fig.declared(
    "buckets",
    columns=(
        fig.Column("Buckets", lambda size: size[0], fig.count),
        fig.Column("Items", lambda size: size[1], fig.count),
        fig.Column("Share of items", lambda size: size[2], fig.share),
    ),
)


def _bucket_sizes(d: Diagnosis) -> dict[str, tuple[int, int, float]]:
    """Group bucket sizes into 1, 2, 3, 4 and then doublings: buckets, items, share of items."""
    # Sizes above 4 share a bin up to the next power of two: 5 to 8, 9 to 16, ...
    bins: dict[tuple[int, int], tuple[int, int]] = {}
    for size, buckets in d.verdict.collisions.histogram.items():
        low = size if size <= 4 else 1 << ((size - 1).bit_length() - 1)
        edges = (size, size) if size <= 4 else (low + 1, 2 * low)
        before = bins.get(edges, (0, 0))
        bins[edges] = (before[0] + buckets, before[1] + buckets * size)
    total = d.verdict.collisions.items
    return {
        f"{a}" if a == b else f"{a:,} to {b:,}": (buckets, items, items / total)
        for (a, b), (buckets, items) in sorted(bins.items())
    }


def _buckets(d: Diagnosis) -> fig.Figure:
    sizes = _bucket_sizes(d)
    trace = fig.bars(
        "items",
        sizes,
        [part for _, _, part in sizes.values()],
        1,
        customdata=[[fig.count(buckets), fig.count(items)] for buckets, items, _ in sizes.values()],
        hovertemplate="%{y:.2%}: %{customdata[1]} items in %{customdata[0]} buckets<extra></extra>",
    )
    return BUCKETS.figure(sizes, traces=[trace])


RECONSTRUCTION: fig.Plot[Mapping[str, float | None]] = fig.declared("reconstruction")
PREFIX_TEXTS = {
    "level": "level",
    "good": "every level lowers the line, and held-out items lie close above the fitted ones",
    "bad": "a level that adds nothing, or held-out items far above",
    "which": "up to this level",
}
ALONE_TEXTS = {
    "level": "codebook alone",
    "good": "all codebooks low and the whole code lower still",
    "bad": "a codebook near 1, which knows no more than the mean",
    "which": "of this codebook",
}
GROUPS = {"training": "fitted on", "held_out": "held out", "all": "all items"}


def _group_error(group: str) -> fig.Column[Mapping[str, float | None]]:
    return fig.Column(GROUPS[group], lambda errors: errors[group], fig.number)


def _reconstruction(d: Diagnosis) -> fig.Figure:
    levels = d.reconstruction.per_level
    groups = ["training", "held_out"] if "held_out" in levels[0].errors else ["all"]
    is_prefix = d.reconstruction.per_level_kind == "prefix"
    by_level = {level_name(d, level.level): level.errors for level in levels}
    # Errors of prefixes form a line; codebooks alone are points that nothing connects.
    traces = [
        fig.line(
            GROUPS[group],
            by_level,
            [errors[group] for errors in by_level.values()],
            place + 1,
            mode="lines+markers" if is_prefix else "markers",
            hovertemplate="%{y:.3f}",
        )
        for place, group in enumerate(groups)
    ]
    columns = tuple(_group_error(g) for g in groups)
    return replace(RECONSTRUCTION, columns=columns).figure(
        {**by_level, "Whole code, decoded": d.reconstruction.relative_error},
        traces=traces,
        layout={
            "xaxis": {"type": "category", "range": [-0.4, len(levels) - 0.6]},
            "yaxis": fig.axis("relative error", rangemode="tozero"),
        },
        **(PREFIX_TEXTS if is_prefix else ALONE_TEXTS),
    )


# Robustness and geometry ---------------------------------------------------------------------

OVERLAP: fig.Plot[LevelOverlap] = fig.declared(
    "overlap",
    columns=(
        fig.Column(
            "Effective size at 0.1", lambda o: o.at(REPORT_SCALE).effective_size, fig.number
        ),
        fig.Column("Usage alone", lambda o: o.at(REPORT_SCALE).usage_size, fig.number),
        fig.Column("Geometry's share of R", lambda o: o.at(REPORT_SCALE).geometry_share, fig.share),
        fig.Column(
            "Geometry shows at",
            lambda o: o.geometry_scale,
            lambda scale: "beyond the sweep" if scale is None else f"{scale:g}",
        ),
    ),
    x=lambda o: [point.scale for point in o.points],
    y=lambda o: [point.effective_size for point in o.points],
)


def _effective_size(d: Diagnosis) -> fig.Figure:
    traces = []
    # The dotted limit is what usage alone would give: without near codewords, the line is on it.
    for level in d.overlap:
        name, color = level_name(d, level.level), fig.palette(level.level)
        ends = [level.points[0].scale, level.points[-1].scale]
        limit = [level.points[0].usage_size] * 2
        traces.append(OVERLAP.series(name, level, color))
        traces.append(fig.line(f"usage alone, {name.lower()}", ends, limit, color, **UNLISTED))
    return OVERLAP.figure({level_name(d, o.level): o for o in d.overlap}, traces=traces)


FLIPS: fig.Plot[NoiseResponse] = fig.declared(
    "flips",
    x=lambda response: [point.scale for point in response.flips.points],
    y=lambda response: [point.prefix[-1].value for point in response.flips.points],
)
COMPARED_FLIPS: fig.Plot[NoiseResponse] = fig.declared("compared-flips", x=FLIPS.x, y=FLIPS.y)


def _noise_axis(response: NoiseResponse) -> dict[str, Any]:
    """Return the x axis of flips under noise on the input."""
    scales = [point.scale for point in response.flips.points]
    return {"xaxis": fig.axis("noise, in input standard deviations", ticks=scales)}


def _flips(d: Diagnosis, response: Flips) -> fig.Figure:
    hierarchical = d.model.hierarchical
    names = [
        f"up to level {level + 1}" if hierarchical else level_name(d, level)
        for level in range(d.model.levels)
    ]
    scales = [point.scale for point in response.input.flips.points]

    def measured(noise: NoiseResponse, level: int) -> list[Proportion]:
        return [point.shares(hierarchical)[level] for point in noise.flips.points]

    def proxy(noise: NoiseResponse, level: int) -> list[float]:
        return [point.shares(hierarchical)[level] for point in noise.margins.points]

    traces = []
    for level, name in enumerate(names):
        # The measured line has its intervals; the closed form is a dotted line beside it.
        color, flips = fig.palette(level), measured(response.input, level)
        values = [flip.value for flip in flips]
        style: dict[str, Any] = {"mode": FLIPS.mark, "hovertemplate": FLIPS.hover}
        intervals = fig.error_bars(flips, color=color)
        traces.append(fig.line(name, scales, values, color, **style, **intervals))
        margins = proxy(response.input, level)
        traces.append(fig.line(f"margin proxy, {name}", scales, margins, color, **UNLISTED))
    # Of the whole id every figure, of the levels before it the measured ones.
    columns: dict[str, list[float]] = {}
    for space, noise in (("input", response.input), ("latent", response.latent)):
        if noise is not None:
            columns[f"{names[-1]}, {space}"] = [flip.value for flip in measured(noise, -1)]
            columns[f"{names[-1]}, {space} (proxy)"] = proxy(noise, -1)
    for level, name in enumerate(names[:-1]):
        columns[f"{name}, input"] = [flip.value for flip in measured(response.input, level)]
    rows = zip(scales, *columns.values(), strict=True)
    return replace(
        FLIPS.figure({}, traces=traces, layout=_noise_axis(response.input)),
        columns=["Noise", *columns],
        rows=[[f"{scale:g}", *map(fig.share, values)] for scale, *values in rows],
    )


SPECTRA: fig.Plot[SpaceGeometry] = fig.declared(
    "spectra",
    x=lambda s: s.spectrum.rank,
    y=lambda s: [value if value > 1e-9 else None for value in s.spectrum.share],
)
COMPARED_SPECTRA: fig.Plot[SpaceGeometry] = fig.declared(
    "compared-spectra", x=SPECTRA.x, y=SPECTRA.y
)


def _spectra(geometry: Spaces) -> fig.Figure:
    spaces = {space.name: space for space in geometry.spaces}
    # Dashes tell the spaces apart where their curves lie on each other.
    traces = [
        SPECTRA.series(name, space, place + 1, dash=("solid", "dash", "solid")[place % 3])
        for place, (name, space) in enumerate(spaces.items())
    ]
    rows, items = fig.count(geometry.rows), fig.count(geometry.items)
    return SPECTRA.figure(spaces, traces=traces, rows=rows, items=items)


# Comparisons ---------------------------------------------------------------------------------

SENSES = {"lower": "lower is better", "higher": "higher is better", "neither": "not ranked"}

PARETO: fig.Plot[int] = fig.declared("pareto")
AGREEMENT: fig.Plot[float | None] = fig.declared(
    "agreement",
    columns=(fig.Column("Rank correlation", lambda value: value, fig.number),),
)


def comparison_figures(c: Comparison) -> list[fig.Figure]:
    """Return the figures of a comparison."""
    keys = {row.key for row in c.metrics}
    trades = [
        ("relative_error", "id_flips"),
        ("relative_error", "weighted_auc"),
        ("id_flips", "weighted_auc"),
    ]
    figures = [_pareto(c, c.metric(a), c.metric(b)) for a, b in trades if {a, b} <= keys]
    responses = {name: d.flips.input for name, d in c.diagnoses.items() if d.flips is not None}
    # A figure of all models is drawn where it was measured for each of them.
    if len(responses) == len(c.names):
        first = responses[c.names[0]]
        columns: tuple[fig.Column[NoiseResponse], ...] = tuple(
            _flipped_ids(n, point.scale) for n, point in enumerate(first.flips.points)
        )
        flips = replace(COMPARED_FLIPS, columns=columns)
        figures.append(flips.figure(responses, layout=_noise_axis(first)))
    spaces = {name: d.geometry.spaces for name, d in c.diagnoses.items() if d.geometry is not None}
    if len(spaces) == len(c.names):
        source = spaces[c.names[0]][0]
        # All models read the same input, so its spectrum is shown once, as the reference.
        traces = [COMPARED_SPECTRA.series("input", source, "muted", dash="dot")]
        rows = [COMPARED_SPECTRA.row("input", source)]
        for place, (name, (*_, decoded)) in enumerate(spaces.items()):
            traces.append(COMPARED_SPECTRA.series(name, decoded, fig.palette(place)))
            rows.append(COMPARED_SPECTRA.row(name, decoded))
        figures.append(replace(COMPARED_SPECTRA.figure({}, traces=traces), rows=rows))
    proxies = {
        "expected overlap rate R": c.agreement.overlap,
        "geometry's part of R": c.agreement.geometry,
        "margin proxy": c.agreement.margins,
    }
    agreement = AGREEMENT.figure(
        proxies, traces=[], scale=c.agreement.scale, rows=fig.count(c.agreement.rows)
    )
    return [*figures, agreement]


def _flipped_ids(place: int, scale: float) -> fig.Column[NoiseResponse]:
    return fig.Column(f"{scale:g}", lambda r: r.flips.points[place].prefix[-1].value, fig.share)


def _metric_value(row: MetricRow) -> fig.Column[int]:
    return fig.Column(row.name, lambda place: row.values[place], fig.WRITERS[row.kind])


def _pareto(c: Comparison, x: MetricRow, y: MetricRow) -> fig.Figure:
    front = c.front(x, y)
    xs, ys = ([row.values[place] for place in front] for row in (x, y))
    traces = [fig.line("nobody better in both", xs, ys, "muted", **fig.REFERENCE, hoverinfo="skip")]
    for place, name in enumerate(c.names):
        color = f"@{fig.palette(place)}"
        # A filled marker is on the front: no other model is better in both metrics.
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
        fig.Column[int]("Beaten in both by another", lambda n: "no" if n in front else "yes"),
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
    return fig.axis(title, tickformat=".0%") if row.kind == "share" else fig.axis(title)
