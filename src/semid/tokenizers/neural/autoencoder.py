"""The autoencoder of neural tokenizers: in training, exact on the CPU, and for export."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.blocks import Preprocess
from semid.quantization.engine.narrow import PANEL, TILE, score_tile
from semid.quantization.engine.plain import padded
from semid.quantization.threads import map_blocks
from semid.seeds import torch_generator

Array = npt.NDArray[np.float32]
Layer = tuple[Array, Array]
"""Weights ``(in, out)`` and bias ``(out,)``."""

BLOCK = 256
"""Rows per block: a block's widest activations stay in the second-level cache."""
MIN_TILED = 64
"""Rows from which on laying out the weights for tiles of rows pays."""


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _dense(x: Array, weight: Array, bias: Array, relu: bool, out: Array) -> None:
    inputs, width = weight.shape
    whole = inputs - inputs % 4
    spare = np.empty(width, np.float32)
    # Two rows at a time: each weight that is loaded serves both. A last single row is its own
    # partner, whose result goes nowhere.
    for i in range(0, len(x), 2):
        other = min(i + 1, len(x) - 1)
        row, partner = out[i], spare if other == i else out[other]
        row[:] = bias
        partner[:] = bias
        # Four inputs at a time: the compiler turns the inner loop into vector instructions, and
        # each output adds its terms in the order of the inputs, whatever the block size.
        for k in range(0, whole, 4):
            a, b, c, d = x[i, k], x[i, k + 1], x[i, k + 2], x[i, k + 3]
            e, f, g, h = x[other, k], x[other, k + 1], x[other, k + 2], x[other, k + 3]
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            for j in range(width):
                total = row[j] + a * w0[j]
                total = total + b * w1[j]
                total = total + c * w2[j]
                row[j] = total + d * w3[j]
                total = partner[j] + e * w0[j]
                total = total + f * w1[j]
                total = total + g * w2[j]
                partner[j] = total + h * w3[j]
        # Up to three inputs are left that do not fill a group of four.
        for k in range(whole, inputs):
            a, e, w0 = x[i, k], x[other, k], weight[k]
            for j in range(width):
                row[j] = row[j] + a * w0[j]
                partner[j] = partner[j] + e * w0[j]
        if relu:
            for j in range(width):
                row[j] = max(row[j], np.float32(0))
                partner[j] = max(partner[j], np.float32(0))


@numba.njit(nogil=True, cache=True)
def _dense_tiles(
    x: Array, numbers: npt.NDArray[np.int64], panels: Array, offsets: Array, relu: bool, out: Array
) -> None:
    for panel in range(panels.shape[0]):
        for first in range(0, len(out), TILE):
            score_tile(
                x, numbers, first, panels, panel, offsets, x.shape[1], out[first : first + TILE],
                panel * PANEL,
            )  # fmt: skip
    if relu:
        flat = out.reshape(-1)
        for i in range(len(flat)):
            flat[i] = max(flat[i], np.float32(0))


def _apply_layer(x: Array, layer: Layer, panels: Array | None, relu: bool) -> Array:
    """Apply a dense layer: by `_panels` in tiles whose sums stay in registers, without as it is.

    Both add the terms of an output in the order of the inputs, so the results are the same bits.
    """
    weight, bias = layer
    width = weight.shape[1]
    if panels is None:
        result = np.empty((len(x), width), dtype=np.float32)
        _dense(x, weight, bias, relu, result)
        return result
    numbers = np.minimum(np.arange(padded(len(x), TILE)), len(x) - 1)
    tiled = np.empty((len(numbers), len(panels) * PANEL), np.float32)
    offsets = np.zeros(tiled.shape[1], np.float32)
    offsets[:width] = -bias  # what a sum starts from is minus this
    _dense_tiles(x, numbers, panels, offsets, relu, tiled)
    return np.ascontiguousarray(tiled[: len(x), :width])


def _panels(weight: Array) -> Array:
    """Return weights ``(in, out)`` as panels of outputs ``(panels, in, PANEL)``, zeros last."""
    wide = np.pad(weight, ((0, 0), (0, -weight.shape[1] % PANEL)))
    return np.ascontiguousarray(wide.reshape(len(weight), -1, PANEL).transpose(1, 0, 2))


