"""Which arithmetic the matrix products of a training step run in."""

from __future__ import annotations

import logging

import torch

__all__ = ["PRECISIONS", "resolve_precision"]

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Return ``fp32`` or ``bf16``.

    ``auto`` takes bf16 where the chip has matrix units for it: CUDA devices of compute capability
    8 or later, CPUs with AMX tiles. It asks the chip and times nothing, so that a run on one
    machine always takes the same arithmetic. ``benchmarks/training_step.py`` shows what it brings.

    Args:
        wanted: one of `PRECISIONS`.
        device: where the model lies.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)[0] >= 8
        reason = "tensor cores" if found else "no bf16 tensor cores"
    else:
        found = bool(torch.cpu._is_amx_tile_supported())
        reason = "AMX tiles found" if found else "no AMX tiles"
    chosen = "bf16" if found else "fp32"
    logger.info("precision: %s (%s on %s)", chosen, reason, device.type)
    return chosen
