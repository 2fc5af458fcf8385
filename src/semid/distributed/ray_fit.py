"""``semid fit --engine ray``: residual K-means over rows held by many workers, and Ray Train."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.distributed.ray_shards import RayShardPool
from semid.distributed.ray_workers import (
    RayOptions,
    WorkerPool,
    check_slots,
    check_store,
    connect,
)
from semid.distributed.units import Catalogue, Unit
from semid.errors import InputError, MissingExtraError
from semid.filesystems import FilePath, is_uri
from semid.health import CollisionCounter, Collisions, merge_collisions, row_hashes
from semid.loading import load_tokenizer
from semid.progress import Progress, ProgressArgument, QuietProgress, with_progress
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
    """One worker's state: it scans and evaluates its units, and holds a shard of training rows.

    ``codes`` are the codewords of the largest level; training rows are held as float32 up to
    ``memory_bytes``.
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

    def _open(self, units: Sequence[Unit]) -> tuple[EmbeddingSource, npt.NDArray[np.bool_]]:
        """Open the rows of units; return them and the mask of the training rows among them."""
        source = self.catalogue.source(units)
        return source, ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)

    def scan(self) -> ShardScan:
        """Read the units once."""
        train, digests, hashes = [], [], [np.empty(0, np.uint64)]
        sums: npt.NDArray[np.float64] | float = 0.0
        for unit in self.units:
            source, is_train = self._open([unit])
            # The digest names the rows and which of them train: a resume on others is refused.
            digest = hashlib.sha256(np.packbits(is_train).tobytes())
            # The mean of all rows is what relative errors are measured against.
            for _, block in source.blocks():
                sums = sums + block.sum(axis=0, dtype=np.float64)
                block_hashes = row_hashes(block)
                digest.update(block_hashes.tobytes())
                hashes.append(block_hashes)
            train.append(int(is_train.sum()))
            digests.append(digest.hexdigest())
        self._hashes = np.concatenate(hashes)
        # Enough to count the distinct rows of all workers up to the number of codewords.
        smallest = np.unique(self._hashes)[: self.codes]
        return ShardScan(train, np.asarray(sums), smallest, digests)

    def load(self, units: Sequence[Unit], skip: int, first_row: int, rows: int) -> int:
        """Take a shard of the training rows of some units; return its number of rows.

        The first ``skip`` training rows of the units belong to the shard before; ``first_row`` is
        the number of the shard's first row among all training rows.
        """
        if rows == 0:
            units = self.units[:1] or self.catalogue.units()[:1]
        source, is_train = self._open(units)
        train = np.flatnonzero(is_train)
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
        """Encode and decode the units' rows, and count; ``mean`` is that of all rows (dim,)."""
        tokenizer.threads = self.threads
        # Errors and usage add up over workers; equal ids of different workers meet in `count`.
        counter = HealthCounter(tokenizer.codebook_sizes, mean)
        done = 0
        for unit in self.units:
            source, is_train = self._open([unit])
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
    """What a fit on Ray was, beside the tokenizer."""

    workers: int  # actors that held shards
    rows: tuple[int, ...]  # training rows of each
    lost: int  # workers that ended and were made again
    sent: dict[str, int]  # method -> bytes from the driver to workers
    received: dict[str, int]  # method -> bytes from workers to the driver
    passed: dict[str, int]  # method -> bytes between workers


def share_units(units: Sequence[Unit], shares: int) -> list[list[Unit]]:
    """Cut units that follow one another into ``shares`` runs of nearly equal numbers of rows."""
    rows = np.array([unit.rows for unit in units])
    middles = np.cumsum(rows) - rows / 2  # a unit belongs to the share in which its middle lies
    owner = np.minimum((middles * shares / max(int(rows.sum()), 1)).astype(int), shares - 1)
    runs: list[list[Unit]] = [[] for _ in range(shares)]
    for unit, share in zip(units, owner, strict=True):
        runs[share].append(unit)
    return runs


