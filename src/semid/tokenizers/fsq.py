"""FSQ: an autoencoder whose bounded latent is rounded to a fixed grid; no codebook is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.artefact import fingerprint
from semid.codes import MAX_LEVELS
from semid.options import MAX_BEAM, option
from semid.quantization.residual import ResidualCodes, encode_residual
from semid.tokenizers.neural.quantized import QuantizedTokenizer
from semid.tokenizers.neural.quantizers import (
    Codebook,
    Quantized,
    Quantizer,
    UpdateRule,
    straight_through,
)

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

EPSILON = 1e-3
"""The bound stays this share inside the outermost half steps (Mentzer et al. 2023, app. A.1)."""

MAX_GRID = 65_536
"""Most points of a grid that is one code: they are tabulated as its codebook."""

MAX_STEPS = 1 << 20
"""Most steps along a dimension over all stages: float32 latents resolve no more."""


@dataclass(frozen=True)
class ScalarGrid:
    """The values that latents are rounded to, and the bound before (Mentzer et al. 2023, app. A.1).

    A dimension of L levels is bounded by ``tanh(z + shift) half - offset`` with
    ``half = (L - 1) (1 - eps) / 2``, and rounded to one of L whole numbers. For even L these are
    ``-L/2 .. L/2 - 1``, one more below zero than above: the offset 1/2 moves the bound to between
    them, and ``shift = tan(offset / half)`` keeps z = 0 near the middle. For odd L both are 0.
    Latents are then divided by ``L // 2``, so that they lie in [-1, 1].

    A residual stage divides each cell of the stage before into L equal parts (ours).

    Shapes: ``levels`` (dimensions,).
    """

    levels: tuple[int, ...]
    stages: int

    @cached_property
    def _constants(self) -> tuple[Doubles, Doubles, Doubles, Doubles]:
        """Return half width of the bound, offset, shift, and divisor, one per dimension."""
        levels = np.array(self.levels, dtype=np.float64)
        half = (levels - 1) * (1 - EPSILON) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        return half, offset, np.tan(offset / half), levels // 2

    def bound(self, z: Array) -> Array:
        """Bound and scale latents ``(n, dimensions)``; each row's result depends on it alone."""
        half, offset, shift, divisor = self._constants
        # In float64: near a midpoint, float32 rounding on the way would decide the code.
        bounded = np.tanh(z.astype(np.float64) + shift) * half - offset
        return (bounded / divisor).astype(np.float32)

    def bound_tensor(self, z: Tensor) -> Tensor:
        """Return the same with gradients."""
        half, offset, shift, divisor = (z.new_tensor(each) for each in self._constants)
        bounded: Tensor = (torch.tanh(z + shift) * half - offset) / divisor
        return bounded

    def values(self, stage: int) -> list[Array]:
        """Return the values that a stage adds to each dimension, rising, float32."""
        divisors = self._constants[3]
        each = []
        for level in self.levels:
            steps = np.arange(level, dtype=np.float64)
            # A cell has width 1 after the first stage and 1/L of the one before after each other.
            offset, scale = (level // 2, 1.0) if stage == 0 else ((level - 1) / 2, level**-stage)
            each.append((steps - offset) * scale)
        return [(v / d).astype(np.float32) for v, d in zip(each, divisors, strict=True)]

    def codebooks(self, group: int) -> list[Array]:
        """Return codewords ``(codes, dimensions)`` of every stage and group of dimensions.

        A code counts the digits of ``group`` consecutive dimensions, the first in ones. Its
        codewords are 0 in all other dimensions, so that the codewords of an item add up.
        """
        books = []
        for stage in range(self.stages):
            values = self.values(stage)
            for first in range(0, len(values), group):
                members = values[first : first + group]
                book = np.zeros((math.prod(map(len, members)), len(values)), dtype=np.float32)
                numbers = np.arange(len(book))
                for dimension, column in enumerate(members, first):
                    # Codes count in mixed radix; the lowest digit left is this dimension's.
                    book[:, dimension] = column[numbers % len(column)]
                    numbers //= len(column)
                books.append(book)
        return books

    def digits(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Round bounded latents ``(n, dimensions)``.

        Returns the position of each value within its stage and dimension ``(n, stages,
        dimensions)``, ties to the lower, and what remains ``(n, dimensions)``.
        """
        residual, digits = latent.clone(), []
        for stage in range(self.stages):
            for dimension, values in enumerate(self.values(stage)):
                # The nearest of rising values: as many as have their upper midpoint below. The mean
                # of two float32 values is exact in float64.
                each = torch.from_numpy(values).to(latent.device)
                middles = (each[1:].double() + each[:-1].double()) / 2
                at = torch.bucketize(residual[:, dimension].double().contiguous(), middles)
                digits.append(at)
                residual[:, dimension] -= each[at]
        return torch.stack(digits, 1).reshape(len(latent), self.stages, -1), residual

    def codes(self, digits: Tensor, group: int) -> Tensor:
        """Return codes ``(n, levels)``, one per stage and ``group`` dimensions."""
        digits = digits.reshape(len(digits), -1, group)
        levels = torch.tensor(self.levels, device=digits.device).reshape(-1, group)
        # A digit counts as much as the dimensions before it in its group have values together.
        basis = torch.cumprod(levels, 1) // levels
        return (digits * basis.repeat(self.stages, 1)).sum(2)


class FixedCodebook(Codebook):
    """Codewords that training counts and never moves."""

    @torch.no_grad()
    def observe_(self, z: Tensor, labels: Tensor) -> None:
        """Count the labels ``(n,)`` of a batch."""
        self.used += self.batch_counts(labels).to(torch.int64)


class ScalarQuantizer(Quantizer):
    """Bounds latents and rounds them to the grid, with a straight-through gradient."""

    is_fixed = True

    def __init__(self, grid: ScalarGrid, *, group: int) -> None:
        nn.Module.__init__(self)
        self.grid, self.group = grid, group
        self.rule = UpdateRule(revive_below=0.0)
        self.books = nn.ModuleList()
        for number, codewords in enumerate(grid.codebooks(group)):
            book = FixedCodebook(*codewords.shape, rule=self.rule, seed=0, name=number)
            book.codewords.copy_(torch.from_numpy(codewords))
            self.books.append(book)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, dimensions)``; in training mode the codes are counted."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.grid.bound_tensor(z.float())
        # Rounding has no gradient; `straight_through` passes that of the output on to `bounded`.
        digits, _ = self.grid.digits(bounded.detach())
        codes = self.grid.codes(digits, self.group)
        quantized = torch.zeros_like(bounded)
        for level, codebook in enumerate(self.codebooks):
            quantized = quantized + codebook.codewords[codes[:, level]]
            if self.training:
                codebook.observe_(bounded, codes[:, level])
        none = z.new_zeros(())  # nothing but the reconstruction is trained for
        return Quantized(straight_through(bounded, quantized), codes, none[None], none)


class BoundedEncoder(nn.Module):
    """An encoder with the grid's bound behind it, for export."""

    def __init__(self, encoder: nn.Module, grid: ScalarGrid) -> None:
        super().__init__()
        self.encoder, self.grid = encoder, grid

    def forward(self, x: Tensor) -> Tensor:
        """Return bounded latents ``(batch, dimensions)`` of rows ``(batch, dim)``."""
        return self.grid.bound_tensor(self.encoder(x).double()).float()


@dataclass(kw_only=True, eq=False, repr=False)
class FSQ(QuantizedTokenizer):
    """Finite scalar quantization: each latent dimension is bounded and rounded to a few values.

    The codebook is the grid of all combinations, so nothing is learned but the autoencoder, by the
    reconstruction alone: no codebook or commitment loss, no pre-training, no codes that die for
    want of a gradient. Each of the ``groups`` has one latent dimension per entry of
    ``dimension_levels``; ``latent``, ``commitment_weight`` and ``pretrain_epochs`` of the network
    do not apply.

    The paper has one group and one stage. Groups are parallel codes. Further stages (ours) divide
    each cell of the grid as often again, so that ids go from coarse to fine. Grids that the paper
    recommends: (8, 6, 5) for 2^8 codes, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12, (8, 8, 8,
    6, 5) for 2^14.

    Raises:
        UsageError: if a value is out of range; levels of one value; a grid of more than 65,536
            points as one code.

    Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", §3 and app. A.1.
    Rounding costs O(dimensions stages) per row, whatever the number of codes.
    """

    kind: ClassVar[str] = "fsq"
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "sum"

    dimension_levels: Sequence[int] = option(
        (8, 6, 5), ge=2, le=MAX_GRID, help="Number of values of each latent dimension of a group."
    )
    groups: int = option(3, ge=1, le=MAX_LEVELS, help="Groups of latent dimensions.")
    stages: int = option(1, ge=1, le=MAX_LEVELS, help="Residual stages.")
    codes_per: str = option(
        "group",
        choices=("group", "dimension"),
        help="What has a code in each stage. group: one number for the grid point of each group; "
        "dimension: each latent dimension by itself.",
    )
    beam_width: int = option(
        1, ge=1, le=MAX_BEAM, help="Partial codes kept while encoding; 1 rounds, which is nearest."
    )

    def _problems(self) -> list[str]:
        levels = tuple(int(level) for level in self.dimension_levels)
        if not levels:
            return ["dimension_levels=(): give the number of values of at least one dimension"]
        if min(levels) < 2:
            return []  # the field's own range says so
        problems = []
        per_group, points = self.codes_per == "group", math.prod(levels)
        if per_group and points > MAX_GRID:
            problems.append(
                f"dimension_levels={levels} make {points:,} codes per group, above {MAX_GRID:,}; "
                "give fewer or smaller levels and more groups, or codes_per='dimension'"
            )
        codes = self.stages * self.groups * (1 if per_group else len(levels))
        if codes > MAX_LEVELS:
            problems.append(
                f"groups={self.groups}, stages={self.stages} and codes_per='{self.codes_per}' make "
                f"{codes:,} codes per item, above {MAX_LEVELS}; give fewer groups or stages"
            )
        if self.stages * math.log2(max(levels)) > math.log2(MAX_STEPS):
            problems.append(
                f"{self.stages} stages of {max(levels)} levels divide a dimension more finely than "
                f"float32 can hold ({MAX_STEPS:,} steps); give fewer stages or smaller levels"
            )
        width = self.groups * len(levels)
        if self._config.latent not in (0, width):
            problems.append(
                f"latent={self._config.latent}: the latent of fsq has one column for each of its "
                f"{width} dimensions; leave it out"
            )
        return problems

    def _resolved(self, name: str) -> Any:
        value = super()._resolved(name)
        return [int(level) for level in value] if name == "dimension_levels" else value

    @property
    def _grid(self) -> ScalarGrid:
        levels = tuple(int(level) for level in self.dimension_levels)
        return ScalarGrid(levels * self.groups, self.stages)

    @property
    def _group(self) -> int:
        """Dimensions that share a code."""
        return len(self.dimension_levels) if self.codes_per == "group" else 1

    @property
    def hierarchical(self) -> bool:  # type: ignore[override]
        """Whether codes go from coarse to fine: where there are several stages."""
        return self.stages > 1

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each group, or of each dimension, stage by stage."""
        levels = np.array(self._grid.levels).reshape(-1, self._group)
        return tuple(levels.prod(axis=1).tolist()) * self.stages

    @property
    def codebook_fingerprint(self) -> str:
        """SHA-256 of all learned arrays: the grid is the same for every model, its meaning not."""
        _ = self.dim
        return fingerprint(self._tensors())

    def _latent_width(self, dim: int) -> int:
        return len(self._grid.levels)

    def _quantizer(self, latent: int) -> ScalarQuantizer:
        return ScalarQuantizer(self._grid, group=self._group)

    def _set_codebooks(self, books: Sequence[Array]) -> None:
        super()._set_codebooks(books)
        # A refinement moves codewords and a refresh renumbers them; then they have to be searched.
        pairs = zip(books, self._grid.codebooks(self._group), strict=True)
        self._rounds = all(np.array_equal(*pair) for pair in pairs)

    def _latent_block(self, x: Array) -> Array:
        return self._grid.bound(super()._latent_block(x))

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        latent = self._latent_block(x)
        if beam_width > 1 or not self._rounds:
            return encode_residual(
                latent, self._codebook_index, beam_width=beam_width, threads=self.threads
            )
        # While the codebooks are the grid itself, rounding finds the nearest codewords.
        digits, remainder = self._grid.digits(torch.from_numpy(latent))
        codes = self._grid.codes(digits, self._group).numpy()
        return ResidualCodes.of(codes, remainder.numpy())

    def encoder_module(self) -> nn.Module:
        """Return the encoder and the bound as a module, see `Tokenizer.encoder_module`."""
        return BoundedEncoder(super().encoder_module(), self._grid)
