"""How a training run is conducted: one frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from semid.options import Options, option
from semid.training.precision import PRECISIONS

__all__ = ["SCHEDULES", "TrainOptions"]

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
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

    epochs: int = option(60, ge=1)
    batch_size: int = option(512, ge=2)
    learning_rate: float = option(1e-3, gt=0)
    weight_decay: float = option(0.0, ge=0)
    schedule: str = option("cosine", choices=SCHEDULES)
    warmup: float = option(0.02, ge=0, lt=1)
    clip_norm: float | None = option(1.0, gt=0)
    patience: int | None = option(20, ge=1)
    precision: str = option("auto", choices=PRECISIONS)
    checkpoint_seconds: float = option(30.0, ge=0)
