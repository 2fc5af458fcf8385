"""What codes are worth: overlap, flips, geometry, reconstruction, retrieval, matching.

Functions on numpy arrays or torch tensors that return frozen dataclasses with `to_dict`; blocked,
and the same result for any number of threads. Drawing them is `semid.report`'s work.
"""

from semid.diagnostics.auc import MatchRate, NegativePairs, PairAucs, auc, negative_pairs, pair_aucs
from semid.diagnostics.discrete import (
    DiscreteRanks,
    DiscreteRetrieval,
    discrete_ranks,
    discrete_retrieval,
)
from semid.diagnostics.flips import (
    FlipPoint,
    FlipRates,
    MarginPoint,
    MarginProxy,
    flip_rates,
    margin_proxy,
)
from semid.diagnostics.overlap import (
    NOISE_SCALES,
    REPORT_SCALE,
    LevelOverlap,
    OverlapPoint,
    overlap,
    overlap_levels,
)
from semid.diagnostics.pairs import (
    Estimate,
    ItemPairs,
    PairCounts,
    Proportion,
    item_pairs,
    pairs_by_id,
    proportion,
    rank_agreement,
    spearman,
)
from semid.diagnostics.popularity import (
    PopularityHealth,
    PopularitySegment,
    popularity_health,
    popularity_segments,
)
from semid.diagnostics.retrieval import (
    CUTOFFS,
    HitRates,
    ItemRetrieval,
    Retention,
    item_retrieval,
    neighbor_ranks,
)
from semid.diagnostics.spaces import (
    Geometry,
    Reconstruction,
    geometry,
    latent_std,
    reconstruction,
    reconstruction_by_level,
    sample_rows,
)

__all__ = [
    "CUTOFFS",
    "NOISE_SCALES",
    "REPORT_SCALE",
    "DiscreteRanks",
    "DiscreteRetrieval",
    "Estimate",
    "FlipPoint",
    "FlipRates",
    "Geometry",
    "HitRates",
    "ItemPairs",
    "ItemRetrieval",
    "LevelOverlap",
    "MarginPoint",
    "MarginProxy",
    "MatchRate",
    "NegativePairs",
    "OverlapPoint",
    "PairAucs",
    "PairCounts",
    "PopularityHealth",
    "PopularitySegment",
    "Proportion",
    "Reconstruction",
    "Retention",
    "auc",
    "discrete_ranks",
    "discrete_retrieval",
    "flip_rates",
    "geometry",
    "item_pairs",
    "item_retrieval",
    "latent_std",
    "margin_proxy",
    "negative_pairs",
    "neighbor_ranks",
    "overlap",
    "overlap_levels",
    "pair_aucs",
    "pairs_by_id",
    "popularity_health",
    "popularity_segments",
    "proportion",
    "rank_agreement",
    "reconstruction",
    "reconstruction_by_level",
    "sample_rows",
    "spearman",
]
