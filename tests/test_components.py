"""Leading principal components against a decomposition of the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest

from semid.quantization.blocks import ArrayBlocks
from semid.quantization.least_squares import leading_components


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Rows (9000, 12) of known spread, far from the origin."""
    generator = np.random.default_rng(5)
    turn = np.linalg.qr(generator.normal(size=(12, 12)))[0]
    spread = 2.0 ** -np.arange(12)
    return (generator.normal(size=(9000, 12)) * spread @ turn + 3.0).astype(np.float32)


@pytest.mark.parametrize("share", [0.01, 0.7, 0.9, 0.999])
def test_they_are_those_of_a_singular_value_decomposition(rows, share):
    found = leading_components(ArrayBlocks(rows), rows.mean(axis=0, dtype=float), share=share)
    left = rows.astype(float) - rows.mean(axis=0, dtype=float)
    _, values, vectors = np.linalg.svd(left, full_matrices=False)
    held = np.cumsum(values**2) / np.sum(values**2)
    assert found.shape == (12, int(np.argmax(held >= share)) + 1)
    assert np.allclose(np.abs(np.sum(found * vectors[: found.shape[1]].T, axis=0)), 1, atol=1e-5)
    assert np.allclose(found.T @ found, np.eye(found.shape[1]), atol=1e-6)


def test_rows_that_are_all_alike_keep_one_component():
    rows = np.ones((5, 3), dtype=np.float32)
    assert leading_components(ArrayBlocks(rows), np.ones(3), share=0.85).shape == (3, 1)
