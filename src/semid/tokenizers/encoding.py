"""Encode a catalogue of any size to one Parquet file, and go on after a kill.

Finished parts lie in ``<output>.partial/``; each is complete or absent. A resumed run starts after
the last one, so no row is lost or doubled, and the final file is put together and renamed at the
end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from semid.artefact import atomic_file, check_output
from semid.codes import PARQUET_OPTIONS, ids_schema, ids_table
from semid.data.embeddings import open_embeddings
from semid.data.source import EmbeddingSource
from semid.errors import ArtefactError, EmbeddingError, OutputExistsError
from semid.health import row_hashes
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import BLOCK_ROWS
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import EncodedBlock
from semid.training.checkpoint import run_key

__all__ = ["encode_to_parquet", "partial_folder"]

# Blocks a part: what a kill can cost at most, 262,144 rows.
PART_BLOCKS = 4
KEY_FILE = "run.json"


def partial_folder(path: str | os.PathLike[str]) -> Path:
    """Return where a run in progress towards ``path`` keeps its state."""
    target = Path(path)
    return target.parent / f"{target.name}.partial"


def encode_to_parquet(
    tokenizer: Tokenizer,
    source: Any,
    path: str | os.PathLike[str],
    *,
    ids: Any = None,
    beam_width: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> int:
    """Encode rows block by block and write ``item_id``, ``codes``, ``residual_norm``.

    Args:
        tokenizer: a fitted tokenizer.
        source: embeddings, anything `semid.open_embeddings` reads.
        path: the Parquet file to write.
        ids: item ids for a source that has none.
        beam_width: partial codes kept a row; None takes the tokenizer's own.
        overwrite: replace an existing file.
        resume: continue a run that was stopped; without one it starts afresh.
        progress: told about every block; silent by default.

    Returns:
        The number of rows encoded in this call (less than all after a resume).

    Raises:
        OutputExistsError: if ``path`` exists, or an unfinished run towards it, and neither
            ``overwrite`` nor ``resume`` is given.
        ArtefactError: if the unfinished run belongs to another model or source.
        EmbeddingError: for rows of another width, or with NaN or inf.

    Memory: a few blocks of 65,536 rows.
    """
    target = check_output(path, overwrite=overwrite)
    opened = open_embeddings(source, ids=ids)
    info = tokenizer.codes_info(beam_width)
    parts = _Parts(
        partial_folder(target),
        key=run_key(asdict(info), _digest(opened)),
        resume=resume,
    )
    steps = progress or QuietProgress()
    steps.start("encode", total=len(opened))
    steps.step(min(parts.first_row, len(opened)))
    items = opened.ids.to_arrow()
    written = 0
    blocks = tokenizer.encode_blocks(opened, beam_width=info.beam_width, first=parts.first_row)
    try:
        for group in _groups(blocks, PART_BLOCKS):
            tables = [
                ids_table(items.slice(b.start, len(b.x)), b.codes, b.residual_norms, info)
                for b in group
            ]
            parts.write(group[0].start, pa.concat_tables(tables))
            count = sum(len(block.x) for block in group)
            written += count
            steps.step(count)
    except EmbeddingError:  # these rows will not become right: leave nothing to resume
        parts.clear()
        raise
    parts.join(target, ids_schema(items.type, info), rows=len(opened), overwrite=overwrite)
    return written


def _groups(blocks: Iterator[EncodedBlock], size: int) -> Iterator[list[EncodedBlock]]:
    group: list[EncodedBlock] = []
    for block in blocks:
        group.append(block)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _digest(source: EmbeddingSource) -> str:
    """Identify a source without reading all of it: its description, first rows and ids."""
    digest = hashlib.sha256(json.dumps(source.describe(), default=str).encode())
    for _, block in source.blocks(4096):
        digest.update(row_hashes(block).tobytes())
        break
    digest.update(json.dumps(source.ids.strings(0, 4096).to_pylist()).encode())
    return digest.hexdigest()


class _Parts:
    """The finished parts of a run, named by their first row."""

    def __init__(self, folder: Path, *, key: str, resume: bool) -> None:
        self.folder = folder
        rows_a_part = PART_BLOCKS * BLOCK_ROWS
        if folder.exists() and not resume:
            raise OutputExistsError(
                f"'{folder}' holds an unfinished run; continue it with --resume (resume=True) or "
                "delete that folder"
            )
        if folder.exists():
            self._check_key(key)
        self._key = key
        self.first_row = 0
        while self._file(self.first_row).exists():
            self.first_row += rows_a_part

    def _write_key(self, key: str) -> None:
        work = self.folder / f".{KEY_FILE}.tmp"
        work.write_text(json.dumps({"key": key}), encoding="utf8")
        work.replace(self.folder / KEY_FILE)

    def _check_key(self, key: str) -> None:
        file = self.folder / KEY_FILE
        if file.exists() and json.loads(file.read_text(encoding="utf8"))["key"] != key:
            raise ArtefactError(
                f"'{self.folder}' belongs to a run with another model, beam or source; repeat the "
                "command that began it, or delete that folder"
            )

    def _file(self, first_row: int) -> Path:
        return self.folder / f"part-{first_row:012d}.parquet"

    def write(self, first_row: int, table: pa.Table) -> None:
        """Write a part, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_key(self._key)
        work = self.folder / f".{first_row:012d}.tmp"
        pq.write_table(table, work, **PARQUET_OPTIONS)
        work.replace(self._file(first_row))

    def join(self, target: Path, schema: pa.Schema, *, rows: int, overwrite: bool) -> None:
        """Put the parts together in row order and remove them."""
        files = sorted(self.folder.glob("part-*.parquet"))
        with atomic_file(target, overwrite=overwrite) as work:
            with pq.ParquetWriter(work, schema, **PARQUET_OPTIONS) as writer:
                for file in files:
                    table = pq.read_table(file, page_checksum_verification=True)
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
            found = pq.read_metadata(work).num_rows
            if found != rows:
                raise ArtefactError(
                    f"'{self.folder}' holds {found} of {rows} rows; delete that folder and encode "
                    "again"
                )
        self.clear()

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
