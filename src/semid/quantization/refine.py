"""Joint refinement of residual codebooks: beam encoding and ridge least squares in turn.

K-means level by level never returns to a level it has left. Here all levels are fitted again
together to the codes that a beam finds, the ridge is chosen on items held out, and what does not
lower their error is not kept. The two steps alone end in the nearest local optimum; further rounds
shake the codebooks with noise that falls to nothing (stochastic relaxation of the codebooks, LSQ++,
Martinez et al. 2018; the scale of the noise and the schedule are ours).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from semid.options import MAX_BEAM, Options, option
from semid.quantization.blocks import Blocks, read_ahead
from semid.quantization.least_squares import NormalEquations
from semid.quantization.nearest import IndexedCodebook, index_codebook
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.seeds import numpy_generator

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RefineOptions(Options):
    """How codebooks are refined.

    Attributes:
        rounds: most rounds of encoding and least squares, 0 or more; 0 leaves the codebooks.
        annealing_rounds: rounds with noise that follow, 0 or more; as many ``rounds`` as before
            end them, and all of that is kept only if it lowers the error.
        temperature: noise of the first of those, in standard deviations of the residual over the
            square root of the levels; it falls linearly. 0 or more.
        beam_width: partial codes kept while encoding, at least 1.
        ridges: ridges to choose from, each above 0, in items that say "zero" a codeword.
        tolerance: relative fall of the error that a round has to bring for another one, 0 or more.
    """

    rounds: int = option(8, ge=0)
    annealing_rounds: int = option(12, ge=0)
    temperature: float = option(1.0, ge=0)
    beam_width: int = option(8, ge=1, le=MAX_BEAM)
    ridges: tuple[float, ...] = option((0.3, 1.0, 3.0, 10.0), gt=0)
    tolerance: float = option(1e-3, ge=0)

    def _problems(self) -> list[str]:
        return [] if self.ridges else ["ridges=(): give at least one number above 0"]

    @property
    def most_rounds(self) -> int:
        """Rounds of both kinds, at most."""
        noisy = self.rounds + self.annealing_rounds if self.annealing_rounds else 0
        return self.rounds + noisy if self.rounds else 0


@dataclass(frozen=True)
class ColumnGroup:
    """Columns that are fitted together, over the first ``levels`` levels alone.

    Attributes:
        columns: which columns of the rows.
        levels: levels whose codewords have these columns; those of later levels keep theirs.
    """

    columns: slice
    levels: int


@dataclass(frozen=True)
class RefineRound:
    """What a round did.

    Attributes:
        ridge: the ridge it chose.
        error: mean squared residual of the items judged on, after it.
        before: the same before it.
    """

    ridge: float
    error: float
    before: float


def refine_residual(
    train: Blocks,
    codebooks: Sequence[Array],
    *,
    judged: Blocks | None = None,
    groups: Sequence[ColumnGroup] | None = None,
    options: RefineOptions | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_round: Callable[[RefineRound], None] | None = None,
) -> tuple[list[Array], list[RefineRound]]:
    """Refine codebooks that were fitted level by level.

    Returns refined codebooks (those given, if no round lowered the error) and the rounds kept.

    Cost: a round encodes the training rows once and the judged rows once a ridge (once, from the
    second with noise on), by a beam (`semid.quantization.beam`).

    Shapes: ``train`` (items, dim), ``codebooks`` (codes, dim), ``weights`` (items,).
    """
    options = options or RefineOptions()
    width = train.dim
    groups = groups or [ColumnGroup(slice(0, width), len(codebooks))]
    judged = train if judged is None or not len(judged) else judged
    start = [book.copy() for book in codebooks]
    if not options.rounds:
        return start, []
    refiner = _Refiner(train, judged, groups, options, weights, threads, on_round)
    # First the nearest local optimum, then out of it with falling noise and down again; the second
    # result counts only where held-out rows prefer it.
    best, history = refiner.settled(start, refiner.error(start))
    if options.annealing_rounds:
        error = history[-1].error if history else refiner.error(best)
        shaken, rounds = refiner.annealed(best, error, numpy_generator(seed, "anneal"))
        shaken, more = refiner.settled(shaken, rounds[-1].error)
        if [*rounds, *more][-1].error < error:
            best, history = shaken, [*history, *rounds, *more]
    return best, history


@dataclass
class _Refiner:
    """What all rounds of one refinement share; see `refine_residual`."""

    train: Blocks
    judged: Blocks
    groups: Sequence[ColumnGroup]
    options: RefineOptions
    weights: npt.NDArray[np.float64] | None
    threads: int | None
    on_round: Callable[[RefineRound], None] | None

    def settled(self, books: list[Array], error: float) -> tuple[list[Array], list[RefineRound]]:
        """Run rounds without noise for as long as they lower the error."""
        rounds: list[RefineRound] = []
        for _ in range(self.options.rounds):
            solved, record = self._solved(
                self._equations(books)[0], books, self.options.ridges, error
            )
            # Held-out rows decide, so a round may raise the error: its codebooks are dropped.
            if not record.error < error:
                break
            rounds.append(record)
            too_small = record.error > (1.0 - self.options.tolerance) * error
            books, error = solved, record.error
            if too_small:
                break
        return books, rounds

    def annealed(
        self, books: list[Array], error: float, generator: np.random.Generator
    ) -> tuple[list[Array], list[RefineRound]]:
        """Run all rounds with noise; the last leaves none."""
        rounds: list[RefineRound] = []
        count, ridges = self.options.annealing_rounds, self.options.ridges
        spread = np.zeros(0)
        for number in range(count):
            equations, squared = self._equations(books)
            if not rounds:
                # The residual's standard deviation per column sets the scale of all noise.
                spread = np.sqrt(squared / max(self._mass(), 1e-12))
            books, record = self._solved(equations, books, ridges, error)
            rounds.append(record)
            # The first round chooses the ridge; the others take it, which saves encodings.
            ridges, error = (record.ridge,), record.error
            if number + 1 < count:  # the noise falls linearly and the last round adds none
                books = self._shaken(books, (1.0 - number / count) * spread, generator)
        return books, rounds

    def error(self, books: Sequence[Array]) -> float:
        """Return the mean squared residual of the judged rows."""
        indexed, total = _indexed(books), 0.0
        for _, block in read_ahead(self.judged):
            norms = self._encoded(block, indexed).residual_norms
            total += float(np.square(norms, dtype=np.float64).sum())
        return total / max(len(self.judged), 1)

    def _encoded(self, block: Array, indexed: list[IndexedCodebook]) -> ResidualCodes:
        return encode_residual(
            block, indexed, beam_width=self.options.beam_width, threads=self.threads
        )

    def _equations(self, books: Sequence[Array]) -> tuple[NormalEquations, Doubles]:
        """Encode the training rows; return their equations and squared residuals by column.

        A weight counts a row so often in both.
        """
        equations = NormalEquations([len(book) for book in books], self.train.dim)
        indexed, squared = _indexed(books), np.zeros(self.train.dim)
        for start, block in read_ahead(self.train):
            codes = self._encoded(block, indexed).codes
            mass = None if self.weights is None else self.weights[start : start + len(block)]
            equations.add_(codes, block, mass)
            residual = block - dequantize(codes, books)
            weighted = residual if mass is None else residual * mass[:, None]
            squared += np.einsum("nd,nd->d", weighted, residual, dtype=np.float64)
        return equations, squared

    def _mass(self) -> float:
        return len(self.train) if self.weights is None else float(self.weights.sum())

    def _solved(
        self,
        equations: NormalEquations,
        books: Sequence[Array],
        ridges: Sequence[float],
        before: float,
    ) -> tuple[list[Array], RefineRound]:
        """Solve with every ridge and keep the one that judged rows like best."""
        tried = []
        for ridge in ridges:
            refined = [book.copy() for book in books]
            for group in self.groups:
                solved = equations.solve(
                    ridge=ridge,
                    start=[book[:, group.columns] for book in books],
                    columns=group.columns,
                    levels=group.levels,
                    threads=self.threads,
                )
                for book, table in zip(refined, solved, strict=False):
                    book[:, group.columns] = table
            tried.append((self.error(refined), ridge, refined))
        error, ridge, refined = min(tried, key=lambda one: one[:2])  # ties: the smaller ridge
        record = RefineRound(ridge, error, before)
        if self.on_round is not None:
            self.on_round(record)
        return refined, record

    def _shaken(
        self, books: Sequence[Array], spread: Doubles, generator: np.random.Generator
    ) -> list[Array]:
        """Add noise to the columns that are fitted; ``spread`` ``(dim,)`` is that of all levels."""
        shaken = [book.copy() for book in books]
        for group in self.groups:
            scale = self.options.temperature / np.sqrt(group.levels) * spread[group.columns]
            for book in shaken[: group.levels]:
                noise = generator.normal(size=(len(book), len(scale))) * scale
                book[:, group.columns] += noise.astype(np.float32)
        return shaken


def _indexed(books: Sequence[Array]) -> list[IndexedCodebook]:
    return [index_codebook(torch.from_numpy(book)) for book in books]
