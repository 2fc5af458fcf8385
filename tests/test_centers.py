"""The kernels of the seeding equal float64 sums written down plainly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from semid.quantization import engine, seeding
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.engine.centers import add_gains, lower_distances, pack_centers
from semid.quantization.sharding import as_sharded

Array = npt.NDArray[np.float32]
SIZES = [(1, 1, 1), (5, 16, 17), (97, 33, 40), (193, 256, 6)]


def problem(rows: int, dim: int, centers: int) -> tuple[Array, Array, npt.NDArray[np.float64]]:
    """Return rows, centers of which one is a row, and the squared distances of all pairs."""
    rng = np.random.default_rng(rows)
    y = (rng.normal(size=(rows, dim)) / dim**0.5).astype(np.float32)
    c = (rng.normal(size=(centers, dim)) / dim**0.5).astype(np.float32)
    c[-1] = y[-1]
    apart = y.astype(np.float64)[:, None] - c.astype(np.float64)
    return y, c, (apart**2).sum(axis=2)


def squares(rows: Array) -> Array:
    return np.einsum("nd,nd->n", rows, rows)


@pytest.mark.parametrize(("rows", "dim", "centers"), SIZES)
def test_distances_are_lowered_to_the_nearest_center(rows: int, dim: int, centers: int) -> None:
    y, c, distances = problem(rows, dim, centers)
    before = np.linspace(0.3, 3, rows, dtype=np.float32)
    closest = before.copy()
    lower_distances(y, squares(y), *pack_centers(c, squares(c) / 2), closest)
    np.testing.assert_allclose(closest, np.minimum(before, distances.min(axis=1)), atol=3e-6)
    assert (closest > 0).all()


@pytest.mark.parametrize(("rows", "dim", "centers"), SIZES)
def test_gains_equal_plain_sums(rows: int, dim: int, centers: int) -> None:
    y, c, distances = problem(rows, dim, centers)
    rng = np.random.default_rng(0)
    closest = rng.uniform(0, 2, rows).astype(np.float32)
    mass = rng.integers(0, 3, rows).astype(np.float32)
    panels, norms = pack_centers(c, squares(c))
    total = np.zeros(len(norms), np.float32)
    add_gains(y, closest - squares(y), mass, panels, norms, total)
    exact = (mass[:, None] * np.maximum(closest[:, None] - distances, 0)).sum(axis=0)
    # Products keep 8 bits.
    room = 2.0**-7 * (mass[:, None] * np.abs(y.astype(np.float64) @ c.T)).sum(axis=0) + 1e-5
    assert (np.abs(total[:centers] - exact) <= room).all()
    assert (total[centers:] == 0).all()


def test_gains_are_those_of_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = as_sharded(ArrayBlocks(rng.normal(size=(1500, 24)).astype(np.float32)), threads=1)
    places = np.arange(0, 1500, 75)
    found = []
    for has in (True, False):
        monkeypatch.setattr(engine.search, "has_bfloat16", lambda has=has: has)
        sample = seeding._Sample(rows, 8, np.random.default_rng(0), 1)
        sample.add_centers(places[:4])
        found.append(sample.gains(places[4:]))
    # Sums in another order: a product near a tie may be rounded the other way.
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_mass_of_copies_is_that_of_the_first() -> None:
    rows = np.array([[1, 0], [2, 0], [1, 0], [3, 0], [2, -0.0], [1, 0]], np.float32)
    mass = np.array([1.0, 2, 4, 8, 16, 32])
    np.testing.assert_array_equal(seeding._merge_copies(rows, mass), [37, 18, 0, 8, 0, 0])
    np.testing.assert_array_equal(mass, [1, 2, 4, 8, 16, 32])
