"""The DRQ paper as data: what its words claim, and the tables that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from semid.diagnostics.flips import rank_agreement
from semid.reproduce.claims import (
    Claim,
    Comparison,
    Contrast,
    Metric,
    Row,
    Rows,
    claim,
    constant,
    inside,
    metric,
    negated,
    relative_change,
)
from semid.reproduce.paired import paired_difference

__all__ = ["TITLE", "TOKENIZERS", "drq_claims", "effective_size", "flip_rate"]

TITLE = "Decoupled Residual Quantization for Robust Semantic IDs (DRQ)"
TOKENIZERS = ("RQ-VAE", "RQP-VAE", "RQ-KMeans", "DRQ-VAE", "DRQ-VAE+CL")
GEOMETRY = (
    "participation_ratio",
    "effective_rank",
    "top_share",
    "mean_abs_cosine",
    "mean_abs_cosine_centered",
)
NOISE = 0.1
"""The noise at which overlap is judged; the page shows the whole sweep."""


def overlap(level: int, key: str, noise: float = NOISE) -> Metric:
    """Return a metric of a level's overlap at a noise."""

    def read(row: Row) -> float | None:
        scales = row["scale"]
        return float(row[key][scales.index(noise)]) if noise in scales else None

    return inside(("overlap", level), read)


def effective_size(level: int) -> Metric:
    """Return the metric K_eff of a level."""
    return overlap(level, "effective_size")


def flip_rate(noise: float, space: str = "input", key: str = "id") -> Metric:
    """Return the metric: the share of ids that noise on a space changes."""

    def read(row: Row) -> float | None:
        flips = row.get("flips") or {}
        # A tokenizer without an encoder has one space, which is measured once.
        points = flips.get(space) or (flips.get("input") if flips.get("latent_is_input") else None)
        if not points or noise not in points["scale"]:
            return None
        return float(points[key][points["scale"].index(noise)])

    return read


def latent(key: str) -> Metric:
    """Return a metric of the latent's geometry."""
    return metric("geometry", "latent", key)


def usage(level: int, key: str) -> Metric:
    """Return a metric of a level's usage; level -1 is the deepest."""
    return metric("usage", level, key)


def retention(space: str, cutoff: str) -> Metric:
    """Return the metric: retention of a space at a cutoff."""
    return metric("behavior", "retention", space, cutoff)


def auc(name: str) -> Metric:
    """Return a metric of the pairs' AUCs."""
    return metric("behavior", "aucs", name)


CODES, CONTINUOUS = "decoder(codes)", "decoder(z)"
METRICS: Mapping[str, Metric] = {
    "participation ratio": latent("participation_ratio"),
    "effective rank": latent("effective_rank"),
    "less top eigenvalue": negated(latent("top_share")),
    "|cosine|": latent("mean_abs_cosine"),
    "less |cosine|": negated(latent("mean_abs_cosine")),
    "K_eff of level 1": effective_size(0),
    "K_eff of level 2": effective_size(1),
    "K_eff of level 3": effective_size(2),
    "perplexity of level 1": usage(0, "perplexity"),
    "perplexity of level 3": usage(-1, "perplexity"),
    "less Gini of level 1": negated(usage(0, "gini")),
    "less Gini of level 3": negated(usage(-1, "gini")),
    "K_eff": effective_size(0),
    "less relative error": negated(metric(CODES, "relative_error")),
    "relative error": negated(metric(CODES, "relative_error")),
    "collision rate": metric("collisions", "collision_rate"),
    "less collision rate": negated(metric("collisions", "collision_rate")),
    **{f"retention at {k}": retention(CODES, k) for k in ("20", "50", "100", "200")},
    "embedding AUC": auc(f"embedding: {CODES}"),
    "weighted AUC": auc("weighted"),
    "exact AUC by prefix": auc("exact_prefix"),
}
"""What the claims compare, by the name that the page shows; higher is in the claim's favor."""


VIEWS = ("K_eff", "relative error", "weighted AUC")
K_EFF_3_AND_1 = (effective_size(2), effective_size(0))


def others(*names: str) -> list[str]:
    """Return the paper's other tokenizers."""
    return [name for name in TOKENIZERS if name not in names]


