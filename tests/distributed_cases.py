"""Catalogues in Parquet folders for the tests of several workers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_folder(
    folder: Path,
    x: np.ndarray,
    *,
    files: int = 3,
    row_group: int = 100,
    ids: bool = True,
    names: list[str] | None = None,
) -> Path:
    """Write rows as Parquet files of unequal length, with text ids that do not sort by row."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, len(x), files + 1).astype(int)
    edges[1:-1] += 1
    for file, (first, last) in enumerate(itertools.pairwise(edges.tolist())):
        columns = {"embedding": rows_array(x[first:last])}
        if ids:
            wanted = names or [f"item-{(row * 7919) % 1_000_003}" for row in range(len(x))]
            columns["item_id"] = pa.array(wanted[first:last])
        pq.write_table(pa.table(columns), folder / f"part-{file}.parquet", row_group_size=row_group)
    return folder


def rows_array(x: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


def many_rows(rows: int = 200_000, dim: int = 4, seed: int = 3) -> np.ndarray:
    """Rows in 30 clusters: four blocks of rows, small enough to fit in a moment."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(30, dim))
    noise = 0.3 * generator.normal(size=(rows, dim))
    return (centers[generator.integers(0, 30, rows)] + noise).astype(np.float32)
