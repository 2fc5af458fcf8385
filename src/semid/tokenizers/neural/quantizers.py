"""Quantizers in training: residual levels, or parallel codebooks that are averaged.

Gradients, which open implementations get wrong in several ways: residuals are taken from the raw
codewords, never from a straight-through output; one straight-through covers the whole sum; the
commitment of every level reaches the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from semid.seeds import child_seed
from semid.tokenizers.neural.autoencoder import blank_linear
from semid.tokenizers.neural.codebook import Codebook, UpdateRule, nearest_labels

__all__ = ["ParallelQuantizer", "Quantized", "Quantizer", "ResidualQuantizer"]


class Quantized(NamedTuple):
    """What a quantizer makes of a batch.

    Attributes:
        latent: ``(n, latent)`` for the decoder: codewords forward, the identity backward.
        codes: ``(n, levels)`` int64.
        commitment: ``(levels,)`` ``|sg[q] - r|^2`` a level, summed over dimensions, mean over rows.
        codebook: scalar ``|q - sg[r]|^2`` over all levels; 0 under the moving-average rule.
    """

    latent: Tensor
    codes: Tensor
    commitment: Tensor
    codebook: Tensor


class ResidualQuantizer(nn.Module):
    """Levels that each quantize what the levels before left (RQ-VAE).

    Args:
        sizes: codewords of each level.
        latent: width.
        rule: how codewords move.
        seed: of revived codewords.
    """

    def __init__(self, sizes: Sequence[int], latent: int, *, rule: UpdateRule, seed: int) -> None:
        super().__init__()
        self.rule = rule
        self.books = nn.ModuleList(
            [Codebook(k, latent, rule=rule, seed=seed, name=i) for i, k in enumerate(sizes)]
        )

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, latent)``; in training mode the codebooks take the batch in."""
        taken = torch.zeros_like(z)
        codes, commitment, codebook = [], [], z.new_zeros(())
        for book in self.books:
            assert isinstance(book, Codebook)
            residual = z - taken  # gradient 1 to z: taken holds raw codewords without a graph
            fixed = residual.detach()
            labels = nearest_labels(fixed, book.codewords)
            words = book.codewords[labels]
            chosen = words.detach()
            if self.training:
                if self.rule.kind == "gradient":
                    codebook = codebook + _squared(words - fixed)
                book.observe_(fixed, labels)
            codes.append(labels)
            commitment.append(_squared(residual - chosen))
            taken = taken + chosen
        straight = z + (taken - z.detach()).detach() if z.requires_grad else taken
        return Quantized(straight, torch.stack(codes, 1), torch.stack(commitment), codebook)


class ParallelQuantizer(nn.Module):
    """Codebooks that all quantize the same latent; the decoder sees their average (MoC eq. 7).

    With the gradient rule the codebooks are fitted jointly through their average, with moving
    averages each goes to the mean of the vectors it was given.

    Args:
        sizes: codewords of each codebook.
        latent: width.
        rule: how codewords move.
        seed: of revived codewords.
        projection: give each codebook a learned linear map of the latent before its lookup
            (MoC §4.1 speaks of "various spaces"; the map is ours).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        latent: int,
        *,
        rule: UpdateRule,
        seed: int,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.books = nn.ModuleList(
            [Codebook(k, latent, rule=rule, seed=seed, name=i) for i, k in enumerate(sizes)]
        )
        self.maps = nn.ModuleList(
            [blank_linear(latent, latent, bias=False) for _ in sizes] if projection else []
        )
        for number, each in enumerate(self.maps):
            assert isinstance(each, nn.Linear)
            nn.init.eye_(each.weight)
            own_seed = seed + number
            if not -(2**63) <= own_seed < 2**64:  # torch takes no others
                own_seed = child_seed(seed, "projection", number)
            generator = torch.Generator().manual_seed(own_seed)
            with torch.no_grad():  # spaces that start alike would stay alike
                each.weight.add_(torch.randn(latent, latent, generator=generator) / latent)

    def spaces(self, z: Tensor) -> list[Tensor]:
        """Return what each codebook is given: ``(n, latent)`` each."""
        if len(self.maps):
            return [each(z) for each in self.maps]
        return [z] * len(self.books)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, latent)``; in training mode the codebooks take the batch in."""
        with torch.autocast(z.device.type, enabled=False):
            spaces = self.spaces(z)
        codes, words, apart = [], [], []
        for book, space in zip(self.books, spaces, strict=True):
            assert isinstance(book, Codebook)
            fixed = space.detach()
            labels = nearest_labels(fixed, book.codewords)
            found = book.codewords[labels]
            codes.append(labels)
            words.append(found)
            apart.append(_squared(space - found.detach()))
            if self.training:
                book.observe_(fixed, labels)
        middle = torch.stack(spaces).mean(dim=0) if len(self.maps) else z
        mean = torch.stack(words).mean(dim=0)
        codebook = z.new_zeros(())
        if self.training and self.rule.kind == "gradient":
            codebook = _squared(mean - middle.detach())
        # Under a projection each map has to be held to its codebook; without one, z to the average.
        commitment = (
            torch.stack(apart) / len(apart) if len(self.maps) else _squared(z - mean.detach())[None]
        )
        fixed_mean = mean.detach()
        straight = middle + (fixed_mean - middle.detach()).detach()
        return Quantized(straight, torch.stack(codes, 1), commitment, codebook)


Quantizer = ResidualQuantizer | ParallelQuantizer


def _squared(difference: Tensor) -> Tensor:
    """Sum over dimensions, mean over rows."""
    return difference.square().sum(dim=1).mean()