def above(winner: str, losers: Sequence[str], *names: str, digits: int = 4) -> list[Contrast]:
    """Contrast one tokenizer with others in some of `METRICS`, which it should lead."""
    return [
        Contrast(
            f"{name}, {winner} - {loser}",
            METRICS[name],
            {"tokenizer": winner},
            {"tokenizer": loser},
            digits=digits,
        )
        for name in names
        for loser in losers
    ]


def best(winner: str, *names: str, digits: int = 4) -> list[Contrast]:
    """Contrast one tokenizer with all others in some of `METRICS`."""
    return above(winner, others(winner), *names, digits=digits)


def worst(loser: str, name: str, digits: int = 4) -> list[list[Contrast]]:
    """Contrast every other tokenizer with one in a metric in which it should be last."""
    return [above(other, [loser], name, digits=digits) for other in others(loser)]


def higher(tokenizer: str, what: str, a: Metric, b: Metric, digits: int = 4) -> Contrast:
    """Contrast two metrics of one tokenizer; the first should be higher."""
    return Contrast(f"{what}, {tokenizer}", a, {"tokenizer": tokenizer}, metric_b=b, digits=digits)


def lossless(space: str) -> list[Contrast]:
    """Contrast DRQ-VAE's retention with 1, from which it may differ by 0.01."""
    return [
        Contrast(
            f"0.01 - |1 - retention at {k}|, DRQ-VAE, {space}",
            retention(space, k),
            {"tokenizer": "DRQ-VAE"},
            metric_b=constant(1.0),
            margin=0.01,
        )
        for k in ("20", "50")
    ]


def overlap_agreement(rows: Rows, data: str) -> list[Comparison]:
    """Rank R against measured flips over tokenizers and levels, one correlation per seed."""
    correlations = []
    for seed in sorted(rows.names("seed", data=data)):
        flips, rates = [], []
        for row in rows.where(data=data, seed=seed):
            measured = row.get("flips") or {}
            points = measured.get("latent", measured.get("input"))
            if not points or NOISE not in points["scale"]:
                continue
            shares = points["code"][points["scale"].index(NOISE)]
            for share, level in zip(shares, row["overlap"], strict=False):
                flips.append(share)
                rates.append(level["rate"][level["scale"].index(NOISE)])
        if len(flips) >= 6:  # two tokenizers of three levels
            value = rank_agreement(flips, {"R": rates})["R"]["all"]
            if value is not None:
                correlations.append(float(value))
    result = paired_difference(correlations, [0.0] * len(correlations)) if correlations else None
    return [Comparison(f"{data}: rank correlation of R with the flips", result, 3)]


def beaten_somewhere(rows: Rows, data: str) -> list[Comparison]:
    """Compare each tokenizer with the rival that beats it most clearly in some view."""
    comparisons = []
    for tokenizer in TOKENIZERS:
        rivals = [
            comparison
            for other in others(tokenizer)
            for contrast in above(other, [tokenizer], *VIEWS)
            if (comparison := contrast.compare(rows, data)).difference is not None
        ]
        best = max(rivals, key=lambda c: c.favor, default=None)
        comparisons.append(
            Comparison(f"{data}: {tokenizer} is beaten in some view", None)
            if best is None
            else Comparison(f"{tokenizer} is beaten; {best.name}", best.difference)
        )
    return comparisons


