"""Tokenizers that preprocess rows and quantize latents with codebooks: what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from semid.options import MAX_BEAM, option
from semid.quantization.blocks import Preprocess
from semid.quantization.nearest import IndexedCodebook, index_codebook
from semid.quantization.residual import ResidualCodes, encode_residual
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import level_sizes
from semid.tokenizers.stored import check_shapes

Array = npt.NDArray[np.float32]


@dataclass(kw_only=True, eq=False, repr=False)
class CodebookTokenizer(Tokenizer):
    """Base of tokenizers whose learned state is preprocessing and codebooks, and maybe more.

    A subclass's `_fit` sets ``_preprocess`` and calls `_set_codebooks`.
    """

    normalize: bool = option(False, help="Scale (centered) rows to unit length first.")
    center: bool = option(False, help="Subtract the mean of the training rows first.")

    def __post_init__(self) -> None:
        """Start without codebooks."""
        super().__post_init__()
        self._preprocess = Preprocess(normalize=self.normalize)
        self._prepared: tuple[IndexedCodebook, ...] = ()

    def _set_codebooks(self, books: Sequence[Array]) -> None:
        self._prepared = tuple(index_codebook(torch.from_numpy(book)) for book in books)

    def _codebooks(self) -> tuple[Array, ...]:
        return tuple(book.codewords.numpy() for book in self._prepared)

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {f"codebooks.{i}": book for i, book in enumerate(self._codebooks())}
        if self._preprocess.mean is not None:
            tensors["preprocess.mean"] = self._preprocess.mean
        return tensors

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        width = self._codeword_width(tensors)
        shapes = {f"codebooks.{i}": (size, width) for i, size in enumerate(self.codebook_sizes)}
        check_shapes(tensors, shapes | ({"preprocess.mean": (self._dim,)} if self.center else {}))
        self._preprocess = Preprocess(
            mean=tensors["preprocess.mean"] if self.center else None, normalize=self.normalize
        )
        self._set_codebooks([tensors[f"codebooks.{i}"] for i in range(self.levels)])

    def _codeword_width(self, tensors: Mapping[str, np.ndarray]) -> int:
        """Return the width of codewords, as settings and the other arrays have it."""
        return self.dim


@dataclass(kw_only=True, eq=False, repr=False)
class ResidualTokenizer(CodebookTokenizer):
    """Base of tokenizers whose levels each quantize what the levels before left."""

    hierarchical: ClassVar[bool] = True
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "sum"

    levels: int = option(3, help="Codes per item.")
    codebook_size: int | Sequence[int] = option(
        256, help="Codewords per level (2 to 2**32), or one number for each level."
    )
    beam_width: int = option(
        1, ge=1, le=MAX_BEAM, help="Partial codes kept while encoding; 1 is greedy."
    )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each level."""
        return level_sizes(self.levels, self.codebook_size)

    def _resolved(self, name: str) -> Any:
        return list(self.codebook_sizes) if name == "codebook_size" else super()._resolved(name)

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return encode_residual(
            self._latent_block(x), self._prepared, beam_width=beam_width, threads=self.threads
        )
