"""Units of work: row groups of Parquet files, and how long encoding them will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from semid.data.columns import common_type, pick_embedding_column, require_column
from semid.data.files import ParquetFiles
from semid.data.ids import ItemIds
from semid.data.items import DEFAULT_ID_COLUMN
from semid.data.list_sources import ParquetSource
from semid.data.source import EmbeddingSource
from semid.errors import UsageError
from semid.filesystems import FilePath, is_uri
from semid.tokenizers.base import Tokenizer

UNIT_ROWS = 262_144
"""Rows after which a unit is full: what the end of a worker can cost at most, with the row group
that goes over it."""


@dataclass(frozen=True)
class Unit:
    """Row groups of one file that follow one another."""

    file: int  # number of the file
    groups: tuple[int, ...]  # numbers of its row groups
    first_row: int  # number of the first row among all rows
    rows: int  # rows in it

    @property
    def name(self) -> str:
        """Name of the file of its results; names sort in row order."""
        return f"part-{self.file:06d}-{self.groups[0]:06d}.parquet"


@dataclass(frozen=True)
class Catalogue:
    """Embeddings in Parquet, known by their footers alone; small, and can be sent to a worker."""

    files: ParquetFiles  # the files
    column: str  # the embedding column
    id_column: str | None  # the id column, or None for row numbers
    dim: int  # width of the embeddings, the same for every unit whatever rows lie in it
    id_type: pa.DataType  # Arrow type of the item ids

    @classmethod
    def open(
        cls,
        path: FilePath,
        *,
        embedding_column: str | None = None,
        id_column: str | None = None,
    ) -> Catalogue:
        """Read the footers."""
        if str(path).lower().endswith((".npy", ".npz")):
            raise UsageError(
                f"'{path}' is an .npy, whose rows have no row groups that workers could share; "
                "leave --engine and --processes out (it is mapped into memory, and threads share "
                "it), or write the embeddings as a folder of Parquet files"
            )
        files = ParquetFiles.open(path)
        column = pick_embedding_column(files.schemas[0], embedding_column, label=files.label)
        if id_column is None and DEFAULT_ID_COLUMN in files.schemas[0].names:
            id_column = DEFAULT_ID_COLUMN
        id_type = pa.int64() if id_column is None else _id_type(files, id_column)
        # Refuses files that do not agree on the embeddings.
        dim = ParquetSource(files, column, ids=ItemIds.range(files.count)).dim
        return cls(files, column, id_column, dim, id_type)

    def __len__(self) -> int:
        """Count the rows."""
        return self.files.count

    def units(self, rows: int = UNIT_ROWS) -> list[Unit]:
        """Cut into units: row groups of a file until one has ``rows`` rows, in row order."""
        units: list[Unit] = []
        start = 0
        for file, sizes in enumerate(self.files.row_groups):
            # Empty row groups are skipped; the last unit of a file may be small.
            groups, count = list[int](), 0
            full = [group for group, size in enumerate(sizes) if size]
            for group in full:
                groups.append(group)
                count += sizes[group]
                if count >= rows or group == full[-1]:
                    units.append(Unit(file, tuple(groups), start, count))
                    start, groups, count = start + count, [], 0
        return units

    def source(self, units: Sequence[Unit]) -> EmbeddingSource:
        """Open the rows of some units that follow one another, under their ids."""
        files = self.files.select([(unit.file, unit.groups) for unit in units])
        if self.id_column is None:
            first = units[0].first_row
            ids = ItemIds(pa.array(np.arange(first, first + files.count)))
        else:
            values = files.read([self.id_column]).column(0)
            if values.type != self.id_type:
                values = values.cast(self.id_type)
            source = f"id column '{self.id_column}' of {files.label}"
            ids = ItemIds(values, source=source, allow_empty=False)
        return ParquetSource(files, self.column, ids=ids, dim=self.dim)

    def check_local(self, *, what: str) -> None:
        """Refuse paths that other processes cannot see."""
        if str(self.files.paths[0]).startswith("memory://"):
            raise UsageError(
                f"{self.files.label} lies in this process's memory, which {what} cannot see; "
                "write it to a disk or an object store that all of them reach"
            )


def _id_type(files: ParquetFiles, column: str) -> pa.DataType:
    """Return the one type that the ids of all files are read as."""
    kinds: dict[pa.DataType, FilePath] = {}
    for path, schema in zip(files.paths, files.schemas, strict=True):
        require_column(column, schema.names, label=f"'{path}'", flag="--id-column (id_column=)")
        kinds.setdefault(schema.field(column).type, path)
    try:
        return common_type(list(kinds))
    except pa.ArrowException:
        types = ", ".join(f"{kind} in '{path}'" for kind, path in kinds.items())
        raise UsageError(
            f"the id column '{column}' is of several types: {types}; write all files with one"
        ) from None


START_SECONDS = {"local": 6.0, "ray": 15.0}
"""Until the first worker works: imports and kernels, with Ray its own start besides. Measured on a
small machine (docs/scaling.md); they only weigh where a run is short."""

_REASONS = {
    "local": "--engine local starts faster and passes nothing around; --engine ray pays when more "
    "machines share the work.",
    "ray": "--engine ray pays when more machines share the work; on one, leave it out.",
}

PROBE_ROWS = 16_384


@dataclass(frozen=True)
class Estimate:
    """How long an encode will take."""

    rows: int  # rows left to encode
    bytes: int  # bytes of their files, by the footers
    rows_per_second: float  # of one worker with one thread, measured on the first rows
    workers: int  # workers of the run
    engine: str  # the engine that was chosen

    def seconds(self, engine: str, workers: int) -> float:
        """Return the time on an engine."""
        return START_SECONDS[engine] + self.rows / self.rows_per_second / workers

    @property
    def sentence(self) -> str:
        """Return what a person should know, with the reason for the engine."""
        local = self.seconds("local", self.workers)
        ray = self.seconds("ray", self.workers)
        return (
            f"{self.rows:,} rows ({self.bytes / 1e9:.2f} GB): one worker encodes about "
            f"{self.rows_per_second:,.0f} rows per second; {self.workers} on this machine take "
            f"about {spell(local)}, as many on Ray {spell(ray)}. {_REASONS[self.engine]}"
        )


def estimate_encode(
    tokenizer: Tokenizer,
    catalogue: Catalogue,
    units: list[Unit],
    beam_width: int,
    workers: int,
    engine: str,
) -> Estimate:
    """Encode a few rows and tell from them how long all will take."""
    threads, tokenizer.threads = tokenizer.threads, 1
    try:
        # Time of the processor, not of the clock: other programs may be running.
        raw = next(iter(catalogue.source(units[:1])._raw_blocks(PROBE_ROWS)))
        x = np.nan_to_num(raw.values)  # rows that cannot be used are the run's business
        tokenizer._encode_block(x[:256], beam_width)  # the first call prepares kernels
        began = time.process_time()
        tokenizer._encode_block(x, beam_width)
        took = max(time.process_time() - began, 1e-6)
    finally:
        tokenizer.threads = threads
    size = 0
    for file in {unit.file for unit in units}:
        path = catalogue.files.paths[file]
        # Of a file that is elsewhere, what its values weigh as float32.
        rows = sum(catalogue.files.row_groups[file])
        size += int(rows) * catalogue.dim * 4 if is_uri(path) else Path(path).stat().st_size
    return Estimate(sum(unit.rows for unit in units), size, len(x) / took, workers, engine)


def spell(seconds: float) -> str:
    """Write a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
