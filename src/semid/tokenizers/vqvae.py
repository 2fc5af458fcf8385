"""Codebooks trained inside an autoencoder: VQ-VAE, RQ-VAE, RQP-VAE and MoC-VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from semid.codes import MAX_CODEWORDS, MAX_LEVELS
from semid.options import option
from semid.quantization.nearest import assign
from semid.quantization.residual import ResidualCodes
from semid.tokenizers.codebooks import ResidualTokenizer
from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.autoencoder import EncoderGraph, perceptron
from semid.tokenizers.neural.quantized import QuantizedAutoencoder, QuantizedTokenizer
from semid.tokenizers.neural.quantizers import (
    RULES,
    ParallelQuantizer,
    ResidualQuantizer,
    UpdateRule,
)
from semid.tokenizers.stored import check_shapes

Array = npt.NDArray[np.float32]


@dataclass(kw_only=True, eq=False, repr=False)
class MovingAverageTokenizer(QuantizedTokenizer):
    """Base of tokenizers with moving averages and revival of dead codes (van den Oord 2017)."""

    ema_decay: float = option(0.99, gt=0, lt=1, help="Decay of the codewords' moving averages.")
    revive_below: float = option(
        0.1,
        ge=0,
        lt=1,
        help="Share of an even filling below which a code is moved to a vector of the current "
        "batch; 0 never revives.",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class ParallelTokenizer(MovingAverageTokenizer):
    """Base of tokenizers with parallel codebooks; the decoder receives the mean codeword."""

    hierarchical: ClassVar[bool] = False
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "mean"

    projection = False

    rule: str = option(
        "ema",
        choices=RULES,
        help="ema: each codebook follows the mean of the latents assigned to it; gradient: all "
        "codebooks are fitted jointly through their average.",
    )

    def __post_init__(self) -> None:
        """Start without projections."""
        super().__post_init__()
        self._maps: tuple[Array, ...] = ()

    def _quantizer(self, latent: int) -> ParallelQuantizer:
        return ParallelQuantizer(
            self.codebook_sizes,
            latent,
            rule=UpdateRule(kind=self.rule, decay=self.ema_decay, revive_below=self.revive_below),
            seed=self.seed,
            projection=self.projection,
        )

    def _set_model(self, model: QuantizedAutoencoder) -> None:
        super()._set_model(model)
        assert isinstance(model.quantizer, ParallelQuantizer)
        # A linear layer holds its weights as (out, in); rows are multiplied from the left.
        self._maps = tuple(
            parameter.detach().cpu().numpy().T.copy()
            for parameter in model.quantizer.maps.parameters()
        )

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        # Codebooks are parallel: each takes the codeword nearest to its own view of the latent.
        spaces = self._spaces(super()._latent_block(x))
        codes = np.empty((len(x), self.levels), dtype=np.int64)
        for level, (space, book) in enumerate(zip(spaces, self._codebook_index, strict=True)):
            codes[:, level], _ = assign(space, book, threads=self.threads)
        # The decoder receives the mean codeword, so the residual is that of the mean latent.
        return ResidualCodes.of(codes, _mean(spaces) - self._quantize_codes(codes))

    def _spaces(self, z: Array) -> list[Array]:
        """Return the latent that each codebook quantizes; one for all without projections."""
        if not self._maps:
            return [z] * self.levels
        no_bias = np.zeros(z.shape[1], dtype=np.float32)
        return [perceptron(z, [(each, no_bias)], threads=self.threads) for each in self._maps]

    def _latent_block(self, x: Array) -> Array:
        return _mean(self._spaces(super()._latent_block(x)))

    def encoder_module(self) -> nn.Module:
        """Return the encoder as a module, see `Tokenizer.encoder_module`."""
        _ = self.dim
        assert self._autoencoder is not None
        return EncoderGraph(self._preprocess, self._autoencoder, self._maps)

    def _tensors(self) -> dict[str, np.ndarray]:
        return {**super()._tensors(), **{f"maps.{i}": each for i, each in enumerate(self._maps)}}

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        super()._set_tensors(tensors)
        names = [f"maps.{i}" for i in range(self.levels if self.projection else 0)]
        width = self._codebooks()[0].shape[1]
        check_shapes(tensors, dict.fromkeys(names, (width, width)))
        self._maps = tuple(np.ascontiguousarray(tensors[name]) for name in names)


def _mean(spaces: list[Array]) -> Array:
    """Return the mean latent; the latent itself, unrounded, where all spaces are the same."""
    if spaces[0] is spaces[-1]:
        return spaces[0]
    total = spaces[0]
    for space in spaces[1:]:
        total = total + space
    return total / np.float32(len(spaces))


@dataclass(kw_only=True, eq=False, repr=False)
class MoCVAE(ParallelTokenizer):
    """One encoder, several codebooks beside each other; the decoder receives the mean codeword.

    Codes are parallel: each codebook describes the whole item, and a shared first code means no
    more than a shared last one. Each codebook's K-means start has a child seed of its own. The
    papers say "various spaces" of the projection, which is ours and off in their equations; MoC §2
    uses the EMA rule "in practice".

    Raises:
        UsageError: if a value is out of range.

    Source: MoC §4.1, eq. 7: ``z_q = mean_i q_i``, ``q_i`` the codeword of codebook i nearest to z.
    """

    kind: ClassVar[str] = "mocvae"

    n_codebooks: int = option(3, ge=1, le=MAX_LEVELS, help="Codes per item.")
    codebook_size: int | Sequence[int] = option(
        256,
        ge=2,
        le=MAX_CODEWORDS,
        help="Codewords per codebook (2 to 2**32), or one number for each codebook.",
    )
    projection: bool = option(False, help="Give each codebook a learned linear map of the latent.")

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each codebook."""
        return level_sizes(self.n_codebooks, self.codebook_size, name="n_codebooks")


