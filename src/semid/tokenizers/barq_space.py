"""The space in which BARQ fits codebooks: the content of rows and their direction of behavior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.data.blocks import Moments
from semid.quantization.blocks import Blocks, Preprocess
from semid.quantization.least_squares import leading_components
from semid.quantization.nearest import IndexedCodebook
from semid.quantization.residual import encode_residual
from semid.tokenizers.neural.autoencoder import ExactEncoder, perceptron

Array = npt.NDArray[np.float32]

UNIT_LENGTH = Preprocess(normalize=True)


@dataclass(frozen=True)
class Content:
    """The part of rows that is quantized: all of them, or their leading principal components."""

    components: Array | None = None  # (dim, width) orthonormal columns; None for whole rows
    rest: Array | None = None  # (dim,) the mean's part outside the components
    threads: int | None = None

    @classmethod
    def of(
        cls, blocks: Blocks, mean: npt.NDArray[np.float64], *, share: float, threads: int | None
    ) -> Content:
        """Keep the components of rows with mean ``mean`` that hold ``share`` of the variance."""
        if share == 1:
            return cls(threads=threads)
        components = leading_components(blocks, mean, share=share)
        exact = components.astype(np.float64)
        # P P'mean is the part of the mean inside the components; the rest of it lies outside.
        rest = (mean - exact @ (mean @ exact)).astype(np.float32)
        return cls(components, rest, threads)

    def tensors(self) -> dict[str, Array]:
        """Return its arrays by name."""
        arrays = {"components": self.components, "rest": self.rest}
        return {name: array for name, array in arrays.items() if array is not None}

    def width(self, dim: int) -> int:
        """Return the width of the content of rows of width ``dim``."""
        return dim if self.components is None else self.components.shape[1]

    def __call__(self, x: Array) -> Array:
        """Return the content ``(n, width)`` of rows; each depends on that row alone."""
        if self.components is None:
            return x
        bias = np.zeros(self.components.shape[1], dtype=np.float32)
        return perceptron(x, [(self.components, bias)], threads=self.threads)

    def rows(self, content: Array) -> Array:
        """Return the rows ``(n, dim)`` of least distance to the mean that have this content."""
        if self.components is None or self.rest is None:
            return content
        lift = np.ascontiguousarray(self.components.T)
        return perceptron(content, [(lift, self.rest)], threads=self.threads)


@dataclass(frozen=True)
class Blend:
    """Rows ``x`` to ``[P'x, scale u(x), 0...]``, ``u`` the direction of the encoder's latent."""

    content: Content
    encoder: ExactEncoder | None  # None leaves behavior out
    scale: float
    penalty_columns: int  # of zeros, in which the codewords have their penalties

    def directions(self, x: Array) -> Array:
        """Return ``u(x)`` ``(n, latent)``, of width 0 without an encoder."""
        if self.encoder is None:
            return np.empty((len(x), 0), dtype=np.float32)
        return UNIT_LENGTH.apply(self.encoder(x, threads=self.content.threads))

    def weighted(self, rows: Blocks, weight: float) -> Blend:
        """Return it with behavior of ``weight`` times the variance of content; 0 leaves it out."""
        if not weight:
            return replace(self, encoder=None, scale=1.0)
        # Without a scale the wider part would decide all codes, whatever the weight says.
        variances = [
            Moments.of((start, part(x)) for start, x in rows.blocks()).variance
            for part in (self.content, self.directions)
        ]
        ratio = variances[0] / max(variances[1], 1e-12)
        return replace(self, scale=float(np.sqrt(weight * ratio)))

    def __call__(self, x: Array) -> Array:
        """Return ``(n, content + latent + penalties)``; each row depends on that row alone."""
        zeros = np.zeros((len(x), self.penalty_columns), dtype=np.float32)
        scaled = np.float32(self.scale) * self.directions(x)
        return np.concatenate([self.content(x), scaled, zeros], axis=1)


def encode_rows(
    rows: Blocks, index: Sequence[IndexedCodebook], *, beam_width: int = 1, threads: int | None
) -> npt.NDArray[np.int64]:
    """Return the codes of blended rows ``(items, levels)``."""
    parts = [
        encode_residual(x, index, beam_width=beam_width, threads=threads).codes
        for _, x in rows.blocks()
    ]
    return np.concatenate(parts or [np.empty((0, len(index)), np.int64)])


def code_targets(
    rows: Blocks, codes: npt.NDArray[np.int64], target: Callable[[Array], Array]
) -> Iterator[tuple[npt.NDArray[np.int64], Array]]:
    """Yield blocks of codes with the targets of their rows."""
    for start, x in rows.blocks():
        yield codes[start : start + len(x)], target(x)


class BlendGraph(nn.Module):
    """`Blend` as a module that can be traced, with the preprocessing of rows before it."""

    def __init__(self, blend: Blend, prepare: nn.Module, encoder: nn.Module | None) -> None:
        super().__init__()
        self.prepare, self.encoder = prepare, encoder
        self.scale, self.penalty_columns = float(np.float32(blend.scale)), blend.penalty_columns
        components = blend.content.components
        matrix = None if components is None else torch.from_numpy(components.copy())
        self.register_buffer("components", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, content + latent + penalties)``."""
        content = self.prepare(x)
        parts = [content if self.components is None else content @ self.components]
        if self.encoder is not None:
            z = self.encoder(x).double()
            norms = z.square().sum(dim=1, keepdim=True).sqrt()
            norms = torch.where(norms == 0, torch.ones_like(norms), norms)
            parts.append((self.scale * (z / norms)).float())
        if self.penalty_columns:
            parts.append(parts[0].new_zeros((x.shape[0], self.penalty_columns)))
        return torch.cat(parts, dim=1)
