"""Encode a folder of Parquet unit by unit, in any number of processes, and go on after a stop.

What is written depends on the units alone: one file a unit, whole or absent, named so that the
names sort in row order. Who encodes a unit, and in which order, changes nothing, and a unit whose
file is there is not encoded again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import PARQUET_OPTIONS, CodesInfo, ids_schema, ids_table
from semid.data.filesystems import FilePath, Folder, is_uri, open_parquet
from semid.data.ids import ItemIds
from semid.distributed.units import Catalogue, Unit
from semid.errors import ArtefactError, IdsError, OutputExistsError, UsageError
from semid.loading import load
from semid.training.checkpoint import run_key

__all__ = [
    "Done",
    "EncodeJob",
    "Encoder",
    "Output",
    "check_engine_options",
    "open_output",
    "refuse_repeats",
]

KEY_FILE = "run.json"


@dataclass(frozen=True)
class Done:
    """A unit that was encoded.

    Attributes:
        name: its file.
        rows: rows written.
        process: id of the process that did it.
        hashes: ``(rows,)`` uint64 of the item ids, to find repeats among units.
    """

    name: str
    rows: int
    process: int
    hashes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class EncodeJob:
    """What every worker needs to know; small, and can be sent.

    Attributes:
        model: folder or URI of the artefact, which workers load by themselves.
        catalogue: the embeddings.
        parts: folder that receives a file a unit.
        info: what the ids carry.
        on_invalid: ``error`` or ``skip``, as for `semid.open_embeddings`.
    """

    model: FilePath
    catalogue: Catalogue
    parts: FilePath
    info: CodesInfo
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
        self.tokenizer = load(job.model)
        self.tokenizer.threads = threads
        if self.tokenizer.weights_fingerprint != job.info.weights_fingerprint:
            raise ArtefactError(
                f"'{job.model}' has changed since this run began; put the model back, or encode "
                "afresh into another output"
            )
        self.folder = Folder(job.parts)

    def encode(self, unit: Unit) -> Done:
        """Encode one unit and write its file.

        Raises:
            EmbeddingError: rows of another width, or with null, NaN or inf.
            IdsError: item ids repeat within the unit.
        """
        source = self.job.catalogue.source([unit])
        if self.job.on_invalid == "skip":
            usable = source.valid_rows()
            source = source if usable.all() else source.subset(usable)
        items = source.ids.to_arrow()
        info = self.job.info
        tables = [ids_schema(items.type, info).empty_table()]
        for block in self.tokenizer.encode_blocks(source, beam_width=info.beam_width):
            part = items.slice(block.start, len(block.x))
            tables.append(ids_table(part, block.codes, block.residual_norms, info))
        self.folder.write_table(unit.name, pa.concat_tables(tables))
        return Done(unit.name, len(items), os.getpid(), source.ids.hash64())


def open_output(
    path: FilePath, *, overwrite: bool, resume: bool, info: CodesInfo, catalogue: Catalogue
) -> Output:
    """Prepare the output of a run.

    Args:
        path: a ``.parquet`` file, or a folder or URI that receives a file a unit.
        overwrite: replace what is there.
        resume: continue an unfinished run towards ``path``.
        info: what the ids carry.
        catalogue: the embeddings.

    Raises:
        OutputExistsError: there is something at ``path``, or an unfinished run towards it.
        ArtefactError: the unfinished run belongs to another model or other embeddings.
    """
    output = Output(path)
    if output.target.exists() and not overwrite:
        raise OutputExistsError(
            f"output '{path}' exists; choose another path or pass --overwrite (overwrite=True)"
        )
    files = catalogue.files
    seen = {"paths": [str(p) for p in files.paths], "groups": files.row_groups}
    key = run_key({**asdict(info), "columns": [catalogue.column, catalogue.id_column]}, str(seen))
    found = output.parts.read(KEY_FILE)
    if found is not None and not resume:
        raise OutputExistsError(
            f"'{output.parts}' holds an unfinished run; continue it with --resume (resume=True) "
            "or delete that folder"
        )
    if found is not None and json.loads(found)["key"] != key:
        raise ArtefactError(
            f"'{output.parts}' belongs to a run with another model, beam or source; repeat the "
            "command that began it, or delete that folder"
        )
    output.parts.write(KEY_FILE, json.dumps({"key": key}).encode())
    return output


class Output:
    """Where the ids go, and what of them is there.

    Args:
        path: a ``.parquet`` file, a folder, or a URI of either.
    """

    def __init__(self, path: FilePath) -> None:
        self.path = path
        self.single = str(path).lower().endswith(".parquet")
        text = str(path).rstrip("/")
        self.target = Folder(text if is_uri(path) else path)
        self.parts = Folder(f"{text}.partial")

    def finished(self) -> set[str]:
        """Return the names of the units that are done."""
        return {name for name in self.parts.names() if name.startswith("part-")}

    def hashes(self, name: str) -> npt.NDArray[np.uint64]:
        """Read the hashed item ids of a unit that was done before."""
        with open_parquet(self.parts.file(name)) as parquet:
            column = parquet.read(columns=["item_id"]).column(0)
        return ItemIds(column).hash64()

    def publish(self, names: Sequence[str], schema: pa.Schema, *, rows: int) -> None:
        """Put the files in their place, in row order, and end the run.

        Raises:
            ArtefactError: they do not hold ``rows`` rows.
        """
        found = 0
        for name in names:
            with open_parquet(self.parts.file(name)) as parquet:
                found += parquet.metadata.num_rows
        if found != rows:
            raise ArtefactError(
                f"'{self.parts}' holds {found} of {rows} rows; delete that folder and encode again"
            )
        self.target.remove()
        if self.single:
            self._join(names, schema)
        else:
            for name in names:
                self.parts.move_into(name, self.target)
        self.parts.remove()

    def _join(self, names: Sequence[str], schema: pa.Schema) -> None:
        """Write one file of all parts, a part at a time."""
        parent, _, last = str(self.path).rstrip("/").rpartition("/")
        with (
            Folder(parent or ".").stream(last) as sink,
            pq.ParquetWriter(sink, schema, **PARQUET_OPTIONS) as writer,
        ):
            for name in names:
                with open_parquet(self.parts.file(name)) as parquet:
                    table = parquet.read()
                writer.write_table(table.replace_schema_metadata(schema.metadata))


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
