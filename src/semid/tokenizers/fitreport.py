"""What a fit says of itself: sizes, errors on trained and held-out rows, the health verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.overlap import REPORT_SCALE, overlap_levels
from semid.health import CollisionCounter, Collisions, LevelUsage, UsageCounter, Verdict, verdict

__all__ = ["ErrorSums", "FitReport", "HealthCounter"]

Array = npt.NDArray[np.float32]


@dataclass
class ErrorSums:
    """Squared error added up over rows.

    Attributes:
        rows: rows counted.
        squared: sum of squared errors ``|x - x_hat|^2``.
    """

    rows: int = 0
    squared: float = 0.0

    def add_(self, x: Array, reconstruction: Array) -> None:
        """Count rows ``(n, dim)`` and their reconstruction."""
        difference = x - reconstruction
        self.rows += len(x)
        self.squared += float(np.einsum("nd,nd->", difference, difference, dtype=np.float64))

    def relative(self, variance: float) -> float | None:
        """Mean squared error over ``variance``; None without rows or variance."""
        return self.squared / self.rows / variance if self.rows and variance > 0 else None


class HealthCounter:
    """Adds up codes and errors in blocks and judges them at the end.

    Args:
        codebook_sizes: codewords of each level.
        variance: mean squared distance of the training rows to their mean.
    """

    def __init__(self, codebook_sizes: tuple[int, ...], variance: float) -> None:
        self._usage = UsageCounter(codebook_sizes)
        self._collisions = CollisionCounter(codebook_sizes)
        self._variance = variance
        self._sizes = codebook_sizes
        self._latents = 0
        self._latent_sum: npt.NDArray[np.float64] | float = 0.0
        self._latent_squares = 0.0
        self.training = ErrorSums()
        self.validation = ErrorSums()

    def update(
        self,
        codes: npt.NDArray[np.int64],
        x: Array,
        reconstruction: Array,
        *,
        latent: Array,
        train: npt.NDArray[np.bool_],
        row_hashes: npt.NDArray[np.uint64],
    ) -> None:
        """Count a block: codes ``(n, levels)``, rows and reconstructions ``(n, dim)``, latents."""
        self._usage.update(codes)
        self._collisions.update(codes, duplicate_groups=row_hashes)
        self._latents += len(latent)
        self._latent_sum = self._latent_sum + latent.sum(axis=0, dtype=np.float64)
        self._latent_squares += float(np.einsum("nd,nd->", latent, latent, dtype=np.float64))
        self.training.add_(x[train], reconstruction[train])
        self.validation.add_(x[~train], reconstruction[~train])

    def take_collisions(self) -> CollisionCounter:
        """Hand over the ids counted, which grow with the items, and keep what does not grow."""
        taken, self._collisions = self._collisions, CollisionCounter(self._sizes)
        return taken

    def merge(self, other: HealthCounter) -> None:
        """Add what another counter over other rows has counted."""
        self._usage.merge(other._usage)
        self._collisions.merge(other._collisions)
        self._latents += other._latents
        self._latent_sum = self._latent_sum + other._latent_sum
        self._latent_squares += other._latent_squares
        for mine, theirs in ((self.training, other.training), (self.validation, other.validation)):
            mine.rows += theirs.rows
            mine.squared += theirs.squared

    def verdict(
        self, codebooks: Sequence[Array], *, collisions: Collisions | None = None
    ) -> Verdict:
        """Judge what was counted.

        Args:
            codebooks: ``(codes, latent)`` each; they give the effective sizes at noise 0.1.
            collisions: those of all items, where their ids were taken and counted elsewhere.
        """
        used = self._usage.result()
        return verdict(
            used,
            collisions or self._collisions.result(),
            effective_sizes=self._effective_sizes(codebooks, used),
            training_error=self.training.relative(self._variance),
            validation_error=self.validation.relative(self._variance),
        )

    def _effective_sizes(
        self, codebooks: Sequence[Array], used: tuple[LevelUsage, ...]
    ) -> list[float] | None:
        """Effective codebook size of each level (DRQ eq. 12); None where latents do not vary."""
        mean = np.asarray(self._latent_sum) / max(self._latents, 1)
        variance = (self._latent_squares / max(self._latents, 1) - float(mean @ mean)) / mean.size
        if variance <= 0:
            return None
        levels = overlap_levels(
            codebooks, used, latent_std=float(np.sqrt(variance)), scales=(REPORT_SCALE,)
        )
        return [level.at(REPORT_SCALE).effective_size for level in levels]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """The report of one fit, stored in the artefact.

    Attributes:
        items: rows given.
        trained_items: rows trained on.
        held_out_items: rows held out and judged.
        seconds: wall time of the fit.
        details: figures of this tokenizer's own, for example inertia a level.
        health: the verdict as data (`semid.health.Verdict.to_dict`).
        summary: the verdict as text.
    """

    items: int
    trained_items: int
    held_out_items: int
    seconds: float
    details: dict[str, Any]
    health: dict[str, Any]
    summary: str

    @property
    def training_error(self) -> float | None:
        """Relative error ``|x - x_hat|^2 / |x - mean|^2`` on the rows trained on."""
        error: float | None = self.health["training_error"]
        return error

    @property
    def validation_error(self) -> float | None:
        """The same on held-out rows (about the training rows' mean); None if none were held out."""
        error: float | None = self.health["validation_error"]
        return error

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FitReport:
        """Read what `to_dict` gave."""
        return cls(**data)
