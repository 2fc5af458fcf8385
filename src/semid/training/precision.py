"""Which arithmetic the matrix products of a training step run in."""

from __future__ import annotations

import logging

import torch

__all__ = ["PRECISIONS", "bf16_on_cpu", "resolve_precision"]

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")


def bf16_on_cpu() -> bool:
    """Say whether this CPU multiplies bf16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Return ``fp32`` or ``bf16``.

    ``auto`` takes bf16 where the chip has instructions for it: CUDA devices of compute capability
    8 or later, CPUs with AMX tiles or AVX-512 BF16. It asks the chip and times nothing, so that a
    run on one machine always takes the same arithmetic. ``benchmarks/training_step.py`` shows what
    it brings.

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
        found = bf16_on_cpu()
        reason = "AMX or AVX-512 BF16" if found else "no AMX, no AVX-512 BF16"
    chosen = "bf16" if found else "fp32"
    logger.info("precision: %s (%s on %s)", chosen, reason, device.type)
    return chosen
