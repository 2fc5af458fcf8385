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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from semid.codes import ids_schema
from semid.distributed.encode_job import (
    Done,
    EncodeJob,
    Encoder,
    check_engine_options,
    open_output,
    partial_path,
    refuse_repeats,
)
from semid.distributed.ray_workers import Crew, RayOptions, check_slots, connect
from semid.distributed.units import UNIT_ROWS, Catalogue, Estimate, Unit, estimate_encode
from semid.errors import EmbeddingError, InputError
from semid.filesystems import FilePath
from semid.loading import load_tokenizer
from semid.output import claim_output
from semid.progress import Progress, QuietProgress
from semid.quantization.threads import default_threads
from semid.runs import remove_state_folder

__all__ = ["EncodeRun", "LocalOptions", "encode_folder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """Processes of this machine.

    Attributes:
        processes: how many; None takes one for every CPU this process may use.
        retries: how often a process that ends is replaced before the run gives up.
    """

    processes: int | None = None
    retries: int = 3


@dataclass(frozen=True)
class EncodeRun:
    """What a run did.

    Attributes:
        rows: rows of the output.
        encoded: rows encoded in this call (less than all after a resume).
        by_process: process id -> rows it encoded.
        lost: workers that ended and were replaced.
        estimate: what was expected of it; None if nothing was left to do.
    """

    rows: int
    encoded: int
    by_process: dict[int, int]
    lost: int
    estimate: Estimate | None


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
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> EncodeRun:
    """Encode Parquet files with several workers; the codes are those of `Tokenizer.encode`.

    Args:
        model: artefact folder or URI that every worker can read.
        source: Parquet file, folder, glob or URI.
        output: a ``.parquet`` file, or a folder or URI that receives a file a unit.
        engine: processes of this machine (default), or actors of Ray.
        embedding_column: as for `semid.open_embeddings`.
        id_column: as for `semid.open_embeddings`.
        on_invalid: ``error`` refuses null, NaN and infinite rows; ``skip`` leaves them out.
        beam_width: partial codes kept a row; None takes the tokenizer's own.
        unit_rows: rows after which a unit is full.
        overwrite: replace what is at ``output``.
        resume: continue an unfinished run; units that are done are not encoded again.
        progress: told about every unit; silent by default.
        announce: told the estimate before the run; logged by default.

    Returns:
        Who encoded what.

    Raises:
        UsageError: a wrong option, or workers that would not fit the cluster.
        OutputExistsError: ``output`` or an unfinished run towards it exists.
        ArtefactError: the unfinished run belongs to another model or source.
        EmbeddingError: rows that cannot be used.
        IdsError: item ids repeat, within a unit or among units.
        InputError: workers end again and again.

    Cost: a worker holds a few blocks and one unit's codes; this process 8 bytes an item, with which
    repeated ids are found.
    """
    steps = progress or QuietProgress()
    state = partial_path(output)
    with claim_output(output, overwrite=overwrite, inputs=[model, source], state=state):
        catalogue = Catalogue.open(source, embedding_column=embedding_column, id_column=id_column)
        check_engine_options(on_invalid, catalogue, several=True)
        tokenizer = load_tokenizer(model)
        info = tokenizer.codes_info(beam_width)
        where = open_output(output, resume=resume, info=info, catalogue=catalogue)
        units = catalogue.units(unit_rows)
        finished = where.finished()
        missing = [unit for unit in units if unit.name not in finished]
        job = EncodeJob(_absolute(model), catalogue, where.parts.path, info, where.key, on_invalid)
        done: list[Done] = []
        run = _RayRun(job, engine) if isinstance(engine, RayOptions) else _LocalRun(job, engine)
        estimate = None
        steps.start("encode", total=len(catalogue))
        try:
            if units:
                workers = run.size(len(units))
                if missing:
                    estimate = estimate_encode(
                        tokenizer,
                        catalogue,
                        missing,
                        beam_width=info.beam_width,
                        workers=workers,
                        engine=run.name,
                    )
                    (announce or logger.info)(estimate.sentence)
                rows = {unit.name: unit.rows for unit in units}
                # Workers get the finished units too: they read the rows again, to see whether
                # they have changed, and encode only those that have.
                for each in run.results(units, workers):
                    done.append(each)
                    steps.step(rows[each.name])
        except EmbeddingError:  # these rows will not become right: leave nothing to resume
            remove_state_folder(state)
            raise
        if catalogue.id_column is not None:
            refuse_repeats([each.hashes for each in done])
        where.publish(done, ids_schema(catalogue.id_type, info), overwrite=overwrite)
    encoded = [each for each in done if each.encoded]
    by_process: dict[int, int] = {}
    for each in encoded:
        by_process[each.process] = by_process.get(each.process, 0) + each.rows
    return EncodeRun(
        sum(each.rows for each in done),
        sum(each.rows for each in encoded),
        by_process,
        run.lost,
        estimate,
    )


def _absolute(path: FilePath) -> FilePath:
    """A worker may stand in another folder."""
    return path if "://" in str(path) else os.path.abspath(path)  # noqa: PTH100 - keeps its text


class _LocalRun:
    """Units over processes of this machine, each started afresh (no fork of torch's threads)."""

    name = "local"

    def __init__(self, job: EncodeJob, options: LocalOptions | None) -> None:
        self.job, self.options = job, options or LocalOptions()
        self.lost = 0

    def size(self, units: int) -> int:
        """Return the number of processes to start."""
        return max(1, min(self.options.processes or default_threads(), units))

    def results(self, units: Sequence[Unit], workers: int) -> Iterator[Done]:
        """Yield units as they are done; a process that ends costs the units it had begun."""
        left = {unit.name: unit for unit in units}
        for attempt in range(self.options.retries + 1):
            try:
                for done in self._once(list(left.values()), workers):
                    del left[done.name]
                    yield done
                return
            except BrokenProcessPool:
                self.lost += 1
                logger.warning("a process ended (attempt %d); its units are begun again", attempt)
        raise InputError(
            f"processes ended {self.lost} times, {len(left)} units are left; this machine is "
            "probably out of memory: use fewer --processes, then --resume"
        )

    def _once(self, units: list[Unit], workers: int) -> Iterator[Done]:
        threads = max(1, default_threads() // workers)
        with ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self.job, threads),
        ) as pool:
            # Two units a process in flight: none waits, and few are begun when one ends.
            waiting = list(reversed(units))
            running: set[Future[Done]] = set()
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    running.add(pool.submit(_encode, waiting.pop()))
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()


_ENCODER: Encoder | None = None


def _begin(job: EncodeJob, threads: int) -> None:
    """Load the artefact, once a process, and end when the driver does.

    A pool's process waits for work on a pipe of which it holds both ends itself, so without this
    it would outlive a driver that is killed.
    """
    global _ENCODER
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    _ENCODER = Encoder(job, threads=threads)


def _follow(sentinel: int) -> None:
    """End this process at once when the one behind ``sentinel`` has ended."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode(unit: Unit) -> Done:
    assert _ENCODER is not None
    return _ENCODER.encode(unit)


class _RayRun:
    """Units over actors; an actor takes the next one when it has finished the last."""

    name = "ray"

    def __init__(self, job: EncodeJob, options: RayOptions) -> None:
        self.job, self.options = job, options
        self.ray = connect(options)
        self.lost = 0

    def size(self, units: int) -> int:
        """Return the number of actors to start."""
        return min(check_slots(self.ray, self.options), units)

    def results(self, units: Sequence[Unit], workers: int) -> Iterator[Done]:
        """Yield units as they are done; an actor that ends is replaced and its unit done again."""
        crew = Crew(
            self.ray,
            _Maker(self.job, self.options.cpus_per_worker),
            size=workers,
            cpus=self.options.cpus_per_worker,
            retries=self.options.retries,
            restore=lambda place: (),
        )
        try:
            yield from self._handed_out(crew, list(reversed(units)))
        finally:
            self.lost = crew.lost
            crew.close()

    def _handed_out(self, crew: Crew, waiting: list[Unit]) -> Iterator[Done]:
        running: dict[Any, tuple[int, Unit, int]] = {}

        def begin(place: int, unit: Unit, attempt: int) -> None:
            running[crew.start(place, "encode", unit)] = (place, unit, attempt)

        for place in range(crew.size):
            begin(place, waiting.pop(), 0)
        while running:
            (ready, *_), _ = self.ray.wait(list(running), num_returns=1)
            place, unit, attempt = running.pop(ready)
            try:
                done = crew.get(ready)
            except self.ray.exceptions.RayActorError as error:
                crew.remake(place, attempt, error)
                begin(place, unit, attempt + 1)
                continue
            if waiting:
                begin(place, waiting.pop(), 0)
            yield done


class _Maker:
    """Makes the encoder of an actor; travels to it."""

    def __init__(self, job: EncodeJob, threads: int) -> None:
        self.job, self.threads = job, threads

    def __call__(self, place: int) -> Encoder:
        return Encoder(self.job, threads=self.threads)
