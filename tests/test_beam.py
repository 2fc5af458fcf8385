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
        patch.setattr(beam, "GREEDY_BYTES", 0)
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
    search = engine.levels.search_levels

    def counting(x, *rest, **options):
        rows.append(len(x))
        return search(x, *rest, **options)

    monkeypatch.setattr(engine.levels, "search_levels", counting)
    return rows


def routes(levels):
    """Every route of this machine that multiplies levels."""
    return [
        route
        for route in engine.search.working_routes()
        if route.name == "fp32" or route in engine.levels._routes(levels.dim)
    ]


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("width", [1, 2, 5, 90])
def test_products_find_what_searches_find(monkeypatch, counted, width, mean):
    x, books = drawn(mean=mean)
    if width == 1:
        books = [np.unique(book, axis=0) for book in books]  # see the test of repeated codewords
    found = encoded(x, books, width)
    assert counted == [700]
    assert_same(found, searched(monkeypatch, x, books, width))
    assert_same(found, encoded(x, books, width, threads=3))


@pytest.mark.parametrize("width", [1, 5])
def test_every_route_finds_what_searches_find(monkeypatch, width):
    x, books = drawn(mean=3.0)
    books = [np.unique(book, axis=0) for book in books]
    expected = searched(monkeypatch, x, books, width)
    for route in routes(levels := engine.levels.index_levels(books)):
        levels.route = route
        found = engine.levels.search_levels(x, levels, [width, width, 1])
        assert np.array_equal(found.codes[:, 0], expected.codes), route.name
        assert np.array_equal(found.lengths, expected.residual_norms), route.name


@pytest.mark.parametrize("kept", [1, 6])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_scores_lie_within_their_bound(monkeypatch, mean, kept):
    x, books = drawn(mean=mean)
    seen = []
    monkeypatch.setattr(engine.levels, "extend_rows", lambda *given: seen.append(given[2:10]))
    levels = engine.levels.index_levels(books)
    lines = np.cumsum([0, *map(len, books)])
    codes = np.random.default_rng(1).integers(0, 65, size=(700, 3))
    wide = x.astype(np.float64) - levels.center[:24]
    for route in routes(levels):
        seen.clear()
        engine.levels._search(x, levels, route, [kept, kept, 1], 1)
        rounded, _, _, base, units, shift, margins, half = seen[0]
        assert len(half) == 700
        assert (half >= 0).all()
        off = np.zeros((700, 1))
        for level, (columns, size, _, column, start) in enumerate(levels.shape.tolist()):
            scaled = levels.scaled[column : column + columns]
            if route.name == "fp32":
                products = base[:, column : column + columns]
            else:
                entries, _, _ = route.round_entries(scaled, float(levels.reach[level]))
                whole = rounded[:, : entries.shape[1]].astype(np.int64) @ entries.T.astype(np.int64)
                products = (whole - shift[:, None]).astype(np.float32) * units[level][:, None]
                products = products[:700]
            table = levels.products[start:].reshape(-1)
            at = codes[:, :level] + lines[:level] if level else np.zeros((700, 1), np.int64)
            for place in at.T:
                products = products - table[place[:, None] * columns + np.arange(columns)]
            # What the score of every child is off, on its own and together with its parents'.
            before = x.astype(np.float64)
            for earlier in range(level):
                before = before - books[earlier][codes[:, earlier]]
            gain = np.square(before).sum(1)[:, None] - np.square(
                before[:, None] - books[level].astype(np.float64)
            ).sum(2)
            if level == 0:  # rows and the first codebook are centered
                gain = np.square(wide).sum(1)[:, None] - np.square(
                    x[:, None].astype(np.float64) - books[0]
                ).sum(2)
            error = products[:, :size] - 0.5 * gain * 4.0**-levels.exponent + off
            assert (np.abs(error) <= 0.5 * margins[level, :700, None]).all(), (route.name, level)
            if kept > 1:
                off = np.take_along_axis(error, codes[:, level : level + 1], axis=1)


