"""Joint refinement of residual codebooks: beam encoding and ridge least squares in turn.

K-means level by level never returns to a level it has left. Here all levels are fitted again
together to the codes that a beam finds, the ridge is chosen on items held out, and what does not
lower their error is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import UsageError
from semid.quantization.additive import NormalEquations
from semid.quantization.blocks import Blocks, read_ahead
from semid.quantization.nearest import PreparedCodebook, prepare
from semid.quantization.residual import encode_residual

__all__ = ["Part", "RefineOptions", "RefineRound", "refine_residual"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """How codebooks are refined.

    Attributes:
        rounds: most rounds of encoding and least squares, 0 or more; 0 leaves the codebooks.
        beam_width: partial codes kept while encoding, at least 1.
        ridges: ridges to choose from, each above 0, in items that say "zero" a codeword.
        tolerance: relative fall of the error that a round has to bring for another one, 0 or more.
    """

    rounds: int = 8
    beam_width: int = 8
    ridges: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UsageError: listing every value out of range.
        """
        object.__setattr__(self, "ridges", tuple(float(ridge) for ridge in self.ridges))
        allowed = [
            ("rounds", self.rounds >= 0, "0 or more"),
            ("beam_width", self.beam_width >= 1, "at least 1"),
            ("ridges", bool(self.ridges) and min(self.ridges) > 0, "numbers above 0"),
            ("tolerance", self.tolerance >= 0, "0 or more"),
        ]
        problems = [
            f"{name}={getattr(self, name)!r}: give {rule}"
            for name, good, rule in allowed
            if not good
        ]
        if problems:
            raise UsageError("; ".join(problems))


@dataclass(frozen=True)
class Part:
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
    parts: Sequence[Part] | None = None,
    options: RefineOptions | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    on_round: Callable[[RefineRound], None] | None = None,
) -> tuple[list[Array], list[RefineRound]]:
    """Refine codebooks that were fitted level by level.

    Args:
        train: ``(items, dim)`` rows to fit to.
        codebooks: one ``(codes, dim)`` float32 a level.
        judged: rows to choose the ridge and the end on; None takes ``train``, which favours the
            smallest ridge.
        parts: columns that are fitted together; None fits all columns over all levels. Columns in
            no part stay.
        options: rounds, beam, ridges.
        weights: ``(items,)`` weights of the training rows.
        threads: plain threads; they change no result.
        on_round: called after every round that was kept.

    Returns:
        Refined codebooks (those given, if no round lowered the error) and the rounds kept.

    Cost: a round encodes the training rows once and the judged rows once a ridge, at
    ``beam_width`` times the cost of greedy encoding.
    """
    options = options or RefineOptions()
    width = train.dim
    parts = parts or [Part(slice(0, width), len(codebooks))]
    judged = train if judged is None or not len(judged) else judged
    best = [book.copy() for book in codebooks]
    error = _error(judged, best, options.beam_width, threads)
    history: list[RefineRound] = []
    for _ in range(options.rounds):
        equations = _equations(train, best, options.beam_width, weights, threads)
        tried = []
        for ridge in options.ridges:
            books = _solve(equations, best, parts, ridge, threads)
            tried.append((_error(judged, books, options.beam_width, threads), ridge, books))
        found, ridge, books = min(tried, key=lambda one: one[:2])
        if not found < error:
            break
        history.append(RefineRound(ridge, found, error))
        enough = found > (1.0 - options.tolerance) * error
        best, error = books, found
        if on_round is not None:
            on_round(history[-1])
        if enough:
            break
    return best, history


def _prepared(books: Sequence[Array]) -> list[PreparedCodebook]:
    return [prepare(torch.from_numpy(book)) for book in books]


def _equations(
    rows: Blocks,
    books: Sequence[Array],
    beam_width: int,
    weights: npt.NDArray[np.float64] | None,
    threads: int | None,
) -> NormalEquations:
    equations = NormalEquations([len(book) for book in books], rows.dim)
    prepared = _prepared(books)
    for start, block in read_ahead(rows):
        found = encode_residual(block, prepared, beam_width=beam_width, threads=threads)
        mass = None if weights is None else weights[start : start + len(block)]
        equations.add_(found.codes, block, mass)
    return equations


def _solve(
    equations: NormalEquations,
    books: Sequence[Array],
    parts: Sequence[Part],
    ridge: float,
    threads: int | None,
) -> list[Array]:
    made = [book.copy() for book in books]
    for part in parts:
        start = [book[:, part.columns] for book in books]
        solved = equations.solve(
            ridge=ridge, start=start, columns=part.columns, levels=part.levels, threads=threads
        )
        for book, table in zip(made, solved, strict=False):
            book[:, part.columns] = table
    return made


def _error(rows: Blocks, books: Sequence[Array], beam_width: int, threads: int | None) -> float:
    """Return the mean squared residual."""
    prepared, total = _prepared(books), 0.0
    for _, block in read_ahead(rows):
        found = encode_residual(block, prepared, beam_width=beam_width, threads=threads)
        total += float(np.square(found.residual_norms, dtype=np.float64).sum())
    return total / max(len(rows), 1)
