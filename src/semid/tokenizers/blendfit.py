"""Codebooks of a blend of content and behavior: K-means by level, refinement, prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.progress import Progress
from semid.quantization.blocks import Blocks, ResidualBlocks
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.nearest import prepare
from semid.quantization.prices import priced, size_prices, with_room
from semid.quantization.refine import Part, RefineOptions, RefineRound, refine_residual
from semid.quantization.residual import encode_residual
from semid.seeds import child_seed
from semid.tokenizers.levels import fit_levels
from semid.tokenizers.neural.blend import Columns
from semid.training.stages import Stages

__all__ = ["BlendFit"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class BlendFit:
    """What the steps of one fit share.

    Attributes:
        rows: training rows ``[content, behavior, room for prices]``.
        judged: the same of the items held out, or None.
        parts: the columns of content, of all levels, and those of behavior, of the first, if any.
        prices: columns at the end, 0 in every row.
        sizes: codewords of each level.
        seed: any integer.
        weights: ``(items,)`` weights of the training rows, or None.
        threads: plain threads; they change no result.
        progress: told about every iteration and round.
    """

    rows: Blocks
    judged: Blocks | None
    parts: Sequence[Part]
    prices: int
    sizes: Sequence[int]
    seed: int
    weights: npt.NDArray[np.float64] | None
    threads: int | None
    progress: Progress

    def levels(
        self, options: KMeansOptions, stages: Stages
    ) -> tuple[list[Array], list[dict[str, Any]]]:
        """K-means of the levels that see behavior, then of the others on what content is left."""
        first = self.parts[-1].levels
        books: list[Array] = []
        records: list[dict[str, Any]] = []
        for name, at, stop in (("blend", 0, first), ("content", first, len(self.sizes))):
            if at == stop:
                continue
            kept = stages.finished(name)
            if kept is None:
                found, fits = fit_levels(
                    self._left(books) if at else self.rows,
                    self.sizes[at:stop],
                    seed=child_seed(self.seed, name) if at else self.seed,
                    options=options,
                    weights=self.weights,
                    threads=self.threads,
                    store=stages.stage(name),
                    progress=self.progress,
                )
                words = [book.codewords.numpy() for book in found]
                stages.finish(name, {str(i): word for i, word in enumerate(words)}, {"fits": fits})
            else:
                words = [kept[0][str(i)] for i in range(stop - at)]
                fits = kept[1]["fits"]
            books += [with_room(word, self.rows.dim - word.shape[1]) for word in words]
            records += fits
        return books, records

    def _left(self, books: Sequence[Array]) -> Blocks:
        """Return the content that the greedy codes of these levels leave."""
        ready = [prepare(torch.from_numpy(book)) for book in books]
        parts = [
            encode_residual(x, ready, threads=self.threads).codes for _, x in self.rows.blocks()
        ]
        labels = list(np.ascontiguousarray(np.concatenate(parts).T))
        return Columns(ResidualBlocks(self.rows, labels, books), self.parts[0].columns.stop)

    def refined(
        self, books: Sequence[Array], options: RefineOptions
    ) -> tuple[list[Array], list[RefineRound]]:
        """Refine all levels together: content over all of them, behavior over its own."""
        self.progress.start("refine", total=options.most_rounds)
        return refine_residual(
            self.rows,
            books,
            judged=self.judged,
            parts=self.parts,
            options=options,
            weights=self.weights,
            seed=child_seed(self.seed, "refine"),
            threads=self.threads,
            on_round=lambda one: self.progress.step(1, error=one.error, ridge=one.ridge),
        )

    def priced(self, books: Sequence[Array], *, limit: float, beam_width: int) -> list[Array]:
        """Give codewords the prices that even out usage, for all levels together."""
        unpriced = self.rows.dim - self.prices
        plain = [np.ascontiguousarray(book[:, :unpriced]) for book in books]
        prices = size_prices(
            Columns(self.rows, unpriced),
            plain,
            limit=limit,
            columns=self.parts[0].columns.stop,
            beam_width=beam_width,
            threads=self.threads,
        )
        return [
            priced(book, paid, level=level, levels=self.prices)
            for level, (book, paid) in enumerate(zip(plain, prices, strict=True))
        ]
