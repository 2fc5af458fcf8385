"""The figures of item pairs and of popularity: retrieval, retention, AUCs, capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from semid.diagnostics.auc import MatchRate
from semid.diagnostics.popularity import PopularityHealth, PopularitySegment
from semid.diagnostics.retrieval import HitRates, Retention
from semid.report import figure as fig
from semid.report.results import PairResults

HITS: fig.Plot[HitRates] = fig.declared(
    "hits",
    x=lambda way: [f"HR@{k}" for k in way.rates],
    y=lambda way: [estimate.value for estimate in way.rates.values()],
    estimates=lambda way: list(way.rates.values()),
)
RETENTION: fig.Plot[Retention] = fig.declared(
    "retention",
    x=lambda way: way.above_chance,
    y=lambda way: [None if e is None else e.value for e in way.above_chance.values()],
    estimates=lambda way: list(way.above_chance.values()),
)
AUCS: fig.Plot[Any] = fig.declared(
    "aucs",
    columns=(fig.Column("AUC", lambda estimate: estimate, fig.interval),),
)
READINGS = {
    "exact_full": "whole id equal",
    "exact_prefix": "length of common prefix",
    "exact_count": "number of equal codes",
    "weighted": "codeword cosine, weighted by level",
    "weighted_equality": "equal codes, weighted by level",
}
MATCHES: fig.Plot[MatchRate] = fig.declared("matches")
POPULARITY: fig.Plot[PopularitySegment] = fig.declared("popularity")


def _hit_rate(k: int) -> fig.Column[HitRates]:
    return fig.Column(f"HR@{k}", lambda way: way.rates[k], fig.interval)


def pair_figures(measured: PairResults, prefix: str, section: str, suffix: str) -> list[fig.Figure]:
    """Return the figures of one set of item pairs."""
    pairs, ks = measured.pairs, measured.cutoffs
    clusters = "users" if pairs.by_user else "query items"
    facts: dict[str, Any] = {
        "prefix": prefix,
        "section": section,
        "suffix": suffix,
        "pairs": f"{fig.count(pairs.pairs)} pairs of {fig.count(pairs.clusters)} {clusters}",
    }
    # Retrieval by embeddings and by whole ids in one chart, with chance as the reference; the table
    # has the shorter prefixes too.
    *embeddings, chance = measured.retrieval.hit_rates
    depths = measured.discrete.depths
    ways = {way.name: way for way in embeddings} | {"whole id": depths[-1], chance.name: chance}
    colors: dict[str, int | str] = dict(zip(ways, (1, 2, 4, 5, 6), strict=False))
    colors[chance.name] = "muted"
    hits = replace(HITS, columns=tuple(_hit_rate(k) for k in ks)).figure(
        {way.name: way for way in (*measured.retrieval.hit_rates, *depths)},
        traces=[HITS.series(name, way, colors[name]) for name, way in ways.items()],
        candidates=fig.count(pairs.pool - 1),
        **facts,
    )
    retention = RETENTION.figure(
        {},
        traces=[
            *(
                RETENTION.series(way.name, way, place + 2)
                for place, way in enumerate(measured.retrieval.retention)
            ),
            fig.line("as good as the original", ks, [1.0] * len(ks), "muted", **fig.REFERENCE),
        ],
        layout={"xaxis": fig.axis("K", ticks=ks)},
        **facts,
    )
    # The table has two rows per reconstruction, which a declaration cannot say.
    retention = replace(
        retention,
        columns=["", *(f"K = {k}" for k in ks)],
        rows=[
            [f"{way.name}, {what}", *(fig.interval(values[k]) for k in ks)]
            for way in measured.retrieval.retention
            for what, values in (("above chance", way.above_chance), ("plain ratio", way.plain))
        ],
    )
    return [hits, retention, _aucs(measured, facts), _matches(measured, facts)]


def _aucs(measured: PairResults, facts: dict[str, Any]) -> fig.Figure:
    aucs = {READINGS.get(name, name): value for name, value in measured.aucs.aucs.items()}
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [estimate.value for estimate in aucs.values()],
        "y": list(aucs),
        "marker": {"color": "@1", "size": 9},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        **fig.error_bars(list(aucs.values()), along="x"),
    }
    return AUCS.figure(
        aucs, traces=[trace], per_pair=measured.aucs.per_pair, seed=measured.aucs.seed, **facts
    )


def _matches(measured: PairResults, facts: dict[str, Any]) -> fig.Figure:
    hierarchical = measured.aucs.hierarchical
    columns: tuple[fig.Column[MatchRate], ...] = (
        fig.Column("Related pairs", lambda m: m.rates(hierarchical)[0], fig.share),
        fig.Column("Random pairs", lambda m: m.rates(hierarchical)[1], fig.share),
        fig.Column("Ratio", lambda m: m.ratio(hierarchical), fig.number),
    )
    return replace(MATCHES, columns=columns).figure(
        {
            f"levels 1 to {match.depth}" if hierarchical else f"codebook {match.depth}": match
            for match in measured.aucs.matches
        },
        where="all levels up to this one" if hierarchical else "this codebook",
        **facts,
    )


def popularity_figure(popularity: PopularityHealth) -> fig.Figure:
    """Return the figure of collisions and capacity by popularity."""
    segments = {segment.name: segment for segment in popularity.segments}
    return POPULARITY.figure(segments, shared=fig.share(popularity.interactions_in_shared_ids))
