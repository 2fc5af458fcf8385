"""``semid encode`` over a folder: units handed to local processes or to Ray's actors.

Neither engine sees a row: a worker reads its row groups, encodes them and writes the file. What
travels is the number of a unit, and the hashes of its item ids back.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from semid.codes import CodesInfo, ids_schema
from semid.distributed.ray_workers import Actors, RayOptions, check_slots, connect
from semid.distributed.units import UNIT_ROWS, Catalogue, Estimate, Unit, estimate_encode
from semid.errors import ArtefactError, EmbeddingError, InputError, UsageError
from semid.filesystems import FilePath, is_uri
from semid.loading import load_tokenizer
from semid.output import claim_output
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.threads import default_threads
from semid.runs import partial_path
from semid.tokenizers.encoding import EncodedPart, PartFolder, refuse_repeats
from semid.training.checkpoint import run_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """Processes of this machine."""

    processes: int | None = None  # None takes one for every CPU this process may use
    retries: int = 3  # how often a process that ends is replaced before the run gives up


@dataclass(frozen=True)
class EncodeRun:
    """The result of a run."""

    rows: int  # rows of the output
    encoded: int  # rows encoded in this call (less than all after a resume)
    by_process: dict[int, int]  # process id -> rows it encoded
    lost: int  # workers that ended and were replaced
    estimate: Estimate | None  # the expected time; None if nothing was left to do


@dataclass(frozen=True)
class EncodeJob:
    """What every worker needs to know; small, and can be sent."""

    model: FilePath  # folder or URI of the artefact, which workers load by themselves
    catalogue: Catalogue  # the embeddings
    parts: FilePath  # folder that receives a file per unit
    info: CodesInfo  # metadata of the ids
    key: str  # identifies the run; every part is signed with it
    on_invalid: str = "error"  # ``error`` or ``skip``, as for `semid.open_embeddings`


class EncodeWorker:
    """A worker: loads the artefact once, refuses one that has changed, and encodes units."""

    def __init__(self, job: EncodeJob, *, threads: int | None = 1) -> None:
        self.job = job
        self.tokenizer = load_tokenizer(job.model)
        self.tokenizer.threads = threads
        if self.tokenizer.weights_fingerprint != job.info.weights_fingerprint:
            raise ArtefactError(
                f"'{job.model}' has changed since this run began; put the model back, or encode "
                "afresh into another output"
            )
        self.parts = PartFolder(job.parts, job.info, job.key)

    def encode(self, unit: Unit) -> EncodedPart:
        """Encode one unit and write its file, unless it is there and its rows have not changed."""
        source = self.job.catalogue.source([unit])
        if self.job.on_invalid == "skip":
            usable = source.valid_rows()
            source = source if usable.all() else source.subset(usable)
        return self.parts.encode(
            unit.name,
            source.ids,
            read=lambda: (block for _, block in source.blocks(BLOCK_ROWS, copy=False)),
            encode=lambda: self.tokenizer.encode_blocks(
                source, beam_width=self.job.info.beam_width
            ),
        )


def encode_key(info: CodesInfo, catalogue: Catalogue) -> str:
    """Return what identifies a run: the model, the beam, the files and their row groups."""
    files = catalogue.files
    data = {"paths": [str(p) for p in files.paths], "groups": files.row_groups}
    return run_key({**asdict(info), "columns": [catalogue.column, catalogue.id_column]}, str(data))


@with_progress
def encode_folder(
    model: FilePath,
    source: FilePath,
    output: FilePath,
    *,
    engine: LocalOptions | RayOptions | None = None,
    embedding_column: str | None = None,
    id_column: str | None = None,
    on_invalid: str = "error",
    beam_width: int | None = None,
    unit_rows: int = UNIT_ROWS,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressArgument = None,
    announce: Callable[[str], None] | None = None,
) -> EncodeRun:
    """Encode Parquet files with several workers; the codes are those of `Tokenizer.encode`.

    Cost: a worker holds a few blocks and one unit's codes; this process 8 bytes per item, with
    which repeated ids are found.
    """
    progress = progress or QuietProgress()
    state = partial_path(output)
    with claim_output(output, overwrite=overwrite, inputs=[model, source], state=state):
        # Footers alone are read here: they say which row groups there are and how wide rows are.
        catalogue = Catalogue.open(source, embedding_column=embedding_column, id_column=id_column)
        if on_invalid not in ("error", "skip"):
            raise UsageError(f"--on-invalid '{on_invalid}' is neither 'error' nor 'skip'")
        catalogue.check_local(what="another process")
        tokenizer = load_tokenizer(model)
        info = tokenizer.codes_info(beam_width)
        # The folder of parts is the whole state of a run: a killed driver needs nothing else.
        folder = PartFolder(state, info, encode_key(info, catalogue))
        folder.begin(resume=resume)
        units = catalogue.units(unit_rows)
        finished = folder.finished()
        missing = [unit for unit in units if unit.name not in finished]
        # Workers may run in another folder.
        model = model if is_uri(model) else os.path.abspath(model)  # noqa: PTH100 - keeps its text
        job = EncodeJob(model, catalogue, state, info, folder.key, on_invalid)
        run = _RayRun(job, engine) if isinstance(engine, RayOptions) else _LocalRun(job, engine)
        parts: list[EncodedPart] = []
        estimate = None
        progress.start("encode", total=len(catalogue))
        try:
            if units:
                workers = run.size(len(units))
                if missing:
                    estimate = estimate_encode(
                        tokenizer, catalogue, missing, info.beam_width, workers, run.name
                    )
                    (announce or logger.info)(estimate.sentence)
                rows = {unit.name: unit.rows for unit in units}
                # Workers get the finished units too: they read the rows again, to see whether
                # they have changed, and encode only those that have.
                for part in run.results(units, workers):
                    parts.append(part)
                    progress.step(rows[part.name], workers=run.workers)
        except EmbeddingError:  # these rows will not become right: leave nothing to resume
            folder.clear()
            raise
        # Each worker sees its own ids alone, so repeats among files show only now.
        if catalogue.id_column is not None:
            refuse_repeats([part.hashes for part in parts])
        folder.publish(
            output,
            parts,
            ids_schema(catalogue.id_type, info),
            overwrite=overwrite,
            single=str(output).lower().endswith(".parquet"),
        )
    by_process: Counter[int] = Counter()
    for part in parts:
        if part.encoded:
            by_process[part.process] += part.rows
    rows_written = sum(part.rows for part in parts)
    return EncodeRun(rows_written, by_process.total(), dict(by_process), run.lost, estimate)


class _LocalRun:
    """Units over processes of this machine, each started afresh (no fork of torch's threads)."""

    name = "local"

    def __init__(self, job: EncodeJob, options: LocalOptions | None) -> None:
        self.job, self.options = job, options or LocalOptions()
        self.lost = self.workers = 0

    def size(self, units: int) -> int:
        """Return the number of processes to start."""
        return max(1, min(self.options.processes or default_threads(), units))

    def results(self, units: Sequence[Unit], workers: int) -> Iterator[EncodedPart]:
        """Yield units as they are done; a process that ends costs the units it had begun."""
        # A broken pool loses all its processes: what is not done is given to a new one.
        remaining = {unit.name: unit for unit in units}
        self.workers = workers
        for attempt in range(self.options.retries + 1):
            try:
                for part in self._once(list(remaining.values()), workers):
                    del remaining[part.name]
                    yield part
                return
            except BrokenProcessPool:
                self.lost += 1
                logger.warning("a process ended (attempt %d); its units are begun again", attempt)
        raise InputError(
            f"processes ended {self.lost} times, {len(remaining)} units are left; this machine is "
            "probably out of memory: use fewer --processes, then --resume"
        )

    def _once(self, units: list[Unit], workers: int) -> Iterator[EncodedPart]:
        threads = max(1, default_threads() // workers)
        with ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self.job, threads),
        ) as pool:
            # Two units per process in flight: none waits, and few are begun when one ends.
            waiting = list(reversed(units))
            running: set[Future[EncodedPart]] = set()
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    running.add(pool.submit(_encode, waiting.pop()))
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()


