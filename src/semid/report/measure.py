"""One pass over the catalogue: codes, errors per item and per level, and figures made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.codes import code_dtype
from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError
from semid.health import LevelUsage, bucket_keys, row_hashes
from semid.progress import Progress
from semid.report.results import Curve, LevelErrors, ReconstructionErrors
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import mean_row
from semid.tokenizers.fit_report import HealthCounter
from semid.tokenizers.stored import HELD_OUT_SALT

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class Moments:
    """Sums that give means and variances, less the first row so that large means cancel nothing.

    Args:
        first: ``(dim,)`` the first row seen.
    """

    def __init__(self, first: Array) -> None:
        self.shift = first.astype(np.float64)
        self.rows = 0
        self.total = np.zeros(len(first))
        self.squares = np.zeros(len(first))

    def add_(self, rows: Array) -> None:
        """Count rows ``(n, dim)``."""
        shifted = rows - self.shift
        self.rows += len(rows)
        self.total += shifted.sum(axis=0)
        self.squares += np.einsum("nd,nd->d", shifted, shifted)

    @property
    def variances(self) -> Floats:
        """Variance of each dimension, ``(dim,)``."""
        mean = self.total / self.rows
        return np.maximum(self.squares / self.rows - mean * mean, 0.0)

    @property
    def variance(self) -> float:
        """Mean squared distance to the mean: the variances summed."""
        return float(self.variances.sum())

    def spread_about(self, other: Moments) -> float:
        """Sum of squared distances of these rows to the mean of ``other``, of the same shift."""
        mean = other.total / other.rows
        return float(self.squares.sum() - 2.0 * (mean @ self.total) + self.rows * (mean @ mean))


@dataclass(frozen=True)
class CataloguePass:
    """The results of the pass.

    Attributes:
        codes: ``(items, levels)``.
        errors: ``(items,)`` float32 squared error ``|x - x_hat|^2`` of each item.
        keys: ``(items,)`` uint64, equal exactly for equal ids.
        hashes: ``(items,)`` uint64, equal for equal inputs.
        health: usage, collisions and errors, as a fit counts them.
        latent: moments of the latent.
        held_out_latent: moments of the latent of held-out rows alone.
        remaining: ``(levels, items)`` float32: squared latent error after the first l + 1 levels
            (parallel tokenizers: of codebook l alone).
        normalized: sum of squared errors between rows and reconstructions of unit length.
        cosine: sum of the cosines of rows with their reconstructions.
    """

    codes: npt.NDArray[Any]
    errors: Array
    keys: npt.NDArray[np.uint64]
    hashes: npt.NDArray[np.uint64]
    health: HealthCounter
    latent: Moments
    held_out_latent: Moments
    remaining: Array
    normalized: float
    cosine: float

    @property
    def items(self) -> int:
        """Number of items."""
        return len(self.codes)

    @property
    def usage(self) -> tuple[LevelUsage, ...]:
        """Usage of each level."""
        return self.health.usage()


def measure_catalogue(
    tok: Tokenizer,
    source: EmbeddingSource,
    progress: Progress,
    *,
    held_out: npt.NDArray[np.bool_] | None = None,
) -> CataloguePass:
    """Read every row for the mean, then encode and decode every row once.

    Memory: ``20 + 6 levels`` bytes per item, and a few blocks of 65,536 rows.

    Shapes: ``source`` (items, dim), ``held_out`` (items,).
    """
    items = len(source)
    if items == 0:
        raise EmbeddingError("there are no rows to diagnose; give at least one")
    codebooks = tok.codebooks
    codes = np.empty((items, tok.levels), dtype=code_dtype(tok.codebook_sizes))
    errors = np.empty(items, dtype=np.float32)
    hashes = np.empty(items, dtype=np.uint64)
    remaining = np.empty((tok.levels, items), dtype=np.float32)
    normalized = cosine = 0.0
    moments: tuple[Moments, Moments] | None = None
    progress.start("read", total=None)
    health = HealthCounter(tok.codebook_sizes, mean_row(source))
    progress.start("read, encode, decode", total=items)
    # One pass: everything that needs a row, its codes or its reconstruction is added up here.
    for block in tok.encode_blocks(source):
        span = slice(block.start, block.start + len(block.x))
        decoded = tok.decode(block.codes)
        latent = tok.latent(block.x)
        codes[span] = block.codes
        hashes[span] = row_hashes(block.x)
        remaining[:, span] = _remaining_errors(latent, block.codes, codebooks, tok.hierarchical)
        errors[span] = health.update(
            block.codes,
            block.x,
            decoded,
            latent=latent,
            train=None if held_out is None else ~held_out[span],
            row_hashes=hashes[span],
        )
        # Both moments are shifted by the first row, so that spreads can be taken about one mean.
        if moments is None:
            moments = Moments(latent[0]), Moments(latent[0])
        moments[0].add_(latent)
        if held_out is not None:
            moments[1].add_(latent[held_out[span]])
        cosines = _cosines(block.x, decoded)
        cosine += float(cosines.sum())
        normalized += float((2.0 - 2.0 * cosines).sum())
        progress.step(len(block.x))
    assert moments is not None
    return CataloguePass(
        codes=codes,
        errors=errors,
        keys=bucket_keys(codes),
        hashes=hashes,
        health=health,
        latent=moments[0],
        held_out_latent=moments[1],
        remaining=remaining,
        normalized=normalized,
        cosine=cosine,
    )


def _squared_norms(rows: Array) -> Floats:
    squared: Floats = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return squared


def _cosines(x: Array, decoded: Array) -> Floats:
    """Return the cosine of each row with its reconstruction; 0 where one of them is zero."""
    products = np.einsum("nd,nd->n", x, decoded, dtype=np.float64)
    lengths = np.sqrt(_squared_norms(x) * _squared_norms(decoded))
    cosines: Floats = np.divide(products, lengths, out=np.zeros(len(x)), where=lengths > 0)
    return cosines


def _remaining_errors(
    latent: Array, codes: npt.NDArray[np.int64], codebooks: tuple[Array, ...], hierarchical: bool
) -> Floats:
    """Return the squared latent error after each level, or of each parallel codebook alone."""
    errors = np.empty((len(codebooks), len(latent)))
    residual = latent
    for level, codebook in enumerate(codebooks):
        quantized = codebook[codes[:, level]]
        residual = residual - quantized if hierarchical else latent - quantized
        errors[level] = _squared_norms(residual)
    return errors


def rank_frequency(usage: LevelUsage, *, points: int = 256) -> Curve:
    """Return the shares of the codes, the most used first, thinned out to about ``points`` ranks.

    Ranks start at 1. Both ends are in the curve, and every rank of a curve with fewer.
    """
    # Half of the points are even in rank and half in its logarithm: head and tail both show.
    shares = np.sort(usage.probabilities)[::-1]
    ranks = np.arange(1, len(shares) + 1)
    if len(ranks) > points:
        even = np.linspace(1, len(shares), points)
        head = np.geomspace(1, len(shares), points // 2)
        ranks = np.unique(np.concatenate([even, head]).round().astype(np.int64))
    return Curve(tuple(ranks.tolist()), tuple(shares[ranks - 1].tolist()))


def held_out_rows(tok: Tokenizer, source: EmbeddingSource) -> tuple[Mask | None, str]:
    """Return ``(items,)`` which rows the fit held out, and a note; None where that is unknown.

    It is known where there are as many rows and held-out rows as the fit reports.
    """
    mask = held_out_mask(source.ids, tok.validation_fraction, salt=HELD_OUT_SALT)
    fit = tok.report
    if fit is None or (fit.items, fit.held_out_items) != (len(mask), int(mask.sum())):
        return None, (
            "These are not the rows the model was fitted on (or they carry other ids), so errors "
            "are of all rows together"
        )
    if not mask.any():
        return mask, "The fit held no rows out, so every error here is on rows it has seen"
    return mask, (
        f"{int(mask.sum()):,} of {len(mask):,} items were held out of the fit; their error is the "
        "one to believe"
    )


def reconstruction_errors(
    tok: Tokenizer, measured: CataloguePass, held_out: Mask | None
) -> ReconstructionErrors:
    """Return errors of the whole code in the input space, and by level in the latent space."""
    groups: dict[str, Mask | slice] = {"all": slice(None)}
    spreads = {"all": measured.latent.spread_about(measured.latent)}
    if held_out is not None:
        # The training rows are all rows less the held-out ones, and so is their spread about the
        # common mean.
        held_out_spread = measured.held_out_latent.spread_about(measured.latent)
        groups |= {"training": ~held_out, "held_out": held_out}
        spreads |= {"training": spreads["all"] - held_out_spread, "held_out": held_out_spread}
    relative = measured.health.relative_errors

    def level_error(level: int, group: str) -> float | None:
        squared = float(measured.remaining[level][groups[group]].sum(dtype=np.float64))
        return squared / spreads[group] if spreads[group] > 0 else None

    return ReconstructionErrors(
        space="decoder(codes)",
        mse_per_element=float(measured.errors.mean(dtype=np.float64)) / tok.dim,
        normalized_squared_error=measured.normalized / measured.items,
        mean_cosine=measured.cosine / measured.items,
        relative_error=relative,
        per_level_kind="prefix" if tok.hierarchical else "alone",
        per_level=tuple(
            LevelErrors(level, {group: level_error(level, group) for group in relative})
            for level in range(tok.levels)
        ),
        variance=float(measured.health.inputs.variances.sum()),
        latent_variance=measured.latent.variance,
    )
