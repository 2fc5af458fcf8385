"""Joint refinement of residual codebooks, and penalties that even out their usage.

K-means level by level never returns to a level it has left. In refinement beam encoding and ridge
least squares take turns: all levels are fitted again together to the codes that a beam finds, the
ridge is chosen on items held out, and what does not lower their error is dropped. The two steps
alone end in the nearest local optimum; further rounds add noise to the codebooks that falls to
nothing (stochastic relaxation of the codebooks, LSQ++, Martinez et al. 2018; the scale of the noise
and the schedule are ours). In the first of these rounds, codewords with very few items are placed
beside those with most (ours), which evens out usage at about the same error.

With penalties per codeword (a power diagram) a row takes the codeword of least
``|x - c|^2 + penalty``. Penalties are one more coordinate: with ``x' = [x, 0]`` and
``c' = [c, sqrt(penalty)]`` the plain nearest codeword is the penalized one, so the engine, its
bounds and beams need know nothing of penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError
from semid.options import MAX_BEAM, Options, option
from semid.quantization.blocks import Blocks, read_ahead
from semid.quantization.least_squares import NormalEquations
from semid.quantization.nearest import IndexedCodebook, index_codebook
from semid.quantization.residual import ResidualCodes, dequantize, encode_residual
from semid.seeds import numpy_generator

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

MOVE_BELOW = 0.2
"""A codeword with fewer items than this share of the mean moves beside one with many; chosen by
`benchmarks/evenness.py`."""
SPLIT_ABOVE = 1.5
"""Only a codeword with more items than this multiple of the mean gets such a neighbor."""
SPLIT_NOISE = 0.3
"""Distance between the two, in standard deviations of the residual over sqrt(levels)."""
MOVING_SHARE = 0.6
"""Share of the rounds with noise in which codewords move; later ones settle."""


@dataclass(frozen=True, kw_only=True)
class RefineOptions(Options):
    """How codebooks are refined.

    After the rounds with noise come as many ``rounds`` as before, and all of that is kept only if
    it lowers the error. The noise falls linearly with the round.
    """

    rounds: int = option(
        8, ge=0, help="Maximum rounds of encoding and least squares; 0 leaves the codebooks."
    )
    annealing_rounds: int = option(24, ge=0, help="Rounds with noise that follow.")
    temperature: float = option(
        1.0,
        ge=0,
        help="First noise, in standard deviations of the residual over the square root of the "
        "levels.",
    )
    beam_width: int = option(8, ge=1, le=MAX_BEAM, help="Partial codes kept while encoding.")
    ridges: tuple[float, ...] = option(
        (0.3, 1.0, 3.0, 10.0),
        gt=0,
        help="Ridges to choose from, in items per codeword whose target is zero.",
    )
    tol: float = option(
        1e-3, ge=0, help="Stop when a round lowers the error by less than this share."
    )

    def _problems(self) -> list[str]:
        return [] if self.ridges else ["ridges=(): give at least one number above 0"]

    @property
    def most_rounds(self) -> int:
        """Rounds of both kinds, at most."""
        noisy = self.rounds + self.annealing_rounds if self.annealing_rounds else 0
        return self.rounds + noisy if self.rounds else 0


@dataclass(frozen=True)
class ColumnGroup:
    """Columns of the rows that are fitted together, over the first levels alone."""

    columns: slice
    levels: int  # codewords of later levels keep these columns


@dataclass(frozen=True)
class RefineRound:
    """The ridge that a round chose, and the mean squared residual of held-out items around it."""

    ridge: float
    error: float
    before: float


def refine_residual(
    train: Blocks,
    codebooks: Sequence[Array],
    *,
    held_out: Blocks | None = None,
    groups: Sequence[ColumnGroup] | None = None,
    options: RefineOptions | None = None,
    weights: Doubles | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_round: Callable[[RefineRound], None] | None = None,
) -> tuple[list[Array], list[RefineRound]]:
    """Refine codebooks that were fitted level by level.

    Returns refined codebooks (copies of the old ones, if no round lowered the error) and the
    rounds that led to them.

    Cost: a round encodes the training rows once and the held-out rows once per ridge (once, from
    the second with noise on), by a beam (see `semid.quantization.beam`).

    Shapes: ``train`` (items, dim), ``codebooks`` (codes, dim), ``weights`` (items,).
    """
    options = options or RefineOptions()
    groups = groups or [ColumnGroup(slice(0, train.dim), len(codebooks))]
    held_out = train if held_out is None or not len(held_out) else held_out
    start = [book.copy() for book in codebooks]
    if not options.rounds:
        return start, []
    refiner = _Refiner(train, held_out, groups, options, weights, threads, on_round)
    # First the nearest local optimum, then out of it with falling noise and down again; the second
    # result counts only where held-out rows prefer it.
    best, history = refiner.descend(start, refiner.error(start))
    if options.annealing_rounds:
        error = history[-1].error if history else refiner.error(best)
        annealed, rounds = refiner.anneal(best, error, numpy_generator(seed, "anneal"))
        annealed, more = refiner.descend(annealed, rounds[-1].error)
        if [*rounds, *more][-1].error < error:
            best, history = annealed, [*history, *rounds, *more]
    return best, history


@dataclass
class _Refiner:
    """What all rounds of one refinement share; see `refine_residual`."""

    train: Blocks
    held_out: Blocks
    groups: Sequence[ColumnGroup]
    options: RefineOptions
    weights: Doubles | None
    threads: int | None
    on_round: Callable[[RefineRound], None] | None

    def descend(self, books: list[Array], error: float) -> tuple[list[Array], list[RefineRound]]:
        """Run rounds without noise for as long as they lower the error."""
        rounds: list[RefineRound] = []
        for _ in range(self.options.rounds):
            equations, _ = self._equations(books)
            solved, record = self._solve(equations, books, self.options.ridges, error)
            # Held-out rows decide, so a round may raise the error: its codebooks are dropped.
            if not record.error < error:
                break
            rounds.append(record)
            converged = record.error > (1.0 - self.options.tol) * error
            books, error = solved, record.error
            if converged:
                break
        return books, rounds

    def anneal(
        self, books: list[Array], error: float, generator: np.random.Generator
    ) -> tuple[list[Array], list[RefineRound]]:
        """Run all rounds with noise; the last adds none."""
        rounds: list[RefineRound] = []
        count, ridges = self.options.annealing_rounds, self.options.ridges
        spread = np.zeros(0)
        mass = len(self.train) if self.weights is None else float(self.weights.sum())
        for number in range(count):
            equations, squared = self._equations(books)
            if not rounds:
                # The residual's standard deviation per column sets the scale of all noise.
                spread = np.sqrt(squared / max(mass, 1e-12))
            books, record = self._solve(equations, books, ridges, error)
            rounds.append(record)
            # The first round chooses the ridge; the others reuse it, which saves encodings.
            ridges, error = (record.ridge,), record.error
            if number + 1 < count:  # the noise falls linearly and the last round adds none
                if number < MOVING_SHARE * count:
                    near = SPLIT_NOISE * spread
                    books = self._move_rare(books, equations.counts, near, generator)
                scale = self.options.temperature * (1.0 - number / count)
                books = self._add_noise(books, scale * spread, generator)
        return books, rounds

    def error(self, books: Sequence[Array]) -> float:
        """Return the mean squared residual of the held-out rows."""
        indexed, total = _indexed(books), 0.0
        for _, block in read_ahead(self.held_out):
            norms = self._encode(block, indexed).residual_norms
            total += float(np.square(norms, dtype=np.float64).sum())
        return total / max(len(self.held_out), 1)

    def _encode(self, block: Array, indexed: list[IndexedCodebook]) -> ResidualCodes:
        return encode_residual(
            block, indexed, beam_width=self.options.beam_width, threads=self.threads
        )

    def _equations(self, books: Sequence[Array]) -> tuple[NormalEquations, Doubles]:
        """Encode the training rows; return their equations and squared residuals, by weight."""
        equations = NormalEquations([len(book) for book in books], self.train.dim)
        indexed, squared = _indexed(books), np.zeros(self.train.dim)
        for start, block in read_ahead(self.train):
            codes = self._encode(block, indexed).codes
            mass = None if self.weights is None else self.weights[start : start + len(block)]
            equations.add_(codes, block, mass)
            residual = block - dequantize(codes, books)
            weighted = residual if mass is None else residual * mass[:, None]
            squared += np.einsum("nd,nd->d", weighted, residual, dtype=np.float64)
        return equations, squared

    def _solve(
        self,
        equations: NormalEquations,
        books: Sequence[Array],
        ridges: Sequence[float],
        before: float,
    ) -> tuple[list[Array], RefineRound]:
        """Solve with every ridge; return the codebooks with the least error on held-out rows."""
        solutions = []
        for ridge in ridges:
            refined = [book.copy() for book in books]
            for group in self.groups:
                tables = equations.solve(
                    ridge=ridge,
                    start=[book[:, group.columns] for book in books],
                    columns=group.columns,
                    levels=group.levels,
                    threads=self.threads,
                )
                for book, table in zip(refined, tables, strict=False):
                    book[:, group.columns] = table
            solutions.append((self.error(refined), ridge, refined))
        error, ridge, refined = min(solutions, key=lambda one: one[:2])  # ties: the smaller ridge
        record = RefineRound(ridge, error, before)
        if self.on_round is not None:
            self.on_round(record)
        return refined, record

    def _move_rare(
        self,
        books: list[Array],
        counts: Sequence[Doubles],
        spread: Doubles,
        generator: np.random.Generator,
    ) -> list[Array]:
        """Place the codewords with fewest items beside those with most, one each.

        A codeword for a handful of outliers lowers the error of training items alone; beside a
        frequent one it splits a dense cell. ``counts`` are items ``(codes,)`` per level.
        """
        rare, frequent = [], []
        for items in counts:
            by_count = np.argsort(items, kind="stable")
            moved = by_count[items[by_count] < MOVE_BELOW * items.mean()]
            split = by_count[::-1][: len(moved)]
            split = split[items[split] > SPLIT_ABOVE * items.mean()]
            rare.append(moved[: len(split)])
            frequent.append(split)
        noisy = self._add_noise(books, spread, generator)
        books = [book.copy() for book in books]
        for book, noisy_book, moved, split in zip(books, noisy, rare, frequent, strict=True):
            for group in self.groups:  # other columns, such as penalties, stay
                book[moved, group.columns] = noisy_book[split, group.columns]
        return books

    def _add_noise(
        self, books: Sequence[Array], spread: Doubles, generator: np.random.Generator
    ) -> list[Array]:
        """Add noise to the columns that are fitted; ``spread`` ``(dim,)`` is that of all levels."""
        noisy = [book.copy() for book in books]
        for group in self.groups:
            # Independent noise of every level adds up: each gets 1 / sqrt(levels) of the spread.
            scale = spread[group.columns] / np.sqrt(group.levels)
            for book in noisy[: group.levels]:
                noise = generator.normal(size=(len(book), len(scale))) * scale
                book[:, group.columns] += noise.astype(np.float32)
        return noisy


def _indexed(books: Sequence[Array]) -> list[IndexedCodebook]:
    return [index_codebook(book) for book in books]


# Balancing ------------------------------------------------------------------------------------

BALANCE_ROUNDS = 20
STEP = 0.1
"""Fraction of the highest penalty that a codeword e times too large gets in the first round."""


def balance_penalties(
    rows: Blocks,
    codebooks: Sequence[Array],
    *,
    strength: float,
    columns: int | None = None,
    beam_width: int = 1,
    threads: int | None = None,
) -> list[Doubles]:
    """Find penalties that even out how many rows take each codeword, for all levels together.

    A codeword's penalty rises with the logarithm of its size and never above ``strength`` times
    the mean squared residual after all levels. At one level a row's squared error rises by at most
    that much: with ``k`` the nearest codeword and ``j`` the one that it takes,
    ``|x - j|^2 + p_j <= |x - k|^2 + p_k``. Steps shrink, and of all rounds the penalties with the
    most even usage (entropy, summed over levels) are returned: sizes that oscillate cannot leave
    usage less even than no penalties do.

    Returns ``(codes,)`` float64 per level, the lowest of each 0, in squared units of the rows.

    Cost: 21 encodings of all rows.

    Shapes: ``rows`` (items, dim), ``codebooks`` (codes, dim).
    """
    if not 0 <= strength < float("inf"):
        raise UsageError(f"strength={strength}: give 0 or more")
    penalties = [np.zeros(len(book)) for book in codebooks]
    if strength == 0:
        return penalties
    sizes, residual = _sizes(rows, codebooks, penalties, columns or rows.dim, beam_width, threads)
    highest = strength * residual
    best, best_entropy = penalties, _entropy(sizes)
    for number in range(1, BALANCE_ROUNDS + 1):
        # Raise the penalty of codewords larger than the mean size and lower that of smaller ones.
        # Steps fall with 1 / sqrt(round), so that sizes settle.
        step = STEP * highest / np.sqrt(number)
        penalties = [
            np.clip(p + step * (np.log1p(n) - np.log1p(n.mean())), 0.0, highest)
            for p, n in zip(penalties, sizes, strict=True)
        ]
        sizes, _ = _sizes(rows, codebooks, penalties, columns or rows.dim, beam_width, threads)
        entropy = _entropy(sizes)
        if entropy > best_entropy:
            best, best_entropy = penalties, entropy
    # A constant that all codewords of a level pay changes no code.
    return [each - each.min() for each in best]


def _entropy(sizes: Sequence[Doubles]) -> float:
    total = 0.0
    for counts in sizes:
        # Codewords without rows add nothing: p log p goes to 0.
        share = counts[counts > 0] / counts.sum()
        total -= float((share * np.log(share)).sum())
    return total


def _sizes(
    rows: Blocks,
    codebooks: Sequence[Array],
    penalties: Sequence[Doubles],
    columns: int,
    beam_width: int,
    threads: int | None,
) -> tuple[list[Doubles], float]:
    """Return rows per codeword of each level, and the mean squared residual without penalties."""
    levels = len(codebooks)
    books = _indexed(
        [
            add_penalties(book, penalty, level=level, levels=levels)
            for level, (book, penalty) in enumerate(zip(codebooks, penalties, strict=True))
        ]
    )
    sizes, total = [np.zeros(len(book)) for book in codebooks], 0.0
    for _, block in read_ahead(rows):
        padded = pad_columns(block, levels)
        codes = encode_residual(padded, books, beam_width=beam_width, threads=threads).codes
        for level, counts in enumerate(sizes):
            counts += np.bincount(codes[:, level], minlength=len(counts))
        residual = block[:, :columns] - dequantize(codes, [book[:, :columns] for book in codebooks])
        total += float(np.einsum("nd,nd->", residual, residual, dtype=np.float64))
    return sizes, total / max(len(rows), 1)


def pad_columns(rows: Array, count: int) -> Array:
    """Return rows ``(n, dim)`` with ``count`` more columns of zeros."""
    return np.pad(rows, ((0, 0), (0, count)))


def add_penalties(codebook: Array, penalties: Doubles, *, level: int = 0, levels: int = 1) -> Array:
    """Return codewords ``(codes, dim + levels)`` with penalties ``(codes,)`` as coordinates."""
    # Every level has a coordinate of its own, so that the penalty of a level stays as a constant in
    # the residual and a beam adds up the penalties of all levels.
    padded = pad_columns(codebook, levels)
    padded[:, codebook.shape[1] + level] = np.sqrt(penalties)
    return padded
