"""Whether codes are healthy, and if not, what is wrong, why, and what to try."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal

from semid.errors import InputError
from semid.health._collisions import Collisions
from semid.health._counters import ENERGY_TIMES_MEDIAN, Concentration, Inputs, LevelUsage
from semid.health._evidence import read_evidence
from semid.results import Result

Severity = Literal["note", "warning", "unhealthy"]

NEAR = 1.1
"""A value within this factor of a warning is noted: shares of 0.24 and 0.26 are much alike."""

ENERGY_FEW = 0.05
"""Rows or columns that stand out are few up to this share of all."""

SHOWN_NUMBERS = (
    *("least perplexity", "dead codes", "largest code", "largest bucket"),
    *("collision rate", "colliding items", "held-out error", "relative error"),
)
"""Numbers of `semid.report.numbers` that a verdict shows."""

ROWS_PER_CODEWORD = 39
"""Training rows per codeword below which a fit warns, as in faiss' K-means."""


@dataclass(frozen=True)
class Threshold:
    """Values of one measure at which a finding begins; fields as in `thresholds.toml`."""

    finding: str
    figure: str
    warning: float | None = None
    unhealthy: float | None = None
    note: float | None = None
    low: bool = False
    reason: str = ""
    why: str = ""
    advice: str = ""

    @property
    def side(self) -> Literal["below", "above"]:
        """On which side of a limit a value is bad."""
        return "below" if self.low else "above"

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


THRESHOLDS = {
    key: Threshold(
        figure=entry.pop("figure").format(times=ENERGY_TIMES_MEDIAN, few=ENERGY_FEW), **entry
    )
    for key, entry in tomllib.loads(
        resources.files("semid.health").joinpath("thresholds.toml").read_text("utf8")
    ).items()
}
"""Every threshold, as `thresholds.toml` declares it."""

GEOMETRY = THRESHOLDS["geometry"]


def threshold_table(*, reasons: bool = False) -> list[str]:
    """Return the thresholds as lines of a Markdown table."""
    heads = ["finding", "figure", "note", "warning", "unhealthy", *(["why"] if reasons else [])]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for threshold in THRESHOLDS.values():
        limits = (threshold.note, threshold.warning, threshold.unhealthy)
        cells = ["" if limit is None else f"{threshold.side} {limit:g}" for limit in limits]
        names = ", ".join(f"`{name}`" for name in threshold.finding.split(", "))
        why = [threshold.reason] if reasons else []
        lines.append(f"| {' | '.join([names, threshold.figure, *cells, *why])} |")
    return lines


@dataclass(frozen=True)
class Finding(Result):
    """One finding."""

    name: str  # short fixed name, for programs, as in the table of `docs/report.md`
    severity: Severity  # ``note`` does not change the verdict
    level: int | None  # the level it is about, from 0, or None
    what: str  # what is wrong, with the figures
    why: str  # the likely cause
    advice: str  # what to try


