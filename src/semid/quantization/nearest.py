"""Exact search: the nearest codewords of rows, and the top-k rows of a database.

Screening in low precision finds every entry that can win, and a float64 key in a fixed order of
sums decides (see ``engine/README.md``). The answer is therefore the same on every chip and route,
for any block size and number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from semid.errors import UsageError, check_choice
from semid.lazy import is_imported, torch
from semid.quantization import engine
from semid.quantization.engine.plain import (
    L2,
    METRICS,
    Rows,
    check_entries,
    check_rows,
    float32_rows,
    nearest_plain,
    suits_plain,
)
from semid.quantization.threads import THREADED_WORK, resolve_threads

if TYPE_CHECKING:
    from torch import Tensor

    from semid.quantization.engine.bounded import RowBounds
    from semid.quantization.engine.search import SearchResult
    from semid.quantization.engine.table import VectorTable

Array = npt.NDArray[np.float32]

BOUND_BYTES = 1 << 29
"""Memory for what assignments remember of rows from one pass of K-means to the next."""
MAX_NEIGHBORS = 500
"""Largest ``k`` of `top_k`."""


class Nearest(NamedTuple):
    """Result of `nearest` ``(items,)`` and `nearest_m` ``(items, m)``, nearest first."""

    labels: Tensor  # int64 codeword indices
    distances: Tensor  # float32 squared Euclidean distances


class IndexedCodebook:
    """A codebook with everything the search needs; made by `index_codebook`."""

    def __init__(self, codebook: Rows) -> None:
        # (codes, dim), not to be written to.
        self.codewords: Array = float32_rows(codebook, name="codebook", multiple=1).copy()
        check_entries(self.codewords, name="codebook")
        self._full: VectorTable | None = None
        # Other codebooks, and products with them (see `semid.quantization.residual`).
        self.products: tuple[list[IndexedCodebook], Any] | None = None

    def __len__(self) -> int:
        return len(self.codewords)

    @cached_property
    def table(self) -> VectorTable:
        """The codewords without exact duplicates, indexed at their first search."""
        return engine.table.VectorTable(self.codewords, metric=L2, unique=True)

    def full_table(self) -> VectorTable:
        """Return the table with exact duplicates in it, which `nearest_m` must list."""
        if len(self.table) == len(self.codewords):
            return self.table
        if self._full is None:
            self._full = engine.table.VectorTable(self.codewords, metric=L2, unique=False)
        return self._full


def index_codebook(codebook: Rows) -> IndexedCodebook:
    """Index a codebook ``(codes, dim)`` for repeated searches; threads can share the index.

    It is copied: float32, float16 or bfloat16, finite.

    Raises:
        UsageError: wrong dtype or shape, or no codewords.
        EmbeddingError: NaN or infinite values.
    """
    return IndexedCodebook(codebook)


def _indexed(x: Rows, codebook: Rows | IndexedCodebook) -> IndexedCodebook:
    check_rows(x, name="x")
    indexed = codebook if isinstance(codebook, IndexedCodebook) else index_codebook(codebook)
    if x.shape[1] != indexed.codewords.shape[1]:
        raise UsageError(
            f"x has {x.shape[1]} columns and the codebook {indexed.codewords.shape[1]}; "
            "give both the same width"
        )
    return indexed


def _search(
    x: Rows,
    table: VectorTable,
    k: int,
    threads: int | None,
    route: str,
    *,
    exclude: npt.NDArray[np.int64] | None = None,
    within: Tensor | None = None,
    name: str = "x",
) -> SearchResult:
    """Return labels and float64 keys ``(items, k)``, by the device that holds ``x``."""
    check_choice("route", route, engine.search.ROUTES)
    resolve_threads(threads)
    plain = exclude is None and within is None
    if not isinstance(x, np.ndarray) and x.is_cuda:
        return engine.gpu.search_device(x, table, k=k, exclude=exclude, name=name)
    if k == 1 and route == "auto" and plain and engine.narrow.suits(table):
        return engine.narrow.search_narrow(x, table, threads=threads, name=name)
    limit = None if within is None else within.double().numpy()
    chip = engine.search.choose(route, x, table, k=k)
    return engine.search.search(
        x, table, chip, k=k, exclude=exclude, within=limit, threads=threads, name=name
    )


def _search_nearest(
    x: Rows, codebook: Rows | IndexedCodebook, threads: int | None, route: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return label and float64 key ``(items,)`` of the nearest codeword."""
    indexed = _indexed(x, codebook)
    on_cpu = isinstance(x, np.ndarray) or not x.is_cuda
    if route == "auto" and on_cpu and suits_plain(len(x) * indexed.codewords.size):
        resolve_threads(threads)
        return nearest_plain(x, indexed.codewords)
    result = _search(x, indexed.table, 1, threads, route)
    return result.labels[:, 0], result.keys[:, 0]


