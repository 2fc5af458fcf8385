"""Measuring a catalogue: one pass for codes and errors, flips under noise, spectra of spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.codes import code_dtype
from semid.data.blocks import squared_norms
from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.diagnostics.flips import (
    FlipPoint,
    MarginPoint,
    flip_rates,
    margin_proxy,
)
from semid.diagnostics.overlap import LevelOverlap
from semid.diagnostics.pairs import Estimate, bootstrap, rank_agreement, row_groups
from semid.diagnostics.spaces import effective_rank, geometry
from semid.errors import EmbeddingError
from semid.health import LevelUsage, bucket_keys, row_hashes
from semid.progress import Progress
from semid.quantization.nearest import assign, index_codebook
from semid.quantization.residual import encode_residual
from semid.report.results import (
    Agreement,
    Curve,
    Flips,
    LevelErrors,
    NoiseResponse,
    ReconstructionErrors,
    SpaceGeometry,
    Spaces,
)
from semid.seeds import numpy_generator
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import mean_row
from semid.tokenizers.fit_report import HealthCounter
from semid.tokenizers.stored import HELD_OUT_SALT

FLIP_SCALES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Noise of the flip sweep, as multiples of the standard deviation of the space it is put on."""

MAX_RANKS = 256
"""Points of a curve of shares by rank."""

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int64]


class Moments:
    """Sums that give means and variances, less the first row so that large means cancel nothing."""

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

    def spread_about(self, other: Moments, columns: slice) -> float:
        """Sum of squared distances to the mean of ``other``, of the same shift, in some columns."""
        mean = (other.total / other.rows)[columns]
        squares, total = self.squares[columns].sum(), self.total[columns]
        return float(squares - 2.0 * (mean @ total) + self.rows * (mean @ mean))


@dataclass(frozen=True)
class CataloguePass:
    """The results of the pass."""

    codes: npt.NDArray[Any]  # ``(items, levels)``
    errors: Array  # ``(items,)`` float32 squared error ``|x - x_hat|^2`` of each item
    keys: npt.NDArray[np.uint64]  # ``(items,)`` uint64, equal exactly for equal ids
    hashes: npt.NDArray[np.uint64]  # ``(items,)`` uint64, equal for equal inputs
    health: HealthCounter  # usage, collisions and errors, as a fit counts them
    latent: Moments  # moments of the latent
    held_out_latent: Moments  # moments of the latent of held-out rows alone
    # ``(levels, items)`` float32: squared latent error after the first l + 1 levels (parallel
    # tokenizers: of codebook l alone, in the columns that it quantizes)
    remaining: Array
    normalized: float  # sum of squared errors between rows and reconstructions of unit length
    cosine: float  # sum of the cosines of rows with their reconstructions

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
    held_out: Mask | None = None,
) -> CataloguePass:
    """Read every row for the mean, then encode and decode every row once."""
    items = len(source)
    if items == 0:
        raise EmbeddingError("there are no rows to diagnose; give at least one")
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
        # The codes are decoded at once, while the block is in memory.
        decoded = tok.decode(block.codes)
        latent = tok.latent(block.x)
        codes[span] = block.codes
        hashes[span] = row_hashes(block.x)
        remaining[:, span] = _remaining_errors(tok, latent, block.codes)
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
        # The squared distance of two unit vectors is 2 - 2 cos.
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


def _cosines(x: Array, decoded: Array) -> Floats:
    """Return the cosine of each row with its reconstruction; 0 where one of them is zero."""
    products = np.einsum("nd,nd->n", x, decoded, dtype=np.float64)
    lengths = np.sqrt(squared_norms(x) * squared_norms(decoded))
    cosines: Floats = np.divide(products, lengths, out=np.zeros(len(x)), where=lengths > 0)
    return cosines


def _remaining_errors(tok: Tokenizer, latent: Array, codes: npt.NDArray[np.int64]) -> Floats:
    """Return the squared latent error after each level, or of each parallel codebook alone."""
    errors = np.empty((tok.levels, len(latent)))
    residual = latent
    for level, (codebook, part) in enumerate(zip(tok.codebooks, tok.latent_slices, strict=True)):
        if not tok.hierarchical:
            residual = latent[:, part]
        residual = residual - codebook[codes[:, level]]
        errors[level] = squared_norms(residual)
    return errors


