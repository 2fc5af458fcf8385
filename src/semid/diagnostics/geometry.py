"""How many directions an embedding space uses: spectrum of the covariance and column cosines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.arrays import Matrix, as_block, as_matrix, row_blocks
from semid.errors import InputError, UsageError
from semid.results import Result
from semid.seeds import numpy_generator

__all__ = ["Geometry", "geometry", "sample_rows"]

SAMPLE_ROWS = 20_000
"""Rows of the random subset; the paper's number."""

# A column whose variance is below this share of its mean square is constant up to rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class Geometry(Result):
    """Geometry of one space.

    Attributes:
        name: which space, for example ``input``, ``latent``, ``reconstruction``.
        rows: rows looked at.
        items: rows there were.
        dim: width.
        participation_ratio: ``(sum l)^2 / sum l^2`` of the covariance's eigenvalues, 1 to dim.
        effective_rank: ``exp(-sum q log q)``, ``q = l / sum l``, 1 to dim.
        top_share: largest eigenvalue's share of the variance.
        mean_abs_cosine: mean absolute cosine between distinct columns as they are (the paper's
            reading); None with fewer than two columns that are not zero.
        mean_abs_cosine_centered: the same with centered columns, mean absolute correlation.
        zero_columns: columns of zeros, left out of the first cosine.
        constant_columns: columns without variance, left out of the second.
        eigenvalues: of the covariance, largest first, ``(dim,)``.
    """

    name: str
    rows: int
    items: int
    dim: int
    participation_ratio: float
    effective_rank: float
    top_share: float
    mean_abs_cosine: float | None
    mean_abs_cosine_centered: float | None
    zero_columns: int
    constant_columns: int
    eigenvalues: npt.NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(0), repr=False, compare=False
    )


def sample_rows(items: int, rows: int | None = SAMPLE_ROWS, *, seed: int = 0) -> npt.NDArray[Any]:
    """Choose the random subset that geometry and flips look at, the same for every space.

    Args:
        items: rows there are.
        rows: how many to choose; None or more than there are chooses all.
        seed: of the choice.

    Returns:
        Sorted row numbers, int64.

    Raises:
        UsageError: ``rows`` below 1.
    """
    if rows is not None and rows < 1:
        raise UsageError(f"rows={rows} must be at least 1, or None for all")
    if rows is None or rows >= items:
        return np.arange(items)
    chosen = numpy_generator(seed, "sample").choice(items, rows, replace=False, shuffle=False)
    return np.sort(chosen)


def _mean_abs_cosine(gram: npt.NDArray[np.float64], used: npt.NDArray[np.bool_]) -> float | None:
    """Return the mean absolute cosine over ordered pairs of distinct used columns."""
    count = int(used.sum())
    if count < 2:
        return None
    part = gram[np.ix_(used, used)]
    norms = np.sqrt(np.diag(part))
    cosines = np.minimum(np.abs(part / norms[:, None] / norms[None, :]), 1.0)
    np.fill_diagonal(cosines, 0.0)
    return float(cosines.sum() / (count * (count - 1)))


def geometry(
    x: Matrix,
    *,
    name: str,
    sample: int | None = SAMPLE_ROWS,
    seed: int = 0,
) -> Geometry:
    """Measure how many directions a space uses and how its columns correlate.

    Args:
        x: ``(items, dim)``.
        name: which space this is, for the record.
        sample: rows of the random subset; None takes all. `Geometry.rows` says how many it was.
        seed: of the subset; the same seed and length choose the same rows in every space.

    Returns:
        A `Geometry`.

    Raises:
        InputError: bad shape, values that are not finite, or all rows equal.

    Cost: ``rows * dim^2 + dim^3``, float64.

    Source: DRQ section 5.2; the centered cosine is ours.
    """
    array = as_matrix(x, name)
    rows = sample_rows(len(array), sample, seed=seed)
    dim = array.shape[1]
    shift = as_block(array, rows[:1]).astype(np.float64)[0]  # keeps large means from cancelling
    total, gram = np.zeros(dim), np.zeros((dim, dim))
    for part in row_blocks(len(rows)):
        block = as_block(array, rows[part]).astype(np.float64) - shift
        total += block.sum(0)
        gram += block.T @ block
    mean = total / len(rows)
    covariance = gram / len(rows) - np.outer(mean, mean)
    center = mean + shift
    raw = covariance + np.outer(center, center)
    values = np.clip(np.linalg.eigvalsh(covariance)[::-1], 0.0, None)
    variance, square = np.clip(np.diag(covariance), 0.0, None), np.diag(raw)
    varies = variance > _CONSTANT * square
    if not varies.any():
        raise InputError(f"{name}: all {len(rows)} rows are equal, so there is no geometry")
    share = values / values.sum()
    used = share[share > 0]
    return Geometry(
        name=name,
        rows=len(rows),
        items=len(array),
        dim=dim,
        participation_ratio=float(1.0 / (share**2).sum()),
        effective_rank=float(np.exp(-(used * np.log(used)).sum())),
        top_share=float(share[0]),
        mean_abs_cosine=_mean_abs_cosine(raw, square > 0),
        mean_abs_cosine_centered=_mean_abs_cosine(covariance, varies),
        zero_columns=int((square <= 0).sum()),
        constant_columns=int((~varies).sum()),
        eigenvalues=values,
    )
