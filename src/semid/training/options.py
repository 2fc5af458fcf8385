"""How a training run is conducted: one frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from semid.errors import UsageError
from semid.training.precision import PRECISIONS

__all__ = ["SCHEDULES", "TrainOptions"]

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a training run is conducted.

    Attributes:
        epochs: passes over the training rows, at least 1.
        batch_size: rows a step over all processes together, at least 2.
        learning_rate: peak rate of Adam, above 0.
        weight_decay: decoupled decay (AdamW), 0 or more.
        schedule: ``cosine`` falls to a hundredth of the peak; ``constant`` stays.
        warmup: share of all steps over which the rate rises from 0, in [0, 1).
        clip_norm: gradients longer than this are shortened to it; None never shortens.
        patience: epochs without a better evaluation after which training stops; None never stops.
        precision: ``auto``, ``fp32`` or ``bf16``, see `semid.training.precision`.
        checkpoint_seconds: least time between two saved states within an epoch, 0 or more.
    """

    epochs: int = 60
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.02
    clip_norm: float | None = 1.0
    patience: int | None = 20
    precision: str = "auto"
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UsageError: listing every value out of range.
        """
        allowed = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2"),
            ("learning_rate", 0 < self.learning_rate < float("inf"), "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more"),
            ("schedule", self.schedule in SCHEDULES, " or ".join(SCHEDULES)),
            ("warmup", 0 <= self.warmup < 1, "a share in [0, 1)"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or None"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1, or None"),
            ("precision", self.precision in PRECISIONS, " or ".join(PRECISIONS)),
            ("checkpoint_seconds", self.checkpoint_seconds >= 0, "0 or more"),
        ]
        problems = [
            f"{name}={getattr(self, name)!r}: give {rule}"
            for name, good, rule in allowed
            if not good
        ]
        if problems:
            raise UsageError("; ".join(problems))
