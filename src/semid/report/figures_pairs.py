"""The figures of item pairs and of popularity: retrieval, retention, AUCs, capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from semid.diagnostics.auc import MatchRate
from semid.diagnostics.popularity import PopularityHealth, PopularitySegment
from semid.diagnostics.retrieval import HitRates, Retention
from semid.report.figure import (
    REFERENCE,
    Column,
    Figure,
    Plot,
    axis,
    count,
    error_bars,
    interval,
    line,
    number,
    share,
)
from semid.report.results import PairResults

__all__ = ["pair_figures", "popularity_figure"]

HITS = Plot[HitRates](
    "{prefix}-hits",
    "{section}",
    "Finding the other item{suffix}",
    "Good: decoder(codes) close under the original embedding, and the id itself far above random. "
    "Bad: bars near random, where codes have lost what people take together.",
    "HR@K over {pairs}: the share whose second item is among the K first of {candidates} "
    "candidates, by cosine of embeddings, or by longest common prefix (parallel codebooks: number "
    "of equal codes) with ties in a seeded random order. Intervals of 95% are over users.",
    x=lambda way: [f"HR@{k}" for k in way.rates],
    y=lambda way: [estimate.value for estimate in way.rates.values()],
    mark="bars",
    hover="%{y:.2%}",
    estimates=lambda way: list(way.rates.values()),
    layout={
        "barmode": "group",
        "bargap": 0.25,
        "yaxis": axis("hit rate", tickformat=".0%", rangemode="tozero"),
        "xaxis": {"type": "category"},
    },
)
RETENTION = Plot[Retention](
    "{prefix}-retention",
    "{section}",
    "Retrieval that survives the codes{suffix}",
    "Good: near or above the dotted line at every K. Bad: a line that sinks at small K, where the "
    "codes blur an item with its near neighbors.",
    "Retention@K = (HR of the reconstruction - HR of chance) / (HR of the original - HR of "
    "chance). It is not bounded by 1. The plain ratio of hit rates stands in the table.",
    x=lambda way: way.above_chance,
    y=lambda way: [None if e is None else e.value for e in way.above_chance.values()],
    mark="lines+markers",
    hover="K = %{x}: %{y:.1%}",
    estimates=lambda way: list(way.above_chance.values()),
    layout={"yaxis": axis("retention", tickformat=".0%", rangemode="tozero")},
)
AUCS = Plot[Any](
    "{prefix}-aucs",
    "{section}",
    "Telling related pairs from random ones{suffix}",
    "Good: the readings of the codes close to the original embedding. Bad: 0.5, which is chance; a "
    "low value for the whole id alone is normal, for few pairs share all codes.",
    "AUC over {pairs} and {per_pair} random negatives each, the same for all readings (seed "
    "{seed}); ties count one half. The papers name the readings and print no formula; these are "
    "ours.",
    columns=(Column("AUC", lambda estimate: estimate, interval),),
    head="Reading",
    layout={
        "xaxis": axis("AUC", showgrid=True, range=[0.45, 1.0]),
        "yaxis": {"type": "category", "autorange": "reversed"},
        "showlegend": False,
    },
)
READINGS = {
    "exact_full": "whole id equal",
    "exact_prefix": "length of common prefix",
    "exact_count": "number of equal codes",
    "weighted": "codeword cosine, weighted by level",
    "weighted_equality": "equal codes, weighted by level",
}
MATCHES = Plot[MatchRate](
    "{prefix}-matches",
    "{section}",
    "How often codes match{suffix}",
    "Good: related pairs match many times as often as random ones, at every depth. Bad: a ratio "
    "near 1, or matches so rare that depth says nothing.",
    "Share of pairs whose codes are equal in {where}.",
)
POPULARITY = Plot[PopularitySegment](
    "popularity",
    "behavior",
    "How popular and rare items share the id space",
    "Good: popular items hold at least their share of ids and seldom share one. Bad: a head that "
    "shares ids with the tail, since its traffic then teaches the wrong items.",
    "Items by their interactions: the head is the top tenth of those with interactions, the mid "
    "the next four tenths. Capacity is the share of all ids; an id held by several items is "
    "divided among them. Of all interactions, {shared} fall on items that share their id.",
    columns=(
        Column("Items", lambda s: s.items, count),
        Column("Interactions", lambda s: s.interaction_share, share),
        Column("Collision rate", lambda s: s.collision_rate, share),
        Column("Colliding items", lambda s: s.colliding_item_rate, share),
        Column("Share an id with the head", lambda s: s.shared_with_head, share),
        Column("Capacity", lambda s: s.capacity_share, share),
    ),
)


def _hit_rate(k: int) -> Column[HitRates]:
    return Column(f"HR@{k}", lambda way: way.rates[k], interval)


def pair_figures(measured: PairResults, prefix: str, section: str, suffix: str) -> list[Figure]:
    """Return the figures of one set of item pairs."""
    pairs, ks = measured.pairs, measured.cutoffs
    clusters = "users" if pairs.by_user else "query items"
    facts: dict[str, Any] = {
        "prefix": prefix,
        "section": section,
        "suffix": suffix,
        "pairs": f"{count(pairs.pairs)} pairs of {count(pairs.clusters)} {clusters}",
    }
    *embeddings, chance = measured.retrieval.hit_rates
    depths = measured.discrete.depths
    ways = {way.name: way for way in embeddings} | {"whole id": depths[-1], chance.name: chance}
    colors: dict[str, int | str] = dict(zip(ways, (1, 2, 4, 5, 6), strict=False))
    colors[chance.name] = "muted"
    hits = replace(
        HITS,
        columns=tuple(_hit_rate(k) for k in ks),
    ).figure(
        {way.name: way for way in (*measured.retrieval.hit_rates, *depths)},
        traces=[HITS.series(name, way, colors[name]) for name, way in ways.items()],
        candidates=count(pairs.pool - 1),
        **facts,
    )
    retention = RETENTION.figure(
        {},
        traces=[
            *(
                RETENTION.series(way.name, way, place + 2)
                for place, way in enumerate(measured.retrieval.retention)
            ),
            line("as good as the original", ks, [1.0] * len(ks), "muted", **REFERENCE),
        ],
        layout={"xaxis": axis("K", ticks=ks)},
        **facts,
    )
    retention = replace(
        retention,
        columns=["", *(f"K = {k}" for k in ks)],
        rows=[
            [f"{way.name}, {what}", *(interval(values[k]) for k in ks)]
            for way in measured.retrieval.retention
            for what, values in (("above chance", way.above_chance), ("plain ratio", way.plain))
        ],
    )
    return [hits, retention, _aucs(measured, facts), _matches(measured, facts)]


def _aucs(measured: PairResults, facts: dict[str, Any]) -> Figure:
    aucs = {READINGS.get(name, name): value for name, value in measured.aucs.aucs.items()}
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [estimate.value for estimate in aucs.values()],
        "y": list(aucs),
        "marker": {"color": "@1", "size": 9},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        **error_bars(list(aucs.values()), along="x"),
    }
    return AUCS.figure(
        aucs, traces=[trace], per_pair=measured.aucs.per_pair, seed=measured.aucs.seed, **facts
    )


def _matches(measured: PairResults, facts: dict[str, Any]) -> Figure:
    hierarchical = measured.aucs.hierarchical
    columns: tuple[Column[MatchRate], ...] = (
        Column("Related pairs", lambda m: m.rates(hierarchical)[0], share),
        Column("Random pairs", lambda m: m.rates(hierarchical)[1], share),
        Column("Ratio", lambda m: m.ratio(hierarchical), number),
    )
    return replace(MATCHES, columns=columns).figure(
        {
            f"levels 1 to {match.depth}" if hierarchical else f"codebook {match.depth}": match
            for match in measured.aucs.matches
        },
        where="all levels up to this one" if hierarchical else "this codebook",
        **facts,
    )


def popularity_figure(popularity: PopularityHealth) -> Figure:
    """Return the figure of collisions and capacity by popularity."""
    segments = {segment.name: segment for segment in popularity.segments}
    return POPULARITY.figure(segments, shared=share(popularity.interactions_in_shared_ids))
