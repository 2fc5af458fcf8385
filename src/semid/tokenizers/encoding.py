"""Encode a catalogue of any size part by part, and go on after a kill.

Finished parts lie in ``<output>.partial/``. Each is complete or absent, and signed with the run and
the rows it was made from. A resumed run reads those rows again and encodes the parts that are
missing or whose rows have changed, so no row is lost, doubled or stale. At the end the parts become
the output. One process encodes the parts in order (`encode_to_parquet`); several share them
(`semid.distributed.encode_folder`). What is written does not depend on who encodes which part.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import PARQUET_OPTIONS, CodesInfo, ids_schema, ids_table
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.errors import ArtefactError, EmbeddingError, IdsError, OutputExistsError
from semid.filesystems import FilePath, Folder, local_path, open_parquet, split_path
from semid.output import atomic_file, atomic_folder, claim_output, mark_remote_folder
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS
from semid.runs import KEY_FILE, partial_path, remove_state_folder
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import EncodedBlock
from semid.training.checkpoint import run_key

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]

PART_BLOCKS = 4
"""Blocks per part of one process: a kill costs at most these 262,144 rows."""


def rows_digest(blocks: Iterable[npt.NDArray[Any]], ids: ItemIds) -> str:
    """Return the SHA-256 of rows in blocks and of their ids: what a part was made from."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    digest.update(ids.hash64().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class EncodedPart:
    """A part that was encoded."""

    name: str  # its file; names sort in row order
    rows: int
    encoded: bool  # False if an earlier run had encoded it
    process: int  # id of the process that did it
    digest: str  # SHA-256 of the rows and ids it was made from
    hashes: npt.NDArray[np.uint64]  # (rows,) of the item ids, to find repeats among parts


class PartFolder:
    """The parts of one run in the folder or URI `partial_path`, signed with the run's ``key``."""

    def __init__(self, path: FilePath, info: CodesInfo, key: str) -> None:
        self.path, self.info, self.key = path, info, key
        self.folder = Folder(path)

    def begin(self, *, resume: bool) -> None:
        """Mark the folder as this run's, or check that it is."""
        if self.finished() and not resume:
            raise OutputExistsError(
                f"'{self.path}' holds an unfinished run; continue it with --resume (resume=True) "
                "or delete that folder"
            )
        stored = self.folder.read(KEY_FILE)
        if stored is None or not resume:
            self.folder.write(KEY_FILE, json.dumps({"key": self.key}).encode())
        elif _json(stored) != {"key": self.key}:
            raise ArtefactError(
                f"'{self.path}' belongs to a run with another model, beam or source; repeat the "
                "command that began it, or delete that folder"
            )

    def finished(self) -> set[str]:
        """Return the names of the parts that are done."""
        signed = [name for name in self.folder.names() if name.endswith(".parquet.json")]
        return {name.removesuffix(".json") for name in signed}

    def encode(
        self,
        name: str,
        ids: ItemIds,
        *,
        read: Callable[[], Iterator[Array]],
        encode: Callable[[], Iterator[EncodedBlock]],
    ) -> EncodedPart:
        """Encode one part and write its file, unless it is there and its rows have not changed."""
        hashes = ids.hash64()
        # A part of an earlier run counts if its rows are what they were; reading them again costs
        # less than encoding.
        if self.folder.exists_file(name):
            digest = rows_digest(read(), ids)
            if self._is_signed(name, digest):
                return EncodedPart(name, len(ids), False, os.getpid(), digest, hashes)
            logger.warning("the rows of '%s' have changed; they are encoded again", name)
        items, done = ids.to_arrow(), 0
        # The empty table gives a part without rows the schema of the others.
        tables = [pa.Table.from_batches([], ids_schema(items.type, self.info))]

        def rows_encoded() -> Iterator[Array]:
            nonlocal done
            for block in encode():
                rows = items.slice(done, len(block.x))
                tables.append(ids_table(rows, block.codes, block.residual_norms, self.info))
                done += len(block.x)
                yield block.x

        # One pass encodes and hashes, so the signature is of the very rows that were encoded.
        digest = rows_digest(rows_encoded(), ids)
        self.folder.write_table(name, pa.concat_tables(tables))
        # The signature follows the part: one without a signature does not count.
        signature = {"key": self.key, "rows": digest}
        self.folder.write(f"{name}.json", json.dumps(signature).encode())
        return EncodedPart(name, len(ids), True, os.getpid(), digest, hashes)

    def _is_signed(self, name: str, digest: str) -> bool:
        """Whether a part is complete, made by this run, from these rows, and holds such ids."""
        signature = _json(self.folder.read(f"{name}.json") or b"{}")
        try:
            with open_parquet(self.folder.file(name)) as parquet:
                metadata = parquet.schema_arrow.metadata
            same_info = CodesInfo.from_metadata(metadata, path=name) == self.info
        except (OSError, ValueError, RecursionError, ArtefactError):
            return False
        return same_info and signature == {"key": self.key, "rows": digest}

    def publish(
        self,
        output: FilePath,
        parts: Sequence[EncodedPart],
        schema: pa.Schema,
        *,
        overwrite: bool,
        single: bool,
    ) -> None:
        """Write the output from the parts, in row order, and end the run."""
        parts = sorted(parts, key=lambda part: part.name)
        # Another process may have written to the folder meanwhile: look at every signature again.
        for part in parts:
            if not self._is_signed(part.name, part.digest):
                raise ArtefactError(
                    f"'{part.name}' in '{self.path}' is not the part that this run wrote; delete "
                    "that folder and encode again"
                )
        local = local_path(output)
        if not single:
            with new_folder(output, overwrite=overwrite) as target:
                for part in parts:
                    self.folder.move_into(part.name, target)
        elif local is not None:
            with atomic_file(local, overwrite=overwrite) as work:
                self._join(parts, schema, work)
        else:
            folder, name = split_path(output)
            with folder.stream(name) as sink:
                self._join(parts, schema, sink)
        self.clear()

    def _join(self, parts: Sequence[EncodedPart], schema: pa.Schema, sink: Any) -> None:
        """Write one file of all parts, a part at a time."""
        with pq.ParquetWriter(sink, schema, **PARQUET_OPTIONS) as writer:
            for part in parts:
                with open_parquet(self.folder.file(part.name)) as parquet:
                    table = parquet.read()
                if len(table) != part.rows:
                    raise ArtefactError(
                        f"'{part.name}' in '{self.path}' holds {len(table)} of {part.rows} rows; "
                        "delete that folder and encode again"
                    )
                writer.write_table(table.replace_schema_metadata(schema.metadata))

    def clear(self) -> None:
        """Remove the parts."""
        remove_state_folder(self.path)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def new_folder(output: FilePath, *, overwrite: bool) -> Iterator[Folder]:
    """Open the folder for results, which appears in one step at the end, on this machine.

    An object store has no such step: there the former files are removed first and the marker that
    makes the folder complete is written last.
    """
    local = local_path(output)
    if local is not None:
        with atomic_folder(local, overwrite=overwrite) as work:
            yield Folder(work)
        return
    target = Folder(str(output).rstrip("/"))
    target.remove()
    yield target
    mark_remote_folder(target)


