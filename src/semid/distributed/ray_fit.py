"""``semid fit --engine ray``: residual K-means over rows held by many workers."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import held_out_mask
from semid.distributed.ray_workers import (
    RayOptions,
    RayShardPool,
    check_slots,
    check_store,
    connect,
)
from semid.distributed.units import Catalogue, Unit
from semid.errors import EmbeddingError
from semid.health import CollisionCounter, Collisions, merge_collisions, row_hashes
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import BLOCK_ROWS, Node, merge_nodes
from semid.quantization.sharding import Shard, ShardedMatrix
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import check_enough
from semid.tokenizers.fit_report import FitReport, HealthCounter
from semid.tokenizers.stored import HELD_OUT_SALT
from semid.training.checkpoint import open_checkpoint, run_key
from semid.training.distributed import shard_spans


@dataclass(frozen=True)
class ShardScan:
    """One pass over the row groups of a worker."""

    train: list[int]  # training rows of each unit
    sums: npt.NDArray[np.float64]  # ``(dim,)`` float64 sum of all rows
    # of different rows, at most as many as there are codewords
    smallest_hashes: npt.NDArray[np.uint64]
    digests: list[str]  # one digest per unit, of its rows and of which are held out


class FitWorker:
    """One worker's state.

    Args:
        catalogue: the embeddings.
        units: the units it scans and evaluates, in order.
        held_out: share of the items held out.
        codes: codewords of the largest level.
        threads: number of CPU threads.
        memory_bytes: its training rows are held as float32 up to this size.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        units: Sequence[Unit],
        *,
        held_out: float,
        codes: int,
        threads: int,
        memory_bytes: int,
    ) -> None:
        self.catalogue, self.units = catalogue, list(units)
        self.held_out, self.codes = held_out, codes
        self.threads, self.memory_bytes = threads, memory_bytes
        self.shard: Shard | None = None
        self._hashes: npt.NDArray[np.uint64] | None = None
        self._collisions: CollisionCounter | None = None

    def scan(self) -> ShardScan:
        """Read the units once."""
        train, digests, hashes = [], [], [np.empty(0, np.uint64)]
        sums: npt.NDArray[np.float64] | float = 0.0
        for unit in self.units:
            source = self.catalogue.source([unit])
            is_train = ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)
            digest = hashlib.sha256(np.packbits(is_train).tobytes())
            for _, block in source.blocks():
                sums = sums + block.sum(axis=0, dtype=np.float64)
                block_hashes = row_hashes(block)
                digest.update(block_hashes.tobytes())
                hashes.append(block_hashes)
            train.append(int(is_train.sum()))
            digests.append(digest.hexdigest())
        self._hashes = np.concatenate(hashes)
        smallest = np.unique(self._hashes)[: self.codes]
        return ShardScan(train, np.asarray(sums), smallest, digests)

    def load(self, units: Sequence[Unit], skip: int, first_row: int, rows: int) -> int:
        """Take a shard of the training rows.

        Args:
            units: where they lie.
            skip: training rows of these units that belong to the shard before.
            first_row: number of its first row among all training rows.
            rows: rows of the shard.

        Returns:
            The number of rows.
        """
        if rows == 0:
            units = self.units[:1] or self.catalogue.units()[:1]
        source = self.catalogue.source(units)
        train = np.flatnonzero(~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT))
        self.shard = Shard(
            source.subset(train[skip : skip + rows]),
            first_row=-(-first_row // BLOCK_ROWS) * BLOCK_ROWS if rows == 0 else first_row,
            threads=self.threads,
            memory_bytes=self.memory_bytes,
        )
        return len(self.shard)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the shard."""
        return getattr(self.shard, method)(*arguments)

    def merge(self, left: list[Node[Any]], right: list[Node[Any]]) -> list[Node[Any]]:
        """Add up the nodes of two neighbors; what comes from elsewhere is not written to."""
        return merge_nodes([copy.deepcopy(left), right])

    def evaluate(self, tokenizer: Tokenizer, mean: npt.NDArray[np.float64]) -> HealthCounter:
        """Encode and decode the units' rows, and count.

        Shapes: ``mean`` (dim,).
        """
        tokenizer.threads = self.threads
        counter = HealthCounter(tokenizer.codebook_sizes, mean)
        done = 0
        for unit in self.units:
            source = self.catalogue.source([unit])
            is_train = ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)
            for block in tokenizer.encode_blocks(source):
                span = slice(block.start, block.start + len(block.x))
                if self._hashes is None:  # a worker that replaced another has not scanned
                    hashes = row_hashes(block.x)
                else:
                    hashes = self._hashes[done : done + len(block.x)]
                tokenizer._count_block(counter, block, is_train[span], hashes)
                done += len(block.x)
        # The ids themselves stay here: `split` distributes them to be counted in parts.
        self._collisions = counter.take_collisions()
        return counter

    def split(self, parts: int) -> list[CollisionCounter]:
        """Share out the ids it judged, equal ones into one part."""
        if self._collisions is None:
            return [CollisionCounter([2]) for _ in range(parts)]
        return self._collisions.split(parts)

    def count(self, *parts: CollisionCounter) -> Collisions | None:
        """Count one part of the ids, brought together from all workers; None if it is empty."""
        whole = copy.deepcopy(parts[0])
        for part in parts[1:]:
            whole.merge(part)
        return whole.result() if len(whole) else None


@dataclass(frozen=True)
class RayFit:
    """What a fit on Ray was, beside the tokenizer.

    Attributes:
        workers: actors that held shards.
        rows: training rows of each.
        lost: workers that ended and were made again.
        sent: method -> bytes from the driver to workers.
        received: method -> bytes from workers to the driver.
        passed: method -> bytes between workers.
    """

    workers: int
    rows: tuple[int, ...]
    lost: int
    sent: dict[str, int]
    received: dict[str, int]
    passed: dict[str, int]


def share_units(units: Sequence[Unit], shares: int) -> list[list[Unit]]:
    """Cut units that follow one another into ``shares`` runs of nearly equal numbers of rows."""
    edges = np.cumsum([unit.rows for unit in units])
    total = int(edges[-1]) if len(edges) else 0
    middles = edges - np.array([unit.rows for unit in units]) / 2
    owner = np.minimum((middles * shares / max(total, 1)).astype(int), shares - 1)
    runs: list[list[Unit]] = [[] for _ in range(shares)]
    for unit, share in zip(units, owner, strict=True):
        runs[share].append(unit)
    return runs


def shard_loads(
    units: Sequence[Unit], train: Sequence[int], workers: int
) -> tuple[list[tuple[Any, ...]], list[tuple[int, int]]]:
    """Lay out the training rows: arguments of `FitWorker.load`, and the rows of each worker."""
    stops = np.cumsum(train, dtype=np.int64)
    spans = shard_spans(int(stops[-1]), workers)
    loads: list[tuple[Any, ...]] = []
    for first, last in spans:
        low = int(np.searchsorted(stops, first, side="right"))
        high = int(np.searchsorted(stops, last, side="left")) + 1
        shard_units = list(units[low:high]) if last > first else []
        skip = first - int(stops[low] - train[low]) if shard_units else 0
        loads.append((shard_units, skip, first, last - first))
    return loads, spans


def fit_on_ray(
    tokenizer: Tokenizer,
    catalogue: Catalogue,
    *,
    options: RayOptions | None = None,
    memory_bytes: int = 4 << 30,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> RayFit:
    """Fit a tokenizer in place; its codebooks are those of `Tokenizer.fit`, bit for bit.

    Returns who held what, and how much travelled.

    Cost: two reads of the rows; per iteration a pass over each worker's rows and O(workers codes
    dim) bytes; a worker holds its share of the rows, the driver O(blocks + codes dim).
    """
    options = options or RayOptions()
    steps = progress or QuietProgress()
    started = time.monotonic()
    catalogue.check_local(what="a worker", several=True)
    units = catalogue.units()
    check_enough(len(catalogue), tokenizer.codebook_sizes)
    ray = connect(options)
    workers = check_slots(ray, options)
    shares = [share for share in share_units(units, workers) if share]
    dim = catalogue.source(units[:1]).dim
    largest = max(tokenizer.codebook_sizes)
    # Of a sum, a pair and its result are in the store at one time, four nodes each at worst.
    check_store(
        ray, 3 * 4 * largest * (dim + 1) * 8, what=f"the sums of {largest} x {dim} codewords"
    )
    make = partial(
        _make_worker,
        catalogue,
        shares,
        {
            "held_out": tokenizer.validation_fraction,
            "codes": largest,
            "threads": options.cpus_per_worker,
            "memory_bytes": memory_bytes,
        },
    )
    shards = RayShardPool(
        ray, make, size=len(shares), cpus=options.cpus_per_worker, retries=options.retries
    )
    try:
        steps.start("read", total=len(catalogue))
        scans: list[ShardScan] = list(_everyone(shards, "scan").values())
        steps.step(len(catalogue))
        train = [count for each in scans for count in each.train]
        trained = sum(train)
        distinct = len(np.unique(np.concatenate([each.smallest_hashes for each in scans])))
        check_enough(
            distinct,
            tokenizer.codebook_sizes,
            trained=trained,
            held_out=tokenizer.validation_fraction,
        )
        digest = hashlib.sha256("".join(d for k in scans for d in k.digests).encode())
        key = run_key({"kind": tokenizer.kind, **tokenizer.settings}, digest.hexdigest())
        loads, spans = shard_loads(units, train, len(shares))
        with open_checkpoint(checkpoint, key=key, resume=resume) as store:
            shards.load(loads, spans)
            levels = tokenizer.fit_rows(ShardedMatrix(shards, dim=dim), store=store, progress=steps)
        mean = sum((each.sums for each in scans), np.zeros(dim)) / len(catalogue)
        steps.start("evaluate", total=len(catalogue))
        tokenizer.report = _evaluate(shards, tokenizer, mean, levels, trained, started)
        steps.step(len(catalogue))
        rows = tuple(last - first for first, last in spans)
        return RayFit(
            len(shares), rows, shards.pool.lost, shards.sent, shards.received, shards.passed
        )
    finally:
        shards.close()


def _make_worker(
    catalogue: Catalogue, shares: list[list[Unit]], options: dict[str, Any], place: int
) -> FitWorker:
    return FitWorker(catalogue, shares[place], **options)


def _everyone(shards: RayShardPool, method: str, *arguments: Any) -> dict[int, Any]:
    return shards.pool.ask(dict.fromkeys(range(shards.pool.size), (method, arguments)))


def _evaluate(
    shards: RayShardPool,
    tokenizer: Tokenizer,
    mean: npt.NDArray[np.float64],
    levels: list[dict[str, Any]],
    trained: int,
    started: float,
) -> FitReport:
    """Judge every row once; ids meet in parts, so no machine holds those of all items."""
    model = shards.ray.put(tokenizer)
    counters = list(_everyone(shards, "evaluate", model, mean).values())
    whole = counters[0]
    for counter in counters[1:]:
        whole.merge(counter)
    size = shards.pool.size
    collisions = merge_collisions(_counted(shards, size, model, mean))
    return FitReport.of(
        whole.verdict(tokenizer.codebooks, collisions=collisions),
        items=whole.training.rows + whole.validation.rows,
        trained_items=trained,
        seconds=time.monotonic() - started,
        details={"levels": levels},
    )


def _counted(
    shards: RayShardPool, size: int, model: Any, mean: npt.NDArray[np.float64]
) -> list[Any]:
    """Bring equal ids together, each part in one worker, and count them there."""
    for attempt in range(shards.pool.retries + 1):
        try:
            pieces = [
                shards.pool.actors[place].pieces.options(num_returns=size).remote("split", size)
                for place in range(size)
            ]
            parts = [piece if size > 1 else [piece] for piece in pieces]
            counted = [
                shards.pool.start(part, "count", *(row[part] for row in parts))
                for part in range(size)
            ]
            results = [shards.pool.get(ref) for ref in counted]
            return [result for result in results if result is not None]
        except (shards.ray.exceptions.RayActorError, shards.ray.exceptions.ObjectLostError) as lost:
            for place in shards.pool.ended():
                shards.pool.replace_worker(place, attempt, lost)
                shards.pool.ask({place: ("evaluate", (model, mean))})
    raise EmbeddingError("workers ended again and again while the codes were counted")
