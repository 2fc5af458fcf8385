"""Every threshold of the verdict with its reason; `docs/report.md` and model cards show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning", "unhealthy"]

NEAR = 1.1
"""A value within this factor of a warning is noted: shares of 0.24 and 0.26 are much alike."""

ENERGY_TIMES_MEDIAN = 100.0
"""Rows (in half octaves) and columns stand out above this multiple of the median variance."""

ENERGY_FEW = 0.05
"""Rows or columns that stand out are few up to this share of all."""

ROWS_PER_CODEWORD = 39
"""Training rows per codeword below which a fit warns, as in faiss' K-means."""


@dataclass(frozen=True)
class Threshold:
    """Values of one measure at which a finding begins.

    Attributes:
        finding: name of the finding.
        figure: what is measured.
        warning: value beyond which it is a warning; None if it never is.
        unhealthy: value beyond which it is unhealthy; None if it never is.
        note: value beyond which it is a note; None if it never is.
        low: whether small values are the bad ones.
        reason: why these values.
    """

    finding: str
    figure: str
    warning: float | None = None
    unhealthy: float | None = None
    note: float | None = None
    low: bool = False
    reason: str = ""

    def severity(self, value: float) -> Severity | None:
        """Return the severity of a value; None if it is beyond no threshold."""
        steps: tuple[tuple[Severity, float | None], ...] = (
            ("unhealthy", self.unhealthy),
            ("warning", self.warning),
            ("note", self.note),
        )
        for severity, limit in steps:
            if limit is not None and (value < limit if self.low else value > limit):
                return severity
        return None

    def near(self, value: float) -> bool:
        """Whether a value that is beyond no threshold comes within `NEAR` of a warning."""
        if self.warning is None or self.severity(value) is not None:
            return False
        return value < self.warning * NEAR if self.low else value > self.warning / NEAR


PERPLEXITY = Threshold(
    "collapsed-level",
    "(perplexity - 1) / (attainable - 1), attainable = min(K, items)",
    warning=0.25,
    unhealthy=0.125,
    low=True,
    reason="A quarter means two bits of the level are lost, an eighth three. The collapsed level "
    "of the DRQ paper (481 of 4096) is at 0.117, its other levels at 0.17 and above. One is "
    "subtracted so that a constant code is at 0 for small codebooks too.",
)
DEAD_CODES = Threshold(
    "dead-codes",
    "dead codes beyond those that a shortage of items makes unavoidable, over K",
    warning=0.1,
    reason="A tenth costs 0.15 bits at most; more means that nothing revives dead codes.",
)
FILLING = Threshold(
    "small-id-space",
    "different items per possible id",
    warning=0.5,
    unhealthy=100.0,
    reason="At 0.5, ids drawn evenly at random leave 39 % of the items without an id of their own; "
    "real codes, which follow the data, leave more. Above 100, an id names a cluster and no item.",
)
COLLISIONS = Threshold(
    "collisions",
    "1 - unique/N, less that of ids drawn evenly at random",
    warning=0.3,
    unhealthy=0.6,
    reason="The worst tokenizer of the DRQ paper is at 0.23, its best at 0.07.",
)
SHARED = Threshold(
    "shared-ids",
    "share of the different items that share their id",
    warning=0.5,
    note=0.1,
    reason="A tenth matters to retrieval, which needs one id per item, and is usual: RQ-KMeans "
    "with 3 x 256 codes is at 0.14 to 0.23 on four catalogues of 7 to 18 thousand texts. At "
    "0.5 most items cannot be distinguished from another one.",
)
BUCKET_SHARE = Threshold(
    "giant-bucket",
    "share of the different items that the fullest id holds",
    warning=0.001,
    unhealthy=0.01,
    reason="The largest bucket of the DRQ paper is 76 of 500,000 items, 0.00015.",
)
BUCKET_TIMES_EVEN = Threshold(
    "giant-bucket",
    "the same over the even filling, items / min(items, possible ids); needed as well",
    warning=32.0,
    reason="Short ids fill every bucket; only unevenness is a fault of the codes.",
)
DUPLICATES = Threshold(
    "duplicate-input",
    "share of the items that are exact copies of an earlier one",
    warning=0.01,
    note=0.0,
    reason="Below one in a hundred, copies move no figure of the report.",
)
ERROR = Threshold(
    "little-variance-kept",
    "relative error, of held-out items where there are any",
    warning=0.7,
    unhealthy=0.85,
    reason="Published tokenizers are at 0.27 to 0.66 on four catalogues of text embeddings, and "
    "K-means with 16 codewords on one level at 0.80: codes beyond 0.85 carry less than 4 bits can.",
)
OVERFIT = Threshold(
    "overfit",
    "held-out error over training error",
    warning=1.5,
    reason="Some gap is normal and grows as the items per code shrink (1.1 to 1.3 for RQ-KMeans on "
    "7 to 18 thousand items); beyond one half more, codewords sit on single training rows.",
)
ENERGY_SHARE = Threshold(
    "few-rows, few-columns",
    f"share of the variance in rows or columns beyond {ENERGY_TIMES_MEDIAN:g} times the median, "
    f"where these are at most {ENERGY_FEW:g} of all (or a single one)",
    warning=0.5,
    reason="Fits minimize the squared error, so codes follow whatever holds most of the variance. "
    "Four catalogues of text embeddings are at 0; half and more is a fault of scale.",
)
ENERGY_ERROR = Threshold(
    "few-rows, few-columns",
    "relative error of the other rows (about their own mean) or of the other columns",
    unhealthy=ERROR.unhealthy,
    reason="The same as for all of them: the ids say next to nothing about the rest.",
)
GEOMETRY = Threshold(
    "overlapping-codewords",
    "share of the overlap rate that near codewords make, at noise of 0.1 standard deviations",
    warning=0.1,
    unhealthy=0.5,
    reason="Level 1 of a K-means codebook is at 0 in tens of dimensions and more; at a tenth "
    "the geometry begins to show beside the usage.",
)
CONSTANT = Threshold(
    "constant-dimension",
    "constant input dimensions, as a share of the width or of the mean squared length",
    warning=0.01,
    note=0.0,
    reason="Below one in a hundred they move no figure of the report.",
)

THRESHOLDS = (
    PERPLEXITY,
    DEAD_CODES,
    FILLING,
    COLLISIONS,
    SHARED,
    BUCKET_SHARE,
    BUCKET_TIMES_EVEN,
    DUPLICATES,
    ERROR,
    OVERFIT,
    ENERGY_SHARE,
    ENERGY_ERROR,
    GEOMETRY,
    CONSTANT,
)


def threshold_table(*, reasons: bool = False) -> list[str]:
    """Return the thresholds as lines of a Markdown table."""
    heads = ["finding", "figure", "note", "warning", "unhealthy", *(["why"] if reasons else [])]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for threshold in THRESHOLDS:
        sign = "below" if threshold.low else "above"
        limits = (threshold.note, threshold.warning, threshold.unhealthy)
        cells = ["" if limit is None else f"{sign} {limit:g}" for limit in limits]
        names = ", ".join(f"`{name}`" for name in threshold.finding.split(", "))
        why = [threshold.reason] if reasons else []
        lines.append(f"| {' | '.join([names, threshold.figure, *cells, *why])} |")
    return lines
