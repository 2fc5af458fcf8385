"""Figures of robustness, geometry, behaviour and relations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semid.report.diagnosis import Diagnosis
from semid.report.figure import Figure, bars, level_name, line
from semid.report.numbers import count, number, share

__all__ = ["behaviour_figures", "robustness_figures"]


def robustness_figures(d: Diagnosis) -> list[Figure]:
    """Return the figures of flips and of spectra."""
    return [*_flips(d), *_spectra(d)]


def behaviour_figures(d: Diagnosis) -> list[Figure]:
    """Return the figures of the test users, of popularity and of each kind of relation."""
    figures = []
    if d.behaviour is not None:
        if d.behaviour["measured"] is not None:
            figures += _pairs(d.behaviour["measured"], "behaviour", "behaviour", "")
        if d.behaviour["popularity"] is not None:
            figures.append(_popularity(d.behaviour["popularity"]))
    for place, (kind, measured) in enumerate((d.relations or {}).items()):
        figures += _pairs(measured, f"relations-{place}", "relations", f", {_plain(kind)}")
    return figures


def _plain(kind: str) -> str:
    return kind.replace("_", " ")


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return number(None)
    value = number(estimate["value"])
    if estimate.get("low") is None:
        return value
    return f"{value} ({number(estimate['low'])} to {number(estimate['high'])})"


def _flips(d: Diagnosis) -> list[Figure]:
    if d.flips is None:
        return []
    points = d.flips["input"]["flips"]["points"]
    margins = d.flips["input"]["margins"]["points"]
    scales = [point["scale"] for point in points]
    kind = "prefix" if d.model["hierarchical"] else "code"
    traces = []
    for level in range(d.model["levels"]):
        colour = level % 7 + 1
        shares = [point[kind][level] for point in points]
        name = f"up to level {level + 1}" if kind == "prefix" else level_name(d, level)
        traces.append(
            line(
                name,
                scales,
                [value["value"] for value in shares],
                colour,
                mode="lines+markers",
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [value["high"] - value["value"] for value in shares],
                    "arrayminus": [value["value"] - value["low"] for value in shares],
                    "thickness": 1,
                    "width": 2,
                    "color": f"@{colour}",
                },
                hovertemplate="noise %{x}: %{y:.1%}",
            )
        )
        traces.append(
            line(
                f"margin proxy, {name}",
                scales,
                [margin[kind][level] for margin in margins],
                colour,
                dash="dot",
                width=1,
                showlegend=False,
                hoverinfo="skip",
            )
        )
    return [
        Figure(
            "flips",
            "robustness",
            "Ids that change under noise on the input",
            "Good: lines that stay low at small noise, so that a refreshed embedding keeps its id. "
            "Bad: many ids that flip at 0.1 or 0.2; few collisions are then bought with noise.",
            "Gaussian noise is added to the embeddings, in units of their standard deviation, and "
            "they are encoded again. Whole lines are measured shares with 95% intervals; dotted "
            "lines are the margin proxy, a closed form from the distance of each item to the "
            "borders of its cell.",
            traces,
            {
                "xaxis": {
                    "title": {"text": "noise, in input standard deviations"},
                    "type": "log",
                    "tickvals": scales,
                    "ticktext": [f"{scale:g}" for scale in scales],
                },
                "yaxis": {
                    "title": {"text": "share of items"},
                    "tickformat": ".0%",
                    "range": [0, 1],
                },
            },
            ["Noise", *_flip_columns(d, kind)],
            _flip_rows(d, kind),
        )
    ]


def _flip_columns(d: Diagnosis, kind: str) -> list[str]:
    names = [
        f"up to level {level + 1}" if kind == "prefix" else level_name(d, level)
        for level in range(d.model["levels"])
    ]
    spaces = ["input"] if "latent" not in (d.flips or {}) else ["input", "latent"]
    return [
        f"{name}, {space}{what}"
        for space in spaces
        for name in names[-1:]
        for what in ("", " (proxy)")
    ] + [f"{name}, input" for name in names[:-1]]


def _flip_rows(d: Diagnosis, kind: str) -> list[list[str]]:
    flips = d.flips or {}
    spaces = [space for space in ("input", "latent") if space in flips]
    rows = []
    for place, point in enumerate(flips["input"]["flips"]["points"]):
        row = [f"{point['scale']:g}"]
        for space in spaces:
            row.append(share(flips[space]["flips"]["points"][place][kind][-1]["value"]))
            row.append(share(flips[space]["margins"]["points"][place][kind][-1]))
        row += [share(value["value"]) for value in point[kind][:-1]]
        rows.append(row)
    return rows


def _spectra(d: Diagnosis) -> list[Figure]:
    if d.geometry is None:
        return []
    spaces = d.geometry["spaces"]
    return [
        Figure(
            "spectra",
            "geometry",
            "Directions that carry variance",
            "Good: the three lines lie together, so codes keep the directions of the embedding. "
            "Bad: a line that drops early, where a space has collapsed onto few directions.",
            "Eigenvalues of the covariance as shares of their sum, largest first, on a random "
            f"{count(d.geometry['rows'])} of {count(d.geometry['items'])} items. Participation "
            "ratio and effective rank count the directions in use, from 1 to the width. The cosine "
            "is the mean absolute one between distinct dimensions, as they are and centred.",
            [
                line(
                    space["name"],
                    space["spectrum"]["rank"],
                    [value if value > 1e-9 else None for value in space["spectrum"]["share"]],
                    place + 1,
                    dash=("solid", "dash", "solid")[place % 3],
                    hovertemplate="direction %{x}: %{y:.2%}",
                )
                for place, space in enumerate(spaces)
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
            [
                "",
                "Width",
                "Participation ratio",
                "Effective rank",
                "Top share",
                "Mean absolute cosine",
                "Centred",
            ],
            [
                [
                    space["name"],
                    count(space["dim"]),
                    number(space["participation_ratio"]),
                    number(space["effective_rank"]),
                    share(space["top_share"]),
                    number(space["mean_abs_cosine"]),
                    number(space["mean_abs_cosine_centred"]),
                ]
                for space in spaces
            ],
        )
    ]


def _pairs(measured: Mapping[str, Any], prefix: str, section: str, suffix: str) -> list[Figure]:
    return [
        _hit_rates(measured, prefix, section, suffix),
        _retention(measured, prefix, section, suffix),
        _aucs(measured, prefix, section, suffix),
        _matches(measured, prefix, section, suffix),
    ]


def _cases(measured: Mapping[str, Any]) -> str:
    pairs = measured["pairs"]
    owners = "users" if pairs["by_user"] else "query items"
    return f"{count(pairs['pairs'])} pairs of {count(pairs['clusters'])} {owners}"


def _hit_rates(measured: Mapping[str, Any], prefix: str, section: str, suffix: str) -> Figure:
    ks = [str(k) for k in measured["cutoffs"]]
    rates = measured["retrieval"]["hit_rates"]
    ways = [*rates[:-1], {**measured["discrete"]["depths"][-1], "name": "whole id"}, rates[-1]]
    colours: Sequence[int | str] = [1, 2, 4, 5, 6]
    traces = []
    for place, way in enumerate(ways):
        values = [way["rates"][k] for k in ks]
        traces.append(
            bars(
                way["name"],
                [f"HR@{k}" for k in ks],
                [value["value"] for value in values],
                "muted" if way["name"] == "random" else colours[place],
                hovertemplate="%{y:.2%}",
                **_error_bars(values),
            )
        )
    return Figure(
        f"{prefix}-hits",
        section,
        f"Finding the other item{suffix}",
        "Good: decoder(codes) close under the original embedding, and the id itself far above "
        "random. Bad: bars near random, where codes have lost what people take together.",
        f"HR@K over {_cases(measured)}: the share whose second item is among the K first of "
        f"{count(measured['pairs']['pool'] - 1)} candidates, by cosine of embeddings, or by "
        "longest common prefix (parallel codebooks: number of equal codes) with ties in a seeded "
        "random order. Intervals of 95% are over users.",
        traces,
        {
            "barmode": "group",
            "bargap": 0.25,
            "yaxis": {"title": {"text": "hit rate"}, "tickformat": ".0%", "rangemode": "tozero"},
            "xaxis": {"type": "category"},
        },
        ["", *(f"HR@{k}" for k in ks)],
        [
            [way["name"], *(_interval(way["rates"][k]) for k in ks)]
            for way in [*rates, *measured["discrete"]["depths"]]
        ],
    )


def _error_bars(values: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    if any(value is None or value.get("low") is None for value in values):
        return {}
    known = [value for value in values if value is not None]
    return {
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [value["high"] - value["value"] for value in known],
            "arrayminus": [value["value"] - value["low"] for value in known],
            "thickness": 1,
            "width": 2,
            "color": "@muted",
        }
    }


def _retention(measured: Mapping[str, Any], prefix: str, section: str, suffix: str) -> Figure:
    ks = [str(k) for k in measured["cutoffs"]]
    kept = measured["retrieval"]["retention"]
    traces = [
        line(
            way["name"],
            measured["cutoffs"],
            [
                None if way["above_chance"][k] is None else way["above_chance"][k]["value"]
                for k in ks
            ],
            place + 2,
            mode="lines+markers",
            hovertemplate="K = %{x}: %{y:.1%}",
            **_error_bars([way["above_chance"][k] for k in ks]),
        )
        for place, way in enumerate(kept)
    ]
    traces.append(
        line(
            "as good as the original",
            measured["cutoffs"],
            [1.0] * len(ks),
            "muted",
            dash="dot",
            width=1,
        )
    )
    return Figure(
        f"{prefix}-retention",
        section,
        f"Retrieval that survives the codes{suffix}",
        "Good: near or above the dotted line at every K. Bad: a line that sinks at small K, where "
        "the codes blur an item with its near neighbours.",
        "Retention@K = (HR of the reconstruction - HR of chance) / (HR of the original - HR of "
        "chance). It is not bounded by 1. The plain ratio of hit rates stands in the table.",
        traces,
        {
            "xaxis": {
                "title": {"text": "K"},
                "type": "log",
                "tickvals": measured["cutoffs"],
                "ticktext": ks,
            },
            "yaxis": {"title": {"text": "retention"}, "tickformat": ".0%", "rangemode": "tozero"},
        },
        ["", *(f"K = {k}" for k in ks)],
        [
            row
            for way in kept
            for row in (
                [f"{way['name']}, above chance", *(_interval(way["above_chance"][k]) for k in ks)],
                [f"{way['name']}, plain ratio", *(_interval(way["plain"][k]) for k in ks)],
            )
        ],
    )


_READINGS = {
    "exact_full": "whole id equal",
    "exact_prefix": "length of common prefix",
    "exact_count": "number of equal codes",
    "weighted": "codeword cosine, weighted by level",
    "weighted_equality": "equal codes, weighted by level",
}


def _aucs(measured: Mapping[str, Any], prefix: str, section: str, suffix: str) -> Figure:
    found = measured["aucs"]["aucs"]
    rows = [[_READINGS.get(name, name), _interval(estimate)] for name, estimate in found.items()]
    names = [_READINGS.get(name, name) for name in found]
    values = list(found.values())
    bound = _error_bars(values)
    if bound:
        bound = {"error_x": bound["error_y"]}
    return Figure(
        f"{prefix}-aucs",
        section,
        f"Telling related pairs from random ones{suffix}",
        "Good: the readings of the codes close to the original embedding. Bad: 0.5, which is "
        "chance; a low value for the whole id alone is normal, for few pairs share all codes.",
        f"AUC over {_cases(measured)} and {measured['aucs']['per_pair']} random negatives each, "
        f"the same for all readings (seed {measured['aucs']['seed']}); ties count one half. The "
        "papers name the readings and print no formula; these are ours.",
        [
            {
                "type": "scatter",
                "mode": "markers",
                "x": [estimate["value"] for estimate in values],
                "y": names,
                "marker": {"color": "@1", "size": 9},
                "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
                **bound,
            }
        ],
        {
            "xaxis": {"title": {"text": "AUC"}, "showgrid": True, "range": [0.45, 1.0]},
            "yaxis": {"type": "category", "autorange": "reversed"},
            "showlegend": False,
        },
        ["Reading", "AUC"],
        rows,
    )


def _matches(measured: Mapping[str, Any], prefix: str, section: str, suffix: str) -> Figure:
    hierarchical = measured["aucs"]["hierarchical"]
    kind = "prefix" if hierarchical else "code"
    rows = []
    for match in measured["aucs"]["matches"]:
        positive, negative = match[f"{kind}_positive"], match[f"{kind}_negative"]
        rows.append(
            [
                f"levels 1 to {match['depth']}" if hierarchical else f"codebook {match['depth']}",
                share(positive),
                share(negative),
                number(positive / negative) if negative > 0 else number(None),
            ]
        )
    return Figure(
        f"{prefix}-matches",
        section,
        f"How often codes match{suffix}",
        "Good: related pairs match many times as often as random ones, at every depth. Bad: a "
        "ratio near 1, or matches so rare that depth says nothing.",
        "Share of pairs whose codes are equal"
        + (" in all levels up to this one." if hierarchical else " in this codebook."),
        (),
        {},
        ["", "Related pairs", "Random pairs", "Ratio"],
        rows,
    )


def _popularity(popularity: Mapping[str, Any]) -> Figure:
    return Figure(
        "popularity",
        "behaviour",
        "Who gets room in the id space",
        "Good: popular items hold at least their share of ids and seldom share one. Bad: a head "
        "that shares ids with the tail, since its traffic then teaches the wrong items.",
        "Items by their interactions: the head is the top tenth of those seen, the mid the next "
        "four tenths. Capacity is the share of all ids; an id held by several items is divided "
        "among them. Of all interactions, "
        f"{share(popularity['interactions_in_shared_ids'])} fall on items that share their id.",
        (),
        {},
        [
            "",
            "Items",
            "Interactions",
            "Collision rate",
            "Not alone",
            "Share an id with the head",
            "Capacity",
        ],
        [
            [
                segment["name"],
                count(segment["items"]),
                share(segment["interaction_share"]),
                share(segment["collision_rate"]),
                share(segment["shared_share"]),
                share(segment["shared_with_head"]),
                share(segment["capacity_share"]),
            ]
            for segment in popularity["segments"]
        ],
    )