def rank_frequency(usage: LevelUsage) -> Curve:
    """Return the shares of the codes, the most used first, at about `MAX_RANKS` ranks."""
    # Both ends are in the curve, and every rank of a curve with fewer.
    # Half of the points are even in rank and half in its logarithm: head and tail both show.
    shares = np.sort(usage.probabilities)[::-1]
    even = np.linspace(1, len(shares), MAX_RANKS)
    return _thinned(shares, np.append(even, np.geomspace(1, len(shares), MAX_RANKS // 2)))


def _thinned(shares: Floats, ranks: Floats) -> Curve:
    """Return shares, largest first, at some ranks counted from 1, or at all if these are few."""
    positions = np.arange(1, len(shares) + 1)
    if len(positions) > MAX_RANKS:
        positions = np.unique(ranks.round().astype(np.int64))
    return Curve(tuple(positions.tolist()), tuple(shares[positions - 1].tolist()))


def held_out_rows(tok: Tokenizer, source: EmbeddingSource) -> tuple[Mask | None, str]:
    """Return which rows ``(items,)`` the fit held out, None where that is unknown, and a note."""
    # Known where there are as many rows and held-out rows as the fit reports.
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
    tok: Tokenizer,
    measured: CataloguePass,
    held_out: Mask | None,
    *,
    seed: int,
    replicates: int,
) -> ReconstructionErrors:
    """Return errors of the whole code in the input space, and by level in the latent space."""
    groups: dict[str, Mask | slice] = {"all": slice(None)}
    if held_out is not None:
        groups |= {"training": ~held_out, "held_out": held_out}
    relative = measured.health.relative_errors
    slices = tok.latent_slices

    def spread(group: str, columns: slice) -> float:
        total = measured.latent.spread_about(measured.latent, columns)
        if group == "all":
            return total
        # The training rows are all rows less the held-out ones, and so is their spread about the
        # common mean.
        held_out_spread = measured.held_out_latent.spread_about(measured.latent, columns)
        return held_out_spread if group == "held_out" else total - held_out_spread

    def level_error(level: int, group: str) -> float | None:
        squared = float(measured.remaining[level][groups[group]].sum(dtype=np.float64))
        whole = spread(group, slices[level])
        return squared / whole if whole > 0 else None

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
        held_out=_held_out_error(measured, held_out, seed=seed, replicates=replicates),
    )


def _held_out_error(
    measured: CataloguePass, held_out: Mask | None, **bootstrap_options: int
) -> Estimate | None:
    """Return the relative error of the held-out rows with its interval over rows."""
    error = measured.health.relative_errors.get("held_out")
    if held_out is None or error is None:
        return None
    # What errors are relative to, the squared distance to the mean of all rows, is the same in all
    # draws.
    sums = row_groups(measured.errors[held_out])
    scale = error / sums.sum() if sums.any() else 0.0
    estimate = bootstrap(sums * scale, lambda totals: totals, **bootstrap_options)[0]
    return replace(estimate, value=error)


# Noise and spectra ----------------------------------------------------------------------------


def _encode(tok: Tokenizer, rows: Array) -> Codes:
    return np.concatenate([block.codes for block in tok.encode_blocks(open_embeddings(rows))])


def _latent_encoder(tok: Tokenizer, threads: int | None) -> Callable[[Array], Codes]:
    """Return a function that quantizes latent vectors with this tokenizer's codebooks."""
    codebooks = [index_codebook(codebook) for codebook in tok.codebooks]

    def encode(latents: Array) -> Codes:
        # Residual levels are searched together, parallel codebooks one by one in their columns.
        if tok.hierarchical:
            beam_width = tok.beam_width
            return encode_residual(latents, codebooks, beam_width=beam_width, threads=threads).codes
        labels = [
            assign(np.ascontiguousarray(latents[:, part]), codebook, threads=threads)[0]
            for codebook, part in zip(codebooks, tok.latent_slices, strict=True)
        ]
        return np.stack(labels, axis=1)

    return encode


def measure_flips(
    tok: Tokenizer,
    rows: Array,
    overlaps: tuple[LevelOverlap, ...],
    *,
    input_std: float,
    latent_std: float,
    seed: int,
    threads: int | None,
) -> tuple[Flips, list[str]]:
    """Measure flips of rows (n, dim) under noise on input and latent, with margins; and notes."""
    options: dict[str, Any] = {
        "hierarchical": tok.hierarchical,
        "slices": tok.latent_slices,
        "scales": FLIP_SCALES,
        "threads": threads,
    }
    notes = []
    latents = tok.latent(rows)
    latent_is_input = latents.shape == rows.shape and np.array_equal(latents, rows)
    on_input = NoiseResponse(
        flip_rates(
            rows,
            lambda block: _encode(tok, block),
            space="input",
            scales=FLIP_SCALES,
            unit=input_std,
            seed=seed,
        ),
        replace(
            margin_proxy(
                rows,
                tok.codebooks,
                # Where the latent is the input, noise on it is noise on the latent: isotropic.
                encode_latent=None if latent_is_input else tok.latent,
                unit=input_std,
                seed=seed,
                **options,
            ),
            space="input",
        ),
    )
    on_latent = None
    # Noise on the latent means something only if the codebooks alone quantize it: try without.
    encode = _latent_encoder(tok, threads)
    if latent_is_input:
        notes.append("The latent of this tokenizer is its input, so noise on either is the same")
    elif np.array_equal(encode(latents), _encode(tok, rows)):
        on_latent = NoiseResponse(
            flip_rates(
                latents, encode, space="latent", scales=FLIP_SCALES, unit=latent_std, seed=seed
            ),
            margin_proxy(latents, tok.codebooks, unit=latent_std, **options),
        )
    else:
        notes.append(
            "Flips under noise on the latent are left out: this tokenizer does not quantize its "
            "latent with its codebooks alone"
        )
    # One rank correlation over all scales and levels, of the noise nearest to the codebooks.
    agreement = agreement_with_proxies(
        [
            (flip, margin, overlaps)
            for response in [on_latent or on_input]
            for flip, margin in zip(response.flips.points, response.margins.points, strict=True)
        ]
    )
    return Flips(len(rows), latent_is_input, on_input, on_latent, agreement), notes


def agreement_with_proxies(
    points: Iterable[tuple[FlipPoint, MarginPoint, Sequence[LevelOverlap]]],
) -> Agreement:
    """Return the rank correlation of flips with R, geometry and margins, over all levels."""
    flips: list[float] = []
    proxies: dict[str, list[float]] = {"overlap": [], "geometry": [], "margins": []}
    for flip, margin, overlaps in points:
        for level in overlaps:
            point = level.at(flip.scale)
            flips.append(flip.code[level.level].value)
            proxies["overlap"].append(point.rate)
            proxies["geometry"].append(point.geometry)
            proxies["margins"].append(margin.code[level.level])
    return Agreement(**rank_agreement(flips, proxies))


def flipped_items(
    tok: Tokenizer, rows: Array, codes: npt.NDArray[Any], *, std: float, scale: float, seed: int
) -> Mask:
    """Return for each row (n, dim) whether its id changes under one draw of input noise."""
    draws = numpy_generator(seed, "report", "flips").standard_normal(rows.shape, np.float32)
    noisy = rows + np.float32(scale * std) * draws
    flipped: Mask = (_encode(tok, noisy) != codes).any(axis=1)
    return flipped


def measure_geometry(
    spaces: dict[str, Array], *, items: int, seed: int, replicates: int
) -> Spaces | None:
    """Measure the spectra of spaces (n, width); None where one has no spread."""
    measured: list[tuple[Array, SpaceGeometry]] = []
    for name, rows in spaces.items():
        if len(rows) < 2 or not (rows != rows[0]).any():
            return None
        # A latent that is the input is measured once.
        equal = next((space for other, space in measured if np.array_equal(other, rows)), None)
        if equal is None:
            space = geometry(rows, name=name, sample=None, seed=seed)
            shares = space.eigenvalues / space.eigenvalues.sum()
            spectrum = _thinned(shares, np.geomspace(1, len(shares), MAX_RANKS))
            equal = SpaceGeometry(**vars(space), spectrum=spectrum)
        measured.append((rows, replace(equal, name=name)))
    # Models are compared by the last space, that of the reconstructions.
    interval = effective_rank(rows, name=name, seed=seed, replicates=replicates)
    return Spaces(measured[0][1].rows, items, tuple(space for _, space in measured), interval)
