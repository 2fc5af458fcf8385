"""What tokenizers share that preprocess rows and quantize latents with codebooks; their K-means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from semid.codes import MAX_CODEWORDS, MAX_LEVELS
from semid.data.source import EmbeddingSource
from semid.options import MAX_BEAM, option
from semid.progress import Progress
from semid.quantization.blocks import MEMORY_BYTES, Blocks, Preprocess
from semid.quantization.kmeans import KMeansResult, KMeansState
from semid.quantization.nearest import IndexedCodebook, index_codebook
from semid.quantization.residual import LevelFit, ResidualCodes, encode_residual, fit_residual
from semid.quantization.sharding import Shard, ShardedMatrix, as_sharded
from semid.quantization.threads import default_threads
from semid.tokenizers.base import Tokenizer, Weights
from semid.tokenizers.context import level_sizes
from semid.tokenizers.stored import check_shapes
from semid.training.checkpoint import StateStore
from semid.training.distributed import (
    ProcessShardPool,
    join_processes,
    local_world_size,
    process_span,
    world_size,
)

Array = npt.NDArray[np.float32]

STATE_RECORD = ("restart", "iteration", "inertia", "best_inertia")
STATE_ARRAYS = ("centroids", "best_centroids")
"""Fields of `KMeansState` in a checkpoint: its JSON-able record and its arrays."""


@dataclass(kw_only=True, eq=False, repr=False)
class CodebookTokenizer(Tokenizer):
    """Base of tokenizers whose learned state is preprocessing and codebooks, and maybe more.

    A subclass's `_fit` sets ``_preprocess``, where it uses any, and calls `_set_codebooks`. Latents
    are preprocessed rows; one with a network overrides `_latent_block` and `_decode_codes`.
    """

    normalize: bool = option(False, help="Scale (centered) rows to unit length first.")
    center: bool = option(False, help="Subtract the mean of the training rows first.")

    def __post_init__(self) -> None:
        """Start without codebooks."""
        super().__post_init__()
        self._preprocess = Preprocess(normalize=self.normalize)
        self._codebook_index: tuple[IndexedCodebook, ...] = ()

    def _set_codebooks(self, books: Sequence[Array]) -> None:
        self._codebook_index = tuple(index_codebook(book) for book in books)

    def _latent_block(self, x: Array) -> Array:
        return self._preprocess.apply(x)

    def _decode_codes(self, codes: npt.NDArray[np.int64]) -> Array:
        return self._preprocess.invert(self._quantize_codes(codes))

    def _codebooks(self) -> tuple[Array, ...]:
        return tuple(book.codewords for book in self._codebook_index)

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {f"codebooks.{i}": book for i, book in enumerate(self._codebooks())}
        if self._preprocess.mean is not None:
            tensors["preprocess.mean"] = self._preprocess.mean
        return tensors

    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        widths = self._codeword_widths(tensors)
        shapes: dict[str, tuple[int | None, ...]] = {
            f"codebooks.{i}": (size, width)
            for i, (size, width) in enumerate(zip(self.codebook_sizes, widths, strict=True))
        }
        check_shapes(tensors, shapes | ({"preprocess.mean": (self._dim,)} if self.center else {}))
        self._preprocess = Preprocess(
            mean=tensors["preprocess.mean"] if self.center else None, normalize=self.normalize
        )
        self._set_codebooks([tensors[f"codebooks.{i}"] for i in range(self.levels)])

    def _codeword_widths(self, tensors: Mapping[str, np.ndarray]) -> Sequence[int]:
        """Return the width of each codebook's codewords; side by side they make the latent."""
        width = self._codeword_width(tensors)
        if self.combine != "concat":
            return [width] * self.levels
        names = [f"codebooks.{i}" for i in range(self.levels)]
        check_shapes(tensors, dict.fromkeys(names, (None, None)))
        widths = [tensors[name].shape[1] for name in names]
        if sum(widths) != width:
            raise ValueError(f"codewords of widths {widths} do not make latents of width {width}")
        return widths

    def _codeword_width(self, tensors: Mapping[str, np.ndarray]) -> int:
        """Return the width of codewords, as settings and the other arrays have it."""
        return self.dim


