"""The DRQ paper's claims on geometry, robustness and usage, and what decides them."""

from __future__ import annotations

from semid.diagnostics.flips import rank_agreement
from semid.reproduce.claims import Claim, Comparison, Judgement, Rows, judge, within
from semid.reproduce.claims_drq_retrieval import matching_claims, no_winner, retrieval_claims
from semid.reproduce.drq_reads import (
    SCALE,
    DrqTest,
    constant,
    effective_size,
    figure,
    less,
    others,
    relative,
    space,
)
from semid.reproduce.paired import Difference, paired_difference

__all__ = ["drq_claims"]


def drq_claims(rows: Rows) -> list[Judgement]:
    """Judge every claim of the paper on the rows of a ledger.

    Args:
        rows: of the paper's five tokenizers and of variants, which decide nothing.
    """
    test = DrqTest(rows)
    return [
        *_geometry(test),
        *_robustness(test),
        *_usage(test),
        *retrieval_claims(test),
        *matching_claims(test),
        no_winner(test),
    ]


def _geometry(test: DrqTest) -> list[Judgement]:
    rank = {
        "participation ratio": space("latent", "participation_ratio"),
        "effective rank": space("latent", "effective_rank"),
    }
    spread = {
        "less top eigenvalue": less(space("latent", "top_share")),
    }
    cosine = {"less |cosine|": less(space("latent", "mean_abs_cosine"))}
    degraded = test.inside(
        "RQ-VAE",
        {
            "participation ratio, input - latent": (
                space("input", "participation_ratio"),
                rank["participation ratio"],
            ),
            "effective rank, input - latent": (
                space("input", "effective_rank"),
                rank["effective rank"],
            ),
            "top eigenvalue's share, latent - input": (
                space("latent", "top_share"),
                space("input", "top_share"),
            ),
            "|cosine|, latent - input": (
                space("latent", "mean_abs_cosine"),
                space("input", "mean_abs_cosine"),
            ),
        },
    )
    closeness = [
        Comparison(
            f"{name}: 0.1 - |relative change of the participation ratio|, RQP-VAE",
            within(
                constant(
                    test.rows,
                    relative(rank["participation ratio"], space("input", "participation_ratio")),
                    data=name,
                    tokenizer="RQP-VAE",
                ),
                0.1,
            ),
        )
        for name in test.sets
    ]
    return [
        judge(
            Claim(
                "geometry-rqvae",
                "§5.2, table 1",
                "RQ-VAE degrades geometry relative to the raw input in all four measures.",
                "input against latent of RQ-VAE, each measure",
            ),
            degraded,
        ),
        judge(
            Claim(
                "geometry-close",
                "§5.2, table 1",
                "RQP-VAE and RQ-KMeans stay close to the raw geometry.",
                "the participation ratio of RQP-VAE's latent within 10 % of the input's",
            ),
            closeness,
            note="For RQ-KMeans this is true by construction: its latent is the input.",
        ),
        judge(
            Claim(
                "geometry-rqp-cosine",
                "§5.2, table 1",
                "RQP-VAE has the lowest mean |cosine| between dimensions.",
                "each other tokenizer's mean |cosine| less RQP-VAE's",
            ),
            test.above("RQP-VAE", others("RQP-VAE"), cosine),
        ),
        judge(
            Claim(
                "geometry-cl-best",
                "§5.2, table 1",
                "DRQ-VAE+CL has the best participation ratio and effective rank and the lowest "
                "top eigenvalue.",
                "DRQ-VAE+CL against each other tokenizer in the three measures",
            ),
            test.above("DRQ-VAE+CL", others("DRQ-VAE+CL"), {**rank, **spread}),
        ),
        judge(
            Claim(
                "geometry-cl-cosine",
                "§5.2, table 1",
                "Contrastive supervision introduces stronger correlations between dimensions.",
                "mean |cosine| of DRQ-VAE+CL less DRQ-VAE's",
            ),
            test.above(
                "DRQ-VAE+CL",
                ["DRQ-VAE"],
                {"|cosine|": space("latent", "mean_abs_cosine")},
            ),
        ),
    ]


