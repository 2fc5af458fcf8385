"""Losses on latents of items that belong together (DRQ §4.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["info_nce", "uniformity"]


def info_nce(
    first: Tensor, second: Tensor, *, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE with the other pairs of the batch as negatives.

    Args:
        first: ``(n, latent)`` anchors; rows are scaled to unit length here.
        second: ``(n, latent)`` positives, row i of anchor i.
        temperature: divides the cosines, above 0.
        excluded: ``(n, n)`` boolean, true where ``second[j]`` is no negative of ``first[i]``.

    Returns:
        Scalar: mean over both directions, in nats. One mask serves both when positives count in
        both directions, as those of `semid.tokenizers.neural.pairs.Positives` do.
    """
    a = functional.normalize(first.float(), dim=1)
    b = functional.normalize(second.float(), dim=1)
    with torch.autocast(a.device.type, enabled=False):  # small temperatures magnify rounding
        logits = a @ b.t() / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    forth = functional.cross_entropy(logits, target)
    back = functional.cross_entropy(logits.t(), target)
    return 0.5 * (forth + back)


def uniformity(z: Tensor, *, sharpness: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential of pairs on the sphere (Wang and Isola 2020, eq. 2).

    Args:
        z: ``(n, latent)``, n at least 2; rows are scaled to unit length here.
        sharpness: t of the potential ``exp(-t |a - b|^2)``.

    Returns:
        Scalar; lower is more even.
    """
    unit = functional.normalize(z.float(), dim=1)
    with torch.autocast(unit.device.type, enabled=False):
        squared = (2.0 - 2.0 * (unit @ unit.t())).clamp_min(0.0)
    apart = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (-sharpness * squared[apart]).exp().mean().log()