def perceptron(x: Array, layers: Sequence[Layer], *, threads: int | None = None) -> Array:
    """Apply dense layers with ReLU between them to rows ``(n, in)``: ``(n, out)`` float32.

    Each row depends on that row alone, in any chunking.
    """
    out = np.empty((len(x), layers[-1][0].shape[1]), dtype=np.float32)
    tiled = len(x) >= MIN_TILED
    panels = [_panels(weight) if tiled else None for weight, _ in layers]

    def work(start: int) -> None:
        block = np.ascontiguousarray(x[start : start + BLOCK], dtype=np.float32)
        for number, (layer, packed) in enumerate(zip(layers, panels, strict=True), 1):
            block = _apply_layer(block, layer, packed, number < len(layers))
        out[start : start + BLOCK] = block

    starts = range(0, len(x), BLOCK)
    # Starting threads costs more than a few blocks take.
    map_blocks(work, starts, threads=1 if len(starts) < 8 else threads)
    return out


def compile_layers() -> None:
    """Compile, or fetch, the kernels of dense layers, for few rows and for many."""
    layer = (np.eye(4, dtype=np.float32), np.zeros(4, np.float32))
    for count in (1, MIN_TILED):
        perceptron(np.zeros((count, 4), np.float32), [layer])


PROJECTED = 256
"""Widest projection of one of several inputs."""


class Autoencoder(nn.Module):
    """Multi-layer perceptrons with ReLU around a latent (MoC §4.1: 512-256-128, latent 32).

    Rows are first standardized by one number, so that training does not depend on the scale of the
    embeddings (ours). With several ``inputs``, given by their widths, each goes through a linear
    projection of its own before they are concatenated (DRQ §4: fused heterogeneous features).
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, inputs: Sequence[int], *, latent: int, hidden: Sequence[int], seed: int
    ) -> None:
        super().__init__()
        dim = sum(inputs)
        self.inputs, self.dim = tuple(inputs), dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        widths = [min(width, PROJECTED) for width in inputs] if len(inputs) > 1 else []
        self.projections = nn.ModuleList(
            [blank_linear(a, b) for a, b in zip(inputs, widths, strict=False)]
        )
        sizes = [sum(widths) or dim, *hidden, latent]
        self.encoder = nn.ModuleList([blank_linear(a, b) for a, b in pairwise(sizes)])
        self.decoder = nn.ModuleList(
            [blank_linear(a, b) for a, b in pairwise([latent, *reversed(hidden), dim])]
        )
        self._initialize_(seed)

    def _initialize_(self, seed: int) -> None:
        """Draw weights uniform in ``sqrt(6 / fan_in)`` (He), half of that at the two ends."""
        # ReLU halves the variance of a layer's input, linear outputs do not.
        generator = torch_generator(seed, "weights")
        for stack in (self.projections, self.encoder, self.decoder):
            for number, layer in enumerate(stack):
                assert isinstance(layer, nn.Linear)
                linear = stack is self.projections or number == len(stack) - 1
                bound = math.sqrt((3.0 if linear else 6.0) / layer.in_features)
                with torch.no_grad():
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.zero_()

    def standardize_(self, mean: npt.NDArray[np.float64], variance: float) -> None:
        """Set shift and scale from the mean ``(dim,)`` and the variance of the training rows."""
        self.mean.copy_(torch.from_numpy(mean.astype(np.float32)))
        # One scale for all columns keeps their relative sizes; rows that are all equal keep theirs.
        self.scale.fill_(math.sqrt(variance / len(mean)) if variance > 0 else 1.0)

    def standard(self, x: Tensor) -> Tensor:
        """Return rows ``(n, dim)`` shifted and scaled."""
        return (x - self.mean) / self.scale

    def encode(self, x: Tensor) -> Tensor:
        """Return latents ``(n, latent)`` float32 of standardized rows ``(n, dim)``."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer ``(n, hidden)`` of standardized rows ``(n, dim)``."""
        if len(self.projections):
            parts = zip(self.projections, torch.split(x, list(self.inputs), dim=1), strict=True)
            x = torch.cat([project(part) for project, part in parts], dim=1)
        for layer in self.encoder[:-1]:
            x = torch.relu(layer(x))
        return x

    def head(self, features: Tensor) -> Tensor:
        """Return latents ``(n, latent)`` from the last hidden layer."""
        # The latent is rounded nowhere: codewords differ by less than bf16 resolves.
        with torch.autocast(features.device.type, enabled=False):
            z: Tensor = self.encoder[-1](features.float())
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Return standardized rows ``(n, dim)`` from latents ``(n, latent)``."""
        for layer in self.decoder[:-1]:
            z = torch.relu(layer(z))
        x: Tensor = self.decoder[-1](z)
        return x


class ExactEncoder:
    """Encoder on the CPU in which a row's latent does not depend on other rows."""

    def __init__(self, model: Autoencoder) -> None:
        self.inputs = model.inputs
        self.mean, self.scale = _numpy(model.mean), np.float32(model.scale.item())
        self.projections = [_layer(layer) for layer in model.projections]
        self.layers = [_layer(layer) for layer in model.encoder]

    def __call__(self, x: Array, *, threads: int | None = None) -> Array:
        """Return latents ``(n, latent)`` of rows ``(n, dim)``."""
        x = (x - self.mean) / self.scale
        if self.projections:
            ends = np.cumsum([0, *self.inputs])
            parts = [
                perceptron(x[:, ends[i] : ends[i + 1]], [layer], threads=threads)
                for i, layer in enumerate(self.projections)
            ]
            x = np.concatenate(parts, axis=1)
        return perceptron(x, self.layers, threads=threads)


