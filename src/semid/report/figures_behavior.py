"""Figures of robustness, geometry, behavior and relations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from semid.report.diagnosis import Diagnosis
from semid.report.figure import Figure, bars, line
from semid.report.numbers import count, number, share

__all__ = ["behavior_figures"]


def behavior_figures(d: Diagnosis) -> list[Figure]:
    """Return the figures of the test users, of popularity and of each kind of relation."""
    figures = []
    if d.behavior is not None:
        if d.behavior["measured"] is not None:
            figures += _pairs(d.behavior["measured"], "behavior", "behavior", "")
        if d.behavior["popularity"] is not None:
            figures.append(_popularity(d.behavior["popularity"]))
    for place, (kind, measured) in enumerate((d.relations or {}).items()):
        suffix = ", " + kind.replace("_", " ")
        figures += _pairs(measured, f"relations-{place}", "relations", suffix)
    return figures


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return number(None)
    value = number(estimate["value"])
    if estimate.get("low") is None:
        return value
    return f"{value} ({number(estimate['low'])} to {number(estimate['high'])})"


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
    colors: Sequence[int | str] = [1, 2, 4, 5, 6]
    traces = []
    for place, way in enumerate(ways):
        values = [way["rates"][k] for k in ks]
        traces.append(
            bars(
                way["name"],
                [f"HR@{k}" for k in ks],
                [value["value"] for value in values],
                "muted" if way["name"] == "random" else colors[place],
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
        "the codes blur an item with its near neighbors.",
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
        "behavior",
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
                share(segment["colliding_item_rate"]),
                share(segment["shared_with_head"]),
                share(segment["capacity_share"]),
            ]
            for segment in popularity["segments"]
        ],
    )
