"""BARQ's fit: the space of content and behavior, and its codebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.quantization.balance import add_penalties, balance_penalties, pad_columns
from semid.quantization.blocks import BLOCK_ROWS, Blocks, ResidualBlocks
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.least_squares import leading_components
from semid.quantization.nearest import index_codebook
from semid.quantization.refine import ColumnGroup, RefineOptions, RefineRound, refine_residual
from semid.quantization.residual import encode_residual
from semid.seeds import child_seed
from semid.tokenizers.context import FitContext
from semid.tokenizers.levels import fit_levels
from semid.tokenizers.neural.autoencoder import ExactEncoder, perceptron
from semid.training.checkpoint import StateStore

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
        threads: number of CPU threads.
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
        components = leading_components(blocks, mean, share=share)
        exact = components.astype(np.float64)
        rest = (mean - exact @ (mean @ exact)).astype(np.float32)
        return cls(components, rest, threads=threads)

    @classmethod
    def read(cls, tensors: Mapping[str, Array], *, threads: int | None) -> Content:
        """Read what `tensors` gave."""
        return cls(tensors.get("components"), tensors.get("rest"), threads=threads)

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


class Blend:
    """Rows ``x`` to ``[P'x, scale u(x), 0...]``, with ``u`` the direction of the encoder's latent.

    Args:
        encoder: the behavior encoder; None leaves behavior out.
        content: rows to ``P'x``.
        scale: what directions are multiplied by.
        penalty_columns: columns at the end for codewords' penalties, 0 in every row.
        threads: number of CPU threads.
    """

    def __init__(
        self,
        encoder: ExactEncoder | None,
        *,
        content: Content,
        scale: float,
        penalty_columns: int,
        threads: int | None,
    ) -> None:
        self.encoder, self.content, self.scale = encoder, content, np.float32(scale)
        self.penalty_columns, self.threads = penalty_columns, threads

    def directions(self, x: Array) -> Array:
        """Return ``u(x)`` ``(n, latent)``, of width 0 without an encoder."""
        if self.encoder is None:
            return np.empty((len(x), 0), dtype=np.float32)
        return unit_rows(self.encoder(x, threads=self.threads))

    def __call__(self, x: Array) -> Array:
        """Return ``(n, content + latent + penalties)``; each row depends on that row alone."""
        zeros = np.zeros((len(x), self.penalty_columns), dtype=np.float32)
        return np.concatenate([self.content(x), self.scale * self.directions(x), zeros], axis=1)


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
        penalty_columns: columns at the end, all 0.
    """

    def __init__(
        self,
        prepare: nn.Module,
        encoder: nn.Module | None,
        *,
        components: Array | None,
        scale: float,
        penalty_columns: int,
    ) -> None:
        super().__init__()
        self.prepare, self.encoder = prepare, encoder
        self.scale, self.penalty_columns = scale, penalty_columns
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


@dataclass(frozen=True, kw_only=True)
class BlendFit:
    """What the steps of one fit share.

    Attributes:
        rows: training rows ``[content, behavior, zeros for penalties]``.
        held_out: the same of the items held out, or None.
        parts: the columns of content, of all levels, and those of behavior, of the first, if any.
        penalty_columns: columns at the end, 0 in every row.
        context: of the fit.
        sizes: codewords of each level.
        seed: any integer.
        threads: number of CPU threads.
    """

    rows: Blocks
    held_out: Blocks | None
    parts: Sequence[ColumnGroup]
    penalty_columns: int
    context: FitContext
    sizes: Sequence[int]
    seed: int
    threads: int | None

    def levels(self, options: KMeansOptions) -> tuple[list[Array], list[dict[str, Any]]]:
        """K-means of the levels with behavior, then of the others on the rest of the content."""
        with_behavior = self.parts[-1].levels
        books, records = self._stage("blend", self.rows, self.sizes[:with_behavior], options)
        if with_behavior < len(self.sizes):
            content = self._residual_content(books)
            more, fits = self._stage("content", content, self.sizes[with_behavior:], options)
            books, records = books + more, records + fits
        return books, records

    def _stage(
        self, name: str, rows: Blocks, sizes: Sequence[int], options: KMeansOptions
    ) -> tuple[list[Array], list[dict[str, Any]]]:
        """Fit some levels as one stage of the run; codewords get the columns that they lack."""

        def run(store: StateStore | None) -> tuple[dict[str, Array], dict[str, Any]]:
            books, fits = fit_levels(
                rows,
                sizes,
                seed=self.seed if name == "blend" else child_seed(self.seed, name),
                options=options,
                weights=self.context.weights,
                threads=self.threads,
                store=store,
                progress=self.context.progress,
            )
            return {str(level): book for level, book in enumerate(books)}, {"fits": fits}

        arrays, record = self.context.stage(name, run)
        books = [arrays[str(level)] for level in range(len(sizes))]
        padded = [pad_columns(book, self.rows.dim - book.shape[1]) for book in books]
        return padded, record["fits"]

    def _residual_content(self, books: Sequence[Array]) -> Blocks:
        """Return the content that the greedy codes of these levels leave."""
        prepared = [index_codebook(torch.from_numpy(book)) for book in books]
        codes = [
            encode_residual(x, prepared, threads=self.threads).codes for _, x in self.rows.blocks()
        ]
        labels = list(np.ascontiguousarray(np.concatenate(codes).T))
        return Columns(ResidualBlocks(self.rows, labels, books), self.parts[0].columns.stop)

    def refined(
        self, books: Sequence[Array], options: RefineOptions
    ) -> tuple[list[Array], list[RefineRound]]:
        """Refine all levels together: content over all of them, behavior over its own."""
        progress = self.context.progress
        progress.start("refine", total=options.most_rounds)
        return refine_residual(
            self.rows,
            books,
            judged=self.held_out,
            groups=self.parts,
            options=options,
            weights=self.context.weights,
            seed=child_seed(self.seed, "refine"),
            threads=self.threads,
            on_round=lambda done: progress.step(1, error=done.error, ridge=done.ridge),
        )

    def balanced(self, books: Sequence[Array], *, strength: float, beam_width: int) -> list[Array]:
        """Give codewords the penalties that even out usage, for all levels together."""
        width = self.rows.dim - self.penalty_columns
        books = [np.ascontiguousarray(book[:, :width]) for book in books]
        penalties = balance_penalties(
            Columns(self.rows, width),
            books,
            strength=strength,
            columns=self.parts[0].columns.stop,
            beam_width=beam_width,
            threads=self.threads,
        )
        return [
            add_penalties(book, penalty, level=level, levels=self.penalty_columns)
            for level, (book, penalty) in enumerate(zip(books, penalties, strict=True))
        ]
