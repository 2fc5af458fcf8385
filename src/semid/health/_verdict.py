"""Whether codes are healthy, and if not, what is wrong, why, and what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from semid.errors import InputError
from semid.health._collisions import Collisions
from semid.health._usage import LevelUsage

__all__ = ["Finding", "Verdict", "verdict"]

Severity = Literal["note", "warning", "unhealthy"]
Level = Literal["healthy", "warning", "unhealthy"]

# Perplexity as a share of what is attainable, min(K, items). A quarter means two bits of the level
# are lost, an eighth three. The DRQ paper's collapsed level (RQ-VAE, 481 of 4096) stands at 0.117;
# its other levels stand at 0.46 and above but for DRQ-VAE+CL's deepest, at 0.17.
PERPLEXITY_WARNING = 0.25
PERPLEXITY_UNHEALTHY = 0.125
# Dead codes beyond those that a shortage of items makes unavoidable. A tenth costs 0.15 bits
# at most, too little to matter by itself; more means that nothing revives dead codes.
DEAD_WARNING = 0.1
# Collision rate beyond that of ids drawn evenly at random from all possible ones: below it short
# ids collide by counting alone. The DRQ paper's worst tokenizer stands at 0.23, its best at 0.07.
COLLISION_WARNING = 0.3
COLLISION_UNHEALTHY = 0.6
# A bucket is a giant when it holds this share of the items and also many times the even filling
# (short ids fill every bucket; only unevenness is a fault). The paper's largest bucket is 76 of
# 500,000 items.
BUCKET_WARNING = 0.001
BUCKET_UNHEALTHY = 0.01
BUCKET_TIMES_EVEN = 32
# Exact copies in the input: below one in a hundred they cannot move any figure shown here.
DUPLICATE_WARNING = 0.01
# Held-out error against training error. Some gap is normal and grows as the items a code shrink;
# beyond one half more, the codebooks have learnt the training rows by heart.
GAP_WARNING = 1.5


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: short fixed name, for programs: ``collapsed-level``, ``dead-codes``,
            ``collisions``, ``giant-bucket``, ``duplicate-input``, ``overfit``,
            ``worse-than-mean``.
        severity: ``note`` does not change the verdict.
        level: the level it is about, from 0, or None.
        what: what is wrong, with the figures.
        why: the likely cause.
        advice: what to try.
    """

    name: str
    severity: Severity
    level: int | None
    what: str
    why: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Verdict:
    """The judgement over a tokenizer's codes.

    Attributes:
        level: ``healthy``, ``warning`` or ``unhealthy``, the worst finding's.
        findings: the worst first.
        usage: usage per level.
        collisions: the buckets.
        training_error: relative error on the rows the codebooks were fitted on, or None.
        validation_error: relative error on held-out rows, or None.
        effective_sizes: effective codebook size per level at the stated noise, or None.
    """

    level: Level
    findings: tuple[Finding, ...]
    usage: tuple[LevelUsage, ...]
    collisions: Collisions
    training_error: float | None = None
    validation_error: float | None = None
    effective_sizes: tuple[float, ...] | None = None

    @property
    def healthy(self) -> bool:
        """Whether there is neither a warning nor worse."""
        return self.level == "healthy"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {
            "level": self.level,
            "findings": [finding.to_dict() for finding in self.findings],
            "usage": [level.to_dict() for level in self.usage],
            "collisions": self.collisions.to_dict(),
            "training_error": self.training_error,
            "validation_error": self.validation_error,
            "effective_sizes": None if self.effective_sizes is None else list(self.effective_sizes),
        }

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
            f"items in shared buckets {c.shared_share:.4f}; largest bucket {c.largest_bucket}"
        )
        if self.training_error is not None or self.validation_error is not None:
            shown = [
                f"{name} {value:.4f}"
                for name, value in (
                    ("training", self.training_error),
                    ("held out", self.validation_error),
                )
                if value is not None
            ]
            lines.append(f"  relative error: {', '.join(shown)}")
        for f in self.findings:
            lines.append(f"  {f.severity}: {f.what}. {f.why}. Try: {f.advice}.")
        return "\n".join(lines)


# Why a level is used unevenly and what to try, with codes that nobody uses and without.
_STARVED = (
    "Codewords compete for few regions: weak seeding, no revival of dead codes, or a latent space "
    "that shrank",
    "k-means seeding, revival of dead codes, a smaller codebook at this level, or a tokenizer "
    "fitted by k-means",
)
_UNEVEN = (
    "Nearly every code is used, but most items share a few: rows far from the rest, or thinly "
    "spread, take codewords of their own, since squared error counts them most",
    "a smaller codebook at this level, more levels, or fewer outliers (normalize=True)",
)


