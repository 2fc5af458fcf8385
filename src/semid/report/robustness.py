"""Codes that change under noise, the margins that predict it, and the spectra of the spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.data.embeddings import open_embeddings
from semid.diagnostics.flips import (
    FlipPoint,
    MarginPoint,
    flip_rates,
    input_margin_proxy,
    margin_proxy,
)
from semid.diagnostics.overlap import LevelOverlap
from semid.diagnostics.pairs import rank_agreement
from semid.diagnostics.spaces import Geometry, geometry
from semid.quantization.nearest import index_codebook, nearest
from semid.quantization.residual import encode_residual
from semid.report.results import (
    Agreement,
    Curve,
    Flips,
    NoiseResponse,
    SpaceGeometry,
    Spaces,
)
from semid.seeds import numpy_generator
from semid.tokenizers.base import Tokenizer

FLIP_SCALES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Noise of the flip sweep, as multiples of the standard deviation of the space it is put on."""

MAX_EIGENVALUES = 256

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


def _encode(tok: Tokenizer, rows: Array) -> Codes:
    return np.concatenate([block.codes for block in tok.encode_blocks(open_embeddings(rows))])


def _latent_encoder(tok: Tokenizer, threads: int | None) -> Callable[[Array], Codes]:
    """Return a function that quantizes latent vectors with this tokenizer's codebooks."""
    codebooks = [index_codebook(torch.from_numpy(codebook)) for codebook in tok.codebooks]

    def encode(latents: Array) -> Codes:
        if tok.hierarchical:
            beam_width = tok.beam_width
            return encode_residual(latents, codebooks, beam_width=beam_width, threads=threads).codes
        rows = torch.from_numpy(latents)
        labels = [nearest(rows, each, threads=threads).labels.numpy() for each in codebooks]
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
    """Measure flips under noise on the input and on the latent, with the margin proxies.

    Returns the flips, and notes.

    Cost: ``2 (1 + scales)`` encodings of the subset, and two searches for near codewords.

    Shapes: ``rows`` (n, dim).
    """
    common: dict[str, Any] = {"scales": FLIP_SCALES, "threads": threads}
    shape: dict[str, Any] = {"hierarchical": tok.hierarchical, **common}
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
        # Where the latent is the input, noise on it is noise on the latent: isotropic.
        replace(margin_proxy(rows, tok.codebooks, unit=input_std, **shape), space="input")
        if latent_is_input
        else input_margin_proxy(
            rows, tok.latent, tok.codebooks, unit=input_std, seed=seed, **shape
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
            margin_proxy(latents, tok.codebooks, unit=latent_std, **shape),
        )
    else:
        notes.append(
            "Flips under noise on the latent are left out: this tokenizer does not quantize its "
            "latent with its codebooks alone"
        )
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
    agreement = {name: value["all"] for name, value in rank_agreement(flips, proxies).items()}
    return Agreement(**agreement)


def flipped_items(
    tok: Tokenizer, rows: Array, codes: npt.NDArray[Any], *, std: float, scale: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Return for each row whether its id changes under one draw of input noise.

    Shapes: ``rows`` (n, dim), ``codes`` (n, levels).
    """
    draws = numpy_generator(seed, "report", "flips").standard_normal(rows.shape, np.float32)
    flipped: npt.NDArray[np.bool_] = (
        _encode(tok, rows + np.float32(scale * std) * draws) != codes
    ).any(axis=1)
    return flipped


def measure_geometry(spaces: dict[str, Array], *, items: int, seed: int) -> Spaces | None:
    """Measure the spectra of the spaces on one random subset.

    Returns geometry with thinned out spectra; None where a space has no spread.

    Shapes: ``spaces`` (n, width).
    """
    measured: list[tuple[Array, SpaceGeometry]] = []
    for name, rows in spaces.items():
        if len(rows) < 2 or not (rows != rows[0]).any():
            return None
        # A latent that is the input is measured once.
        equal = next((space for other, space in measured if np.array_equal(other, rows)), None)
        if equal is None:
            space = geometry(rows, name=name, sample=None, seed=seed)
            equal = SpaceGeometry(**vars(space), spectrum=_spectrum(space))
        measured.append((rows, replace(equal, name=name)))
    return Spaces(measured[0][1].rows, items, tuple(space for _, space in measured))


def _spectrum(space: Geometry) -> Curve:
    """Return each eigenvalue's share of the variance by rank, thinned out."""
    shares = space.eigenvalues / space.eigenvalues.sum()
    ranks = np.arange(1, len(shares) + 1)
    if len(ranks) > MAX_EIGENVALUES:
        ranks = np.unique(np.geomspace(1, len(shares), MAX_EIGENVALUES).round().astype(int))
    return Curve(tuple(ranks.tolist()), tuple(shares[ranks - 1].tolist()))