@dataclass(kw_only=True, eq=False, repr=False)
class VQVAE(ParallelTokenizer):
    """One code per item: the 1x point of every Mixture-of-Codes curve; `MoCVAE` of one codebook.

    Raises:
        UsageError: if a value is out of range.

    Source: van den Oord 2017; MoC §2: ``|x - x_hat|^2 + beta |sg[q] - z|^2 (+ |q - sg[z]|^2)``.
    """

    kind: ClassVar[str] = "vqvae"

    codebook_size: int = option(
        256, ge=2, le=MAX_CODEWORDS, help="Number of codewords (2 to 2**32)."
    )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of the one codebook."""
        return level_sizes(1, self.codebook_size)


@dataclass(kw_only=True, eq=False, repr=False)
class RQVAE(ResidualTokenizer, QuantizedTokenizer):
    """Encoder, residual levels with a straight-through estimator, decoder; codebooks by gradient.

    The baseline of both papers, without anything that keeps codes alive: it may collapse, and the
    verdict says so. Use `RQPVAE` where it does.

    Raises:
        UsageError: if a value is out of range.

    Source: MoC §2, DRQ §3; loss ``|x - x_hat|^2 + beta sum_l |sg[q_l] - r_l|^2 +
    sum_l |q_l - sg[r_l]|^2``. A step costs the autoencoder's products and O(batch codes latent)
    per level.
    """

    kind: ClassVar[str] = "rqvae"

    def _update_rule(self) -> UpdateRule:
        return UpdateRule(kind="gradient", revive_below=0.0)

    def _quantizer(self, latent: int) -> ResidualQuantizer:
        rule = self._update_rule()
        return ResidualQuantizer(self.codebook_sizes, latent, rule=rule, seed=self.seed)


@dataclass(kw_only=True, eq=False, repr=False)
class RQPVAE(MovingAverageTokenizer, RQVAE):
    """RQ-VAE with EMA codebook updates and dead-code revival: codes do not die.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §5.1; moving averages with Laplace smoothing from van den Oord 2017, app. A.1.
    """

    kind: ClassVar[str] = "rqpvae"

    def _update_rule(self) -> UpdateRule:
        return UpdateRule(decay=self.ema_decay, revive_below=self.revive_below)
