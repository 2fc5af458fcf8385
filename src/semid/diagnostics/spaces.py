"""Rows in blocks, how embedding spaces are filled (spectra, column cosines), reconstruction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from semid.data.blocks import squared_norms
from semid.diagnostics.pairs import Estimate, bootstrap, row_groups
from semid.errors import InputError, UsageError
from semid.lazy import is_tensor
from semid.quantization import engine
from semid.results import Result
from semid.seeds import numpy_generator

if TYPE_CHECKING:
    import torch

    from semid.quantization.engine.table import VectorTable

Matrix: TypeAlias = "npt.NDArray[Any] | torch.Tensor"

BLOCK_ROWS = 16_384
"""Rows per block; fixed, so that sums do not depend on memory or threads."""


def as_matrix(x: Matrix, name: str) -> npt.NDArray[Any]:
    """Return ``x`` (items, dim) as an array without copying it; ``name`` is for the error."""
    array = x.detach().cpu().numpy() if is_tensor(x) else np.asanyarray(x)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0:
        raise InputError(
            f"{name} has shape {array.shape}; (items, dim) with at least one row is needed"
        )
    if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} has dtype {array.dtype}; numbers are needed")
    return array


def row_blocks(items: int, size: int = BLOCK_ROWS) -> Iterator[slice]:
    """Yield slices over the rows, in order."""
    for start in range(0, items, size):
        yield slice(start, min(start + size, items))


def as_block(array: npt.NDArray[Any], rows: slice | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return rows as contiguous float32 ``(batch, dim)``; InputError if one is not finite."""
    block = np.ascontiguousarray(array[rows], dtype=np.float32)
    if not np.isfinite(block).all():
        bad = int(np.flatnonzero(~np.isfinite(block).all(1))[0])
        start = rows.start or 0 if isinstance(rows, slice) else None
        row = int(rows[bad]) if start is None else start + bad  # type: ignore[index]
        raise InputError(f"row {row} holds NaN or infinite values; drop such rows first")
    return block


def unit_rows(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the rows scaled to length one; rows of zeros stay zeros."""
    norms = np.sqrt(squared_norms(block))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    result: npt.NDArray[np.float32] = (block * scale[:, None]).astype(np.float32)
    return result


def nearest_entries(
    queries: npt.NDArray[np.float32],
    table: VectorTable,
    k: int,
    *,
    threads: int | None = None,
    **limits: Any,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return labels and keys ``(queries, k)`` of `top_k` and `nearest_m`, without torch.

    ``limits`` are ``exclude`` and ``targets`` of the engine's `search`.
    """
    route = engine.search.choose("auto", queries, table, k=k)
    result = engine.search.search(queries, table, route, k=k, threads=threads, **limits)
    return result.labels, result.keys


def latent_std(latents: Matrix) -> float:
    """Return the root of the mean variance per dimension, the unit of the noise scales.

    One positive number serves all levels of latents ``(items, latent)``, since the noise is put on
    these and not on the residuals. Raises `InputError` where all rows are equal.
    """
    array = as_matrix(latents, "latents")
    # Sums are of rows less the first one, so that a large mean cancels no digits.
    shift = as_block(array, slice(0, 1)).astype(np.float64)
    total = np.zeros(array.shape[1])
    squares = 0.0
    for rows in row_blocks(len(array)):
        block = as_block(array, rows) - shift
        total += block.sum(0)
        squares += float(np.einsum("nd,nd->", block, block))
    mean = total / len(array)
    variance = (squares / len(array) - float(mean @ mean)) / array.shape[1]
    if variance <= 0:
        raise InputError(f"all {len(array)} latent rows are equal; there is no scale for the noise")
    return float(np.sqrt(variance))


SAMPLE_ROWS = 20_000
"""Rows of the random subset, as in the DRQ paper."""

# A column whose variance is below this share of its mean square is constant up to rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class Geometry(Result):
    """Geometry of one space."""

    name: str  # which space, for example ``input``, ``latent``, ``reconstruction``
    rows: int  # rows measured
    items: int  # rows to choose from
    dim: int  # width
    participation_ratio: float  # ``(sum l)^2 / sum l^2`` of the covariance's eigenvalues, 1 to dim
    effective_rank: float  # ``exp(-sum q log q)``, ``q = l / sum l``, 1 to dim
    top_share: float  # largest eigenvalue's share of the variance
    # mean absolute cosine between distinct columns as they are (the paper's reading); None with
    # fewer than two columns that are not zero
    mean_abs_cosine: float | None
    # the same with centered columns, mean absolute correlation
    mean_abs_cosine_centered: float | None
    zero_columns: int  # columns of zeros, left out of the first cosine
    constant_columns: int  # columns without variance, left out of the second
    # of the covariance, largest first, ``(dim,)``
    eigenvalues: npt.NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(0), repr=False, compare=False
    )