class ExactDecoder:
    """Decoder on the CPU in which a row's reconstruction does not depend on other rows."""

    def __init__(self, model: Autoencoder) -> None:
        self.mean, self.scale = _numpy(model.mean), np.float32(model.scale.item())
        self.layers = [_layer(layer) for layer in model.decoder]

    def __call__(self, z: Array, *, threads: int | None = None) -> Array:
        """Return rows ``(n, dim)`` from latents ``(n, latent)``."""
        return perceptron(z, self.layers, threads=threads) * self.scale + self.mean


def blank_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer with weights yet to be set, without a draw from torch's generator."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs, outputs, bias=bias, device=torch.get_default_device()
    )
    return layer


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy().astype(np.float32)
    return array


def _layer(layer: nn.Module) -> Layer:
    assert isinstance(layer, nn.Linear)
    return np.ascontiguousarray(_numpy(layer.weight).T), _numpy(layer.bias)


class Prepare(nn.Module):
    """Centring and scaling of rows, as `semid.quantization.blocks.Preprocess` does them."""

    mean: Tensor | None

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean = preprocess.mean
        self.register_buffer("mean", None if mean is None else torch.from_numpy(mean.copy()))
        self.normalize, self.padding = preprocess.normalize, preprocess.padding

    def forward(self, x: Tensor) -> Tensor:
        """Prepare rows ``(batch, dim)``."""
        if self.mean is not None:
            x = x - self.mean
        if self.normalize:
            # float64 norms as in `Preprocess`; a row of zeros has no direction and stays as it is.
            norms = x.double().square().sum(dim=1, keepdim=True).sqrt()
            norms = torch.where(norms == 0, torch.ones_like(norms), norms)
            x = (x.double() / norms).float()
        return nn.functional.pad(x, (0, self.padding)) if self.padding else x


class EncoderGraph(nn.Module):
    """Rows to latents, without the autocast of training.

    ``maps`` (latent, latent) are those of parallel codebooks; none where all see the same latent.
    """

    def __init__(
        self, preprocess: Preprocess, autoencoder: Autoencoder, maps: Sequence[Array] = ()
    ) -> None:
        super().__init__()
        self.prepare = Prepare(preprocess)
        self.autoencoder = copy.deepcopy(autoencoder)
        self.autoencoder.decoder = nn.ModuleList()  # no part of the exported graph
        self.maps = len(maps)
        for number, each in enumerate(maps):
            self.register_buffer(f"map_{number}", torch.from_numpy(each.copy()))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return latents ``(batch, latent)``, or one a codebook, of rows ``(batch, dim)``."""
        standard = self.autoencoder.standard(self.prepare(x))
        latent: Tensor = self.autoencoder.encoder[-1](self.autoencoder.features(standard))
        if self.maps:
            return [latent @ self.get_buffer(f"map_{number}") for number in range(self.maps)]
        return latent
