"""Exact top-k retrieval by cosine, inner product or distance, with the search of `nearest`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from semid.errors import UsageError, check_choice
from semid.quantization.engine.canonical import METRICS
from semid.quantization.engine.gpu import search_device
from semid.quantization.engine.routes import choose
from semid.quantization.engine.search import search
from semid.quantization.engine.table import Table, check_rows

__all__ = ["MOST", "PreparedDatabase", "TopK", "prepare_database", "top_k"]

MOST = 500
"""Largest ``k``."""


class TopK(NamedTuple):
    """Result of `top_k`.

    Attributes:
        indices: ``(queries, k)`` int64 database indices, best first.
        scores: ``(queries, k)`` float32: cosines or inner products, falling; or squared
            distances, rising.
    """

    indices: Tensor
    scores: Tensor


class PreparedDatabase:
    """A database with everything the search needs, made once and shared by threads.

    Args:
        database: ``(entries, dim)`` float32, float16 or bfloat16, finite. It is copied.
        metric: ``"cosine"``, ``"ip"`` or ``"l2"``.

    Raises:
        UsageError: wrong dtype, shape or metric, or no entries.
        EmbeddingError: NaN or infinite values.
    """

    def __init__(self, database: Tensor, *, metric: str = "cosine") -> None:
        self.metric = check_choice("metric", metric, tuple(METRICS))
        check_rows(database, name="database")
        self.table = Table(
            database.detach().cpu(), metric=METRICS[metric], unique=False, name="database"
        )

    def __len__(self) -> int:
        return len(self.table)


def prepare_database(database: Tensor, *, metric: str = "cosine") -> PreparedDatabase:
    """Prepare a database so that repeated blocks of queries do not pay for it again.

    Args:
        database: ``(entries, dim)`` float32, float16 or bfloat16, finite. It is copied.
        metric: ``"cosine"``, ``"ip"`` or ``"l2"``.

    Returns:
        An object to give to `top_k` in place of the database.

    Raises:
        UsageError: wrong dtype, shape or metric, or no entries.
        EmbeddingError: NaN or infinite values.
    """
    return PreparedDatabase(database, metric=metric)


def _excluded(exclude: Tensor | None, queries: int, entries: int) -> np.ndarray | None:
    if exclude is None:
        return None
    if exclude.shape != (queries,) or exclude.is_floating_point():
        raise UsageError(
            f"exclude has shape {tuple(exclude.shape)} and dtype {exclude.dtype}; "
            f"give one integer index for each of the {queries} queries (-1 leaves none out)"
        )
    indices = exclude.detach().cpu().to(torch.int64).numpy()
    if queries and not (indices.min() >= -1 and indices.max() < entries):
        raise UsageError(
            f"exclude holds indices from {indices.min()} to {indices.max()}; the database has "
            f"rows 0 to {entries - 1} (-1 leaves none out)"
        )
    return np.ascontiguousarray(indices)


def top_k(
    queries: Tensor,
    database: Tensor | PreparedDatabase,
    k: int,
    *,
    metric: str = "cosine",
    exclude: Tensor | None = None,
    threads: int | None = None,
    route: str = "auto",
) -> TopK:
    """Find the ``k`` best database rows for each query, exactly.

    Scores are computed in float64 in a fixed order, so lists are the same on every chip, route
    and number of threads; equal scores stand in index order. The cosine with a zero vector is 0.

    Args:
        queries: ``(queries, dim)`` float32, float16 or bfloat16. A row that is not finite gets
            some indices and scores that are not finite.
        database: ``(entries, dim)``, or what `prepare_database` made of it.
        k: 1 to 500, and at most the number of entries that may be returned.
        metric: ``"cosine"``, ``"ip"`` (inner product) or ``"l2"`` (squared distance). A prepared
            database has its own, which must be the same.
        exclude: ``(queries,)`` a database index to leave out of each query's list (the query
            itself), -1 for none.
        threads: see `semid.quantization.nearest.nearest`.
        route: see `semid.quantization.nearest.nearest`.

    Returns:
        Indices and scores ``(queries, k)``, best first.

    Raises:
        UsageError: an argument out of range, or widths and dtypes that do not fit.
        EmbeddingError: the database is not finite.

    Time grows with queries x entries x dim; memory with the block of queries.
    """
    check_choice("metric", metric, tuple(METRICS))
    check_rows(queries, name="queries")
    ready = (
        database
        if isinstance(database, PreparedDatabase)
        else prepare_database(database, metric=metric)
    )
    if ready.metric != metric:
        raise UsageError(
            f"metric='{metric}' but the database was prepared for '{ready.metric}'; "
            "prepare it for the metric you ask for"
        )
    if queries.shape[1] != ready.table.dim:
        raise UsageError(
            f"queries have {queries.shape[1]} columns and the database {ready.table.dim}; "
            "give both the same width"
        )
    left_out = _excluded(exclude, len(queries), len(ready))
    most = min(MOST, len(ready) - (left_out is not None))
    if not 1 <= k <= most:
        raise UsageError(
            f"k={k} is out of range; give 1 to {most} (at most {MOST}, and no more than the "
            f"{len(ready)} rows of the database, less one where exclude is given)"
        )
    if queries.is_cuda:
        found = search_device(queries, ready.table, k=k, exclude=left_out)
    else:
        chosen = choose(route, queries, ready.table, k=k)
        found = search(
            queries, ready.table, chosen, k=k, exclude=left_out, threads=threads, name="queries"
        )
    keys = torch.from_numpy(found.keys)
    scores = (keys if metric == "l2" else -keys).to(torch.float32)
    return TopK(torch.from_numpy(found.labels).to(queries.device), scores.to(queries.device) + 0.0)