_WORKER: EncodeWorker | None = None


def _begin(job: EncodeJob, threads: int) -> None:
    """Load the artefact, once per process, and end when the driver does.

    A pool's process waits for work on a pipe of which it holds both ends itself, so without this
    it would outlive a driver that is killed.
    """
    global _WORKER
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _WORKER = EncodeWorker(job, threads=threads)


def _encode(unit: Unit) -> EncodedPart:
    assert _WORKER is not None
    return _WORKER.encode(unit)


def _make_worker(job: EncodeJob, threads: int, place: int) -> EncodeWorker:
    return EncodeWorker(job, threads=threads)


class _RayRun:
    """Units over actors; an actor takes the next one when it has finished the last."""

    name = "ray"

    def __init__(self, job: EncodeJob, options: RayOptions) -> None:
        self.job, self.options = job, options
        self.ray = connect(options)
        self.lost = self.workers = 0

    def size(self, units: int) -> int:
        """Return the number of actors to start."""
        return min(check_slots(self.ray, self.options), units)

    def results(self, units: Sequence[Unit], workers: int) -> Iterator[EncodedPart]:
        """Yield units as they are done; the unit of an actor that ends is done again.

        A new actor is asked for, and those that are left go on without waiting for it.
        """
        make = partial(_make_worker, self.job, self.options.cpus_per_worker)
        actors = Actors(self.ray, self.options)
        waiting = deque(units)
        # Call of an actor -> the actor and its unit; None while it starts.
        running: dict[Any, tuple[Any, Unit | None]] = {}
        failures: Counter[Unit] = Counter()
        error: Exception | None = None
        deadline = time.monotonic() + self.options.wait_seconds

        def begin() -> None:
            actor = actors.begin()
            running[actor.make.remote(make, 0)] = actor, None

        try:
            for _ in range(workers):
                begin()
            while waiting or actors.living:
                now = time.monotonic()
                if actors.living:
                    deadline = now + self.options.wait_seconds
                seconds = None if actors.living else max(deadline - now, 0)
                ready, _ = self.ray.wait(list(running), num_returns=1, timeout=seconds)
                if not ready:
                    raise actors.none_left(error)
                actor, unit = running.pop(ready[0])
                try:
                    part = actors.get(ready[0])
                except actors.losses as caught:
                    error = caught
                    actors.end(actor, lost=unit is not None)
                    if unit is None:  # sent to a machine that Ray has not missed yet
                        if now >= deadline:
                            raise actors.none_left(error) from None
                        time.sleep(1)
                        begin()
                        continue
                    failures[unit] += 1
                    if failures[unit] > self.options.retries:
                        raise actors.gave_up(f"'{unit.name}'", failures[unit], error) from None
                    logger.warning(
                        "a worker ended; its unit is done again, %d of %d workers live",
                        *(len(actors.living), workers),
                    )
                    waiting.appendleft(unit)
                    begin()
                    continue
                if unit is None:
                    actors.living.append(actor)
                self.workers = len(actors.living)
                # The worker gets its next unit before the caller looks at this one's result.
                if waiting:
                    later = waiting.popleft()
                    running[actor.call.remote(0, "encode", later)] = actor, later
                else:  # its CPU slot may serve a unit whose worker ends
                    actors.end(actor)
                if unit is not None:
                    yield part
        finally:
            self.lost = actors.lost
            actors.close()