def nearest(
    x: Tensor,
    codebook: Rows | IndexedCodebook,
    *,
    threads: int | None = None,
    route: str = "auto",
) -> Nearest:
    """Find the codeword ``(codes, dim)`` nearest to each row ``(items, dim)``, by squared distance.

    Returns labels ``(items,)`` (ties to the lowest index) and distances ``(items,)``.

    Time grows with items x codes x dim; memory with the block of rows, not with ``items``.
    """
    labels, keys = map(torch.from_numpy, _search_nearest(x, codebook, threads, route))
    return Nearest(labels.to(x.device), keys.to(torch.float32).to(x.device))


def nearest_m(
    x: Tensor,
    codebook: Tensor | IndexedCodebook,
    m: int,
    *,
    within: Tensor | None = None,
    threads: int | None = None,
    route: str = "auto",
) -> Nearest:
    """Find the ``m`` nearest codewords of each row, nearest first.

    Returns labels and distances ``(items, m)``; equal distances stand in index order. With
    ``within`` ``(items,)``, codewords farther than that squared distance may be missing: the last
    columns are then infinite.
    """
    indexed = _indexed(x, codebook)
    if not 1 <= m <= len(indexed):
        raise UsageError(
            f"m={m} is out of range; give 1 to {len(indexed)}, the number of codewords"
        )
    if within is not None and within.shape != (len(x),):
        raise UsageError(
            f"within has shape {tuple(within.shape)}; give one distance for each of {len(x)} rows"
        )
    result = _search(x, indexed.full_table(), m, threads, route, within=within)
    labels, keys = torch.from_numpy(result.labels), torch.from_numpy(result.keys)
    return Nearest(labels.to(x.device), keys.to(torch.float32).to(x.device))


def assign(
    block: Array, centroids: Array | IndexedCodebook, *, threads: int | None = None
) -> tuple[npt.NDArray[np.int64], Array]:
    """Label a block's rows ``(n, dim)``: with `statistics`, what everything larger is built on.

    Returns labels ``(n,)`` int64, ties to the lowest, and squared distances ``(n,)`` float32.
    """
    if len(block) * len(centroids) * block.shape[1] < THREADED_WORK:
        threads = 1
    labels, keys = _search_nearest(block, centroids, threads, "auto")
    return labels, _float32(keys)