@dataclass(kw_only=True, eq=False, repr=False)
class LevelTokenizer(CodebookTokenizer):
    """Base of tokenizers whose levels each quantize what the levels before left."""

    hierarchical: ClassVar[bool] = True
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "sum"

    levels: int = option(3, ge=1, le=MAX_LEVELS, help="Codes per item.")
    codebook_size: int | Sequence[int] = option(
        256,
        ge=2,
        le=MAX_CODEWORDS,
        help="Codewords per level (2 to 2**32), or one number for each level.",
    )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each level."""
        return level_sizes(self.levels, self.codebook_size)


@dataclass(kw_only=True, eq=False, repr=False)
class ResidualTokenizer(LevelTokenizer):
    """Base of those that take the nearest codewords of their levels, greedily or by a beam."""

    beam_width: int = option(
        1, ge=1, le=MAX_BEAM, help="Partial codes kept while encoding; 1 is greedy."
    )

    def _encode_block(self, x: Array, beam_width: int) -> ResidualCodes:
        return encode_residual(
            self._latent_block(x), self._codebook_index, beam_width=beam_width, threads=self.threads
        )


# Residual K-means as a stage of a fit -------------------------------------------------------


def training_rows(
    source: EmbeddingSource, *, weights: Weights | None = None, threads: int | None = None
) -> ShardedMatrix:
    """Return the rows of a fit; under ``torchrun`` each process holds its share of the blocks."""
    # One process holds all rows; each of several holds whole blocks, so that sums are the same.
    join_processes()
    if world_size() == 1:
        return as_sharded(source, weights=weights, threads=threads, memory_bytes=MEMORY_BYTES)
    first, last = process_span(len(source))
    shard = Shard(
        source.subset(np.arange(first, last)),
        first_row=first,
        weights=None if weights is None else weights[first:last],
        threads=threads or max(1, default_threads() // local_world_size()),
        memory_bytes=MEMORY_BYTES,
    )
    return ShardedMatrix(ProcessShardPool(shard, len(source)), dim=source.dim, weights=weights)


def fit_levels(
    rows: Blocks | ShardedMatrix,
    sizes: Sequence[int],
    *,
    store: StateStore | None,
    progress: Progress,
    **options: Any,
) -> tuple[list[Array], list[dict[str, Any]]]:
    """Fit one codebook per level by `fit_residual` (DRQ §4.2), from where the store left off.

    Returns the codebooks, and a JSON-able record of how each level's K-means ended.
    """
    run = LevelRun(store, progress, len(sizes))
    books, fits = fit_residual(
        rows,
        sizes,
        done=run.done,
        state=run.state,
        on_iteration=run.on_iteration,
        on_level=run.on_level,
        **options,
    )
    return list(books), [asdict(fit) for fit in fits]


class LevelRun:
    """Checkpoints and progress of residual K-means, saved after every level and iteration."""

    def __init__(self, store: StateStore | None, progress: Progress, levels: int) -> None:
        self._store, self._progress, self._levels = store, progress, levels
        self.done: list[tuple[Array, npt.NDArray[np.int64], LevelFit]] = []
        self.state: KMeansState | None = None
        # Finished levels and the state of the one that was running, if a run is continued.
        if store is not None and store.state is not None:
            arrays, record = store.state
            for level, fit in enumerate(record["fits"]):
                # Rows in other processes keep their labels there and find them again.
                labels = arrays.get(f"labels.{level}", np.empty(0, np.int64))
                self.done.append((arrays[f"codebook.{level}"], labels, LevelFit(**fit)))
            if record["state"] is not None:
                state = record["state"] | {name: arrays[name] for name in STATE_ARRAYS}
                self.state = KMeansState(**state)
        self._announce()

    def _announce(self) -> None:
        """Name the level that begins; its seeding comes before its first iteration."""
        if len(self.done) < self._levels:
            self._progress.start(f"level {len(self.done) + 1} of {self._levels}", total=None)

    def on_iteration(self, level: int, state: KMeansState) -> None:
        """Save where an iteration stands, then report it."""
        self._save(state)
        self._progress.step(1, restart=state.restart, inertia=state.inertia[-1])

    def on_level(self, level: int, result: KMeansResult) -> None:
        """Save a finished level."""
        self.done.append((result.centroids, result.labels, LevelFit.of(result)))
        self._save(None)
        self._announce()

    def _save(self, state: KMeansState | None) -> None:
        if self._store is None:
            return
        # Labels are saved too: without them a continued run would have to assign all rows again.
        arrays: dict[str, np.ndarray] = {}
        for level, (codebook, labels, _) in enumerate(self.done):
            arrays[f"codebook.{level}"] = codebook
            if len(labels):
                arrays[f"labels.{level}"] = labels
        record: dict[str, Any] = {"fits": [asdict(fit) for *_, fit in self.done], "state": None}
        if state is not None:
            record["state"] = {name: getattr(state, name) for name in STATE_RECORD}
            arrays |= {name: getattr(state, name) for name in STATE_ARRAYS}
        self._store.save(arrays, record)
