"""Beams by shared products against beams that search every level."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semid.quantization import beam, engine
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import encode_residual

SIZES = (70, 65, 130)


def drawn(seed: int = 0, *, mean: float = 0.0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows (700, 24) in clusters, and codebooks in which some codewords are equal or zero."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(40, 24))
    rows = centers[generator.integers(0, 40, 700)] + 0.4 * generator.normal(size=(700, 24)) + mean
    books = [rows[generator.permutation(700)[: SIZES[0]]]]
    books += [0.5**level * generator.normal(size=(SIZES[level], 24)) for level in (1, 2)]
    for book in books[1:]:
        book[7] = book[3]
        book[20:25] = 0.0
    return rows.astype(np.float32), [book.astype(np.float32) for book in books]


def searched(monkeypatch, x, books, width):
    """Encode without products."""
    with monkeypatch.context() as patch:
        patch.setattr(beam, "PRODUCT_BYTES", 0)
        return encoded(x, books, width)


def encoded(x, books, width, threads=1):
    ready = [index_codebook(torch.from_numpy(book)) for book in books]
    return encode_residual(x, ready, beam_width=width, threads=threads)


def assert_same(one, other):
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.residual_norms, other.residual_norms)


@pytest.fixture
def counted(monkeypatch):
    """Count the rows that went by products."""
    rows = []
    scanned = beam._scan_level

    def counting(x, *rest):
        rows.append(len(x))
        return scanned(x, *rest)

    monkeypatch.setattr(beam, "_scan_level", counting)
    return rows


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("width", [2, 5, 90])
def test_products_find_what_searches_find(monkeypatch, counted, width, mean):
    x, books = drawn(mean=mean)
    found = encoded(x, books, width)
    assert sum(counted) == 3 * 700
    assert_same(found, searched(monkeypatch, x, books, width))
    assert_same(found, encoded(x, books, width, threads=3))


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_scores_lie_within_their_bound(monkeypatch, mean):
    x, books = drawn(mean=mean)
    seen = []
    scan = engine.keys.scan_children

    def spying(base, halves, products, lines, offsets, margin, *rest):
        seen.append((base.copy(), halves, products, lines, margin))
        scan(base, halves, products, lines, offsets, margin, *rest)

    monkeypatch.setattr(engine.keys, "scan_children", spying)
    monkeypatch.setattr(beam, "SCAN_ROWS", 256)
    encoded(x, books, 6)
    assert len(seen) == 9  # three levels of three parts of the rows
    for at, (base, halves, products, lines, margin) in enumerate(seen):
        level, first = at % 3, 256 * (at // 3)
        scores = base[:, None] - halves[:, :, None]
        before = [0, len(books[0])]
        left = x[first : first + len(base), None]
        for earlier in range(level):
            scores -= products[lines[:, :, earlier]]
            left = left - books[earlier][lines[:, :, earlier] - before[earlier]]
        apart = left[:, :, None].astype(np.float64) - books[level]
        truth = -0.5 * np.square(apart).sum(axis=3)
        if level == 0:  # scores of the first level leave out what is the same for all codewords
            centered = left - books[0].mean(axis=0, dtype=np.float64).astype(np.float32)
            scores = scores - 0.5 * np.square(centered, dtype=np.float64).sum(axis=2)[:, :, None]
        off = np.abs(scores[:, :, : len(books[level])] - truth).max(axis=(1, 2))
        assert (off <= 0.5 * margin).all()


def test_rows_far_from_every_codeword_are_ranked_all_the_same(monkeypatch):
    x, books = drawn()
    x[::3] *= 1e4  # rounding alone decides, so that nothing can be left out by scores
    assert_same(encoded(x, books, 4), searched(monkeypatch, x, books, 4))


@pytest.mark.parametrize(
    ("power", "products"), [(-70, False), (-20, True), (20, True), (70, False)]
)
def test_a_scale_that_float32_cannot_square_is_searched(counted, power, products):
    x, books = drawn()
    scale = np.float32(2.0**power)
    found = encoded(x * scale, [book * scale for book in books], 4)
    assert bool(counted) == products
    if products:
        assert np.array_equal(found.codes, encoded(x, books, 4).codes)


def test_loose_products_are_neither_used_nor_kept(counted):
    x, books = drawn()
    plain = encoded(x, books, 4)
    counted.clear()
    ready = [index_codebook(torch.from_numpy(book)) for book in books]
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same(encode_residual(x, ready, beam_width=4, threads=1), plain)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not counted
    assert ready[-1].products is None


def test_autocast_changes_nothing(counted):
    x, books = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found = encoded(x, books, 4)
    assert counted
    assert_same(found, encoded(x, books, 4))


def test_few_rows_use_products_only_where_they_are_made(counted):
    x, books = drawn()
    ready = [index_codebook(torch.from_numpy(book)) for book in books]
    first = encode_residual(x[:9], ready, beam_width=4)
    assert not counted
    whole = encode_residual(x, ready, beam_width=4)
    again = encode_residual(x[:9], ready, beam_width=4)
    assert counted == [700, 700, 700, 9, 9, 9]
    assert_same(first, again)
    assert np.array_equal(whole.codes[:9], first.codes)
    other = [index_codebook(torch.from_numpy(2 * books[0])), *ready[1:]]  # the last is shared
    assert_same(encode_residual(x, other, beam_width=4), encoded(x, [2 * books[0], *books[1:]], 4))


def test_a_row_that_is_not_finite_spoils_no_other():
    x, books = drawn()
    broken = x.copy()
    broken[5, 2], broken[9, 0] = np.nan, np.inf
    found, clean = encoded(broken, books, 4), encoded(x, books, 4)
    rest = np.delete(np.arange(700), [5, 9])
    assert np.array_equal(found.codes[rest], clean.codes[rest])
