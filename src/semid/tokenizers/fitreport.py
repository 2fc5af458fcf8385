"""What a fit says of itself: sizes, errors on trained and held-out rows, the health verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.health import CollisionCounter, UsageCounter, Verdict, verdict

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
        self.training = ErrorSums()
        self.validation = ErrorSums()

    def update(
        self,
        codes: npt.NDArray[np.int64],
        x: Array,
        reconstruction: Array,
        *,
        train: npt.NDArray[np.bool_],
        row_hashes: npt.NDArray[np.uint64],
    ) -> None:
        """Count a block: codes ``(n, levels)``, rows and reconstructions ``(n, dim)``."""
        self._usage.update(codes)
        self._collisions.update(codes, duplicate_groups=row_hashes)
        self.training.add_(x[train], reconstruction[train])
        self.validation.add_(x[~train], reconstruction[~train])

    def verdict(self) -> Verdict:
        """Judge what was counted."""
        return verdict(
            self._usage.result(),
            self._collisions.result(),
            training_error=self.training.relative(self._variance),
            validation_error=self.validation.relative(self._variance),
        )


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