def shard_loads(
    units: Sequence[Unit], train: Sequence[int], workers: int
) -> tuple[list[tuple[Any, ...]], list[tuple[int, int]]]:
    """Lay out the training rows: arguments of `FitWorker.load`, and the rows of each worker."""
    # Shards are cut between blocks of training rows, which units and files do not know of.
    stops = np.cumsum(train, dtype=np.int64)
    spans = shard_spans(int(stops[-1]), workers)
    loads: list[tuple[Any, ...]] = []
    for first, last in spans:
        # The units in which the shard's first and last training row lie.
        low = int(np.searchsorted(stops, first, side="right"))
        high = int(np.searchsorted(stops, last, side="left")) + 1
        shard_units = list(units[low:high]) if last > first else []
        skip = first - int(stops[low] - train[low]) if shard_units else 0
        loads.append((shard_units, skip, first, last - first))
    return loads, spans


@with_progress
def fit_on_ray(
    tokenizer: Tokenizer,
    catalogue: Catalogue,
    *,
    options: RayOptions | None = None,
    memory_bytes: int = 4 << 30,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: ProgressArgument = None,
) -> RayFit:
    """Fit a tokenizer in place; its codebooks are those of `Tokenizer.fit`, bit for bit.

    Returns who held what, and how much travelled.

    Cost: two reads of the rows; per iteration a pass over each worker's rows and O(workers codes
    dim) bytes; a worker holds its share of the rows, the driver O(blocks + codes dim).
    """
    options = options or RayOptions()
    steps: Progress = progress or QuietProgress()
    started = time.monotonic()
    catalogue.check_local(what="a worker")
    units = catalogue.units()
    check_enough(len(catalogue), tokenizer.codebook_sizes)
    ray = connect(options)
    workers = check_slots(ray, options)
    shares = [share for share in share_units(units, workers) if share]
    first = catalogue.source(units[:1])
    dim = first.dim
    largest = max(tokenizer.codebook_sizes)
    # Of a sum, a pair and its result are in the store at one time, four nodes each at worst.
    # Mixtures sum squares beside rows.
    columns = (dim if tokenizer.encodes_nearest else 2 * dim) + 1
    check_store(ray, 3 * 4 * largest * columns * 8, what=f"the sums of {largest} x {dim} codewords")
    held_out = tokenizer.validation_fraction

    def make(place: int) -> FitWorker:
        return FitWorker(
            catalogue,
            shares[place],
            held_out=held_out,
            codes=largest,
            threads=options.cpus_per_worker,
            memory_bytes=memory_bytes,
        )

    shards = RayShardPool(ray, make, options, size=len(shares))
    steps = _CountedWorkers(steps, shards.pool)
    try:
        steps.start("read", total=len(catalogue))
        scans: list[ShardScan] = shards.pool.ask_all("scan")
        steps.step(len(catalogue))
        train = [count for each in scans for count in each.train]
        trained = sum(train)
        distinct = len(np.unique(np.concatenate([each.smallest_hashes for each in scans])))
        check_enough(distinct, tokenizer.codebook_sizes, trained=trained, held_out=held_out)
        digest = hashlib.sha256("".join(d for k in scans for d in k.digests).encode())
        key = run_key({"kind": tokenizer.kind, **tokenizer.settings}, digest.hexdigest())
        loads, spans = shard_loads(units, train, len(shares))
        with open_checkpoint(checkpoint, key=key, resume=resume) as store:
            shards.load(loads, spans)
            levels = tokenizer.fit_rows(ShardedMatrix(shards, dim=dim), store=store, progress=steps)
        mean = sum((each.sums for each in scans), np.zeros(dim)) / len(catalogue)
        steps.start("evaluate", total=len(catalogue))
        tokenizer.text_model = first.text_model
        tokenizer.report = _evaluate(shards, tokenizer, mean, levels, trained, started)
        steps.step(len(catalogue))
        rows = tuple(last - first for first, last in spans)
        return RayFit(
            len(shares), rows, shards.pool.lost, shards.sent, shards.received, shards.passed
        )
    finally:
        shards.close()


