"""The figures of a report, declared: texts, series, columns and layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from semid.diagnostics.flips import Proportion
from semid.diagnostics.overlap import REPORT_SCALE, LevelOverlap
from semid.report.figure import (
    REFERENCE,
    Column,
    Figure,
    Plot,
    axis,
    bars,
    count,
    error_bars,
    line,
    number,
    palette,
    share,
)
from semid.report.figures_pairs import pair_figures, popularity_figure
from semid.report.results import (
    Diagnosis,
    NoiseResponse,
    RankedUsage,
    SpaceGeometry,
)

__all__ = ["COMPARED_FLIPS", "COMPARED_SPECTRA", "level_name", "noise_axis", "report_figures"]

UNLISTED = {**REFERENCE, "showlegend": False, "hoverinfo": "skip"}


def level_name(diagnosis: Diagnosis, level: int) -> str:
    """Name a level (or a parallel codebook) for people, who count from 1."""
    return f"{'Level' if diagnosis.model.hierarchical else 'Codebook'} {level + 1}"


def report_figures(d: Diagnosis) -> list[Figure]:
    """Return the figures of a diagnosis, in the order of the page."""
    figures = [_usage(d), _buckets(d), _reconstruction(d)]
    if d.overlap:
        figures.append(_effective_size(d))
    if d.flips is not None:
        figures.append(_flips(d))
    if d.geometry is not None:
        figures.append(_spectra(d))
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

USAGE = Plot[RankedUsage](
    "usage",
    "codes",
    "How evenly each codebook is used",
    "Good: a flat line near the dotted one. Bad: a steep fall, or a line that ends early because "
    "the remaining codes are dead.",
    "Share of the items that hold each code, most used code first. Perplexity is exp(H) of these "
    "shares: the number of evenly used codes that would carry as much. Gini is 0 for even use; "
    "dead codes have no item.",
    columns=(
        Column("Codes", lambda u: u.codebook_size, count),
        Column("Perplexity", lambda u: u.perplexity, number),
        Column("Dead", lambda u: u.dead, count),
        Column("Gini", lambda u: u.gini, number),
        Column("Largest code", lambda u: u.largest_share, share),
    ),
    x=lambda u: u.rank_frequency.rank,
    y=lambda u: [value or None for value in u.rank_frequency.share],  # no zeros on a log axis
    hover="rank %{x}: %{y:.3%} of items",
    layout={
        "xaxis": axis("code, most used first"),
        "yaxis": axis("share of items", type="log", tickformat=".2~%", dtick=1),
    },
)


def _usage(d: Diagnosis) -> Figure:
    figure = USAGE.figure({level_name(d, u.level): u for u in d.usage})
    even = [
        line(f"even use of {size:,}", [1, size], [1 / size] * 2, "muted", **REFERENCE)
        for size in sorted({u.codebook_size for u in d.usage})
    ]
    return replace(figure, traces=[*figure.traces, *even])


BUCKETS = Plot[tuple[int, int, float]](
    "buckets",
    "codes",
    "How many items share one id",
    "Good: nearly all items are alone in their bucket. Bad: items far to the right, where many "
    "share one id and nothing can tell them apart.",
    "A bucket is all items with one whole id. Two rates are in use: 1 - unique/N counts the ids "
    "that are missing, the colliding item rate counts the items that share their id. Exact copies "
    "of an embedding must collide and are counted apart.",
    columns=(
        Column("Buckets", lambda size: size[0], count),
        Column("Items", lambda size: size[1], count),
        Column("Share of items", lambda size: size[2], share),
    ),
    head="Items in bucket",
    layout={
        "xaxis": axis("items in the bucket", type="category"),
        "yaxis": axis("share of items", tickformat=".0%"),
        "showlegend": False,
    },
)


def _bucket_sizes(d: Diagnosis) -> dict[str, tuple[int, int, float]]:
    """Group bucket sizes into 1, 2, 3, 4 and then doublings: buckets, items, share of items."""
    bins: dict[tuple[int, int], tuple[int, int]] = {}
    for size, buckets in d.verdict.collisions.histogram.items():
        low = size if size <= 4 else 1 << ((size - 1).bit_length() - 1)
        edges = (size, size) if size <= 4 else (low + 1, 2 * low)
        before = bins.get(edges, (0, 0))
        bins[edges] = (before[0] + buckets, before[1] + buckets * size)
    return {
        f"{a}" if a == b else f"{a:,} to {b:,}": (
            buckets,
            items,
            items / d.verdict.collisions.items,
        )
        for (a, b), (buckets, items) in sorted(bins.items())
    }


def _buckets(d: Diagnosis) -> Figure:
    sizes = _bucket_sizes(d)
    trace = bars(
        "items",
        sizes,
        [part for _, _, part in sizes.values()],
        1,
        customdata=[[count(buckets), count(items)] for buckets, items, _ in sizes.values()],
        hovertemplate="%{y:.2%}: %{customdata[1]} items in %{customdata[0]} buckets<extra></extra>",
    )
    return BUCKETS.figure(sizes, traces=[trace])


RECONSTRUCTION = Plot[Mapping[str, float | None]](
    "reconstruction",
    "codes",
    "What each {level} leaves",
    "Good: {good}. Bad: {bad}.",
    "Squared distance between an item's latent vector and its codewords {which}, over the squared "
    "distance of the same latent vectors to the mean of all: 1 is no better than the mean, 0 is "
    "lossless. The last row is decoder(codes) in the input space.",
)
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


def _group_error(group: str) -> Column[Mapping[str, float | None]]:
    return Column(GROUPS[group], lambda errors: errors[group], number)


def _reconstruction(d: Diagnosis) -> Figure:
    levels = d.reconstruction.per_level
    groups = ["training", "held_out"] if "held_out" in levels[0].errors else ["all"]
    is_prefix = d.reconstruction.per_level_kind == "prefix"
    by_level = {level_name(d, level.level): level.errors for level in levels}
    traces = [
        line(
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
            "yaxis": axis("relative error", rangemode="tozero"),
        },
        **(PREFIX_TEXTS if is_prefix else ALONE_TEXTS),
    )


# Robustness and geometry ---------------------------------------------------------------------

OVERLAP = Plot[LevelOverlap](
    "overlap",
    "robustness",
    "Codes that stay apart under noise",
    "Good: a line on its dotted limit until noise is large. Bad: a line that leaves the limit "
    "early; there, codewords lie so close that chance decides between them.",
    "Effective codebook size 1/R, where R is the expected overlap of two items' codewords under "
    "noise on the latent. The dotted line is what usage alone gives: while a level is on it, this "
    "figure says nothing about geometry. It does not predict how many ids flip; the figure of "
    "flips measures that.",
    columns=(
        Column("Effective size at 0.1", lambda o: o.at(REPORT_SCALE).effective_size, number),
        Column("Usage alone", lambda o: o.at(REPORT_SCALE).usage_size, number),
        Column("Geometry's share of R", lambda o: o.at(REPORT_SCALE).geometry_share, share),
        Column(
            "Geometry shows at",
            lambda o: o.geometry_scale,
            lambda scale: "beyond the sweep" if scale is None else f"{scale:g}",
        ),
    ),
    x=lambda o: [point.scale for point in o.points],
    y=lambda o: [point.effective_size for point in o.points],
    mark="lines+markers",
    hover="noise %{x}: %{y:.1f} codes",
    layout={
        "xaxis": axis(
            "noise, in latent standard deviations",
            ticks=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3],
        ),
        "yaxis": axis("effective codes", rangemode="tozero"),
    },
)


def _effective_size(d: Diagnosis) -> Figure:
    traces = []
    for level in d.overlap:
        name, color = level_name(d, level.level), palette(level.level)
        ends = [level.points[0].scale, level.points[-1].scale]
        limit = [level.points[0].usage_size] * 2
        traces.append(OVERLAP.series(name, level, color))
        traces.append(line(f"usage alone, {name.lower()}", ends, limit, color, **UNLISTED))
    return OVERLAP.figure({level_name(d, o.level): o for o in d.overlap}, traces=traces)


FLIPS = Plot[NoiseResponse](
    "flips",
    "robustness",
    "Ids that change under noise on the input",
    "Good: lines that stay low at small noise, so that a refreshed embedding keeps its id. Bad: "
    "many ids that flip at 0.1 or 0.2; few collisions are then bought with noise.",
    "Gaussian noise is added to the embeddings, in units of their standard deviation, and they are "
    "encoded again. Whole lines are measured shares with 95% intervals; dotted lines are the "
    "margin proxy, a closed form from the distance of each item to the borders of its cell.",
    x=lambda response: [point.scale for point in response.flips.points],
    y=lambda response: [point.prefix[-1].value for point in response.flips.points],
    mark="lines+markers",
    hover="noise %{x}: %{y:.1%}",
    layout={"yaxis": axis("share of items", tickformat=".0%", range=[0, 1])},
)
COMPARED_FLIPS = replace(
    FLIPS,
    section="trade",
    caption="Good: a low line. Bad: a line that rises at small noise; such ids will not survive a "
    "refreshed embedding.",
    definition="Share of the items whose whole id changes when Gaussian noise is added to the "
    "embedding, in units of its standard deviation; the same noise for all models. Noise on the "
    "input compares models of different latent width, noise on the latent does not.",
)


def noise_axis(response: NoiseResponse) -> dict[str, Any]:
    """Return the x axis of flips under noise on the input."""
    scales = [point.scale for point in response.flips.points]
    return {"xaxis": axis("noise, in input standard deviations", ticks=scales)}


def _flips(d: Diagnosis) -> Figure:
    if d.flips is None:
        raise ValueError("the diagnosis holds no flips")
    hierarchical = d.model.hierarchical
    names = [
        f"up to level {level + 1}" if hierarchical else level_name(d, level)
        for level in range(d.model.levels)
    ]
    scales = [point.scale for point in d.flips.input.flips.points]

    def measured(response: NoiseResponse, level: int) -> list[Proportion]:
        return [point.shares(hierarchical)[level] for point in response.flips.points]

    def proxy(response: NoiseResponse, level: int) -> list[float]:
        return [point.shares(hierarchical)[level] for point in response.margins.points]

    traces = []
    for level, name in enumerate(names):
        color, flips = palette(level), measured(d.flips.input, level)
        values = [flip.value for flip in flips]
        style: dict[str, Any] = {"mode": FLIPS.mark, "hovertemplate": FLIPS.hover}
        intervals = error_bars(flips, color=color)
        traces.append(line(name, scales, values, color, **style, **intervals))
        margins = proxy(d.flips.input, level)
        traces.append(line(f"margin proxy, {name}", scales, margins, color, **UNLISTED))
    # Of the whole id every figure, of the levels before it the measured ones.
    columns: dict[str, list[float]] = {}
    for space, response in (("input", d.flips.input), ("latent", d.flips.latent)):
        if response is not None:
            columns[f"{names[-1]}, {space}"] = [flip.value for flip in measured(response, -1)]
            columns[f"{names[-1]}, {space} (proxy)"] = proxy(response, -1)
    for level, name in enumerate(names[:-1]):
        columns[f"{name}, input"] = [flip.value for flip in measured(d.flips.input, level)]
    rows = zip(scales, *columns.values(), strict=True)
    return replace(
        FLIPS.figure({}, traces=traces, layout=noise_axis(d.flips.input)),
        columns=["Noise", *columns],
        rows=[[f"{scale:g}", *map(share, values)] for scale, *values in rows],
    )


SPACE_COLUMNS: tuple[Column[SpaceGeometry], ...] = (
    Column("Width", lambda s: s.dim, count),
    Column("Participation ratio", lambda s: s.participation_ratio, number),
    Column("Effective rank", lambda s: s.effective_rank, number),
    Column("Top share", lambda s: s.top_share, share),
    Column("Mean absolute cosine", lambda s: s.mean_abs_cosine, number),
    Column("Centered", lambda s: s.mean_abs_cosine_centered, number),
)
SPECTRA = Plot[SpaceGeometry](
    "spectra",
    "geometry",
    "Directions that carry variance",
    "Good: the three lines lie together, so codes keep the directions of the embedding. Bad: a "
    "line that drops early, where a space has collapsed onto few directions.",
    "Eigenvalues of the covariance as shares of their sum, largest first, on a random {rows} of "
    "{items} items. Participation ratio and effective rank count the directions in use, from 1 to "
    "the width. The cosine is the mean absolute one between distinct dimensions, as they are and "
    "centered.",
    columns=SPACE_COLUMNS,
    x=lambda s: s.spectrum.rank,
    y=lambda s: [value if value > 1e-9 else None for value in s.spectrum.share],
    hover="direction %{x}: %{y:.2%}",
    layout={
        "xaxis": axis("direction, strongest first"),
        "yaxis": axis("share of variance", type="log", tickformat=".3~%", dtick=1),
    },
)
COMPARED_SPECTRA = replace(
    SPECTRA,
    section="trade",
    title="Directions that survive in decoder(codes)",
    caption="Good: a line close to that of the input. Bad: a line that drops early.",
    definition="Eigenvalues of the covariance as shares of their sum, largest first.",
    columns=SPACE_COLUMNS[1:4],
)


def _spectra(d: Diagnosis) -> Figure:
    if d.geometry is None:
        raise ValueError("the diagnosis holds no geometry")
    spaces = {space.name: space for space in d.geometry.spaces}
    traces = [
        SPECTRA.series(name, space, place + 1, dash=("solid", "dash", "solid")[place % 3])
        for place, (name, space) in enumerate(spaces.items())
    ]
    return SPECTRA.figure(
        spaces, traces=traces, rows=count(d.geometry.rows), items=count(d.geometry.items)
    )
