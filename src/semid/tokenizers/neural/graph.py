"""Preprocessing and encoder as modules that `torch.export` can trace."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.blocks import Preprocess
from semid.tokenizers.neural.autoencoder import Autoencoder

__all__ = ["EncoderGraph", "Prepare"]


class Prepare(nn.Module):
    """Centring and scaling of rows, as `semid.quantization.blocks.Preprocess` does them."""

    mean: Tensor | None

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean = preprocess.mean
        self.register_buffer("mean", None if mean is None else torch.from_numpy(mean.copy()))
        self.normalize = preprocess.normalize

    def forward(self, x: Tensor) -> Tensor:
        """Prepare rows ``(batch, dim)``."""
        if self.mean is not None:
            x = x - self.mean
        if self.normalize:
            norms = x.double().square().sum(dim=1, keepdim=True).sqrt()
            norms = torch.where(norms == 0, torch.ones_like(norms), norms)
            x = (x.double() / norms).float()
        return x


class EncoderGraph(nn.Module):
    """Rows to latents, without the autocast of training.

    Args:
        preprocess: of the rows.
        autoencoder: its encoder is copied.
        maps: ``(latent, latent)`` of each parallel codebook; none where all see the same latent.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        autoencoder: Autoencoder,
        maps: Sequence[npt.NDArray[np.float32]] = (),
    ) -> None:
        super().__init__()
        self.prepare = Prepare(preprocess)
        self.inputs = list(autoencoder.inputs)
        self.register_buffer("mean", autoencoder.mean.detach().clone())
        self.register_buffer("scale", autoencoder.scale.detach().clone())
        self.projections = copy.deepcopy(autoencoder.projections)
        self.layers = copy.deepcopy(autoencoder.encoder)
        self.maps = len(maps)
        for number, each in enumerate(maps):
            self.register_buffer(f"map_{number}", torch.from_numpy(each.copy()))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return latents ``(batch, latent)``, or one a codebook, of rows ``(batch, dim)``."""
        z = (self.prepare(x) - self.get_buffer("mean")) / self.get_buffer("scale")
        if len(self.projections):
            parts = torch.split(z, self.inputs, dim=1)
            pairs = zip(self.projections, parts, strict=True)
            z = torch.cat([project(part) for project, part in pairs], dim=1)
        for layer in self.layers[:-1]:
            z = torch.relu(layer(z))
        latent: Tensor = self.layers[-1](z)
        if self.maps:
            return [latent @ self.get_buffer(f"map_{number}") for number in range(self.maps)]
        return latent
