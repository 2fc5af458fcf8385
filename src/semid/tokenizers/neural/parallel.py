"""Tokenizers whose codebooks stand beside each other and all quantize the same latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import numpy as np
import numpy.typing as npt
from torch import nn

from semid.quantization.assign import assign
from semid.quantization.residual import ResidualCodes
from semid.tokenizers.neural.codebook import UpdateRule
from semid.tokenizers.neural.graph import EncoderGraph
from semid.tokenizers.neural.model import QuantizedAutoencoder
from semid.tokenizers.neural.options import NeuralOptions
from semid.tokenizers.neural.quantized import QuantizedTokenizer
from semid.tokenizers.neural.quantizers import ParallelQuantizer, Quantizer
from semid.tokenizers.neural.rowwise import perceptron
from semid.tokenizers.stored import check_shapes

__all__ = ["ParallelTokenizer"]

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
