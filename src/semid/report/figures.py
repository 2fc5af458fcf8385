"""Figures of a report as data: plotly traces, a caption that says good from bad, a table.

Colors are names (``@1`` to ``@7``, ``@muted``) that the page replaces by those of its theme.
"""

from __future__ import annotations

from semid.report.diagnosis import Diagnosis
from semid.report.figure import Figure, bars, level_name, line
from semid.report.figures_behavior import behavior_figures
from semid.report.figures_robustness import robustness_figures
from semid.report.numbers import count, number, share

__all__ = ["report_figures"]


def report_figures(diagnosis: Diagnosis) -> list[Figure]:
    """Return the figures of a diagnosis, in the order of the page."""
    makers = (
        _usage,
        _buckets,
        _reconstruction,
        _effective_size,
        robustness_figures,
        behavior_figures,
    )
    return [figure for maker in makers for figure in maker(diagnosis)]


def _usage(d: Diagnosis) -> list[Figure]:
    traces = [
        line(
            level_name(d, u["level"]),
            u["rank_frequency"]["rank"],
            [s or None for s in u["rank_frequency"]["share"]],
            u["level"] % 7 + 1,
            hovertemplate="rank %{x}: %{y:.3%} of items",
        )
        for u in d.usage
    ]
    for size in sorted({u["codebook_size"] for u in d.usage}):
        traces.append(
            line(f"even use of {size:,}", [1, size], [1 / size] * 2, "muted", dash="dot", width=1)
        )
    rows = [
        [
            level_name(d, u["level"]),
            count(u["codebook_size"]),
            number(u["perplexity"]),
            count(u["dead"]),
            number(u["gini"]),
            share(u["largest_share"]),
        ]
        for u in d.usage
    ]
    return [
        Figure(
            "usage",
            "codes",
            "How evenly each codebook is used",
            "Good: a flat line near the dotted one. Bad: a steep fall, or a line that ends early "
            "because the remaining codes are dead.",
            "Share of the items that hold each code, most used code first. Perplexity is exp(H) of "
            "these shares: the number of evenly used codes that would carry as much. Gini is 0 for "
            "even use; dead codes have no item.",
            traces,
            {
                "xaxis": {"title": {"text": "code, most used first"}},
                "yaxis": {
                    "title": {"text": "share of items"},
                    "type": "log",
                    "tickformat": ".2~%",
                    "dtick": 1,
                },
            },
            ["", "Codes", "Perplexity", "Dead", "Gini", "Largest code"],
            rows,
        )
    ]


def _size_bins(histogram: dict[str, int]) -> list[tuple[str, int, int]]:
    """Group bucket sizes into 1, 2, 3, 4 and then doublings; return label, buckets, items."""
    bins: dict[tuple[int, int], list[int]] = {}
    for text, buckets in histogram.items():
        size = int(text)
        low = size if size <= 4 else 1 << ((size - 1).bit_length() - 1)
        edges = (size, size) if size <= 4 else (low + 1, 2 * low)
        total = bins.setdefault(edges, [0, 0])
        total[0] += buckets
        total[1] += buckets * size
    return [
        (f"{a}" if a == b else f"{a:,} to {b:,}", total[0], total[1])
        for (a, b), total in sorted(bins.items())
    ]


def _buckets(d: Diagnosis) -> list[Figure]:
    collisions = d.verdict.collisions
    bins = _size_bins(collisions.to_dict()["histogram"])
    labels = [label for label, _, _ in bins]
    shares = [items / collisions.items for _, _, items in bins]
    return [
        Figure(
            "buckets",
            "codes",
            "How many items share one id",
            "Good: nearly all items stand alone in their bucket. Bad: items far to the right, "
            "where many share one id and nothing can tell them apart.",
            "A bucket is all items with one whole id. Two rates are in use: 1 - unique/N counts "
            "the ids that are missing, the shared share counts the items that are not alone. Exact "
            "copies of an embedding must collide and are counted apart.",
            [
                bars(
                    "items",
                    labels,
                    shares,
                    1,
                    customdata=[[count(b), count(i)] for _, b, i in bins],
                    hovertemplate="%{y:.2%}: %{customdata[1]} items in %{customdata[0]} buckets"
                    "<extra></extra>",
                )
            ],
            {
                "xaxis": {"title": {"text": "items in the bucket"}, "type": "category"},
                "yaxis": {"title": {"text": "share of items"}, "tickformat": ".0%"},
                "showlegend": False,
            },
            ["Items in bucket", "Buckets", "Items", "Share of items"],
            [
                [label, count(buckets), count(items), share(items / collisions.items)]
                for label, buckets, items in bins
            ],
        )
    ]