class AssignmentMemory:
    """What repeated assignments of the same rows to moving codewords remember (Lloyd's passes).

    It holds up to ``limit_bytes``; rows beyond them, and of shapes that bounds do not suit, are
    searched in full. The answers are the same. Threads may share it for different rows.
    """

    def __init__(self, limit_bytes: int = BOUND_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._bounds: dict[Hashable, RowBounds | None] = {}

    def assign(
        self, rows: Hashable, x: Array, codebook: IndexedCodebook, *, threads: int | None = None
    ) -> tuple[Array, npt.NDArray[np.int64], Array]:
        """Label rows ``(n, dim)`` as `assign` does; also return them as C-contiguous array.

        ``rows`` names them: under one name they must be the same at every call.
        """
        bounds = self._bounds.get(rows)
        if bounds is not None and bounds.suits(codebook.codewords):
            labels, keys = bounds.search(codebook.codewords, threads=threads)
            return bounds.x, labels, _float32(keys)
        x = np.ascontiguousarray(x)
        labels, distances = assign(x, codebook, threads=threads)
        # Where numba is not loaded yet, the search was too small to need it.
        if is_imported("numba") and (bounds is not None or rows not in self._bounds):
            self._bounds[rows] = self._start(x, labels, codebook) if bounds is None else None
        return x, labels, distances

    def _start(
        self, x: Array, labels: npt.NDArray[np.int64], codebook: IndexedCodebook
    ) -> RowBounds | None:
        shape = (len(x), *codebook.codewords.shape)
        # Equal codewords would all be measured for each of their rows.
        if not engine.bounded.suits(*shape) or len(codebook.table) < len(codebook):
            return None
        others = list(self._bounds.values())  # a copy, since other threads add to it
        held = sum(bounds.bytes for bounds in others if bounds is not None)
        if held + engine.bounded.size(x, len(codebook)) > self.limit_bytes:
            return None
        bounds = engine.bounded.RowBounds(x, labels, codebook.codewords)
        bounds.cost = _relative_cost(bounds, codebook)
        # Too much where the chip's full search is many times faster than float32 products.
        return bounds if bounds.cost <= 1 + engine.bounded.MAX_LOSS else None


def _relative_cost(bounds: RowBounds, codebook: IndexedCodebook) -> float:
    """Return the time of a pass that searches all groups, in full searches, by a few rows."""
    rows = min(len(bounds.x) // engine.bounded.PROBE_SHARE, engine.bounded.MAX_PROBE)
    start = time.thread_time()
    _search(bounds.x[:rows], codebook.table, 1, 1, "auto")
    full = time.thread_time() - start
    return bounds.time_rows(codebook.codewords, rows) / max(full, 1e-9)


def _float32(keys: npt.NDArray[np.float64]) -> Array:
    with np.errstate(over="ignore"):  # a square beyond float32 is infinite
        return keys.astype(np.float32)


class TopK(NamedTuple):
    """Result of `top_k`, ``(queries, k)``, best first."""

    indices: Tensor  # int64 database indices
    scores: Tensor  # float32 cosines or inner products, falling, or squared distances, rising


class IndexedDatabase:
    """A database with everything the search needs; made by `index_database`."""

    def __init__(self, database: Tensor, *, metric: str = "cosine") -> None:
        self.metric = check_choice("metric", metric, tuple(METRICS))
        check_rows(database, name="database")
        self.table = engine.table.VectorTable(
            database.detach().cpu(), metric=METRICS[metric], unique=False, name="database"
        )

    def __len__(self) -> int:
        return len(self.table)


def index_database(database: Tensor, *, metric: str = "cosine") -> IndexedDatabase:
    """Index a database ``(entries, dim)`` for repeated searches; see `index_codebook`.

    ``metric`` is ``"cosine"``, ``"ip"`` or ``"l2"``.
    """
    return IndexedDatabase(database, metric=metric)


def _excluded(exclude: Tensor, queries: int, entries: int) -> npt.NDArray[np.int64]:
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
    database: Tensor | IndexedDatabase,
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

    Returns indices and scores ``(queries, k)``, best first.

    Time grows with queries x entries x dim; memory with the block of queries.

    Shapes: ``queries`` (queries, dim), ``database`` (entries, dim), ``exclude`` (queries,), the
    entry that each query leaves out, -1 for none.
    """
    check_choice("metric", metric, tuple(METRICS))
    check_rows(queries, name="queries")
    if not isinstance(database, IndexedDatabase):
        database = index_database(database, metric=metric)
    if database.metric != metric:
        raise UsageError(
            f"metric='{metric}' but the database was prepared for '{database.metric}'; "
            "prepare it for the metric you ask for"
        )
    if queries.shape[1] != database.table.dim:
        raise UsageError(
            f"queries have {queries.shape[1]} columns and the database {database.table.dim}; "
            "give both the same width"
        )
    excluded = None if exclude is None else _excluded(exclude, len(queries), len(database))
    most = min(MAX_NEIGHBORS, len(database) - (excluded is not None))
    if not 1 <= k <= most:
        raise UsageError(
            f"k={k} is out of range; give 1 to {most} (at most {MAX_NEIGHBORS}, and no more than "
            f"the {len(database)} rows of the database, less one where exclude is given)"
        )
    result = _search(queries, database.table, k, threads, route, exclude=excluded, name="queries")
    indices, keys = torch.from_numpy(result.labels), torch.from_numpy(result.keys)
    scores = (keys if metric == "l2" else -keys).to(torch.float32)
    return TopK(indices.to(queries.device), scores.to(queries.device) + 0.0)
