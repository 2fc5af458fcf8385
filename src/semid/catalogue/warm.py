"""Fit again from the old codebooks instead of a new seeding."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.data.embeddings import EmbeddingSource
from semid.progress import Progress
from semid.quantization.blocks import PreparedBlocks
from semid.quantization.kmeans import KMeansState
from semid.quantization.nearest import prepare
from semid.quantization.residual import fit_residual
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import FitContext
from semid.tokenizers.rqkmeans import RQKMeans

__all__ = ["fit_again"]


class _Warm(RQKMeans):
    """Residual K-means that starts every level from a given codebook, in its old space."""

    start: tuple[npt.NDArray[np.float32], ...] = ()

    def _fit(self, context: FitContext) -> dict[str, Any]:
        rows = (
            context.train
            if self._preprocess.identity
            else PreparedBlocks(context.train, self._preprocess)
        )
        context.progress.start("fit again", total=None)

        def on_iteration(level: int, state: KMeansState) -> None:
            context.progress.step(1, level=level + 1, inertia=state.inertia[-1])

        books, fits = fit_residual(
            rows,
            self.codebook_sizes,
            seed=self.seed,
            options=self.kmeans,
            weights=context.weights,
            init=self.start,
            threads=self.threads,
            on_iteration=on_iteration,
        )
        self._prepared = tuple(prepare(torch.from_numpy(book)) for book in books)
        return {"levels": [asdict(fit) for fit in fits], "warm_start": True}


def fit_again(
    previous: Tokenizer,
    source: EmbeddingSource,
    *,
    warm_start: bool = True,
    weights: npt.ArrayLike | None = None,
    progress: Progress | None = None,
) -> Tokenizer:
    """Fit a tokenizer of the same settings on a changed catalogue.

    Args:
        previous: the generation before; it stays as it is.
        source: the catalogue now.
        warm_start: start from the old codebooks, where the tokenizer is an `RQKMeans`; its
            preprocessing keeps the old mean then, so that both generations share one space. Other
            tokenizers, and False, fit from scratch with the same seed.
        weights: ``(items,)`` item weights, as for `Tokenizer.fit`.
        progress: told about the work; silent by default.

    Returns:
        A fitted tokenizer of the same class. Cost: a fit; a warm start usually converges in fewer
        iterations.
    """
    settings = previous.settings
    threads = getattr(previous, "threads", None)
    # A subclass may mean something else by its codebooks, so only the class itself is known.
    if not warm_start or type(previous) is not RQKMeans:
        fresh = type(previous)(**settings)
        if threads is not None:
            fresh.threads = threads  # type: ignore[attr-defined]
        return fresh.fit(source, weights=weights, progress=progress)
    warm = _Warm(**settings, threads=threads)
    warm.start = tuple(np.array(book) for book in previous.codebooks)
    warm._preprocess = previous._preprocess
    warm.fit(source, weights=weights, progress=progress)
    made = type(previous)(**settings)
    made.threads = threads
    made._set_tensors(warm._tensors())
    made._dim = warm.dim
    made.report = warm.report
    return made
