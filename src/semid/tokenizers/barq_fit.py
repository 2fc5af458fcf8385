"""BARQ's fit: the space of content and behavior, and its codebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.progress import Progress
from semid.quantization.blocks import BLOCK_ROWS, Blocks, ResidualBlocks
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.least_squares import leading_components
from semid.quantization.nearest import index_codebook
from semid.quantization.prices import priced, size_prices, with_room
from semid.quantization.refine import ColumnGroup, RefineOptions, RefineRound, refine_residual
from semid.quantization.residual import encode_residual
from semid.seeds import child_seed
from semid.tokenizers.levels import fit_levels
from semid.tokenizers.neural.autoencoder import ExactEncoder, perceptron
from semid.training.stages import Stages

__all__ = ["Blend", "BlendFit", "BlendGraph", "Columns", "Content", "unit_rows"]


Array = npt.NDArray[np.float32]


def unit_rows(rows: Array) -> Array:
    """Scale rows ``(n, dim)`` to length 1, each by itself; zero rows stay zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    norms[norms == 0] = 1.0
    scaled: Array = (rows / norms[:, None]).astype(np.float32)
    return scaled


class Content:
    """The part of rows that is quantized: all of them, or their leading principal components.

    Args:
        components: ``(dim, width)`` orthonormal columns; None keeps rows whole.
        rest: ``(dim,)`` the mean's part outside the components; None with them.
        threads: plain threads; they change no bit.
    """

    def __init__(
        self, components: Array | None = None, rest: Array | None = None, *, threads: int | None
    ) -> None:
        self.components, self.rest, self.threads = components, rest, threads

    @classmethod
    def of(
        cls, blocks: Blocks, mean: npt.NDArray[np.float64], *, share: float, threads: int | None
    ) -> Content:
        """Keep the components of rows with mean ``mean`` that hold ``share`` of the variance."""
        if share == 1:
            return cls(threads=threads)
        kept = leading_components(blocks, mean, share=share)
        wide = kept.astype(np.float64)
        return cls(kept, (mean - wide @ (mean @ wide)).astype(np.float32), threads=threads)

    @classmethod
    def read(cls, tensors: Mapping[str, Array], *, threads: int | None) -> Content:
        """Return what `tensors` was made of."""
        return cls(tensors.get("components"), tensors.get("rest"), threads=threads)

    def tensors(self) -> dict[str, Array]:
        """Return what it takes to make it again, by name."""
        named = {"components": self.components, "rest": self.rest}
        return {name: each for name, each in named.items() if each is not None}

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


class Blend:
    """Rows ``x`` to ``[P'x, scale u(x), 0...]``, with ``u`` the direction of the encoder's latent.

    Args:
        encoder: the behavior encoder; None leaves behavior out.
        content: rows to ``P'x``.
        scale: what directions are multiplied by.
        prices: coordinates at the end for codewords' prices, 0 in every row.
        threads: plain threads; they change no bit.
    """

    def __init__(
        self,
        encoder: ExactEncoder | None,
        *,
        content: Content,
        scale: float,
        prices: int,
        threads: int | None,
    ) -> None:
        self.encoder, self.content, self.scale = encoder, content, np.float32(scale)
        self.prices, self.threads = prices, threads

    def directions(self, x: Array) -> Array:
        """Return ``u(x)`` ``(n, latent)``, of width 0 without an encoder."""
        if self.encoder is None:
            return np.empty((len(x), 0), dtype=np.float32)
        return unit_rows(self.encoder(x, threads=self.threads))

    def __call__(self, x: Array) -> Array:
        """Return ``(n, content + latent + prices)``; each row depends on that row alone."""
        room = np.zeros((len(x), self.prices), dtype=np.float32)
        return np.concatenate([self.content(x), self.scale * self.directions(x), room], axis=1)


class Columns:
    """A view of blocks that keeps the first columns.

    Args:
        base: ``(items, dim)``.
        width: columns kept.
    """

    def __init__(self, base: Blocks, width: int) -> None:
        self.base, self.dim = base, width

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.base)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Array]]:
        """Yield ``(first row, rows)`` in order."""
        for start, block in self.base.blocks(size):
            yield start, np.ascontiguousarray(block[:, : self.dim])

    def rows(self, indices: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``indices``."""
        return np.ascontiguousarray(self.base.rows(indices)[:, : self.dim])


class BlendGraph(nn.Module):
    """`Blend` as a module that can be traced.

    Args:
        prepare: preprocessing of rows.
        encoder: rows ``(batch, dim)`` to latents; None leaves behavior out.
        components: of the content, ``(dim, content)``; None keeps rows whole.
        scale: what directions are multiplied by.
        prices: coordinates at the end, all 0.
    """

    def __init__(
        self,
        prepare: nn.Module,
        encoder: nn.Module | None,
        *,
        components: Array | None,
        scale: float,
        prices: int,
    ) -> None:
        super().__init__()
        self.prepare, self.encoder = prepare, encoder
        self.scale, self.prices = scale, prices
        kept = None if components is None else torch.from_numpy(components.copy())
        self.register_buffer("components", kept)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, content + latent + prices)``."""
        content = self.prepare(x)
        parts = [content if self.components is None else content @ self.components]
        if self.encoder is not None:
            z = self.encoder(x).double()
            norms = z.square().sum(dim=1, keepdim=True).sqrt()
            norms = torch.where(norms == 0, torch.ones_like(norms), norms)
            parts.append((self.scale * (z / norms)).float())
        if self.prices:
            parts.append(parts[0].new_zeros((x.shape[0], self.prices)))
        return torch.cat(parts, dim=1)


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
    parts: Sequence[ColumnGroup]
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
        ready = [index_codebook(torch.from_numpy(book)) for book in books]
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
            groups=self.parts,
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