@dataclass(frozen=True)
class Verdict(Result):
    """The verdict on a tokenizer's codes."""

    # ``healthy``, ``warning`` or ``unhealthy``, the severity of the worst finding
    level: Literal["healthy", "warning", "unhealthy"]
    findings: tuple[Finding, ...]  # the worst first
    usage: tuple[LevelUsage, ...]  # usage per level
    collisions: Collisions  # how items share ids
    # relative error on the rows the codebooks were fitted on, or None
    training_error: float | None = None
    validation_error: float | None = None  # relative error on held-out rows, or None
    # relative error on all rows, where it is unknown which of them were trained on
    error: float | None = None
    # effective codebook size per level at the stated noise, or None
    effective_sizes: tuple[float, ...] | None = None

    @property
    def healthy(self) -> bool:
        """Whether no finding is a warning or worse."""
        return self.level == "healthy"

    def with_findings(self, findings: Sequence[Finding]) -> Verdict:
        """Return the verdict with more findings, the worst first, and the level they call for."""
        ranks = {"unhealthy": 0, "warning": 1, "note": 2}
        ordered = sorted([*self.findings, *findings], key=lambda finding: ranks[finding.severity])
        worst = ordered[0].severity if ordered else "note"
        level = "healthy" if worst == "note" else worst
        return replace(self, level=level, findings=tuple(ordered))

    def summary(self) -> str:
        """Return the verdict as a few lines of text for a terminal or a log."""
        c = self.collisions
        lines = [f"verdict: {self.level}"]
        for i, u in enumerate(self.usage):
            line = f"  level {u.level + 1}: perplexity {u.perplexity:.1f} of {u.codebook_size}"
            line += f", {u.dead} dead codes, largest code {u.largest_share:.2%}"
            if self.effective_sizes is not None:
                line += f", effective size {self.effective_sizes[i]:.1f}"
            lines.append(line)
        lines.append(
            f"  ids: {c.unique_ids:,} unique of {c.items:,} items; "
            f"1 - unique/N {c.collision_rate:.4f}; "
            f"items in shared buckets {c.colliding_item_rate:.4f}; "
            f"largest bucket {c.largest_bucket}"
        )
        errors = {
            "training": self.training_error,
            "held out": self.validation_error,
            "all rows": self.error,
        }
        known = [f"{name} {value:.4f}" for name, value in errors.items() if value is not None]
        if known:
            lines.append(f"  relative error: {', '.join(known)}")
        for f in self.findings:
            lines.append(f"  {f.severity}: {f.what}. {f.why}. Try: {f.advice}.")
        # How well these figures tell good ids from bad ones, where enough runs have measured it.
        lines += [f"  {sentence}." for sentence in read_evidence().sentences(SHOWN_NUMBERS)]
        return "\n".join(lines)


CONCENTRATED = ("few-rows", "few-columns")
"""Findings after which figures in units of the whole variance say little about most items."""

# Why a level with codes that nobody uses is used unevenly, and what to try.
_STARVED = {
    "why": "Codewords compete for few regions: weak seeding, no revival of dead codes, or a latent "
    "space that shrank",
    "advice": "k-means seeding, revival of dead codes, a smaller codebook at this level, or a "
    "tokenizer fitted by k-means",
}


def evaluate_threshold(
    threshold: Threshold,
    value: float,
    what: str,
    why: str | None = None,
    advice: str | None = None,
    *,
    level: int | None = None,
    name: str | None = None,
) -> list[Finding]:
    """Return the finding for a value beyond a threshold, or a note where it is close to one.

    ``why``, ``advice`` and ``name`` are by default those of the threshold.
    """
    name = name or threshold.finding
    why = threshold.why if why is None else why
    advice = threshold.advice if advice is None else advice
    severity = threshold.severity(value)
    if severity is not None:
        return [Finding(name, severity, level, what, why, advice)]
    if not threshold.near(value):
        return []
    close = (
        f"Close to a warning (`{name}`), which begins {threshold.side} "
        f"{threshold.warning:g}; this is {value:.3g}"
    )
    return [Finding("near-threshold", "note", level, what, close, advice)]


def _usage_findings(level: LevelUsage) -> list[Finding]:
    """Evaluate one level's usage."""
    attainable = min(level.codebook_size, level.items)
    if attainable < 2:
        return []
    # With fewer items than codes, not all codes can be used: measure against what is attainable.
    share = (level.perplexity - 1.0) / (attainable - 1.0)
    dead = (level.dead - (level.codebook_size - attainable)) / level.codebook_size
    bits = math.log2(attainable / level.perplexity)
    dead_findings = evaluate_threshold(
        THRESHOLDS["dead_codes"],
        dead,
        f"level {level.level + 1} has {level.dead} dead codes of {level.codebook_size}",
        level=level.level,
    )
    uneven = evaluate_threshold(
        THRESHOLDS["perplexity"],
        share,
        f"level {level.level + 1} uses its {level.codebook_size} codes like "
        f"{level.perplexity:.1f} even ones ({share:.1%} of the way from one code to the "
        f"attainable {attainable}, {bits:.1f} bits lost; the largest code holds "
        f"{level.largest_share:.1%})",
        **(_STARVED if THRESHOLDS["dead_codes"].severity(dead) else {}),
        level=level.level,
    )
    return uneven + dead_findings


