"""RQ-KMeans: K-means on the embeddings, then on what each level leaves (DRQ §4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import Preprocess
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.nearest import IndexedCodebook, index_codebook
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.quantization.sharding import ShardedMatrix
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import FitContext, check_beam, check_validation_fraction, level_sizes
from semid.tokenizers.levels import fit_levels, training_rows
from semid.tokenizers.neural.autoencoder import Prepare
from semid.tokenizers.stored import check_shapes
from semid.training.stages import StateStore

__all__ = ["RQKMeans"]

Array = npt.NDArray[np.float32]


class RQKMeans(Tokenizer):
    """Residual K-means, no network: deterministic, quick, and hard to beat on reconstruction.

    Args:
        levels: codes an item.
        codebook_size: codewords a level (2 to 2**32), or one number a level.
        seed: any integer.
        normalize: scale (centered) rows to unit length first.
        center: subtract the training mean first.
        beam_width: partial codes kept while encoding; 1 is greedy, 5 lowers the error by a few
            per cent at 5 times the cost.
        validation_fraction: share of the items held out by a hash of their id, in [0, 1).
        kmeans: how K-means runs at each level.
        threads: plain threads; None takes what the machine allows. Results do not depend on it.

    Raises:
        UsageError: if a value is out of range.

    Source: DRQ §4.2 (hierarchical K-means). A fit costs ``levels`` times K-means over the rows
    trained on: O(iterations items codes dim) time a level.
    """

    kind: ClassVar[str] = "rqkmeans"
    hierarchical: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: int = 3,
        codebook_size: int | Sequence[int] = 256,
        seed: int = 0,
        normalize: bool = False,
        center: bool = False,
        beam_width: int = 1,
        validation_fraction: float = 0.05,
        kmeans: KMeansOptions | Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.codebook_sizes = level_sizes(levels, codebook_size)
        check_beam(beam_width, kind=self.kind, hierarchical=self.hierarchical)
        check_validation_fraction(validation_fraction)
        self.seed = int(seed)
        self.normalize = bool(normalize)
        self.center = bool(center)
        self.beam_width = int(beam_width)
        self.validation_fraction = float(validation_fraction)
        self.kmeans = KMeansOptions.of(kmeans)
        self.threads = threads
        self._preprocess = Preprocess(normalize=normalize)
        self._prepared: tuple[IndexedCodebook, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able (threads belong to the machine and are not kept)."""
        return {
            "levels": self.levels,
            "codebook_size": list(self.codebook_sizes),
            "seed": self.seed,
            "normalize": self.normalize,
            "center": self.center,
            "beam_width": self.beam_width,
            "validation_fraction": self.validation_fraction,
            "kmeans": asdict(self.kmeans),
        }

    def _fit(self, context: FitContext) -> dict[str, Any]:
        rows = training_rows(context.train, weights=context.weights, threads=self.threads)
        return {"levels": self.fit_rows(rows, store=context.checkpoint, progress=context.progress)}

    def fit_rows(
        self,
        rows: ShardedMatrix,
        *,
        store: StateStore | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Learn the codebooks from training rows alone, wherever they lie.

        The part of `fit` that does not need items: nothing is held out and nothing judged.

        Args:
            rows: ``(items, dim)`` training rows.
            store: where the state is kept after every iteration; None keeps nothing.
            progress: told about every iteration; silent by default.

        Returns:
            A JSON-able record of how each level ended.
        """
        mean = rows.mean().astype(np.float32) if self.center else None
        preprocess = Preprocess(mean=mean, normalize=self.normalize)
        rows.preprocess(preprocess)
        self._prepared, levels = fit_levels(
            rows,
            self.codebook_sizes,
            seed=self.seed,
            options=self.kmeans,
            weights=None,  # the rows bring theirs
            threads=self.threads,
            store=store,
            progress=progress or QuietProgress(),
        )
        self._preprocess = preprocess
        self._dim = rows.dim
        return levels

    def encoder_module(self) -> nn.Module:
        """Return the preprocessing of rows ``(n, dim)`` as a module that can be exported.

        Raises:
            NotFittedError: before `fit`.
        """
        _ = self.dim
        return Prepare(self._preprocess)

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return encode_residual(
            self._latent_block(x), self._prepared, beam_width=beam_width, threads=self.threads
        )

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return self._preprocess.invert(self._quantize_codes(codes))

    def _quantize_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return dequantize(codes, self._codebooks())

    def _latent_block(self, x: Array) -> Array:
        return self._preprocess.apply(x)

    def _codebooks(self) -> tuple[Array, ...]:
        return tuple(book.codewords.numpy() for book in self._prepared)

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {f"codebooks.{i}": book for i, book in enumerate(self._codebooks())}
        if self._preprocess.mean is not None:
            tensors["preprocess.mean"] = self._preprocess.mean
        return tensors

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        shapes = {f"codebooks.{i}": (size, self._dim) for i, size in enumerate(self.codebook_sizes)}
        check_shapes(tensors, shapes | ({"preprocess.mean": (self._dim,)} if self.center else {}))
        self._preprocess = Preprocess(
            mean=tensors["preprocess.mean"] if self.center else None, normalize=self.normalize
        )
        self._prepared = tuple(
            index_codebook(torch.from_numpy(tensors[f"codebooks.{i}"])) for i in range(self.levels)
        )