def _usage_findings(level: LevelUsage) -> list[Finding]:
    """Judge one level's usage."""
    attainable = min(level.codebook_size, level.items)
    if attainable < 2:
        return []
    found = []
    share = level.perplexity / attainable
    unavoidable = level.codebook_size - attainable
    starved = level.dead - unavoidable > DEAD_WARNING * level.codebook_size
    if share < PERPLEXITY_WARNING:
        bits = math.log2(1 / share)
        found.append(
            Finding(
                "collapsed-level",
                "unhealthy" if share < PERPLEXITY_UNHEALTHY else "warning",
                level.level,
                f"level {level.level + 1} uses its {level.codebook_size} codes like "
                f"{level.perplexity:.1f} even ones ({share:.1%} of the attainable {attainable}, "
                f"{bits:.1f} bits lost; the largest code holds {level.largest_share:.1%})",
                *(_STARVED if starved else _UNEVEN),
            )
        )
    if starved:
        found.append(
            Finding(
                "dead-codes",
                "warning",
                level.level,
                f"level {level.level + 1} has {level.dead} dead codes of {level.codebook_size}",
                "No item is nearest to them, so they carry nothing",
                "revival of dead codes, k-means seeding, or a smaller codebook",
            )
        )
    return found


def _even_collision_rate(items: int, capacity: float) -> float:
    """Return the expected ``1 - unique/N`` of ids drawn evenly at random."""
    filling = items / capacity
    return 1.0 + math.expm1(-filling) / filling


def _collision_findings(c: Collisions, capacity: float) -> list[Finding]:
    """Judge the buckets; where the copies in the input are known, they count once."""
    found = []
    items = c.distinct_items or c.items
    rate = c.collision_rate if c.collision_rate_distinct is None else c.collision_rate_distinct
    shared = c.shared_share if c.shared_share_distinct is None else c.shared_share_distinct
    largest = c.largest_bucket_distinct or c.largest_bucket
    excess = rate - _even_collision_rate(items, capacity)
    if excess > COLLISION_WARNING:
        possible = f"{capacity:,.0f}" if capacity < 1e12 else f"{capacity:.1e}"
        found.append(
            Finding(
                "collisions",
                "unhealthy" if excess > COLLISION_UNHEALTHY else "warning",
                None,
                f"1 - unique/N is {rate:.3f} and {shared:.1%} of the items share their id, "
                f"though {possible} ids are possible for {items:,} items",
                "The levels are used unevenly or repeat each other",
                "more levels, better seeding, or a step that makes ids unique after encoding",
            )
        )
    share = largest / items
    even = items / min(float(items), capacity)
    if share > BUCKET_WARNING and largest > BUCKET_TIMES_EVEN * even:
        found.append(
            Finding(
                "giant-bucket",
                "unhealthy" if share > BUCKET_UNHEALTHY else "warning",
                None,
                f"one id holds {largest:,} items ({share:.2%})",
                "Items that look alike to the embedding (templates, missing text), or a collapse",
                "looking at that bucket's items; mending their embeddings or adding a level",
            )
        )
    if c.duplicate_items:
        duplicates = c.duplicate_items / c.items
        found.append(
            Finding(
                "duplicate-input",
                "warning" if duplicates > DUPLICATE_WARNING else "note",
                None,
                f"{c.duplicate_items:,} items ({duplicates:.2%}) are exact copies of another "
                "item's embedding",
                "Equal inputs get equal ids, whatever the tokenizer",
                "merging them in the catalogue, or unique ids by an appended token",
            )
        )
    return found


def _error_findings(training: float | None, validation: float | None) -> list[Finding]:
    """Judge held-out error against training error and against the mean vector."""
    found = []
    worst = validation if validation is not None else training
    if worst is not None and worst >= 1.0:
        found.append(
            Finding(
                "worse-than-mean",
                "unhealthy",
                None,
                f"relative error {worst:.3f}: the mean vector would reconstruct the items as well",
                "The codes carry nothing of the embedding",
                "a longer fit, a smaller learning rate, or a tokenizer fitted by k-means",
            )
        )
    if training is not None and validation is not None and training > 0:
        ratio = validation / training
        if ratio > GAP_WARNING:
            found.append(
                Finding(
                    "overfit",
                    "warning",
                    None,
                    f"held-out error {validation:.4f} is {ratio:.2f} times the training error "
                    f"{training:.4f}",
                    "Too few items a code: codewords sit on single training rows",
                    "more items, a smaller codebook, or fewer levels",
                )
            )
    return found


def verdict(
    usage: Sequence[LevelUsage],
    collisions: Collisions,
    *,
    training_error: float | None = None,
    validation_error: float | None = None,
    effective_sizes: Sequence[float] | None = None,
) -> Verdict:
    """Judge a tokenizer by its codes and, where known, its errors.

    A low collision rate is never taken as a good sign: an untrained encoder has the lowest.

    Args:
        usage: usage per level, from `semid.health.usage`.
        collisions: the buckets, from `semid.health.collisions`.
        training_error: relative error ``|x - x_hat|^2 / |x - mean|^2`` on the fitted rows.
        validation_error: the same on rows held out.
        effective_sizes: effective codebook size per level, shown and not judged: at small noise
            it says what the usage says.

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
    found = [finding for level in usage for finding in _usage_findings(level)]
    found += _collision_findings(collisions, capacity)
    found += _error_findings(training_error, validation_error)
    ranks = {"unhealthy": 0, "warning": 1, "note": 2}
    found.sort(key=lambda finding: ranks[finding.severity])
    worst = found[0].severity if found else "note"
    return Verdict(
        level="healthy" if worst == "note" else worst,
        findings=tuple(found),
        usage=tuple(usage),
        collisions=collisions,
        training_error=training_error,
        validation_error=validation_error,
        effective_sizes=None if effective_sizes is None else tuple(map(float, effective_sizes)),
    )
