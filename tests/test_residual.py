"""Residual quantization: levels, beams and decoding against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semid.quantization.blocks import ArrayBlocks, map_rows
from semid.quantization.kmeans import KMeansOptions, draw_sample
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import LevelFit, dequantize, encode_residual, fit_residual


@pytest.fixture(scope="module")
def books(clustered):
    return fit_residual(ArrayBlocks(clustered), [12, 9, 7], seed=0)[0]


def prepared(books):
    return [index_codebook(torch.from_numpy(book)) for book in books]


def brute_greedy(x, books):
    residual = x.copy()
    codes = []
    for book in books:
        distances = ((residual[:, None].astype(np.float64) - book[None]) ** 2).sum(2)
        codes.append(distances.argmin(1))
        residual = residual - book[codes[-1]]
    return np.stack(codes, 1), np.linalg.norm(residual, axis=1)


def test_greedy_equals_brute_force(clustered, books):
    found = encode_residual(clustered, prepared(books))
    codes, norms = brute_greedy(clustered, books)
    assert np.array_equal(found.codes, codes)
    np.testing.assert_allclose(found.residual_norms, norms, rtol=1e-5)


def test_a_full_beam_finds_the_best_of_all_codes(clustered, books):
    x = clustered[:60]
    every = np.stack(np.meshgrid(*[range(len(b)) for b in books], indexing="ij"), -1).reshape(-1, 3)
    words = dequantize(every, books).astype(np.float64)
    best = ((x[:, None].astype(np.float64) - words[None]) ** 2).sum(2).min(1)
    found = encode_residual(x, prepared(books), beam_width=12 * 9 * 7)
    np.testing.assert_allclose(found.residual_norms.astype(np.float64) ** 2, best, rtol=1e-3)


def test_a_beam_is_no_worse_than_greedy_on_the_whole(books):
    rows = np.random.default_rng(3).normal(size=(1200, 24)).astype(np.float32)
    norms = [
        encode_residual(rows, prepared(books), beam_width=w).residual_norms for w in (1, 2, 4, 8)
    ]
    errors = [float((each.astype(np.float64) ** 2).sum()) for each in norms]
    assert errors[0] > errors[1] >= errors[2] >= errors[3]


def brute_beam(x, books, width):
    codes, residual = np.empty((len(x), 1, 0), int), x[:, None]
    for book in books:
        apart = ((residual[:, :, None].astype(np.float64) - book) ** 2).sum(3)
        best = apart.reshape(len(x), -1).argsort(axis=1, kind="stable")[:, :width]
        parent, code = np.divmod(best, len(book))
        rows = np.arange(len(x))[:, None]
        codes = np.concatenate([codes[rows, parent], code[:, :, None]], axis=2)
        residual = residual[rows, parent] - book[code]
    return codes[:, 0]


@pytest.mark.parametrize("width", [2, 4, 10, 40])
def test_a_beam_equals_brute_force(books, width):
    x = np.random.default_rng(3).normal(size=(300, 24)).astype(np.float32)
    found = encode_residual(x, prepared(books), beam_width=width)
    assert np.array_equal(found.codes, brute_beam(x, books, width))


def test_beam_rows_are_independent(clustered, books):
    whole = encode_residual(clustered, prepared(books), beam_width=4)
    for row in (0, 7, 1199):
        single = encode_residual(clustered[row : row + 1], prepared(books), beam_width=4)
        assert np.array_equal(single.codes[0], whole.codes[row])


def test_dequantize_adds_levels(books):
    codes = np.array([[1, 2, 3], [0, 0, 0]])
    assert np.array_equal(dequantize(codes, books[:1]), books[0][[1, 0]])
    np.testing.assert_allclose(
        dequantize(codes, books)[0], books[0][1] + books[1][2] + books[2][3], rtol=1e-6
    )


def test_codebooks_do_not_depend_on_what_fits_in_memory(clustered, books):
    small = fit_residual(ArrayBlocks(clustered), [12, 9, 7], seed=0, memory_bytes=0)[0]
    view = map_rows(ArrayBlocks(clustered), lambda x: x, clustered.shape[1])
    streamed = fit_residual(view, [12, 9, 7], seed=0, memory_bytes=0)[0]
    for one, other, third in zip(books, small, streamed, strict=True):
        assert np.array_equal(one, other)
        assert np.array_equal(one, third)


def test_each_level_explains_more(clustered):
    fits = fit_residual(ArrayBlocks(clustered), [16] * 4, seed=0)[1]
    inertia = [fit.inertia for fit in fits]
    assert inertia == sorted(inertia, reverse=True)
    assert inertia[-1] < 0.5 * inertia[0]


def test_sampled_fit_is_refined_on_all_rows(clustered):
    def error(options):
        books = fit_residual(ArrayBlocks(clustered), [16, 16], seed=0, options=options)[0]
        return float((encode_residual(clustered, prepared(books)).residual_norms ** 2).sum())

    refined = error(KMeansOptions(sample_per_code=6))
    rough = error(KMeansOptions(sample_per_code=6, full_pass=False))
    assert error(KMeansOptions()) < refined < rough


def test_sampled_fit_is_that_of_the_sampled_rows_however_it_is_resumed(clustered):
    options = KMeansOptions(sample_per_code=20, full_pass=False)
    before = clustered.copy()
    blocks = ArrayBlocks(clustered)
    chosen = draw_sample(blocks, 16, seed=3, options=options)
    expected = fit_residual(ArrayBlocks(clustered[chosen]), [16] * 3, seed=3)[0]
    done = []

    def keep(level, result):
        fit = LevelFit(result.inertia, len(result.history), result.converged, result.distinct)
        done.append((result.centroids, result.labels, fit))

    books = fit_residual(blocks, [16] * 3, seed=3, options=options, on_level=keep)[0]
    resumed = fit_residual(blocks, [16] * 3, seed=3, options=options, done=done[:2])[0]
    for book, other, whole in zip(books, resumed, expected, strict=True):
        np.testing.assert_array_equal(book, whole)
        np.testing.assert_array_equal(other, whole)
    np.testing.assert_array_equal(clustered, before)


def test_residuals_are_the_same_by_kernel_and_in_any_pieces(monkeypatch):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 9)).astype(np.float32)
    books = [generator.normal(size=(17, 9)).astype(np.float32) for _ in range(3)]
    ready = [index_codebook(book) for book in books]
    whole = encode_residual(x, ready)
    monkeypatch.setattr("semid.quantization.blocks.FUSED_SIZE", 0)
    monkeypatch.setattr("semid.quantization.beam.ROWS", 7)
    monkeypatch.setattr("semid.quantization.beam.GREEDY_BYTES", 0)  # searches level by level
    pieces = encode_residual(x, ready, threads=3)
    assert np.array_equal(whole.codes, pieces.codes)
    assert np.array_equal(whole.residual_norms, pieces.residual_norms)
    plain = x - books[0][whole.codes[:, 0]] - books[1][whole.codes[:, 1]]
    norms = np.linalg.norm((plain - books[2][whole.codes[:, 2]]).astype(np.float64), axis=1)
    np.testing.assert_allclose(whole.residual_norms, norms, rtol=1e-6)
