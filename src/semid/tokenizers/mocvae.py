"""MoC-VAE and VQ-VAE: parallel codebooks that all quantize the same latent (MoC 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import numpy.typing as npt
from torch import nn

from semid.quantization.nearest import assign
from semid.quantization.residual import ResidualCodes
from semid.tokenizers.context import level_sizes
from semid.tokenizers.neural.autoencoder import EncoderGraph, perceptron
from semid.tokenizers.neural.quantized import QuantizedAutoencoder, QuantizedTokenizer
from semid.tokenizers.neural.quantizers import ParallelQuantizer, Quantizer, UpdateRule
from semid.tokenizers.neural.tokenizer import NeuralOptions
from semid.tokenizers.stored import check_shapes

__all__ = ["VQVAE", "MoCVAE", "ParallelTokenizer"]


Array = npt.NDArray[np.float32]


class ParallelTokenizer(QuantizedTokenizer):
    """Base of tokenizers with parallel codebooks; the decoder sees their average.

    Args:
        sizes: codewords of each codebook.
        rule: how codewords move.
        projection: a learned linear map of the latent for each codebook.
        **options: see `NeuralOptions`.
    """

    hierarchical: ClassVar[bool] = False

    def __init__(
        self,
        *,
        sizes: tuple[int, ...],
        rule: UpdateRule,
        projection: bool,
        **options: Unpack[NeuralOptions],
    ) -> None:
        super().__init__(sizes=sizes, **options)
        self.rule, self.projection = rule, projection
        self._maps: tuple[Array, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "rule": self.rule.kind,
            "ema_decay": self.rule.decay,
            "revive_below": self.rule.revive_below,
            **super().settings,
        }

    def _quantizer(self, latent: int) -> Quantizer:
        return ParallelQuantizer(
            self.codebook_sizes,
            latent,
            rule=self.rule,
            seed=self.seed,
            projection=self.projection,
        )

    def _take(self, model: QuantizedAutoencoder) -> None:
        super()._take(model)
        assert isinstance(model.quantizer, ParallelQuantizer)
        self._maps = tuple(
            parameter.detach().cpu().numpy().T.copy()
            for parameter in model.quantizer.maps.parameters()
        )

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        spaces = self._spaces(self._encoded(x))
        codes = np.empty((len(x), self.levels), dtype=np.int64)
        for level, (space, book) in enumerate(zip(spaces, self._prepared, strict=True)):
            codes[:, level], _ = assign(space, book, threads=self.threads)
        left = self._middle(spaces) - self._quantize_codes(codes)
        norms = np.sqrt(np.einsum("nd,nd->n", left, left, dtype=np.float64))
        return ResidualCodes(codes, norms.astype(np.float32))

    def _spaces(self, z: Array) -> list[Array]:
        """Return what each codebook is given."""
        if not self._maps:
            return [z] * self.levels
        still = np.zeros(z.shape[1], dtype=np.float32)
        return [perceptron(z, [(each, still)], threads=self.threads) for each in self._maps]

    def _middle(self, spaces: list[Array]) -> Array:
        if not self._maps:
            return spaces[0]
        total = spaces[0]
        for space in spaces[1:]:
            total = total + space
        return total / np.float32(len(spaces))

    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return super()._quantize_codes(codes) / np.float32(self.levels)

    def _latent_block(self, x: Array) -> Array:
        return self._middle(self._spaces(self._encoded(x)))

    def encoder_module(self) -> nn.Module:
        """Return the encoder as a module that can be traced, see `NeuralTokenizer`."""
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


class MoCVAE(ParallelTokenizer):
    """One encoder, several codebooks beside each other; the decoder sees the mean codeword.

    Codes are parallel: each codebook describes the whole item, and a shared first code means no
    more than a shared last one.

    Args:
        n_codebooks: codes an item.
        codebook_size: codewords a codebook (2 to 2**32), or one number a codebook.
        rule: ``ema``: each codebook follows the mean of the latents it was given (MoC §2, "in
            practice"); ``gradient``: all are fitted jointly through their average.
        ema_decay: of the moving averages, in (0, 1).
        revive_below: share of an even filling below which a code is put on a latent of the current
            batch, in [0, 1); 0 never revives (ours: 0.1).
        projection: a learned linear map of the latent for each codebook (ours, after the paper's
            "various spaces"; off in the paper's equations).
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.tokenizer.NeuralOptions`: ``seed``, ``network``, ``training``,
            ``normalize``, ``center``, ``validation_fraction``, ``device``, ``threads``, ``logger``.
            Each codebook's K-means start has a child seed of its own.

    Raises:
        UsageError: if a value is out of range.

    Source: MoC §4.1, eq. 7: ``z_q = mean_i q_i``, ``q_i`` the codeword of codebook i nearest to z.
    """

    kind: ClassVar[str] = "mocvae"

    def __init__(
        self,
        *,
        n_codebooks: int = 3,
        codebook_size: int | Sequence[int] = 256,
        rule: str = "ema",
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        projection: bool = False,
        **options: Unpack[NeuralOptions],
    ) -> None:
        super().__init__(
            sizes=level_sizes(n_codebooks, codebook_size, name="n_codebooks"),
            rule=UpdateRule(kind=rule, decay=ema_decay, revive_below=revive_below),
            projection=bool(projection),
            **options,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {
            "n_codebooks": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "projection": self.projection,
            **super().settings,
        }


class VQVAE(ParallelTokenizer):
    """One code an item: the 1x point of every Mixture-of-Codes curve, and what many embeddings use.

    It is `MoCVAE` with one codebook.

    Args:
        codebook_size: codewords (2 to 2**32).
        rule: ``ema`` (moving averages) or ``gradient``.
        ema_decay: of the moving averages, in (0, 1).
        revive_below: share of an even filling below which a code is revived; 0 never.
        **options: what every neural tokenizer takes, see
            `semid.tokenizers.neural.tokenizer.NeuralOptions`: ``seed``, ``network``, ``training``,
            ``normalize``, ``center``, ``validation_fraction``, ``device``, ``threads``, ``logger``.

    Raises:
        UsageError: if a value is out of range.

    Source: van den Oord 2017; MoC §2: ``|x - x_hat|^2 + beta |sg[q] - z|^2 (+ |q - sg[z]|^2)``.
    """

    kind: ClassVar[str] = "vqvae"

    def __init__(
        self,
        *,
        codebook_size: int = 256,
        rule: str = "ema",
        ema_decay: float = 0.99,
        revive_below: float = 0.1,
        **options: Unpack[NeuralOptions],
    ) -> None:
        super().__init__(
            sizes=level_sizes(1, codebook_size),
            rule=UpdateRule(kind=rule, decay=ema_decay, revive_below=revive_below),
            projection=False,
            **options,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments that change the result, JSON-able."""
        return {"codebook_size": self.codebook_sizes[0], **super().settings}
