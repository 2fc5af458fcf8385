"""Overlap, flips, margins, geometry and reconstruction against brute force and known answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.diagnostics.flips import flip_rates, margin_proxy
from semid.diagnostics.overlap import NOISE_SCALES, overlap, overlap_levels
from semid.diagnostics.pairs import proportion, rank_agreement, spearman
from semid.diagnostics.spaces import (
    geometry,
    latent_std,
    reconstruction,
    sample_rows,
)
from semid.errors import InputError, UsageError
from semid.health import usage, usage_from_counts


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def brute_overlap(codebook: np.ndarray, counts: np.ndarray, noise: float) -> float:
    c, p = codebook.astype(np.float64), counts / counts.sum()
    total = 0.0
    for i in range(len(c)):
        for j in range(len(c)):
            total += p[i] * p[j] * math.exp(-((c[i] - c[j]) ** 2).sum() / (4 * noise * noise))
    return total


def brute_encode(latents: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
    residual, found = latents.astype(np.float64), []
    for codebook in codebooks:
        labels = ((residual[:, None] - codebook[None]) ** 2).sum(2).argmin(1)
        found.append(labels)
        residual = residual - codebook[labels]
    return np.stack(found, axis=1)


# Overlap -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_overlap_is_the_double_sum(shift):
    codebook = rng().normal(size=(23, 5)).astype(np.float32) + np.float32(shift)
    codebook[7] = codebook[3]  # equal codewords overlap wholly
    codebook[9] = codebook[3] + np.float32(1e-3)
    counts = rng(1).integers(0, 9, 23)
    found = overlap(codebook, counts, latent_std=1.3, threads=1)
    assert [point.scale for point in found.points] == list(NOISE_SCALES)
    for point in found.points:
        assert point.rate == pytest.approx(brute_overlap(codebook, counts, point.noise), rel=1e-5)
        assert point.rate == point.collision_probability + point.geometry
        assert point.effective_size == 1 / point.rate
    assert found.active == np.count_nonzero(counts)
    json.dumps(found.to_dict())


def test_overlap_over_several_tiles_and_any_threads():
    codebook = rng().normal(size=(1300, 3)).astype(np.float32)
    counts = rng(1).integers(1, 9, 1300)
    one = overlap(codebook, counts, latent_std=1.0, scales=(0.05, 1.0), threads=1)
    two = overlap(torch.from_numpy(codebook), counts, latent_std=1.0, scales=(0.05, 1.0), threads=2)
    assert one == two
    c, p = codebook.astype(np.float64), counts / counts.sum()
    distances = ((c[:, None] - c[None]) ** 2).sum(2)
    for point in one.points:
        expected = p @ np.exp(-distances / (4 * point.noise**2)) @ p
        assert point.rate == pytest.approx(expected, rel=1e-6)


def test_uniform_well_separated_codebook_gives_k():
    found = overlap(1000.0 * np.eye(64), np.full(64, 5), latent_std=1.0)
    for point in found.points:
        assert point.effective_size == pytest.approx(64)
        assert point.geometry == 0.0
        assert point.usage_only
    assert found.geometry_scale is None


def test_collapsed_codebook_overlaps_wholly():
    found = overlap(np.ones((600, 8)), np.full(600, 2), latent_std=1.0, scales=(0.01,))
    assert found.points[0].rate == pytest.approx(1.0)
    assert found.points[0].effective_size == pytest.approx(1.0)
    assert found.geometry_scale == 0.01


def test_overlap_of_two_codewords_by_hand():
    found = overlap(np.array([[0.0], [2.0]]), [3, 1], latent_std=1.0, scales=(1.0,))
    point = found.at(1.0)
    assert point.collision_probability == pytest.approx(10 / 16)
    assert point.geometry == pytest.approx(6 / 16 * math.exp(-1))
    with pytest.raises(UsageError, match="not in the sweep"):
        found.at(0.5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6), st.floats(0.01, 3))
def test_order_of_the_capacities(seed, codes, dim, scale):
    codebook = rng(seed).normal(size=(codes, dim))
    counts = rng(seed + 1).integers(0, 20, codes)
    counts[0] += 1
    level = usage_from_counts(counts)
    point = overlap(codebook, level, latent_std=1.0, scales=(scale,), threads=1).points[0]
    slack = 1 + 1e-9
    assert point.effective_size * slack >= 1
    assert point.effective_size <= slack / point.collision_probability
    assert 1 / point.collision_probability <= level.perplexity * slack
    assert level.perplexity <= level.active <= codes


def test_overlap_levels_and_bad_input():
    codes = np.array([[0, 1], [1, 1], [2, 0]])
    books = [np.eye(3), np.eye(3)[:2]]
    levels = overlap_levels(books, usage(codes, [3, 2]), latent_std=0.5)
    assert [level.level for level in levels] == [0, 1]
    with pytest.raises(InputError, match="2 codebooks and 1"):
        overlap_levels(books, usage(codes[:, :1], [3]), latent_std=0.5)
    with pytest.raises(InputError, match="one non-negative count"):
        overlap(np.eye(3), [1, 2], latent_std=1.0)
    with pytest.raises(InputError, match="row 1 holds NaN"):
        overlap(np.array([[0.0], [np.nan]]), [1, 2], latent_std=1.0)
    with pytest.raises(UsageError, match="must be positive"):
        overlap(np.eye(3), [1, 1, 1], latent_std=1.0, scales=(0.0,))


def test_latent_std_is_the_root_mean_variance():
    x = rng().normal(size=(40_000, 3)).astype(np.float32) * [1, 2, 3] + 1000
    assert latent_std(x) == pytest.approx(math.sqrt(x.var(0).mean()), rel=1e-6)
    with pytest.raises(InputError, match="equal"):
        latent_std(np.ones((5, 2)))


# Flips ---------------------------------------------------------------------------------------


def make_levels(latent: int = 4, items: int = 6000) -> tuple[np.ndarray, list[np.ndarray]]:
    latents = rng().normal(size=(items, latent)).astype(np.float32)
    codebooks = [rng(1).normal(size=(12, latent)), 0.6 * rng(2).normal(size=(12, latent))]
    return latents, [c.astype(np.float32) for c in codebooks]


def test_flips_of_two_codewords_by_hand():
    x = np.full((40_000, 1), 0.5, np.float32)
    found = flip_rates(x, lambda rows: (rows > 1).astype(np.int64), space="latent", unit=1.0)
    for point in found.points:
        expected = 0.5 * math.erfc(0.5 / point.noise / math.sqrt(2))
        assert point.code[0].low - 0.01 <= expected <= point.code[0].high + 0.01
        assert point.code == point.prefix


def test_flips_count_codes_and_prefixes():
    latents, codebooks = make_levels()
    found = flip_rates(
        latents,
        lambda rows: torch.from_numpy(brute_encode(rows, codebooks)),
        space="latent",
        scales=(0.0, 0.1),
    )
    still, noisy = found.points
    assert all(level.value == 0 and level.low == 0 < level.high for level in still.code)
    assert noisy.prefix[0] == noisy.code[0]
    assert max(noisy.code[0].value, noisy.code[1].value) <= noisy.prefix[1].value
    assert noisy.prefix[1].value <= noisy.code[0].value + noisy.code[1].value
    again = flip_rates(
        latents,
        lambda rows: brute_encode(rows, codebooks),
        space="latent",
        scales=(0.1,),
    )
    assert again.points[0] == noisy  # the same draws at every scale and in every call
    json.dumps(found.to_dict())


def test_wilson_interval():
    found = proportion(8, 10)
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert proportion(0, 5).low == 0
    assert proportion(5, 5).high == 1
    with pytest.raises(UsageError):
        proportion(6, 5)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_margin_proxy_is_its_formula(hierarchical):
    latents, codebooks = make_levels(items=50)
    found = margin_proxy(
        latents, codebooks, scales=(0.2,), unit=1.0, neighbors=3, hierarchical=hierarchical
    )
    expected, prefix, residual = np.zeros(2), np.zeros(2), latents.astype(np.float64)
    stays = np.ones(50)
    for level, codebook in enumerate(codebooks):
        chosen = []
        for i, row in enumerate(residual):
            near = np.argsort(((row - codebook) ** 2).sum(1))[:4]
            stay = 1.0
            for j in near[1:]:
                first, other = codebook[near[0]].astype(float), codebook[j].astype(float)
                direction = (other - first) / np.linalg.norm(other - first)
                distance = ((first + other) / 2 - row) @ direction
                stay *= 1 - 0.5 * math.erfc(distance / 0.2 / math.sqrt(2))
            stays[i] *= stay
            expected[level] += (1 - stay) / 50
            chosen.append(near[0])
        prefix[level] = (1 - stays).mean()
        if hierarchical:
            residual = residual - codebook[chosen]
    assert found.points[0].code == pytest.approx(tuple(expected), rel=1e-4)
    assert found.points[0].prefix == pytest.approx(tuple(prefix), rel=1e-4)


def test_margin_proxy_follows_simulated_flips():
    latents, codebooks = make_levels()
    scales = (0.05, 0.1, 0.2)
    margins = margin_proxy(latents, codebooks, scales=scales)
    flips = flip_rates(
        latents, lambda rows: brute_encode(rows, codebooks), space="latent", scales=scales
    )
    for margin, flip in zip(margins.points, flips.points, strict=True):
        assert margin.code[0] == pytest.approx(flip.code[0].value, abs=0.04)
        assert margin.prefix[1] == pytest.approx(flip.prefix[1].value, abs=0.1)
    measured = [level.value for point in flips.points for level in point.prefix]
    proxy = [value for point in margins.points for value in point.prefix]
    assert rank_agreement(measured, {"margin": proxy})["margin"] > 0.9


def test_padding_the_latent_changes_nothing_under_input_noise():
    latents, codebooks = make_levels(items=3000)
    inputs = latents @ rng(5).normal(size=(4, 7)).astype(np.float32)
    back = np.linalg.pinv(inputs) @ latents
    padded_books = [np.pad(c, ((0, 0), (0, 28))) for c in codebooks]

    def encode_latent(rows, width=0):
        return np.pad((rows @ back).astype(np.float32), ((0, 0), (0, width)))

    def encode(rows, width=0):
        books = padded_books if width else codebooks
        return brute_encode(encode_latent(rows, width), books)

    plain = flip_rates(inputs, encode, space="input", scales=(0.1,))
    padded = flip_rates(inputs, lambda r: encode(r, 28), space="input", scales=(0.1,))
    assert plain == padded
    for bad in (lambda r: r[:, 0], lambda r: r[1:]):
        with pytest.raises(InputError, match="encode_latent returned shape"):
            margin_proxy(inputs, codebooks, encode_latent=bad, scales=(0.1,))
    a = margin_proxy(inputs, codebooks, encode_latent=encode_latent, scales=(0.1,))
    b = margin_proxy(
        inputs, padded_books, encode_latent=lambda r: encode_latent(r, 28), scales=(0.1,)
    )
    assert a.points[0].code == pytest.approx(b.points[0].code, rel=1e-3)
    assert a.points[0].code[0] == pytest.approx(plain.points[0].code[0].value, abs=0.03)
    assert a.unit == plain.unit  # while latent noise, scaled by the latent, does change
    wide = margin_proxy(encode_latent(inputs, 28), padded_books, scales=(0.1,))
    narrow = margin_proxy(encode_latent(inputs), codebooks, scales=(0.1,))
    assert wide.points[0].code[0] < 0.8 * narrow.points[0].code[0]


def test_input_noise_is_measured_over_all_blocks(monkeypatch):
    """Rows that the encoder stretches come last: the first block alone would miss their noise."""
    latents, codebooks = make_levels(items=1200)

    def encode_latent(rows):
        return (rows[:, :4] * np.where(rows[:, 4:] > 0, 3, 0.1)).astype(np.float32)

    inputs = np.column_stack([latents, np.repeat([-9, 9], 600)]).astype(np.float32)
    whole = margin_proxy(inputs, codebooks, encode_latent=encode_latent, scales=(0.1,), unit=1.0)
    blocks = [slice(start, start + 200) for start in range(0, 1200, 200)]
    monkeypatch.setattr("semid.diagnostics.flips.row_blocks", lambda *_: iter(blocks))
    parts = margin_proxy(inputs, codebooks, encode_latent=encode_latent, scales=(0.1,), unit=1.0)
    assert parts.points[0].code == pytest.approx(whole.points[0].code, rel=0.1)


def test_margins_of_lone_and_equal_codewords():
    x = rng().normal(size=(20, 2)).astype(np.float32)
    found = margin_proxy(x, [np.zeros((1, 2)), np.ones((3, 2))], scales=(0.1, 3.0))
    assert all(point.code == (0.0, 0.0) for point in found.points)
    with pytest.raises(InputError, match="3 wide"):
        margin_proxy(x, [np.zeros((2, 3))])
    with pytest.raises(UsageError, match="positive"):
        margin_proxy(x, [np.zeros((2, 2))], scales=(0.0,))


def test_spearman_with_ties():
    assert spearman([1, 2, 3], [10, 20, 30]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 1, 1], [3, 2, 1]) is None
    a, b = rng().integers(0, 5, 50), rng(1).integers(0, 5, 50)

    def ranks(v):
        return [np.mean([(v < x).sum() + 1, (v <= x).sum()]) for x in v]

    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    found = rank_agreement([1, 2, 2, 1], {"r": [3, 4, 1, 2], "s": [1, 3, 3, 1]})
    assert found == {"r": 0, "s": 1}
    with pytest.raises(InputError, match="one value per row"):
        rank_agreement([1, 2], {"r": [1]})


# Geometry ------------------------------------------------------------------------------------


def test_geometry_is_its_formulas():
    x = rng().normal(size=(500, 6)) @ rng(1).normal(size=(6, 6)) + 3
    found = geometry(x, name="input", sample=None)
    x = x.astype(np.float32).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    q = values / values.sum()
    assert found.participation_ratio == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert found.effective_rank == pytest.approx(np.exp(-(q * np.log(q)).sum()))
    assert found.top_share == pytest.approx(q.max())
    cosine = [
        abs(x[:, i] @ x[:, j]) / np.linalg.norm(x[:, i]) / np.linalg.norm(x[:, j])
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert found.mean_abs_cosine == pytest.approx(np.mean(cosine))
    correlation = np.abs(np.corrcoef(x.T))[~np.eye(6, dtype=bool)]
    assert found.mean_abs_cosine_centered == pytest.approx(correlation.mean())
    assert (found.rows, found.items, found.dim) == (500, 500, 6)
    assert len(found.to_dict(arrays=True)["eigenvalues"]) == 6


def test_geometry_of_known_spaces():
    isotropic = geometry(np.concatenate([np.eye(8), -np.eye(8)]), name="cross")
    assert isotropic.participation_ratio == pytest.approx(8)
    assert isotropic.effective_rank == pytest.approx(8)
    assert isotropic.mean_abs_cosine == pytest.approx(0)
    line = geometry(np.outer(np.arange(9), [1, 2, 0]), name="line")
    assert line.participation_ratio == pytest.approx(1)
    assert (line.zero_columns, line.constant_columns) == (1, 1)
    assert line.mean_abs_cosine == pytest.approx(1)
    wide = geometry(rng().normal(size=(5, 40)) + 9, name="fewer rows than columns")
    assert wide.eigenvalues.min() == 0.0
    assert geometry(np.arange(5)[:, None], name="one").mean_abs_cosine is None
    with pytest.raises(InputError, match="all 4 rows are equal"):
        geometry(np.full((4, 2), 0.3), name="flat")


def test_geometry_sample_is_seeded_and_stated():
    x = rng().normal(size=(1000, 3))
    found = geometry(x, name="input", sample=200, seed=4)
    assert (found.rows, found.items) == (200, 1000)
    assert found == geometry(x, name="input", sample=200, seed=4)
    rows = sample_rows(1000, 200, seed=4)
    assert found == geometry(x, name="input", sample=200, seed=4)
    assert len(np.unique(rows)) == 200
    same = geometry(x[rows], name="input", sample=None)
    assert same.participation_ratio == pytest.approx(found.participation_ratio)
    with pytest.raises(UsageError, match="at least 1"):
        sample_rows(5, 0)


# Reconstruction ------------------------------------------------------------------------------


def test_reconstruction_is_its_formulas_in_any_blocks():
    x = (rng().normal(size=(700, 5)) + 4).astype(np.float32)
    y = (x + 0.3 * rng(1).normal(size=x.shape)).astype(np.float32)
    x[3] = 0
    found = reconstruction(x, y, name="decoder(codes)")
    a, b = x.astype(np.float64), y.astype(np.float64)
    assert found.mse == pytest.approx(((a - b) ** 2).mean())
    assert found.relative_error == pytest.approx(
        ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    )
    keep = np.arange(700) != 3
    cosine = ((a * b).sum(1)[keep] / np.linalg.norm(a[keep], axis=1)) / np.linalg.norm(
        b[keep], axis=1
    )
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-6)
    assert found.normalized_error == pytest.approx(2 * (1 - cosine.mean()), rel=1e-4)
    assert found.zero_rows == 1
    # 40,000 rows are several blocks, whose means and spreads are pooled.
    many, others = np.tile(x, (60, 1)), np.tile(y, (60, 1))
    pooled = reconstruction(many, torch.from_numpy(others), name="decoder(codes)")
    assert pooled.relative_error == pytest.approx(found.relative_error)
    assert pooled.mse == pytest.approx(found.mse)


def test_the_papers_reconstruction_identity():
    angle = math.acos(0.999784)
    x = np.tile([[1.0, 0.0]], (50, 1))
    y = np.tile([[math.cos(angle), math.sin(angle)]], (50, 1)) * 7
    found = reconstruction(x, y, name="decoder(z)")
    assert found.normalized_error == pytest.approx(0.000432, abs=5e-7)
    assert found.relative_error is None  # all rows are equal: there is no variance to explain


def test_reconstructions_of_another_shape_are_refused():
    latents, _ = make_levels(items=40)
    with pytest.raises(InputError, match="give the same"):
        reconstruction(latents, latents[:, :2], name="x")


def test_the_ends_of_ranges_are_allowed():
    assert (proportion(0, 1).value, proportion(1, 1).value) == (0.0, 1.0)
    assert (proportion(0, 1).low, proportion(1, 1).high) == (0.0, 1.0)
    for bad in ((-1, 1), (2, 1), (0, 0)):
        with pytest.raises(UsageError, match="trials >= 1"):
            proportion(*bad)
    for confidence in (0.0, 1.0):
        with pytest.raises(UsageError, match="confidence"):
            proportion(1, 2, confidence=confidence)
    assert sample_rows(5, 5).tolist() == sample_rows(5, None).tolist() == [0, 1, 2, 3, 4]
    assert len(sample_rows(5, 1)) == 1
    with pytest.raises(UsageError, match="at least 1"):
        sample_rows(5, 0)
    latents, codebooks = make_levels(items=50)
    assert margin_proxy(latents, codebooks, scales=(0.1,), neighbors=1).points
    with pytest.raises(UsageError, match="neighbors"):
        margin_proxy(latents, codebooks, neighbors=0)