def drq_claims(rows: Rows) -> list[Claim]:
    """Return every claim of the paper; none of them depends on what has run."""
    geometry, robustness, used = "§5.2, table 1", "§5.3, table 2", "§5.4, table 3"
    before = {key: metric("geometry", "input", key) for key in GEOMETRY}
    after = {key: latent(key) for key in GEOMETRY}
    size, rank, top, cosine = GEOMETRY[:4]
    return [
        claim(
            "geometry-rqvae",
            geometry,
            "RQ-VAE degrades geometry relative to the raw input in all four measures.",
            "input against latent of RQ-VAE, each measure",
            [
                higher("RQ-VAE", f"{what} - {other}", a, b)
                for what, other, a, b in (
                    ("participation ratio, input", "latent", before[size], after[size]),
                    ("effective rank, input", "latent", before[rank], after[rank]),
                    ("top eigenvalue's share, latent", "input", after[top], before[top]),
                    ("|cosine|, latent", "input", after[cosine], before[cosine]),
                )
            ],
        ),
        claim(
            "geometry-close",
            geometry,
            "RQP-VAE and RQ-KMeans stay close to the raw geometry.",
            "the participation ratio of RQP-VAE's latent within 10 % of the input's",
            [
                Contrast(
                    "0.1 - |relative change of the participation ratio|, RQP-VAE",
                    relative_change(after[size], before[size]),
                    {"tokenizer": "RQP-VAE"},
                    metric_b=constant(0.0),
                    margin=0.1,
                )
            ],
            note="For RQ-KMeans this is true by construction: its latent is the input.",
        ),
        claim(
            "geometry-rqp-cosine",
            geometry,
            "RQP-VAE has the lowest mean |cosine| between dimensions.",
            "each other tokenizer's mean |cosine| less RQP-VAE's",
            best("RQP-VAE", "less |cosine|"),
        ),
        claim(
            "geometry-cl-best",
            geometry,
            "DRQ-VAE+CL has the best participation ratio and effective rank and the lowest "
            "top eigenvalue.",
            "DRQ-VAE+CL against each other tokenizer in the three measures",
            best("DRQ-VAE+CL", "participation ratio", "effective rank", "less top eigenvalue"),
        ),
        claim(
            "geometry-cl-cosine",
            geometry,
            "Contrastive supervision introduces stronger correlations between dimensions.",
            "mean |cosine| of DRQ-VAE+CL less DRQ-VAE's",
            above("DRQ-VAE+CL", ["DRQ-VAE"], "|cosine|"),
        ),
        claim(
            "overlap-rqp",
            robustness,
            "RQP-VAE has the lowest R and the largest K_eff at all three levels.",
            f"K_eff at noise {NOISE:g} of RQP-VAE less each other's, every level",
            best("RQP-VAE", *(f"K_eff of level {n}" for n in (1, 2, 3)), digits=1),
        ),
        claim(
            "overlap-rqvae",
            robustness,
            "RQ-VAE is weakest overall, and fails at the first level rather than the deepest.",
            "K_eff of RQ-VAE: level 3 less level 1; at level 1, each other's less RQ-VAE's",
            [higher("RQ-VAE", "K_eff, level 3 - level 1", *K_EFF_3_AND_1, digits=1)],
            *worst("RQ-VAE", "K_eff of level 1", digits=1),
        ),
        claim(
            "overlap-drq",
            robustness,
            "DRQ-VAE is slightly better than RQ-KMeans at levels 2 and 3.",
            "K_eff of DRQ-VAE less RQ-KMeans'",
            above("DRQ-VAE", ["RQ-KMeans"], "K_eff of level 2", "K_eff of level 3", digits=1),
        ),
        claim(
            "overlap-cl",
            robustness,
            "DRQ-VAE+CL degrades in the deeper codebooks, below every other method.",
            "K_eff of DRQ-VAE+CL: level 1 less level 3; at level 3, each other's less its own",
            [higher("DRQ-VAE+CL", "K_eff, level 1 - level 3", *K_EFF_3_AND_1[::-1], digits=1)],
            *worst("DRQ-VAE+CL", "K_eff of level 3", digits=1),
        ),
        claim(
            "overlap-means-confusion",
            "§3.2, eq. 1",
            "R measures how easily a perturbation confuses codewords.",
            f"over tokenizers and levels, rank correlation of R with the share of codes that "
            f"flip under latent noise {NOISE:g}; positive would be the claim",
            overlap_agreement,
            note="R is the sum of a usage floor and a geometry part; at this noise it is nearly "
            "all floor.",
        ),
        claim(
            "usage-rqp",
            used,
            "RQP-VAE is strongest on utilization: highest perplexity and lowest Gini at the "
            "first and the deepest level.",
            "RQP-VAE against each other tokenizer",
            best(
                "RQP-VAE",
                *(f"perplexity of level {n}" for n in (1, 3)),
                *(f"less Gini of level {n}" for n in (1, 3)),
                digits=3,
            ),
        ),
        claim(
            "usage-rqvae",
            used,
            "RQ-VAE's most severe collapse occurs at the first level.",
            "perplexity of RQ-VAE, level 3 less level 1",
            [
                higher(
                    "RQ-VAE",
                    "perplexity, level 3 - level 1",
                    usage(-1, "perplexity"),
                    usage(0, "perplexity"),
                    digits=1,
                )
            ],
        ),
        claim(
            "usage-drq",
            used,
            "DRQ-VAE slightly improves over RQ-KMeans at the deepest level.",
            "perplexity of level 3, DRQ-VAE less RQ-KMeans",
            above("DRQ-VAE", ["RQ-KMeans"], "perplexity of level 3", digits=1),
        ),
        claim(
            "usage-cl",
            used,
            "DRQ-VAE+CL's deepest utilization deteriorates.",
            "perplexity of level 3, DRQ-VAE less DRQ-VAE+CL",
            above("DRQ-VAE", ["DRQ-VAE+CL"], "perplexity of level 3", digits=1),
        ),
        claim(
            "error-codes",
            "§5.5",
            "DRQ-VAE reconstructs best by a wide margin (read as: from its codes).",
            "relative error of decoder(codes), each other's less DRQ-VAE's",
            best("DRQ-VAE", "less relative error"),
        ),
        claim(
            "error-continuous",
            "§5.5",
            "DRQ-VAE reconstructs best by a wide margin (read as: its decoder before "
            "quantization, which alone can reach the paper's figures).",
            "relative error of decoder(z), each other autoencoder's less DRQ-VAE's",
            [
                replace(contrast, metric=negated(metric(CONTINUOUS, "relative_error")))
                for contrast in above(
                    "DRQ-VAE", others("DRQ-VAE", "RQ-KMeans"), "less relative error"
                )
            ],
        ),
        claim(
            "collisions-drq",
            "§5.5",
            "DRQ-VAE has the lowest collision rate and the most unique ids.",
            "1 - unique/N, each other's less DRQ-VAE's",
            best("DRQ-VAE", "less collision rate"),
        ),
        claim(
            "retention-codes",
            "§5.5, table 4",
            "DRQ-VAE keeps retrieval nearly lossless at 20 and 50 (read as: from its codes).",
            "retention of decoder(codes) within 0.01 of 1",
            lossless(CODES),
            note="36 bits an item cannot carry the paper's cosine of 0.9998.",
        ),
        claim(
            "retention-continuous",
            "§5.5, table 4",
            "DRQ-VAE keeps retrieval nearly lossless at 20 and 50 (read as: its decoder "
            "before quantization).",
            "retention of decoder(z) within 0.01 of 1",
            lossless(CONTINUOUS),
        ),
        claim(
            "retention-cl",
            "§5.5, table 4",
            "DRQ-VAE+CL retains most at 100 and 200.",
            "retention of decoder(codes), DRQ-VAE+CL less each other's",
            best("DRQ-VAE+CL", "retention at 100", "retention at 200"),
        ),
        claim(
            "retention-rqp",
            "table 4",
            "RQP-VAE retains more than RQ-VAE and RQ-KMeans at every cutoff.",
            "retention of decoder(codes) at 20, 50, 100, 200",
            above(
                "RQP-VAE",
                ["RQ-VAE", "RQ-KMeans"],
                *(f"retention at {k}" for k in (20, 50, 100, 200)),
            ),
        ),
        claim(
            "auc-cl",
            "§5.5, table 5",
            "DRQ-VAE+CL has the best embedding AUC and weighted AUC.",
            "DRQ-VAE+CL less each other's",
            best("DRQ-VAE+CL", "embedding AUC", "weighted AUC"),
        ),
        claim(
            "auc-exact",
            "§5.5, table 5",
            "Exact match AUC is highest for RQ-VAE.",
            "RQ-VAE less each other's, exact by prefix length",
            best("RQ-VAE", "exact AUC by prefix"),
        ),
        claim(
            "auc-sharing",
            "§5.5",
            "RQ-VAE reuses codes more: it has the highest collision rate.",
            "1 - unique/N, RQ-VAE less each other's",
            best("RQ-VAE", "collision rate"),
        ),
        claim(
            "no-winner",
            "§6",
            "No single tokenizer dominates every view.",
            "for each tokenizer, some other is better in K_eff, relative error or weighted AUC",
            beaten_somewhere,
        ),
    ]
