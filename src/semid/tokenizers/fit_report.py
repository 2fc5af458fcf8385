"""The report of a fit (sizes, errors, health verdict) and the model card made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.blocks import Moments
from semid.data.columns import TextModel
from semid.diagnostics.overlap import REPORT_SCALE, LevelOverlap, overlap_levels
from semid.documents import code_span
from semid.health import (
    CONCENTRATED,
    GEOMETRY,
    NEAR,
    CollisionCounter,
    Collisions,
    EnergyCounter,
    ErrorSums,
    Finding,
    LevelUsage,
    UsageCounter,
    Verdict,
    evaluate_threshold,
    threshold_table,
    verdict,
)
from semid.results import Result

Array = npt.NDArray[np.float32]


class HealthCounter:
    """Adds up codes and errors in blocks; relative errors are about the ``mean`` of all rows."""

    def __init__(self, codebook_sizes: tuple[int, ...], mean: npt.NDArray[np.float64]) -> None:
        self._usage = UsageCounter(codebook_sizes)
        self._collisions = CollisionCounter(codebook_sizes)
        self._sizes = codebook_sizes
        self._latents = Moments()
        self.inputs = EnergyCounter(mean)
        self.training = ErrorSums()
        self.validation = ErrorSums()
        self.unknown = ErrorSums()

    def update(
        self,
        codes: npt.NDArray[np.int64],
        x: Array,
        reconstruction: Array,
        *,
        latent: Array,
        train: npt.NDArray[np.bool_] | None,
        row_hashes: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.float64]:
        """Count a block of n rows; return the squared error of each."""
        self._usage.update(codes)
        self._collisions.update(codes, duplicate_groups=row_hashes)
        self._latents.add_(latent)
        spreads, errors = self.inputs.update(x, reconstruction)
        # Rows whose part in the fit is not known are counted by themselves.
        groups = [(self.unknown, np.ones(len(x), bool))]
        if train is not None:
            groups = [(self.training, train), (self.validation, ~train)]
        for sums, rows in groups:
            error, spread = float(errors[rows].sum()), float(spreads[rows].sum())
            sums.add_(ErrorSums(int(rows.sum()), error, spread))
        return errors

    def take_collisions(self) -> CollisionCounter:
        """Hand over the ids counted, which grow with the items, and keep what does not grow."""
        collisions, self._collisions = self._collisions, CollisionCounter(self._sizes)
        return collisions

    def merge(self, other: HealthCounter) -> None:
        """Add what another counter over other rows has counted."""
        self._usage.merge(other._usage)
        self._collisions.merge(other._collisions)
        self._latents.merge_(other._latents)
        self.inputs.merge(other.inputs)
        self.training.add_(other.training)
        self.validation.add_(other.validation)
        self.unknown.add_(other.unknown)

    @property
    def relative_errors(self) -> dict[str, float | None]:
        """Relative errors of ``all`` rows and, where known, of ``training`` and ``held_out``."""
        whole = ErrorSums()
        for sums in (self.training, self.validation, self.unknown):
            whole.add_(sums)
        groups = {"training": self.training, "held_out": self.validation}
        return {"all": whole.relative} | {
            name: sums.relative for name, sums in groups.items() if sums.rows
        }

    def usage(self) -> tuple[LevelUsage, ...]:
        """Return the usage of each level."""
        return self._usage.result()

    def verdict(
        self,
        codebooks: Sequence[Array],
        *,
        collisions: Collisions | None = None,
        overlaps: Sequence[LevelOverlap] | None = None,
    ) -> Verdict:
        """Return the verdict on what was counted; ``codebooks`` (codes, latent) per level."""
        used = self.usage()
        errors = self.relative_errors
        # Of rows that are neither known to be trained on nor held out there is one error of all.
        known = bool(self.training.rows or self.validation.rows)
        if overlaps is None:
            overlaps = self._overlaps(codebooks, used)
        base = verdict(
            used,
            collisions or self._collisions.result(),
            effective_sizes=[level.at(REPORT_SCALE).effective_size for level in overlaps] or None,
            training_error=errors.get("training"),
            validation_error=errors.get("held_out"),
            error=None if known else errors["all"],
            inputs=self.inputs.result(),
        )
        findings = [] if self._latent_variance() > 0 else [_CONSTANT_LATENT]
        # The unit of the noise is the latent's standard deviation: one that a few rows or columns
        # make up would have the codewords of all other items overlap.
        if not any(finding.name in CONCENTRATED for finding in base.findings):
            findings += _overlap_findings(overlaps)
        return base.with_findings(findings)

    def _latent_variance(self) -> float:
        """Mean squared distance of latents to their mean; 0 where no digit of it is left."""
        variance = self._latents.variance
        # A variance below 1e-13 of the mean square is rounding error of float64 sums.
        square = self._latents.squares / max(self._latents.count, 1)
        return variance if variance > 1e-13 * square else 0.0

    def _overlaps(
        self, codebooks: Sequence[Array], used: tuple[LevelUsage, ...]
    ) -> tuple[LevelOverlap, ...]:
        """Overlap of each level at noise 0.1 (DRQ eq. 12); none where latents do not vary."""
        # The noise is in units of the latent's standard deviation per element.
        variance = self._latent_variance() / self._latents.total.size
        if variance <= 0:
            return ()
        return overlap_levels(
            codebooks, used, latent_std=float(np.sqrt(variance)), scales=(REPORT_SCALE,)
        )


_CONSTANT_LATENT = Finding(
    "constant-latent",
    "unhealthy",
    None,
    "all items have the same latent vector",
    "The embeddings are all equal, or the encoder maps everything to one point",
    "looking at the embeddings; fitting again with a smaller learning rate",
)


def _overlap_findings(overlaps: Sequence[LevelOverlap]) -> list[Finding]:
    """Return what is wrong with the geometry of the codewords."""
    findings = []
    for level in overlaps:
        point = level.at(REPORT_SCALE)
        findings += evaluate_threshold(
            GEOMETRY,
            point.geometry_share,
            f"level {level.level + 1} has codewords that lie on top of each other: at noise "
            f"{REPORT_SCALE:g} its {level.active} used codes act like "
            f"{point.effective_size:.1f}, though usage alone would give "
            f"{1 / point.collision_probability:.1f}",
            "Codewords closer together than small changes of an item: which of them it gets is "
            "chance, whatever the usage looks like",
            "a smaller codebook at this level, k-means seeding, or less freedom for the encoder "
            "to shrink its latent space",
            level=level.level,
        )
    return findings


@dataclass(frozen=True, kw_only=True)
class FitReport(Result):
    """The report of one fit, stored in the artefact.

    Attributes:
        items: number of rows, of which ``trained_items`` were trained on and ``held_out_items``
            evaluated alone.
        seconds: wall time of the fit.
        details: figures of this kind of tokenizer, for example inertia per level.
        health: the verdict.
        summary: the verdict as text.
    """

    items: int
    trained_items: int
    held_out_items: int
    seconds: float
    details: dict[str, Any]
    health: Verdict
    summary: str

    @property
    def training_error(self) -> float | None:
        """Relative error on the rows trained on.

        ``sum |x - x_hat|^2 / sum |x - mean|^2``, both sums over these rows, with the mean of all
        rows of the file.
        """
        return self.health.training_error

    @property
    def validation_error(self) -> float | None:
        """The same on held-out rows, with the same mean; None if none were held out."""
        return self.health.validation_error

    @property
    def figures(self) -> dict[str, float | None]:
        """The main figures by name, as trackers of runs show them."""
        collisions = self.health.collisions
        return {
            "items": self.items,
            "unique_ids": collisions.unique_ids,
            "collision_rate": collisions.collision_rate,
            "colliding_item_rate": collisions.colliding_item_rate,
            "largest_bucket": collisions.largest_bucket,
            "training_error": self.training_error,
            "validation_error": self.validation_error,
            **{f"perplexity_{each.level}": each.perplexity for each in self.health.usage},
        }

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        *,
        items: int,
        trained_items: int,
        seconds: float,
        details: dict[str, Any],
    ) -> FitReport:
        """Make the report of a verdict."""
        return cls(
            items=items,
            trained_items=trained_items,
            held_out_items=items - trained_items,
            seconds=round(seconds, 3),
            details=details,
            health=verdict,
            summary=verdict.summary(),
        )


def card(kind: str, config: Mapping[str, Any]) -> str:
    """Return Markdown that says what the model is, how it was made and whether it is healthy."""
    sizes = config["codebook_sizes"]
    lines = [
        f"# Semantic ID tokenizer: {kind}",
        "",
        f"{len(sizes)} codes per item from codebooks of {', '.join(map(str, sizes))} codewords, "
        f"for embeddings of width {config['dim']}.",
        "",
        "```python",
        "import semid",
        'tokenizer = semid.load("path/to/this/folder")',
        "ids = tokenizer.encode(embeddings)",
        "```",
        "",
        "| setting | value |",
        "|---|---|",
        *[f"| `{name}` | `{value}` |" for name, value in config["settings"].items()],
        *_embeddings_of(config.get("text_model")),
        f"| codebook fingerprint | `{config['codebook_fingerprint']}` |",
        "",
    ]
    report = config["fit_report"]
    if report is not None:
        lines += [
            "## Fit",
            "",
            f"{report['items']:,} items, {report['trained_items']:,} trained on, "
            f"{report['held_out_items']:,} held out, {report['seconds']:,.1f} seconds.",
            "",
            "```text",
            report["summary"],
            "```",
            "",
            "Relative error: `sum |x - x_hat|^2 / sum |x - mean|^2` over the rows named, with the "
            "mean of all rows. The verdict is the worst finding's; notes do not change it. A note "
            f"also says where a figure comes within a factor of {NEAR:g} of a warning.",
            "",
            *threshold_table(),
            "",
            *_behavior_weights(report["details"].get("behavior", {})),
        ]
    return "\n".join(lines)


def _behavior_weights(choice: Mapping[str, Any]) -> list[str]:
    """Return a table of the weights of behavior that a fit tried, if it did."""
    if "trials" not in choice:
        return []
    return [
        f"Weight of behavior: {choice['weight']:g}, by {choice['pairs']:,} pairs of users kept for "
        f"selection. A hit is a second item among the {choice['cutoff']} nearest of the first. All "
        "figures are from before refinement.",
        "",
        "| weight | hits | gain, 95 % interval | content error, held out |",
        "|---|---|---|---|",
        *[
            f"| {each['weight']:g} | {each['hits']:.4f} | {each['low']:+.4f} to "
            f"{each['high']:+.4f} | {each['error']:.4f} |"
            for each in choice["trials"]
        ],
        "",
    ]


def _embeddings_of(text_model: Mapping[str, Any] | None) -> list[str]:
    if text_model is None:
        return []
    return [
        f"| embeddings by | {code_span(str(TextModel(**text_model)))} |",
        f"| of the text | {code_span(text_model['template'])} |",
    ]