def sample_rows(items: int, rows: int | None = SAMPLE_ROWS, *, seed: int = 0) -> npt.NDArray[Any]:
    """Return sorted rows of the random subset for geometry and flips, the same for every space.

    None, or more rows than there are items, chooses all.
    """
    if rows is not None and rows < 1:
        raise UsageError(f"rows={rows} must be at least 1, or None for all")
    if rows is None or rows >= items:
        return np.arange(items)
    subset = numpy_generator(seed, "sample").choice(items, rows, replace=False, shuffle=False)
    return np.sort(subset)


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
    """Measure how many directions a space ``x`` (items, dim) uses and how its columns correlate.

    ``sample`` is the number of rows of the random subset (None takes all); one seed and length
    choose the same rows in every space. Cost: ``rows * dim^2 + dim^3``, float64.

    Source: DRQ section 5.2; the centered cosine is ours.
    """
    array = as_matrix(x, name)
    rows = sample_rows(len(array), sample, seed=seed)
    dim = array.shape[1]
    # Sums are of rows less the first one, so that a large mean cancels no digits.
    shift = as_block(array, rows[:1]).astype(np.float64)[0]
    total, gram = np.zeros(dim), np.zeros((dim, dim))
    for part in row_blocks(len(rows)):
        block = as_block(array, rows[part]).astype(np.float64) - shift
        total += block.sum(0)
        gram += block.T @ block
    mean = total / len(rows)
    covariance = gram / len(rows) - np.outer(mean, mean)
    center = mean + shift
    raw = covariance + np.outer(center, center)  # mean products of columns, not centered
    # Rounding leaves eigenvalues slightly below 0 where a space does not use all directions.
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


def effective_rank(x: Matrix, *, name: str, seed: int, replicates: int) -> Estimate:
    """Return the effective rank of a space ``x`` (items, dim) with its interval over rows.

    Cost: that of `geometry` on all rows, and as much again for the rows' coordinates.
    """
    array = as_matrix(x, name)
    mean = sum(as_block(array, p).sum(0, np.float64) for p in row_blocks(len(array))) / len(array)
    gram = np.zeros((array.shape[1], array.shape[1]))
    for part in row_blocks(len(array)):
        centered = as_block(array, part) - mean
        gram += centered.T @ centered
    values, vectors = np.linalg.eigh(gram / len(array))
    used = values > values.max() * _CONSTANT
    values, vectors = values[used], vectors[:, used]
    share = values / values.sum()
    entropy = float(-(share * np.log(share)).sum())
    # To first order, a row moves eigenvalue k by y_k - l_k, with y_k its squared coordinate along
    # eigenvector k. By the chain rule it moves the entropy H of q = l / sum l by
    # -sum_k y_k (log q_k + H) / sum l, whose mean over the rows is 0.
    slope = (np.log(share) + entropy) / values.sum()
    influence = np.concatenate(
        [-(((as_block(array, p) - mean) @ vectors) ** 2) @ slope for p in row_blocks(len(array))]
    )
    estimate = bootstrap(
        row_groups(influence),
        lambda totals: np.exp(entropy + totals / len(array)),
        seed=seed,
        replicates=replicates,
    )[0]
    return replace(estimate, value=math.exp(entropy))


@dataclass(frozen=True)
class Reconstruction(Result):
    """Reconstruction error under every reading the papers use."""

    name: str  # what was reconstructed from what: ``decoder(codes)`` or ``decoder(z)``
    items: int  # rows compared
    dim: int  # width
    mse: float  # squared error per element
    # squared error summed over l2-normalized vectors, ``2 (1 - cosine)``; the DRQ paper's reading.
    # Rows that are zero on one side are left out
    normalized_error: float | None
    # ``sum |x - x_hat|^2 / sum |x - mean|^2``; 1 is as good as the mean vector, None where all rows
    # are equal
    relative_error: float | None
    cosine: float | None  # mean cosine of x and x_hat; rows that are zero on one side are left out
    zero_rows: int  # number of such rows


def reconstruction(x: Matrix, x_hat: Matrix, *, name: str) -> Reconstruction:
    """Compare vectors ``(items, dim)`` with their reconstructions.

    ``name`` is ``decoder(codes)`` or ``decoder(z)``: the two differ by an order of magnitude, so
    every table must say which it shows. Raises `InputError` where shapes differ.

    Source: DRQ section 5.5 (0.000432 is ``2 (1 - 0.999784)``).
    """
    whole, other = as_matrix(x, "x"), as_matrix(x_hat, "x_hat")
    if whole.shape != other.shape:
        raise InputError(f"x has shape {whole.shape} and x_hat {other.shape}; give the same")
    items, mean, spread = 0, np.zeros(whole.shape[1]), 0.0
    # Squared error, normalized error, cosines, and rows of zeros.
    sums = np.zeros(4)
    for rows in row_blocks(len(whole)):
        original, decoded = as_block(whole, rows), as_block(other, rows)
        difference = original.astype(np.float64) - decoded
        a, b = unit_rows(original), unit_rows(decoded)
        used = a.any(1) & b.any(1)
        # Of near-equal unit vectors the difference keeps digits that 1 - cosine loses.
        gap = a[used].astype(np.float64) - b[used]
        gaps = np.einsum("nd,nd->n", gap, gap)
        squared = np.einsum("nd,nd->", difference, difference)
        sums += [squared, gaps.sum(), (1.0 - gaps / 2.0).sum(), (~used).sum()]
        # The spread of both parts about their common mean is the sum of their spreads plus what
        # the distance of the two means adds (Chan's parallel update).
        block_mean, count = original.mean(0, dtype=np.float64), len(original)
        centered, step = original - block_mean, block_mean - mean
        block_spread = float(np.einsum("nd,nd->", centered, centered))
        spread += block_spread + float(step @ step) * items * count / (items + count)
        mean = mean + step * (count / (items + count))
        items += count
    error, normalized, cosine, zero_rows = sums.tolist()
    nonzero = items - int(zero_rows)
    return Reconstruction(
        name=name,
        items=items,
        dim=len(mean),
        mse=error / (items * len(mean)),
        normalized_error=normalized / nonzero if nonzero else None,
        relative_error=error / spread if spread > 0 else None,
        cosine=cosine / nonzero if nonzero else None,
        zero_rows=int(zero_rows),
    )