@pytest.mark.parametrize("side", ["rows", "codewords"])
def test_rounding_that_turns_the_order_of_scores_is_found(side):
    """Rounding errors that all point at the farther codeword, by nearly half a step."""
    signs = np.tile([1.0, -1.0], 8)
    for route in engine.levels._routes(16):
        # The longest row or codeword and its largest element are 1: they set the step.
        step, longest = 1.0 / getattr(route, "limit", 2.0**14), np.eye(16)[0]
        # Rounded it is nearer to `signs`: 7 of 16 steps along them.
        close = step * (signs * (np.arange(16) < 7) - 0.49 * signs)
        if side == "rows":
            x, books = np.stack([longest, close]), [np.stack([signs, -signs]) / 4, 1e-3 * signs]
        else:
            x, books = signs[None] / 4, [0 * signs, np.stack([close, -close, -longest])]
        x, *books = (np.atleast_2d(each).astype(np.float32) for each in (x, *books))
        levels = engine.levels.index_levels(books)
        levels.route = route
        found = engine.levels.search_levels(x, levels, [1, 1]).codes[-1, 0]
        deciding = books[0] if side == "rows" else books[1]
        exact = np.square(x[-1].astype(np.float64) - deciding).sum(1)
        assert exact[1] < exact[0]
        assert found[int(side == "codewords")] == 1, route.name


def test_rows_between_codewords_take_the_nearest(monkeypatch):
    """Midpoints of two codewords at any level, give or take a rounding."""
    generator = np.random.default_rng(4)
    _, books = drawn(mean=5.0)
    pairs = [generator.integers(0, len(book), size=(2, 700)) for book in books]
    x = books[0][pairs[0][0]] + books[1][pairs[1][0]] + books[2][pairs[2][0]]
    for level in range(3):
        part = slice(level, None, 3)
        first, second = (books[level][place[part]] for place in pairs[level])
        x[part] += (second - first) / 2
    x *= 1 + 1e-7 * generator.normal(size=x.shape).astype(np.float32)
    for width in (1, 3):
        ready = books if width > 1 else [np.unique(book, axis=0) for book in books]
        assert_same(encoded(x, ready, width), searched(monkeypatch, x, ready, width))


def test_repeated_codewords_are_searched_without_products(monkeypatch, counted):
    x, books = drawn()
    found = encoded(x, books, 1)
    assert not counted
    assert_same(found, searched(monkeypatch, x, books, 1))
    assert not np.isin(found.codes[:, 1], [7, 21, 22, 23, 24]).any()  # the first copy wins


def test_equal_rows_and_codewords(monkeypatch):
    x, books = drawn()
    x[:] = x[0]  # constant rows: one tile of equal lengths
    x[400:] = 0.0
    books[2][:] = books[2][0]  # a collapsed level: all children of a partial code are equal
    for width in (2, 70, 300):
        assert_same(encoded(x, books, width), searched(monkeypatch, x, books, width))


def test_rows_far_from_every_codeword_are_ranked_all_the_same(monkeypatch):
    x, books = drawn()
    x[::3] *= 1e4  # rounding alone decides, so that nothing can be left out by scores
    assert_same(encoded(x, books, 4), searched(monkeypatch, x, books, 4))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("power", [-70, -20, 20, 70])
def test_the_scale_changes_no_code(monkeypatch, counted, power, width):
    x, books = drawn()
    books = [np.unique(book, axis=0) for book in books]
    scale = np.float32(2.0**power)
    found = encoded(x * scale, [book * scale for book in books], width)
    # Several partial codes compare in float32, which has to hold squares.
    assert bool(counted) == (width == 1 or abs(power) == 20)
    if counted:
        assert np.array_equal(found.codes, encoded(x, books, width).codes)
    scaled = [book * scale for book in books]
    assert_same(found, searched(monkeypatch, x * scale, scaled, width))


def test_a_row_whose_square_leaves_float32_is_measured(monkeypatch):
    x, books = drawn()
    x[3] *= np.float32(1e25)
    for width in (1, 4):
        ready = books if width > 1 else [np.unique(book, axis=0) for book in books]
        assert_same(encoded(x, ready, width), searched(monkeypatch, x, ready, width))


def test_loose_products_change_nothing(monkeypatch):
    x, books = drawn()
    plain = encoded(x, books, 4)
    levels = engine.levels.index_levels(books)
    levels.route = next(each for each in engine.search.working_routes() if each.name == "fp32")

    def refuse():  # as torch does once one library has a setting of its own
        raise RuntimeError("a mix of the legacy and new settings")

    for told in (lambda: "medium", refuse):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", told)
        found = engine.levels.search_levels(x, levels, [4, 4, 1])
        assert np.array_equal(found.codes[:, 0], plain.codes)


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
    assert counted == [700, 9]
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
