"""``semid fit --engine ray``: residual K-means over rows held by many workers."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.sharding import Shard, ShardedMatrix
from semid.quantization.sums import Node, merge_nodes
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer
from semid.tokenizers.context import check_enough
from semid.tokenizers.factory import make_tokenizer
from semid.tokenizers.fit_report import FitReport, HealthCounter
from semid.tokenizers.rqkmeans import RQKMeans
from semid.training.checkpoint import open_checkpoint, run_key
from semid.training.gathering import shard_spans

__all__ = [
    "FitWorker",
    "Look",
    "RayFit",
    "describe_tokenizer",
    "fit_on_ray",
    "revive_tokenizer",
    "shard_loads",
    "share_units",
]


@dataclass(frozen=True)
class Look:
    """What a worker saw in its row groups.

    Attributes:
        train: training rows of each unit.
        sums: ``(dim,)`` float64 sum of all rows.
        few: the smallest hashes of different rows, at most as many as there are codewords.
        digests: one digest a unit of its rows and of who is held out.
    """

    train: list[int]
    sums: npt.NDArray[np.float64]
    few: npt.NDArray[np.uint64]
    digests: list[str]


class FitWorker:
    """One worker's state.

    Args:
        catalogue: the embeddings.
        units: the units it looks at and judges, one after another.
        held_out: share of the items held out.
        codes: codewords of the largest level.
        threads: plain threads.
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

    def look(self) -> Look:
        """Read the units once.

        Raises:
            EmbeddingError: rows hold null, NaN or inf.
            IdsError: ids repeat within the units.
        """
        train, digests, hashes = [], [], [np.empty(0, np.uint64)]
        sums: npt.NDArray[np.float64] | float = 0.0
        for unit in self.units:
            source = self.catalogue.source([unit])
            kept = ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)
            digest = hashlib.sha256(np.packbits(kept).tobytes())
            for _, block in source.blocks():
                sums = sums + block.sum(axis=0, dtype=np.float64)
                found = row_hashes(block)
                digest.update(found.tobytes())
                hashes.append(found)
            train.append(int(kept.sum()))
            digests.append(digest.hexdigest())
        self._hashes = np.concatenate(hashes)
        few = np.unique(self._hashes)[: self.codes]
        return Look(train, np.asarray(sums), few, digests)

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
        kept = np.flatnonzero(~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT))
        self.shard = Shard(
            source.subset(kept[skip : skip + rows]),
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

    def judge(self, model: Mapping[str, Any], mean: npt.NDArray[np.float64]) -> HealthCounter:
        """Encode and decode the units' rows, and count.

        Args:
            model: what `describe_tokenizer` gave.
            mean: ``(dim,)`` mean of all rows.
        """
        tokenizer = revive_tokenizer(model)
        tokenizer.threads = self.threads  # type: ignore[attr-defined]
        counter = HealthCounter(tokenizer.codebook_sizes, mean)
        done = 0
        for unit in self.units:
            source = self.catalogue.source([unit])
            kept = ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)
            for block in tokenizer.encode_blocks(source):
                span = slice(block.start, block.start + len(block.x))
                known = None if self._hashes is None else self._hashes[done : done + len(block.x)]
                counter.update(
                    block.codes,
                    block.x,
                    tokenizer._decode_codes(block.codes),
                    latent=tokenizer._latent_block(block.x),
                    train=kept[span],
                    row_hashes=row_hashes(block.x) if known is None else known,
                )
                done += len(block.x)
        # The ids themselves stay here: they are shared out by `split` and counted in parts.
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


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a fitted tokenizer as plain data, for a worker that cannot read its folder yet."""
    return {
        "kind": tokenizer.kind,
        "settings": tokenizer.settings,
        "dim": tokenizer.dim,
        "tensors": tokenizer._tensors(),
    }


def revive_tokenizer(model: Mapping[str, Any]) -> Tokenizer:
    """Make a tokenizer of what `describe_tokenizer` gave."""
    tokenizer = make_tokenizer(model["kind"], dict(model["settings"]))
    tokenizer._set_tensors({name: np.array(value) for name, value in model["tensors"].items()})
    tokenizer._dim = int(model["dim"])
    return tokenizer


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
    for unit, own in zip(units, owner, strict=True):
        runs[own].append(unit)
    return runs


def shard_loads(
    units: Sequence[Unit], train: Sequence[int], workers: int
) -> tuple[list[tuple[Any, ...]], list[tuple[int, int]]]:
    """Lay out the training rows: arguments of `FitWorker.load`, and the rows of each worker.

    Args:
        units: all units, in order.
        train: training rows in each.
        workers: number of shards.
    """
    stops = np.cumsum(train, dtype=np.int64)
    spans = shard_spans(int(stops[-1]), workers)
    loads: list[tuple[Any, ...]] = []
    for first, last in spans:
        low = int(np.searchsorted(stops, first, side="right"))
        high = int(np.searchsorted(stops, last, side="left")) + 1
        own = list(units[low:high]) if last > first else []
        skip = first - int(stops[low] - train[low]) if own else 0
        loads.append((own, skip, first, last - first))
    return loads, spans


def fit_on_ray(
    tokenizer: RQKMeans,
    catalogue: Catalogue,
    *,
    options: RayOptions | None = None,
    memory_bytes: int = 4 << 30,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> RayFit:
    """Fit a tokenizer in place; its codebooks are those of `RQKMeans.fit`, bit for bit.

    Args:
        tokenizer: not fitted yet; its ``threads`` are not used, a worker has its CPUs.
        catalogue: the embeddings.
        options: workers, CPUs, cluster.
        memory_bytes: a worker holds its training rows as float32 up to this size, and reads them
            at every pass above it.
        checkpoint: folder on the driver for the state of the run.
        resume: continue from ``checkpoint``.
        progress: told about every step; silent by default.

    Returns:
        Who held what, and how much travelled.

    Raises:
        UsageError: the workers would not fit the cluster, or could not see the files.
        InputError: the object store is too small, or workers end again and again.
        EmbeddingError: NaN or inf, or fewer distinct rows than codewords.
        ArtefactError: the checkpoint belongs to another run.

    Cost: two reads of the rows; per iteration a pass over each worker's rows and O(workers codes
    dim) bytes; a worker holds its share of the rows, the driver O(blocks + codes dim).
    """
    options = options or RayOptions()
    steps = progress or QuietProgress()
    began = time.monotonic()
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
    make = _Maker(catalogue, shares, tokenizer, options.cpus_per_worker, memory_bytes)
    team = RayShardPool(
        ray, make, size=len(shares), cpus=options.cpus_per_worker, retries=options.retries
    )
    try:
        steps.start("read", total=len(catalogue))
        looks: list[Look] = list(_everyone(team, "look").values())
        steps.step(len(catalogue))
        train = [count for look in looks for count in look.train]
        trained = sum(train)
        distinct = len(np.unique(np.concatenate([look.few for look in looks])))
        check_enough(
            distinct,
            tokenizer.codebook_sizes,
            trained=trained,
            held_out=tokenizer.validation_fraction,
        )
        digest = hashlib.sha256("".join(d for k in looks for d in k.digests).encode())
        key = run_key({"kind": tokenizer.kind, **tokenizer.settings}, digest.hexdigest())
        loads, spans = shard_loads(units, train, len(shares))
        with open_checkpoint(checkpoint, key=key, resume=resume) as store:
            team.load(loads, spans)
            levels = tokenizer.fit_rows(ShardedMatrix(team, dim=dim), store=store, progress=steps)
        mean = sum((look.sums for look in looks), np.zeros(dim)) / len(catalogue)
        steps.start("judge", total=len(catalogue))
        tokenizer.report = _judge(team, tokenizer, mean, levels, trained, began)
        steps.step(len(catalogue))
        rows = tuple(last - first for first, last in spans)
        return RayFit(len(shares), rows, team.crew.lost, team.sent, team.received, team.passed)
    finally:
        team.close()


class _Maker:
    """Makes the worker of a place; travels to the actor."""

    def __init__(
        self,
        catalogue: Catalogue,
        shares: list[list[Unit]],
        tokenizer: RQKMeans,
        threads: int,
        memory_bytes: int,
    ) -> None:
        self.catalogue, self.shares = catalogue, shares
        self.held_out, self.codes = tokenizer.validation_fraction, max(tokenizer.codebook_sizes)
        self.threads, self.memory_bytes = threads, memory_bytes

    def __call__(self, place: int) -> FitWorker:
        return FitWorker(
            self.catalogue,
            self.shares[place],
            held_out=self.held_out,
            codes=self.codes,
            threads=self.threads,
            memory_bytes=self.memory_bytes,
        )


def _everyone(team: RayShardPool, method: str, *arguments: Any) -> dict[int, Any]:
    return team.crew.ask(dict.fromkeys(range(team.crew.size), (method, arguments)))


def _judge(
    team: RayShardPool,
    tokenizer: RQKMeans,
    mean: npt.NDArray[np.float64],
    levels: list[dict[str, Any]],
    trained: int,
    began: float,
) -> FitReport:
    """Judge every row once; ids meet in parts, so no machine holds those of all items."""
    model = team.ray.put(describe_tokenizer(tokenizer))
    counters = list(_everyone(team, "judge", model, mean).values())
    whole = counters[0]
    for counter in counters[1:]:
        whole.merge(counter)
    size = team.crew.size
    collisions = merge_collisions(_counted(team, size, model, mean))
    judged = whole.verdict(tokenizer.codebooks, collisions=collisions)
    items = whole.training.rows + whole.validation.rows
    return FitReport(
        items=items,
        trained_items=trained,
        held_out_items=items - trained,
        seconds=round(time.monotonic() - began, 3),
        details={"levels": levels},
        health=judged,
        summary=judged.summary(),
    )


def _counted(team: RayShardPool, size: int, model: Any, mean: npt.NDArray[np.float64]) -> list[Any]:
    """Bring equal ids together, each part in one worker, and count them there."""
    for attempt in range(team.crew.retries + 1):
        try:
            pieces = [
                team.crew.actors[place].pieces.options(num_returns=size).remote("split", size)
                for place in range(size)
            ]
            parts = [piece if size > 1 else [piece] for piece in pieces]
            counted = [
                team.crew.start(part, "count", *(row[part] for row in parts))
                for part in range(size)
            ]
            return [found for ref in counted if (found := team.crew.get(ref)) is not None]
        except (team.ray.exceptions.RayActorError, team.ray.exceptions.ObjectLostError) as lost:
            for place in team.crew.dead():
                team.crew.remake(place, attempt, lost)
                team.crew.ask({place: ("judge", (model, mean))})
    raise EmbeddingError("workers ended again and again while the codes were counted")
