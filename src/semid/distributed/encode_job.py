"""Encode a folder of Parquet unit by unit, in any number of processes, and go on after a stop.

What is written depends on the units alone: one file per unit, whole or absent, named so that the
names sort in row order. Who encodes a unit, and in which order, changes nothing. A unit whose file
is there is not encoded again if the file names this run and its rows are still what they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import PARQUET_OPTIONS, CodesInfo, ids_schema, ids_table
from semid.distributed.units import Catalogue, Unit
from semid.errors import ArtefactError, IdsError, OutputExistsError, UsageError
from semid.filesystems import FilePath, Folder, local_path, open_parquet, split_path
from semid.loading import load_tokenizer
from semid.output import atomic_file, atomic_folder, mark_remote_folder
from semid.quantization.blocks import BLOCK_ROWS
from semid.runs import remove_state_folder
from semid.tokenizers.encoding import RowsDigest, is_part, sign_part
from semid.training.checkpoint import run_key

__all__ = [
    "Done",
    "EncodeJob",
    "Encoder",
    "Output",
    "check_engine_options",
    "open_output",
    "partial_path",
    "refuse_repeats",
]

KEY_FILE = "run.json"


@dataclass(frozen=True)
class Done:
    """A unit that was encoded.

    Attributes:
        name: its file.
        rows: rows in it.
        encoded: whether it was encoded now; False if an earlier run had done it.
        process: id of the process that did it.
        digest: SHA-256 of the rows and ids it was made from.
        hashes: ``(rows,)`` uint64 of the item ids, to find repeats among units.
    """

    name: str
    rows: int
    encoded: bool
    process: int
    digest: str
    hashes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class EncodeJob:
    """What every worker needs to know; small, and can be sent.

    Attributes:
        model: folder or URI of the artefact, which workers load by themselves.
        catalogue: the embeddings.
        parts: folder that receives a file per unit.
        info: what the ids carry.
        key: identifies the run; every part carries it.
        on_invalid: ``error`` or ``skip``, as for `semid.open_embeddings`.
    """

    model: FilePath
    catalogue: Catalogue
    parts: FilePath
    info: CodesInfo
    key: str
    on_invalid: str = "error"


class Encoder:
    """A worker: loads the artefact once and encodes units.

    Args:
        job: what to do.
        threads: plain threads; None takes what the machine allows.

    Raises:
        ArtefactError: the artefact is not the one the run began with.
    """

    def __init__(self, job: EncodeJob, *, threads: int | None = 1) -> None:
        self.job = job
        self.tokenizer = load_tokenizer(job.model)
        self.tokenizer.threads = threads
        if self.tokenizer.weights_fingerprint != job.info.weights_fingerprint:
            raise ArtefactError(
                f"'{job.model}' has changed since this run began; put the model back, or encode "
                "afresh into another output"
            )
        self.folder = Folder(job.parts)

    def encode(self, unit: Unit) -> Done:
        """Encode one unit and write its file, unless it is there and its rows have not changed.

        Raises:
            EmbeddingError: rows of another width, or with null, NaN or inf.
            IdsError: item ids repeat within the unit.
        """
        source = self.job.catalogue.source([unit])
        if self.job.on_invalid == "skip":
            usable = source.valid_rows()
            source = source if usable.all() else source.subset(usable)
        items = source.ids.to_arrow()
        hashes = source.ids.hash64()
        info = self.job.info
        if self.folder.exists_file(unit.name):
            rows = (block for _, block in source.blocks(BLOCK_ROWS, copy=False))
            digest = RowsDigest.of(rows, source.ids)
            if is_part(self.folder, unit.name, info, key=self.job.key, digest=digest):
                return Done(unit.name, len(items), False, os.getpid(), digest, hashes)
        tables = [ids_schema(items.type, info).empty_table()]
        digest_of_rows = RowsDigest()
        for block in self.tokenizer.encode_blocks(source, beam_width=info.beam_width):
            part = items.slice(block.start, len(block.x))
            tables.append(ids_table(part, block.codes, block.residual_norms, info))
            digest_of_rows.update(block.x)
        digest = digest_of_rows.finish(source.ids)
        self.folder.write_table(unit.name, pa.concat_tables(tables))
        sign_part(self.folder, unit.name, key=self.job.key, digest=digest)
        return Done(unit.name, len(items), True, os.getpid(), digest, hashes)


def open_output(path: FilePath, *, resume: bool, info: CodesInfo, catalogue: Catalogue) -> Output:
    """Prepare the output of a run, which the caller holds (`semid.output.claim_output`).

    Args:
        path: a ``.parquet`` file, or a folder or URI that receives a file per unit.
        resume: continue an unfinished run towards ``path``.
        info: what the ids carry.
        catalogue: the embeddings.

    Raises:
        OutputExistsError: there is an unfinished run towards ``path``.
        ArtefactError: the unfinished run belongs to another model or other embeddings.
    """
    files = catalogue.files
    seen = {"paths": [str(p) for p in files.paths], "groups": files.row_groups}
    key = run_key({**asdict(info), "columns": [catalogue.column, catalogue.id_column]}, str(seen))
    output = Output(path, info, key)
    stored = output.parts.read(KEY_FILE)
    if stored is not None and not resume:
        raise OutputExistsError(
            f"'{output.parts}' holds an unfinished run; continue it with --resume (resume=True) "
            "or delete that folder"
        )
    if stored is not None and not _same_key(stored, key):
        raise ArtefactError(
            f"'{output.parts}' belongs to a run with another model, beam or source; repeat the "
            "command that began it, or delete that folder"
        )
    output.parts.write(KEY_FILE, json.dumps({"key": key}).encode())
    return output


def _same_key(stored: bytes, key: str) -> bool:
    try:
        return bool(json.loads(stored)["key"] == key)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class Output:
    """Where the ids go, and what of them is there.

    Args:
        path: a ``.parquet`` file, a folder, or a URI of either.
        info: what the ids carry.
        key: identifies the run.
    """

    def __init__(self, path: FilePath, info: CodesInfo, key: str) -> None:
        self.path, self.info, self.key = path, info, key
        self.parts = Folder(partial_path(path))

    def finished(self) -> set[str]:
        """Return the names of the units that are done."""
        return {n.removesuffix(".json") for n in self.parts.names() if n.endswith(".parquet.json")}

    def publish(self, done: Sequence[Done], schema: pa.Schema, *, overwrite: bool) -> None:
        """Put the files in their place, in row order, and end the run.

        On this machine the output appears, or takes the place of the former one, in one step. An
        object store has no such step for a folder: there, the former files are removed, the new
        ones moved, and the marker written last; a run that is stopped meanwhile is continued with
        ``--resume``.

        Args:
            done: every unit.
            schema: of a file of all rows.
            overwrite: replace a former output of semid.

        Raises:
            ArtefactError: a file is not what this run wrote or accepted.
        """
        done = sorted(done, key=lambda unit: unit.name)
        for unit in done:
            self._check(unit)
        single = str(self.path).lower().endswith(".parquet")
        local = local_path(self.path)
        if local is None and not single:
            target = Folder(str(self.path).rstrip("/"))
            target.remove()
            for unit in done:
                self.parts.move_into(unit.name, target)
            mark_remote_folder(target)
        elif local is None:
            folder, name = split_path(self.path)
            with folder.stream(name) as sink:
                self._join(done, schema, sink)
        elif single:
            with atomic_file(local, overwrite=overwrite) as work:
                self._join(done, schema, work)
        else:
            parts = local_path(self.parts.path)
            assert parts is not None
            with atomic_folder(local, overwrite=overwrite) as work:
                for unit in done:
                    (parts / unit.name).rename(work / unit.name)
        remove_state_folder(partial_path(self.path))

    def _check(self, unit: Done) -> None:
        if not is_part(self.parts, unit.name, self.info, key=self.key, digest=unit.digest):
            raise ArtefactError(
                f"'{unit.name}' in '{self.parts}' is not the part that this run wrote; delete that "
                "folder and encode again"
            )

    def _join(self, done: Sequence[Done], schema: pa.Schema, sink: Any) -> None:
        """Write one file of all parts, a part at a time."""
        with pq.ParquetWriter(sink, schema, **PARQUET_OPTIONS) as writer:
            for unit in done:
                with open_parquet(self.parts.file(unit.name)) as parquet:
                    table = parquet.read()
                writer.write_table(table.replace_schema_metadata(schema.metadata))


def partial_path(path: FilePath) -> str:
    """Return where an unfinished run towards ``path`` keeps its parts, on the same file system."""
    return f"{str(path).rstrip('/')}.partial"


def refuse_repeats(hashes: Sequence[npt.NDArray[np.uint64]]) -> None:
    """Refuse item ids that occur in several units.

    Raises:
        IdsError: saying how many.
    """
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    repeated = int((ordered[1:] == ordered[:-1]).sum())
    if repeated:
        raise IdsError(
            f"{repeated} item ids stand in more than one place among the files; every item needs "
            "an id of its own: drop the repeats or choose another --id-column (id_column=)"
        )


def check_engine_options(on_invalid: str, catalogue: Catalogue, several: bool) -> None:
    """Refuse what several processes cannot do.

    Raises:
        UsageError: an unknown ``on_invalid``, or files that only this process sees.
    """
    if on_invalid not in ("error", "skip"):
        raise UsageError(f"--on-invalid '{on_invalid}' is neither 'error' nor 'skip'")
    catalogue.check_local(what="another process", several=several)