_GROUPS = {"training": "fitted on", "held_out": "held out", "all": "all items"}


def _reconstruction(d: Diagnosis) -> list[Figure]:
    levels = d.reconstruction["per_level"]
    groups = ["training", "held_out"] if "held_out" in levels[0] else ["all"]
    prefix = d.reconstruction["per_level_kind"] == "prefix"
    names = [level_name(d, level["level"]) for level in levels]
    whole = d.reconstruction["relative_error"]
    traces = [
        line(
            _GROUPS[group],
            names,
            [level[group] for level in levels],
            place + 1,
            mode="lines+markers" if prefix else "markers",
            hovertemplate="%{y:.3f}",
        )
        for place, group in enumerate(groups)
    ]
    rows = [
        [name, *(number(level[group]) for group in groups)]
        for name, level in zip(names, levels, strict=True)
    ]
    rows.append(["Whole code, decoded", *(number(whole[group]) for group in groups)])
    return [
        Figure(
            "reconstruction",
            "codes",
            "What each level leaves" if prefix else "What each codebook alone leaves",
            (
                "Good: every level lowers the line, and held-out items lie close above the fitted "
                "ones. Bad: a level that adds nothing, or held-out items far above."
                if prefix
                else "Good: all codebooks low and the whole code lower still. Bad: a codebook near "
                "1, which knows no more than the mean."
            ),
            "Squared distance between an item's latent vector and its codewords"
            + (" up to this level" if prefix else " of this codebook")
            + ", over the squared distance of the same latent vectors to the mean of all: 1 is no "
            "better than the mean, 0 is lossless. The last row is decoder(codes) in the input "
            "space.",
            traces,
            {
                "xaxis": {"type": "category", "range": [-0.4, len(names) - 0.6]},
                "yaxis": {"title": {"text": "relative error"}, "rangemode": "tozero"},
            },
            ["", *(_GROUPS[group] for group in groups)],
            rows,
        )
    ]


def _effective_size(d: Diagnosis) -> list[Figure]:
    if not d.overlap:
        return []
    traces = []
    rows = []
    for level in d.overlap:
        scales = [point["scale"] for point in level["points"]]
        color = level["level"] % 7 + 1
        traces.append(
            line(
                level_name(d, level["level"]),
                scales,
                [point["effective_size"] for point in level["points"]],
                color,
                mode="lines+markers",
                hovertemplate="noise %{x}: %{y:.1f} codes",
            )
        )
        floor = level["points"][0]["collision_probability"]
        traces.append(
            line(
                f"usage alone, {level_name(d, level['level']).lower()}",
                [scales[0], scales[-1]],
                [1 / floor] * 2,
                color,
                dash="dot",
                width=1,
                showlegend=False,
                hoverinfo="skip",
            )
        )
        shown = next(point for point in level["points"] if point["scale"] == 0.1)
        rows.append(
            [
                level_name(d, level["level"]),
                number(shown["effective_size"]),
                number(1 / shown["collision_probability"]),
                share(shown["geometry_share"]),
                "beyond the sweep"
                if level["geometry_scale"] is None
                else f"{level['geometry_scale']:g}",
            ]
        )
    return [
        Figure(
            "overlap",
            "robustness",
            "Codes that stay apart under noise",
            "Good: a line on its dotted floor until noise is large. Bad: a line that leaves the "
            "floor early; there, codewords lie so close that chance decides between them.",
            "Effective codebook size 1/R, where R is the expected overlap of two items' codewords "
            "under noise on the latent. The dotted line is what usage alone gives: while a level "
            "sits on it, this figure says nothing about geometry. It does not predict how many ids "
            "flip; the figure of flips measures that.",
            traces,
            {
                "xaxis": {
                    "title": {"text": "noise, in latent standard deviations"},
                    "type": "log",
                    "tickvals": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3],
                    "ticktext": ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "3"],
                },
                "yaxis": {"title": {"text": "effective codes"}, "rangemode": "tozero"},
            },
            [
                "",
                "Effective size at 0.1",
                "Usage alone",
                "Geometry's share of R",
                "Geometry shows at",
            ],
            rows,
        )
    ]