def _robustness(test: DrqTest) -> list[Judgement]:
    sizes = {f"K_eff of level {n + 1}": effective_size(n) for n in range(3)}
    deeper = {f"K_eff of level {n + 1}": effective_size(n) for n in (1, 2)}
    agreement = [
        Comparison(f"{name}: rank correlation of R with the flips", found, 3)
        for name in test.sets
        for found in [_agreement(test.rows, name)]
    ]
    return [
        judge(
            Claim(
                "overlap-rqp",
                "§5.3, table 2",
                "RQP-VAE has the lowest R and the largest K_eff at all three levels.",
                f"K_eff at noise {SCALE:g} of RQP-VAE less each other's, every level",
            ),
            test.above("RQP-VAE", others("RQP-VAE"), sizes, digits=1),
        ),
        judge(
            Claim(
                "overlap-rqvae",
                "§5.3, table 2",
                "RQ-VAE is weakest overall, and fails at the first level rather than the deepest.",
                "K_eff of RQ-VAE: level 3 less level 1; at level 1, each other's less RQ-VAE's",
            ),
            [
                *test.inside(
                    "RQ-VAE",
                    {"K_eff, level 3 - level 1": (effective_size(2), effective_size(0))},
                    digits=1,
                ),
                *(
                    c
                    for other in others("RQ-VAE")
                    for c in test.above(
                        other, ["RQ-VAE"], {"K_eff of level 1": effective_size(0)}, digits=1
                    )
                ),
            ],
        ),
        judge(
            Claim(
                "overlap-drq",
                "§5.3, table 2",
                "DRQ-VAE is slightly better than RQ-KMeans at levels 2 and 3.",
                "K_eff of DRQ-VAE less RQ-KMeans'",
            ),
            test.above("DRQ-VAE", ["RQ-KMeans"], deeper, digits=1),
        ),
        judge(
            Claim(
                "overlap-cl",
                "§5.3, table 2",
                "DRQ-VAE+CL degrades in the deeper codebooks, below every other method.",
                "K_eff of DRQ-VAE+CL: level 1 less level 3; at level 3, each other's less its own",
            ),
            [
                *test.inside(
                    "DRQ-VAE+CL",
                    {"K_eff, level 1 - level 3": (effective_size(0), effective_size(2))},
                    digits=1,
                ),
                *(
                    c
                    for other in others("DRQ-VAE+CL")
                    for c in test.above(
                        other, ["DRQ-VAE+CL"], {"K_eff of level 3": effective_size(2)}, digits=1
                    )
                ),
            ],
        ),
        judge(
            Claim(
                "overlap-means-confusion",
                "§3.2, eq. 1",
                "R measures how easily a perturbation confuses codewords.",
                f"over tokenizers and levels, rank correlation of R with the share of codes that "
                f"flip under latent noise {SCALE:g}; positive would be the claim",
            ),
            agreement,
            note="R is the sum of a usage floor and a geometry part; at this noise it is nearly "
            "all floor.",
        ),
    ]


def _agreement(rows: Rows, data: str) -> Difference | None:
    """Rank R against measured flips over tokenizers and levels, a correlation a seed."""
    found = []
    for seed in sorted(rows.names("seed", data=data, variant="")):
        flips, rates = [], []
        for row in rows.where(data=data, variant="", seed=seed):
            measured = row.get("flips") or {}
            points = measured.get("latent", measured.get("input"))
            if not points or SCALE not in points["scale"]:
                continue
            shares = points["code"][points["scale"].index(SCALE)]
            for share, level in zip(shares, row["overlap"], strict=False):
                flips.append(share)
                rates.append(level["rate"][level["scale"].index(SCALE)])
        if len(flips) >= 6:  # two tokenizers of three levels
            value = rank_agreement(flips, {"R": rates})["R"]["all"]
            if value is not None:
                found.append(float(value))
    return paired_difference(found, [0.0] * len(found)) if found else None


def _usage(test: DrqTest) -> list[Judgement]:
    even = {
        "perplexity of level 1": figure("usage", 0, "perplexity"),
        "perplexity of level 3": figure("usage", -1, "perplexity"),
        "less Gini of level 1": less(figure("usage", 0, "gini")),
        "less Gini of level 3": less(figure("usage", -1, "gini")),
    }
    deep = {"perplexity of level 3": figure("usage", -1, "perplexity")}
    return [
        judge(
            Claim(
                "usage-rqp",
                "§5.4, table 3",
                "RQP-VAE is strongest on utilization: highest perplexity and lowest Gini at the "
                "first and the deepest level.",
                "RQP-VAE against each other tokenizer",
            ),
            test.above("RQP-VAE", others("RQP-VAE"), even, digits=3),
        ),
        judge(
            Claim(
                "usage-rqvae",
                "§5.4, table 3",
                "RQ-VAE's most severe collapse occurs at the first level.",
                "perplexity of RQ-VAE, level 3 less level 1",
            ),
            test.inside(
                "RQ-VAE",
                {
                    "perplexity, level 3 - level 1": (
                        figure("usage", -1, "perplexity"),
                        figure("usage", 0, "perplexity"),
                    )
                },
                digits=1,
            ),
        ),
        judge(
            Claim(
                "usage-drq",
                "§5.4, table 3",
                "DRQ-VAE slightly improves over RQ-KMeans at the deepest level.",
                "perplexity of level 3, DRQ-VAE less RQ-KMeans",
            ),
            test.above("DRQ-VAE", ["RQ-KMeans"], deep, digits=1),
        ),
        judge(
            Claim(
                "usage-cl",
                "§5.4, table 3",
                "DRQ-VAE+CL's deepest utilization deteriorates.",
                "perplexity of level 3, DRQ-VAE less DRQ-VAE+CL",
            ),
            test.above("DRQ-VAE", ["DRQ-VAE+CL"], deep, digits=1),
        ),
    ]
