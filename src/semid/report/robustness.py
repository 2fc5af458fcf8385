"""Noise and shape: codes that flip, the margins that predict it, and the spectra of the spaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.data.embeddings import open_embeddings
from semid.diagnostics.flips import FlipRates, flip_rates, rank_agreement
from semid.diagnostics.geometry import Geometry, geometry
from semid.diagnostics.margins import MarginProxy, input_margin_proxy, margin_proxy
from semid.diagnostics.overlap import LevelOverlap
from semid.quantization.nearest import index_codebook, nearest
from semid.quantization.residual import encode_residual
from semid.seeds import numpy_generator
from semid.tokenizers.base import Tokenizer

__all__ = ["FLIP_SCALES", "flipped_items", "measure_flips", "measure_geometry"]

FLIP_SCALES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Noise of the flip sweep, as multiples of the standard deviation of the space it is put on."""

MOST_EIGENVALUES = 256

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


def _encode(tok: Tokenizer, rows: Array) -> Codes:
    return np.concatenate([block.codes for block in tok.encode_blocks(open_embeddings(rows))])


def _latent_encoder(tok: Tokenizer, threads: int | None) -> Callable[[Array], Codes]:
    """Return how this tokenizer's codebooks quantize latent vectors."""
    books = [index_codebook(torch.from_numpy(book)) for book in tok.codebooks]

    def encode(latents: Array) -> Codes:
        if tok.hierarchical:
            found = encode_residual(latents, books, beam_width=tok.beam_width, threads=threads)
            return found.codes
        rows = torch.from_numpy(latents)
        labels = [nearest(rows, book, threads=threads).labels.numpy() for book in books]
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
) -> tuple[dict[str, Any], list[str]]:
    """Measure flips under noise on the input and on the latent, with the margin proxies.

    Args:
        tok: a fitted tokenizer.
        rows: ``(n, dim)`` a random subset of the items.
        overlaps: of all items, to be set beside the flips.
        input_std: standard deviation of the input, root of the mean variance a dimension.
        latent_std: the same of the latent.
        seed: of the noise.
        threads: plain threads.

    Returns:
        JSON-able figures, and sentences for the reader.

    Cost: ``2 (1 + scales)`` encodings of the subset, and two searches for near codewords.
    """
    common: dict[str, Any] = {"scales": FLIP_SCALES, "threads": threads}
    shape: dict[str, Any] = {"hierarchical": tok.hierarchical, **common}
    measured: dict[str, tuple[FlipRates, MarginProxy]] = {}
    notes = []
    latents = tok.latent(rows)
    same = latents.shape == rows.shape and np.array_equal(latents, rows)
    measured["input"] = (
        flip_rates(
            rows,
            lambda block: _encode(tok, block),
            space="input",
            scales=FLIP_SCALES,
            unit=input_std,
            seed=seed,
        ),
        # Where the latent is the input, noise on it is noise on the latent: no covariance to find.
        replace(margin_proxy(rows, tok.codebooks, unit=input_std, **shape), space="input")
        if same
        else input_margin_proxy(
            rows, tok.latent, tok.codebooks, unit=input_std, seed=seed, **shape
        ),
    )
    encode = _latent_encoder(tok, threads)
    if same:
        notes.append("The latent of this tokenizer is its input, so noise on either is the same")
    elif np.array_equal(encode(latents), _encode(tok, rows)):
        measured["latent"] = (
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
    result: dict[str, Any] = {"items": len(rows), "latent_is_input": same}
    for space, (flips, margins) in measured.items():
        result[space] = {"flips": flips.to_dict(), "margins": margins.to_dict()}
    result["agreement"] = _agreement(measured.get("latent", measured["input"]), overlaps)
    return result, notes


def _agreement(
    measured: tuple[FlipRates, MarginProxy], overlaps: tuple[LevelOverlap, ...]
) -> dict[str, Any]:
    """Rank correlation of flips with R, its geometry and the margins, over levels and scales."""
    flips, margins = measured
    rows: dict[str, list[float]] = {"flips": [], "overlap": [], "geometry": [], "margins": []}
    for flip, margin in zip(flips.points, margins.points, strict=True):
        for level in overlaps:
            point = level.at(flip.scale)
            rows["flips"].append(flip.code[level.level].value)
            rows["overlap"].append(point.rate)
            rows["geometry"].append(point.geometry)
            rows["margins"].append(margin.code[level.level])
    agreement = rank_agreement(
        rows.pop("flips"), {name: np.asarray(values) for name, values in rows.items()}
    )
    return {name: value["all"] for name, value in agreement.items()}


def flipped_items(
    tok: Tokenizer, rows: Array, codes: npt.NDArray[Any], *, std: float, scale: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Say of each row whether its id changes under one draw of input noise.

    Args:
        tok: a fitted tokenizer.
        rows: ``(n, dim)``.
        codes: ``(n, levels)`` the ids without noise.
        std: standard deviation of the input.
        scale: noise as a multiple of it.
        seed: of the draw.
    """
    draws = numpy_generator(seed, "report", "flips").standard_normal(rows.shape, np.float32)
    flipped: npt.NDArray[np.bool_] = (
        _encode(tok, rows + np.float32(scale * std) * draws) != codes
    ).any(axis=1)
    return flipped


def measure_geometry(spaces: dict[str, Array], *, items: int, seed: int) -> dict[str, Any] | None:
    """Measure the spectra of the spaces on one random subset.

    Args:
        spaces: name -> ``(n, width)`` rows of the same items.
        items: items the subset was drawn from.
        seed: the subset's.

    Returns:
        JSON-able figures with thinned spectra; None where a space has no spread.
    """
    found: list[Geometry] = []
    seen: list[Array] = []
    for name, rows in spaces.items():
        if len(rows) < 2 or not (rows != rows[0]).any():
            return None
        twin = next((i for i, other in enumerate(seen) if np.array_equal(other, rows)), None)
        found.append(
            geometry(rows, name=name, sample=None, seed=seed)
            if twin is None
            else replace(found[twin], name=name)
        )
        seen.append(rows)
    return {
        "rows": found[0].rows,
        "items": items,
        "spaces": [{**space.to_dict(), "spectrum": _spectrum(space)} for space in found],
    }


def _spectrum(space: Geometry) -> dict[str, Any]:
    """Return each eigenvalue's share of the variance by rank, thinned."""
    shares = space.eigenvalues / space.eigenvalues.sum()
    ranks = np.arange(1, len(shares) + 1)
    if len(ranks) > MOST_EIGENVALUES:
        ranks = np.unique(np.geomspace(1, len(shares), MOST_EIGENVALUES).round().astype(int))
    return {"rank": ranks.tolist(), "share": [float(shares[rank - 1]) for rank in ranks]}
