"""What a verdict says beyond usage and collisions: overlapping codewords, dead dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from semid.diagnostics.overlap import LevelOverlap
from semid.health import Finding, Verdict
from semid.report.measure import Moments

__all__ = ["OVERLAP_SCALE", "extra_findings", "judge"]

OVERLAP_SCALE = 0.1
"""Noise, as a multiple of the latent standard deviation, at which codewords must still be apart."""

# Share of R that near codewords make at that noise. Level 1 of a k-means codebook stands at 0 in
# tens of dimensions and more; a tenth is where the geometry begins to show beside usage.
GEOMETRY_WARNING = 0.1
GEOMETRY_UNHEALTHY = 0.5
# Constant dimensions: below one in a hundred, of the width and of the squared length, they cannot
# move any figure shown here.
CONSTANT_WARNING = 0.01


def extra_findings(
    inputs: Moments, latent: Moments, overlaps: Sequence[LevelOverlap]
) -> list[Finding]:
    """Judge the geometry of codewords and the dimensions of the input.

    Args:
        inputs: moments of the embeddings.
        latent: moments of the latent.
        overlaps: per level, holding `OVERLAP_SCALE`.
    """
    found = [finding for level in overlaps for finding in _overlap_finding(level)]
    found += _constant_finding(inputs)
    if latent.variance <= 0:
        found.append(
            Finding(
                "constant-latent",
                "unhealthy",
                None,
                "all items have the same latent vector",
                "The embeddings are all equal, or the encoder maps everything to one point",
                "looking at the embeddings; fitting again with a smaller learning rate",
            )
        )
    return found


def _constant_finding(inputs: Moments) -> list[Finding]:
    constant = inputs.constant
    if not len(constant):
        return []
    listed = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
    # A few dimensions at zero are harmless; a constant that carries weight is in every cosine.
    weight = float((inputs.low[constant] ** 2).sum()) / max(inputs.mean_square, 1e-300)
    harmful = len(constant) > CONSTANT_WARNING * len(inputs.low) or weight > CONSTANT_WARNING
    return [
        Finding(
            "constant-dimension",
            "warning" if harmful else "note",
            None,
            f"{len(constant)} of {len(inputs.low)} input dimensions hold one value for all items "
            f"(dimension {listed}, counted from 0), {weight:.1%} of the mean squared length",
            "A failed or padded feature: it carries nothing, and a large constant hides the rest "
            "from cosine similarity",
            "repairing or dropping these dimensions where the embeddings are made",
        )
    ]


def _overlap_finding(level: LevelOverlap) -> list[Finding]:
    point = level.at(OVERLAP_SCALE)
    share = point.geometry_share
    if share <= GEOMETRY_WARNING:
        return []
    severity: Literal["warning", "unhealthy"] = (
        "unhealthy" if share > GEOMETRY_UNHEALTHY else "warning"
    )
    return [
        Finding(
            "overlapping-codewords",
            severity,
            level.level,
            f"level {level.level + 1} has codewords that lie on top of each other: at noise "
            f"{OVERLAP_SCALE:g} its {level.active} used codes act like "
            f"{point.effective_size:.1f}, though usage alone would give {1 / point.floor:.1f}",
            "Codewords closer together than small changes of an item: which of them it gets is "
            "chance, whatever the usage looks like",
            "a smaller codebook at this level, k-means seeding, or less freedom for the encoder "
            "to shrink its latent space",
        )
    ]


def judge(base: Verdict, extra: Sequence[Finding]) -> Verdict:
    """Return the verdict with more findings, the worst first, and its level raised if need be."""
    ranks = {"unhealthy": 0, "warning": 1, "note": 2}
    findings = sorted([*base.findings, *extra], key=lambda finding: ranks[finding.severity])
    worst = findings[0].severity if findings else "note"
    return replace(base, level="healthy" if worst == "note" else worst, findings=tuple(findings))
