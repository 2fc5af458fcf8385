"""Residual K-means as a stage of a fit: with checkpoints, progress and figures for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.source import EmbeddingSource
from semid.progress import Progress
from semid.quantization.blocks import Blocks
from semid.quantization.kmeans import KMeansOptions, KMeansResult, KMeansState
from semid.quantization.residual import LevelFit, fit_residual
from semid.quantization.sharding import Shard, ShardedMatrix, as_sharded
from semid.quantization.threads import default_threads
from semid.training.checkpoint import StateStore
from semid.training.distributed import (
    ProcessShardPool,
    join_processes,
    local_world_size,
    process_span,
    world_size,
)

Array = npt.NDArray[np.float32]

MEMORY_BYTES = 1 << 30


def training_rows(
    source: EmbeddingSource,
    *,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> ShardedMatrix:
    """Return the rows of a fit; under ``torchrun`` each process holds its share of the blocks.

    Shapes: ``source`` (items, dim), ``weights`` (items,).
    """
    join_processes()
    if world_size() == 1:
        return as_sharded(source, weights=weights, threads=threads, memory_bytes=memory_bytes)
    threads = threads or max(1, default_threads() // local_world_size())
    first, last = process_span(len(source))
    shard = Shard(
        source.subset(np.arange(first, last)),
        first_row=first,
        weights=None if weights is None else weights[first:last],
        threads=threads,
        memory_bytes=memory_bytes,
    )
    return ShardedMatrix(ProcessShardPool(shard, len(source)), dim=source.dim, weights=weights)


def fit_levels(
    rows: Blocks | ShardedMatrix,
    sizes: Sequence[int],
    *,
    seed: int,
    options: KMeansOptions,
    weights: npt.NDArray[np.float64] | None,
    threads: int | None,
    store: StateStore | None,
    progress: Progress,
) -> tuple[list[Array], list[dict[str, Any]]]:
    """Fit one codebook per level (DRQ §4.2), from where the store left off.

    Returns the codebooks, and a JSON-able record of how each level's K-means ended.

    Shapes: ``rows`` (items, dim), ``weights`` (items,).
    """
    run = LevelRun(store, progress, len(sizes))
    books, fits = fit_residual(
        rows,
        sizes,
        seed=seed,
        options=options,
        weights=weights,
        threads=threads,
        done=run.done,
        state=run.state,
        on_iteration=run.on_iteration,
        on_level=run.on_level,
    )
    return list(books), [asdict(fit) for fit in fits]


class LevelRun:
    """Checkpoints and progress of residual K-means, saved after every level and iteration.

    Args:
        store: where the state is kept, with the state to continue from; None keeps nothing.
        progress: callback that receives progress events.
        levels: levels of the fit.
    """

    def __init__(self, store: StateStore | None, progress: Progress, levels: int) -> None:
        self._checkpoint = store
        self._progress = progress
        self._levels = levels
        self.done: list[tuple[Array, npt.NDArray[np.int64], LevelFit]] = []
        self.state: KMeansState | None = None
        stored = None if self._checkpoint is None else self._checkpoint.state
        if stored is not None:
            self._restore(*stored)
        self._announce()

    def _announce(self) -> None:
        """Name the level that begins; its seeding comes before its first iteration."""
        if len(self.done) < self._levels:
            self._progress.start(f"level {len(self.done) + 1} of {self._levels}", total=None)

    def _restore(self, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        for level, fit in enumerate(record["fits"]):
            # Rows in other processes keep their labels there and find them again.
            labels = arrays.get(f"labels.{level}", np.empty(0, np.int64))
            self.done.append((arrays[f"codebook.{level}"], labels, LevelFit(**fit)))
        if record["state"] is not None:
            self.state = KMeansState(
                **record["state"],
                centroids=arrays["centroids"],
                best_centroids=arrays["best_centroids"],
            )

    def on_iteration(self, level: int, state: KMeansState) -> None:
        """Save where an iteration stands, then report it."""
        self._save(state)
        self._progress.step(1, restart=state.restart, inertia=state.inertia[-1])

    def on_level(self, level: int, result: KMeansResult) -> None:
        """Keep a finished level."""
        fit = LevelFit(result.inertia, len(result.history), result.converged, result.distinct)
        self.done.append((result.centroids, result.labels, fit))
        self._save(None)
        self._announce()

    def _save(self, state: KMeansState | None) -> None:
        if self._checkpoint is None:
            return
        arrays: dict[str, np.ndarray] = {}
        for level, (codebook, labels, _) in enumerate(self.done):
            arrays[f"codebook.{level}"] = codebook
            if len(labels):
                arrays[f"labels.{level}"] = labels
        record: dict[str, Any] = {"fits": [asdict(fit) for *_, fit in self.done], "state": None}
        if state is not None:
            record["state"] = {
                "restart": state.restart,
                "iteration": state.iteration,
                "inertia": state.inertia,
                "best_inertia": state.best_inertia,
            }
            arrays["centroids"] = state.centroids
            arrays["best_centroids"] = state.best_centroids
        self._checkpoint.save(arrays, record)
