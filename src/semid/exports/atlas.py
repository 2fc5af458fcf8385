"""A catalogue for Embedding Atlas: a point per item, its codes, its neighbors and its title."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.catalogue.uniqueness import rows_of
from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.items import read_items
from semid.errors import MissingExtraError, UsageError, check_choice
from semid.exports.formats import ExportFormat
from semid.lazy import torch
from semid.quantization.nearest import index_codebook, nearest_m

logger = logging.getLogger(__name__)

PROJECTIONS = ("auto", "umap", "pca")

Array = npt.NDArray[np.float32]


def _write_atlas(
    path: Path,
    *,
    ids: SemanticIds,
    embeddings: Any = None,
    embedding_ids: Any = None,
    items: Any = None,
    projection: str = "auto",
    neighbors: int = 15,
    seed: int = 0,
) -> None:
    """Write one Parquet file for ``embedding-atlas FILE --x projection_x --y projection_y``.

    ``code_1`` and so on are text, so that they color points as categories. ``neighbors`` holds rows
    of the file and cosine distances, nearest first; 0 leaves it out. Cost: all embeddings in
    memory, and an exact search of every item among all.
    """
    check_choice("projection", projection, PROJECTIONS)
    if embeddings is None:
        raise UsageError("the export to atlas projects embeddings: give --embeddings (embeddings=)")
    if isinstance(neighbors, bool) or not 0 <= neighbors <= 1000:
        raise UsageError(f"neighbors={neighbors!r}: give 0 to 1000")
    source = open_embeddings(embeddings, ids=embedding_ids)
    x = source.rows(rows_of(ids.items, source))
    points = project(x, projection, seed=seed)
    columns: dict[str, Any] = {"item_id": ids.items.to_arrow()}
    if items is not None:
        columns["title"] = read_items(items, ids=ids.items).titles
    for level, codes in enumerate(ids.codes.T, start=1):
        columns[f"code_{level}"] = pa.array(codes).cast(pa.string())
    columns["residual_norm"] = ids.residual_norms
    columns["projection_x"], columns["projection_y"] = points.T
    if neighbors and len(ids) > 1:
        columns["neighbors"] = _neighbors(x, min(neighbors, len(ids) - 1))
    pq.write_table(pa.table(columns), path)


def project(x: Array, method: str = "auto", *, seed: int = 0) -> Array:
    """Return points ``(items, 2)`` of rows ``(items, dim)``, by UMAP or by principal components.

    ``auto`` takes UMAP where it is installed (the extra ``atlas``) and there are enough items.
    """
    enough = len(x) > 15  # UMAP's number of neighbors
    if method != "pca":
        try:
            umap = importlib.import_module("umap")
        except ImportError:
            if method == "umap":
                raise MissingExtraError(
                    "umap-learn", extra="atlas", purpose="projection=umap"
                ) from None
            logger.warning(
                "points are principal components; pip install 'semid[atlas]' to project by UMAP"
            )
        else:
            if enough:
                points = umap.UMAP(metric="cosine", random_state=seed).fit_transform(x)
                return np.asarray(points, dtype=np.float32)
    centered = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    # Eigenvectors of the covariance, largest eigenvalues last; their sign is arbitrary and fixed
    # here, so that equal data give an equal file.
    axes = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :2]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    points = np.zeros((len(x), 2), np.float32)
    points[:, : axes.shape[1]] = centered @ (axes * signs)
    return points


def _neighbors(x: Array, count: int) -> pa.Array:
    """Return the nearest other rows of each row by cosine, and the distances 1 - cosine."""
    lengths = np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    unit = torch.from_numpy(np.ascontiguousarray(x / lengths))
    nearest = nearest_m(unit, index_codebook(unit.numpy()), count + 1)
    labels, squares = nearest.labels.numpy(), nearest.distances.numpy()
    rows = []
    for row, (label, square) in enumerate(zip(labels, squares, strict=True)):
        others = np.flatnonzero(label != row)[:count]  # a copy of a row may come before itself
        # |a - b|^2 = 2 (1 - cos) for rows of length 1.
        distances = np.maximum(square[others], 0) / 2
        rows.append({"ids": label[others].tolist(), "distances": distances.tolist()})
    kind = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float64()))])
    return pa.array(rows, kind)


ATLAS = ExportFormat(
    _write_atlas,
    options=("embeddings", "embedding_ids", "items", "projection", "neighbors", "seed"),
)