def refuse_repeats(hashes: Sequence[npt.NDArray[np.uint64]]) -> None:
    """Refuse item ids that occur in several parts."""
    # After sorting, equal hashes lie beside each other.
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    repeated = int((ordered[1:] == ordered[:-1]).sum())
    if repeated:
        raise IdsError(
            f"{repeated} item ids stand in more than one place among the files; every item needs "
            "an id of its own: drop the repeats or choose another --id-column (id_column=)"
        )


@with_progress
def encode_to_parquet(
    tokenizer: Tokenizer,
    source: Any,
    path: str | os.PathLike[str],
    *,
    ids: Any = None,
    beam_width: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressArgument = None,
) -> int:
    """Encode rows block by block and write ``item_id``, ``codes``, ``residual_norm``.

    Returns the number of rows encoded in this call (less than all after a resume).

    Memory: a few blocks of 65,536 rows.
    """
    opened = open_embeddings(source, ids=ids)
    info = tokenizer.codes_info(beam_width)
    progress = progress or QuietProgress()
    state = partial_path(path)
    with claim_output(path, overwrite=overwrite, inputs=[source], state=state):
        # The key holds all that decides the codes: the model, the beam and the source.
        key = run_key(asdict(info), json.dumps(opened.describe(), default=str))
        folder = PartFolder(state, info, key)
        folder.begin(resume=resume)
        rows = _Cursor(lambda first: opened.blocks(BLOCK_ROWS, first=first, copy=False))
        encoded = _Cursor(
            lambda first: tokenizer.encode_blocks(opened, beam_width=info.beam_width, first=first)
        )
        parts: list[EncodedPart] = []
        progress.start("encode", total=len(opened))
        try:
            for start in range(0, len(opened), PART_BLOCKS * BLOCK_ROWS):
                stop = min(start + PART_BLOCKS * BLOCK_ROWS, len(opened))
                part = folder.encode(
                    f"part-{start:012d}.parquet",
                    opened.ids.take(np.arange(start, stop)),
                    read=lambda start=start: (x for _, x in rows.take(start)),  # type: ignore[misc]
                    encode=lambda start=start: encoded.take(start),  # type: ignore[misc]
                )
                parts.append(part)
                progress.step(part.rows)
        except EmbeddingError:  # these rows will not become right: leave nothing to resume
            folder.clear()
            raise
        schema = ids_schema(opened.ids.to_arrow().type, info)
        folder.publish(os.fspath(path), parts, schema, overwrite=overwrite, single=True)
    return sum(part.rows for part in parts if part.encoded)


class _Cursor:
    """Reads blocks part by part; a part that follows the last one goes on in the same pass."""

    def __init__(self, blocks_from: Callable[[int], Iterator[Any]]) -> None:
        self._blocks_from = blocks_from
        self._blocks: Iterator[Any] = iter(())
        self._next_row = -1

    def take(self, start: int) -> Iterator[Any]:
        """Yield the blocks of the part that begins at row ``start``."""
        if start != self._next_row:
            self._blocks = self._blocks_from(start)
        self._next_row = start + PART_BLOCKS * BLOCK_ROWS
        yield from itertools.islice(self._blocks, PART_BLOCKS)
