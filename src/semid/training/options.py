"""How a training run is conducted: options, precision and learning-rate schedule."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from semid.lazy import torch
from semid.options import Options, option

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")


def bf16_on_cpu() -> bool:
    """Say whether this CPU multiplies bf16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_precision(requested: str, device: torch.device) -> str:
    """Return ``fp32`` or ``bf16``; ``auto`` takes bf16 where the chip has instructions for it."""
    if requested != "auto":
        return requested
    # The chip is asked and nothing is timed, so that a run on one machine always takes the same
    # arithmetic. `benchmarks/training_step.py` shows what bf16 brings.
    if device.type == "cuda":
        supported = torch.cuda.get_device_capability(device)[0] >= 8
        reason = "tensor cores" if supported else "no bf16 tensor cores"
    else:
        supported = bf16_on_cpu()
        reason = "AMX or AVX-512 BF16" if supported else "no AMX, no AVX-512 BF16"
    precision = "bf16" if supported else "fp32"
    logger.info("precision: %s (%s on %s)", precision, reason, device.type)
    return precision


SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """How a training run is conducted.

    The schedule ``cosine`` falls to a hundredth of the peak, ``constant`` stays. The precision
    ``auto`` takes bf16 where the chip has instructions for it. Without ``clip_norm`` gradients keep
    their length, without ``patience`` all epochs run.
    """

    epochs: int = option(60, ge=1, help="Maximum number of training epochs.")
    batch_size: int = option(512, ge=2, help="Rows per training step, over all processes.")
    learning_rate: float = option(1e-3, gt=0, help="Peak learning rate of Adam.")
    weight_decay: float = option(0.0, ge=0, help="Decoupled weight decay (AdamW).")
    schedule: str = option("cosine", choices=SCHEDULES, help="Schedule of the learning rate.")
    warmup: float = option(
        0.02, ge=0, lt=1, help="Share of all steps over which the learning rate rises from 0."
    )
    clip_norm: float | None = option(1.0, gt=0, help="Maximum norm of the gradient.")
    patience: int | None = option(
        20, ge=1, help="Epochs without improvement after which training stops."
    )
    evaluate_every: int = option(
        1, ge=1, help="Epochs from one evaluation to the next; the last epoch always has one."
    )
    precision: str = option("auto", choices=PRECISIONS, help="Arithmetic of matrix products.")
    checkpoint_seconds: float = option(
        30.0, ge=0, help="Minimum time between two checkpoints within an epoch."
    )


FLOOR = 0.01
"""Where the cosine ends, as a share of the peak."""


def learning_rate(step: int, *, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Return the rate of a step, from 0; a function of its number, so a resume needs no state."""
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    if schedule == "constant":
        return peak
    done = (step - rising) / max(total - rising, 1)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