def _collision_findings(c: Collisions, capacity: float) -> list[Finding]:
    """Evaluate the buckets; exact copies of an input count once where they are known."""
    items = c.distinct_items or c.items
    rate = c.collision_rate if c.collision_rate_distinct is None else c.collision_rate_distinct
    colliding = c.colliding_item_rate_distinct
    if colliding is None:
        colliding = c.colliding_item_rate
    largest = c.largest_bucket_distinct or c.largest_bucket
    possible = f"{capacity:,.0f}" if capacity < 1e12 else f"{capacity:.1e}"
    filling = items / capacity
    findings = evaluate_threshold(
        THRESHOLDS["filling"],
        filling if items > 1 else 0.0,
        f"{possible} ids are possible for {items:,} different items, {filling:,.3g} items per id; "
        f"{c.unique_ids:,} ids are in use, and {colliding:.1%} of the items share theirs",
    )
    # Ids drawn evenly at random, by Poisson: of `capacity` ids, 1 - exp(-filling) are hit; per
    # item that many over `filling`.
    random_rate = 1.0 + math.expm1(-filling) / filling
    findings += evaluate_threshold(
        THRESHOLDS["collisions"],
        rate - random_rate,
        f"1 - unique/N is {rate:.3f} and {colliding:.1%} of the items share their id, "
        f"though {possible} ids are possible for {items:,} items",
    )
    # Colliding items are reported on their own only where no cause of theirs is.
    if all(finding.severity == "note" for finding in findings):
        findings += evaluate_threshold(
            THRESHOLDS["shared"],
            colliding,
            f"{colliding:.1%} of the items share their id with a different item",
        )
    # A bucket is a fault if it is large as such and beside the even filling of short ids.
    even = items / min(float(items), capacity)
    if THRESHOLDS["bucket_times_even"].severity(largest / even) is not None:
        share = largest / items
        findings += evaluate_threshold(
            THRESHOLDS["bucket_share"], share, f"one id holds {largest:,} items ({share:.2%})"
        )
    if c.duplicate_items is not None:
        duplicates = c.duplicate_items / c.items
        findings += evaluate_threshold(
            THRESHOLDS["duplicates"],
            duplicates,
            f"{c.duplicate_items:,} items ({duplicates:.2%}) are exact copies of another "
            "item's embedding",
        )
    return findings


def _error_findings(
    training: float | None, validation: float | None, error: float | None, *, skewed: bool
) -> list[Finding]:
    """Evaluate the error against the mean vector and, unless ``skewed``, the training error."""
    findings = []
    value = next((e for e in (validation, training, error) if e is not None), None)
    if value is not None and value >= 1.0:
        findings.append(
            Finding(
                "worse-than-mean",
                "unhealthy",
                None,
                f"relative error {value:.3f}: the mean vector would reconstruct the items as well",
                "The codes carry nothing of the embedding",
                "a longer fit, a smaller learning rate, or a tokenizer fitted by k-means",
            )
        )
    elif value is not None:
        findings += evaluate_threshold(
            THRESHOLDS["error"],
            value,
            f"relative error {value:.3f}: the codes keep {1.0 - value:.0%} of the variance",
        )
    # Where a few rows make up the error, the gap says on which side of the split they lie.
    if training is not None and validation is not None and training > 0 and not skewed:
        ratio = validation / training
        findings += evaluate_threshold(
            THRESHOLDS["overfit"],
            ratio,
            f"held-out error {validation:.4f} is {ratio:.2f} times the training error "
            f"{training:.4f}",
        )
    return findings