class _CountedWorkers:
    """Progress whose figures say how many workers live."""

    def __init__(self, progress: Progress, pool: WorkerPool) -> None:
        self.progress, self.pool = progress, pool
        self.start, self.close = progress.start, progress.close

    def step(self, done: int = 1, **fields: Any) -> None:
        """Report steps."""
        self.progress.step(done, **fields, workers=len(self.pool.living))


def _evaluate(
    shards: RayShardPool,
    tokenizer: Tokenizer,
    mean: npt.NDArray[np.float64],
    levels: list[dict[str, Any]],
    trained: int,
    started: float,
) -> FitReport:
    """Judge every row once; ids meet in parts, so no machine holds those of all items."""
    # Codes stay with the workers; what comes here grows with codewords and not with items.
    model = shards.ray.put(tokenizer)
    counters = shards.pool.ask_all("evaluate", model, mean)
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
    pool = shards.pool
    lost: Exception = InputError("")
    for attempt in range(pool.retries + 1):
        try:
            split = [
                actor.pieces.options(num_returns=size).remote(place, "split", size)
                for place, actor in enumerate(pool.actors)
            ]
            # Column i of these lists is part i of the ids of all workers.
            parts = zip(*(each if size > 1 else [each] for each in split), strict=True)
            counted = [pool.start(part, "count", *column) for part, column in enumerate(parts)]
            results = [pool.get(ref) for ref in counted]
            return [result for result in results if result is not None]
        except pool.losses as error:
            lost = error
            for place in pool.ended():
                pool.replace_worker(place, attempt, lost)
                pool.ask({place: ("evaluate", (model, mean))})
    raise pool.gave_up("the count of the codes", pool.retries + 1, lost)


def fit_with_ray_train(
    kind: str,
    values: dict[str, Any],
    source: FilePath,
    *,
    columns: dict[str, str | None] | None = None,
    options: RayOptions | None = None,
    checkpoint: FilePath | None = None,
    resume: bool = False,
) -> Tokenizer:
    """Fit a neural tokenizer on Ray Train and return it.

    Ray Train starts the processes and joins them (gloo, or NCCL where there are GPUs), as
    ``torchrun`` does; from there on `fit` runs unchanged, and all processes end with the same
    weights.
    """
    options = options or RayOptions()
    ray = connect(options)
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise MissingExtraError("ray[train]", extra="ray", purpose="Ray Train") from None
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = check_slots(ray, options)
    # The result lies beside the checkpoint, on the disk that the workers share.
    shared = None if checkpoint is None else Path(checkpoint).absolute().parent
    if shared is not None:
        shared.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="semid-train-", dir=shared))
    config = {
        "kind": kind,
        "values": values,
        "source": str(source) if is_uri(source) else os.path.abspath(source),  # noqa: PTH100
        "columns": columns or {},
        "threads": options.cpus_per_worker,
        "output": str(work / "model"),
        "checkpoint": None if checkpoint is None else str(Path(checkpoint).absolute()),
        "resume": resume,
    }
    try:
        TorchTrainer(
            _train,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus >= workers,
                resources_per_worker={"CPU": options.cpus_per_worker},
            ),
            run_config=RunConfig(storage_path=str(work / "ray"), name="semid"),
        ).fit()
        fitted: Tokenizer = load_tokenizer(work / "model")
    except ray.train.TrainingFailedError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"a worker of Ray Train failed: {lines[-1].strip()}; with a checkpoint, --resume "
            "continues the run"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return fitted


def _train(config: dict[str, Any]) -> None:
    """Run in every process: the fit that a single process would do."""
    from semid.data.embeddings import open_embeddings
    from semid.tokenizers.factory import make_tokenizer
    from semid.training.distributed import is_main

    tokenizer = make_tokenizer(config["kind"], config["values"], threads=config["threads"])
    tokenizer.fit(
        open_embeddings(config["source"], **config["columns"]),
        checkpoint=config["checkpoint"],
        resume=config["resume"],
    )
    if is_main():
        tokenizer.save(config["output"])
