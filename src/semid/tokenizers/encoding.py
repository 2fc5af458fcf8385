"""Encode a catalogue of any size to one Parquet file, and go on after a kill.

Finished parts lie in ``<output>.partial/``; each is complete or absent, and names the run and the
rows it was made from. A resumed run reads those rows again and starts at the first part that is
missing or whose rows have changed, so no row is lost, doubled or stale. The final file is put
together and renamed at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import PARQUET_OPTIONS, CodesInfo, ids_schema, ids_table
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import ArtefactError, EmbeddingError, OutputExistsError
from semid.filesystems import Folder, open_parquet
from semid.output import atomic_file, claim_output
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import BLOCK_ROWS
from semid.runs import remove_state_folder
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import EncodedBlock
from semid.training.checkpoint import run_key

__all__ = ["RowsDigest", "encode_to_parquet", "is_part", "partial_folder", "sign_part"]

logger = logging.getLogger(__name__)

# Blocks per part: a kill costs at most these 262,144 rows.
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
    target = Path(path)
    opened = open_embeddings(source, ids=ids)
    info = tokenizer.codes_info(beam_width)
    steps = progress or QuietProgress()
    with claim_output(target, overwrite=overwrite, inputs=[source], state=partial_folder(target)):
        key = run_key(asdict(info), json.dumps(opened.describe(), default=str))
        parts = _Parts(partial_folder(target), opened, info, key=key, resume=resume)
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
                parts.write(group, pa.concat_tables(tables))
                count = sum(len(block.x) for block in group)
                written += count
                steps.step(count)
        except EmbeddingError:  # these rows will not become right: leave nothing to resume
            parts.clear()
            raise
        parts.join(target, ids_schema(items.type, info), rows=len(opened), overwrite=overwrite)
    return written


def _groups(blocks: Iterator[EncodedBlock], size: int) -> Iterator[list[EncodedBlock]]:
    while group := list(itertools.islice(blocks, size)):
        yield group


class RowsDigest:
    """SHA-256 of rows and their ids: identifies what a part was made from."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, block: npt.NDArray[np.float32]) -> None:
        """Add the next rows, ``(n, dim)`` float32."""
        self._digest.update(np.ascontiguousarray(block).data)

    def finish(self, ids: ItemIds) -> str:
        """Add the rows' item ids and return 64 hexadecimal digits."""
        self._digest.update(ids.hash64().tobytes())
        return self._digest.hexdigest()

    @classmethod
    def of(cls, blocks: Iterable[npt.NDArray[np.float32]], ids: ItemIds) -> str:
        """Return the digest of rows in blocks and of their ids."""
        digest = cls()
        for block in blocks:
            digest.update(block)
        return digest.finish(ids)


def sign_part(folder: Folder, name: str, *, key: str, digest: str) -> None:
    """Write beside a finished part which run made it, and from which rows.

    Args:
        folder: of the parts.
        name: the part's file.
        key: the run's `semid.training.checkpoint.run_key`.
        digest: the `RowsDigest` of its rows.
    """
    folder.write(f"{name}.json", json.dumps({"key": key, "rows": digest}).encode())


def is_part(folder: Folder, name: str, info: CodesInfo, *, key: str, digest: str) -> bool:
    """Whether a part is complete, made by this run, from these rows, and holds such ids."""
    try:
        signed = json.loads(folder.read(f"{name}.json") or b"{}")
        with open_parquet(folder.file(name)) as parquet:
            metadata = parquet.schema_arrow.metadata
        same = CodesInfo.from_metadata(metadata, path=name) == info
    except (OSError, ValueError, RecursionError, ArtefactError):
        return False
    return bool(same and signed == {"key": key, "rows": digest})


class _Parts:
    """The finished parts of a run, named by their first row."""

    def __init__(
        self, folder: Path, source: EmbeddingSource, info: CodesInfo, *, key: str, resume: bool
    ) -> None:
        self.folder, self.source, self.info, self.key = folder, source, info, key
        self.store = Folder(folder)
        self.digests: dict[Path, str] = {}
        self.first_row = 0
        if not folder.exists():
            return
        if not resume and any(folder.iterdir()):
            raise OutputExistsError(
                f"'{folder}' holds an unfinished run; continue it with --resume (resume=True) or "
                "delete that folder"
            )
        self._check_key()
        self._accept()

    def _check_key(self) -> None:
        file = self.folder / KEY_FILE
        try:
            same = not file.exists() or json.loads(file.read_bytes())["key"] == self.key
        except (ValueError, KeyError, TypeError, RecursionError):
            same = False
        if not same:
            raise ArtefactError(
                f"'{self.folder}' belongs to a run with another model, beam or source; repeat the "
                "command that began it, or delete that folder"
            )

    def _accept(self) -> None:
        """Count the parts from the first on whose rows are still what they were; drop the rest."""
        blocks = (block for _, block in self.source.blocks(BLOCK_ROWS, copy=False))
        for start in range(0, len(self.source), PART_BLOCKS * BLOCK_ROWS):
            file = self._file(start)
            if not file.exists():
                break
            stop = min(start + PART_BLOCKS * BLOCK_ROWS, len(self.source))
            digest = RowsDigest.of(itertools.islice(blocks, PART_BLOCKS), self._ids(start, stop))
            if not self._is_ours(file, digest):
                logger.warning("rows from %d on have changed; they are encoded again", start)
                break
            self.digests[file] = digest
            self.first_row = start + PART_BLOCKS * BLOCK_ROWS
        for file in self.folder.glob("part-*.parquet"):
            if file not in self.digests:
                file.unlink()
                self.store.remove_file(f"{file.name}.json")

    def _is_ours(self, file: Path, digest: str) -> bool:
        return is_part(self.store, file.name, self.info, key=self.key, digest=digest)

    def _ids(self, start: int, stop: int) -> ItemIds:
        return self.source.ids.take(np.arange(start, stop))

    def _file(self, first_row: int) -> Path:
        return self.folder / f"part-{first_row:012d}.parquet"

    def write(self, group: list[EncodedBlock], table: pa.Table) -> None:
        """Write a part, whole or not at all."""
        start, stop = group[0].start, group[-1].start + len(group[-1].x)
        digest = RowsDigest.of((block.x for block in group), self._ids(start, stop))
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            with atomic_file(self.folder / KEY_FILE, mark=False) as work:
                work.write_text(json.dumps({"key": self.key}), encoding="utf8")
        file = self._file(start)
        with atomic_file(file, mark=False) as work:
            pq.write_table(table, work, **PARQUET_OPTIONS)
        sign_part(self.store, file.name, key=self.key, digest=digest)
        self.digests[file] = digest

    def join(self, target: Path, schema: pa.Schema, *, rows: int, overwrite: bool) -> None:
        """Put the parts together in row order and remove them.

        Raises:
            ArtefactError: they are not the parts that this run wrote or accepted.
        """
        with atomic_file(target, overwrite=overwrite) as work:
            count = 0
            with pq.ParquetWriter(work, schema, **PARQUET_OPTIONS) as writer:
                for file, digest in sorted(self.digests.items()):
                    if not self._is_ours(file, digest):
                        raise ArtefactError(
                            f"'{file}' is not the part that this run wrote; delete "
                            f"'{self.folder}' and encode again"
                        )
                    table = pq.read_table(file, page_checksum_verification=True)
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
                    count += len(table)
            if count != rows:
                raise ArtefactError(
                    f"'{self.folder}' holds {count} of {rows} rows; delete that folder and encode "
                    "again"
                )
        self.clear()

    def clear(self) -> None:
        """Remove the parts."""
        remove_state_folder(self.folder)