def _input_findings(inputs: Inputs) -> list[Finding]:
    """Evaluate the embeddings: rows or columns with most of the variance, or with none."""
    findings = []
    if inputs.rows is not None:
        findings += _concentration_findings(
            inputs.rows,
            "few-rows",
            "rows",
            "Fits minimize the squared error, so rows far from the rest draw codewords and hide "
            "the error of all others",
            "looking at the longest rows and repairing them, or normalize=True",
        )
    if inputs.columns is not None:
        listed = ", ".join(map(str, inputs.columns.columns[:8]))
        findings += _concentration_findings(
            inputs.columns,
            "few-columns",
            f"columns (column {listed}, counted from 0)",
            "Fits minimize the squared error, so the codes describe the columns of largest scale",
            "scaling the columns alike where the embeddings are made",
        )
    if inputs.constant:
        listed = ", ".join(map(str, inputs.constant[:8])) + (", ..." if inputs.constant[8:] else "")
        # A few dimensions at zero are harmless; a constant that carries weight is in every cosine.
        findings += evaluate_threshold(
            THRESHOLDS["constant"],
            max(len(inputs.constant) / inputs.width, inputs.constant_weight),
            f"{len(inputs.constant)} of {inputs.width} input dimensions hold one value for all "
            f"items (dimension {listed}, counted from 0), {inputs.constant_weight:.1%} of the mean "
            "squared length",
        )
    return findings


def _concentration_findings(
    c: Concentration, name: str, unit: str, why: str, advice: str
) -> list[Finding]:
    """Evaluate variance that lies in a few rows or columns."""
    if c.count > max(ENERGY_FEW * c.total, 1.0):
        return []
    rest = (
        "" if c.rest_error is None else f"; the relative error of all others is {c.rest_error:.3f}"
    )
    what = f"{c.count:,} of {c.total:,} {unit} hold {c.share:.1%} of the variance{rest}"
    findings = evaluate_threshold(THRESHOLDS["energy_share"], c.share, what, why, advice, name=name)
    # A finding on scale alone is a warning: where the codes still describe the rest, they are fit
    # for use. The error of the rest says whether they do.
    if findings and findings[0].name == name and c.rest_error is not None:
        worse = THRESHOLDS["energy_error"].severity(c.rest_error)
        return [replace(findings[0], severity=worse or findings[0].severity)]
    return findings


def verdict(
    usage: Sequence[LevelUsage],
    collisions: Collisions,
    *,
    training_error: float | None = None,
    validation_error: float | None = None,
    error: float | None = None,
    effective_sizes: Sequence[float] | None = None,
    inputs: Inputs | None = None,
) -> Verdict:
    """Evaluate a tokenizer by its codes and, where known, its errors and inputs.

    A low collision rate is never taken as a good sign: an untrained encoder has the lowest.

    Args:
        usage: usage per level, from `semid.health.usage`.
        collisions: the buckets, from `semid.health.collisions`.
        training_error: relative error on the fitted rows: ``sum |x - x_hat|^2`` over
            ``sum |x - mean|^2``, both over these rows, with the mean of all rows.
        validation_error: the same on rows held out.
        error: the same on all rows, where it is unknown which of them were trained on.
        effective_sizes: effective codebook size per level, shown but not evaluated: at small noise
            it repeats the usage.
        inputs: how the variance of the embeddings lies in rows and columns, from
            `semid.health.EnergyCounter`.

    Returns:
        A `Verdict`, the worst finding first.

    Raises:
        InputError: no levels, or ``effective_sizes`` of another length.
    """
    if not usage:
        raise InputError("usage holds no levels; give the result of semid.health.usage")
    if effective_sizes is not None and len(effective_sizes) != len(usage):
        raise InputError(
            f"effective_sizes has {len(effective_sizes)} entries, but usage {len(usage)} levels"
        )
    capacity = math.prod(float(level.codebook_size) for level in usage)
    findings = [finding for level in usage for finding in _usage_findings(level)]
    findings += _collision_findings(collisions, capacity)
    input_findings = [] if inputs is None else _input_findings(inputs)
    # Where few rows or columns hold most of the variance, errors say little about the others.
    skewed = any(finding.name in CONCENTRATED for finding in input_findings)
    findings += _error_findings(training_error, validation_error, error, skewed=skewed)
    findings += input_findings
    unevaluated = Verdict(
        level="healthy",
        findings=(),
        usage=tuple(usage),
        collisions=collisions,
        training_error=training_error,
        validation_error=validation_error,
        error=error,
        effective_sizes=None if effective_sizes is None else tuple(map(float, effective_sizes)),
    )
    return unevaluated.with_findings(findings)
