"""``semid unique`` over ids that no machine could hold: the same tokens, a part at a time.

A token is an item's place in its bucket, so it depends on the items with equal codes alone. The
files of ids are shared out by a hash of the codes into parts on disk; each part is numbered by
itself; each file is written again with its tokens. Memory: one part, or one file, at a time.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.catalogue.placement import append_tokens, token_count
from semid.catalogue.uniqueness import UniqueReport
from semid.codes import CodesInfo, ids_table
from semid.data.files import find_parquet
from semid.data.ids import ItemIds
from semid.errors import ArtefactError, UsageError
from semid.filesystems import FilePath, open_parquet
from semid.health import bucket_keys, part_of
from semid.output import claim_output
from semid.tokenizers.encoding import new_folder, refuse_repeats

PART_ROWS = 8_000_000
"""Rows of a part, about: half a gigabyte while it is numbered."""


def unique_folder(
    source: FilePath,
    output: FilePath,
    *,
    capacity: int | None = None,
    parts: int | None = None,
    overwrite: bool = False,
) -> UniqueReport:
    """Append a token that tells items with equal ids apart, to a folder of ids of any size.

    The outcome is that of `semid.make_unique` with ``method="append"``, file by file.

    Returns the report of `semid.make_unique`; ``unplaced_rows`` are not listed, only counted.

    Cost: two reads and one write of the ids, and one write and read of the parts. Memory: a part or
    a file, and 8 bytes per item with which repeated item ids are found.
    """
    if capacity is not None and capacity < 1:
        raise UsageError(f"capacity={capacity}: give at least 1")
    with claim_output(output, overwrite=overwrite, inputs=[source]):
        files = find_parquet(source)
        info, rows = _metadata(files)
        count = parts or max(1, -(-rows // PART_ROWS))
        with tempfile.TemporaryDirectory(prefix="semid-unique-") as name:
            folder = Path(name)
            # 1. Rows with equal codes come together in one part, whatever file they were in.
            _share_out(files, info, folder, count)
            # 2. Each part is numbered by itself; the largest number decides the size of the level.
            largest = max(_number(folder, part) for part in range(count))
            size = capacity or token_count(np.array([largest]))
            # 3. Files are written again in their order, with the tokens of their rows.
            report = _report(folder, count, size)
            extended = replace(info, unique="append", codebook_sizes=(*info.codebook_sizes, size))
            with new_folder(output, overwrite=overwrite) as target:
                for number, file in enumerate(files):
                    tokens = np.minimum(_tokens(folder, number, count), size - 1)
                    table = _plain(file)
                    codes = _codes(table, len(info.codebook_sizes))
                    target.write_table(
                        f"part-{number:06d}.parquet",
                        ids_table(
                            table["item_id"].combine_chunks(),
                            np.concatenate([codes, tokens[:, None].astype(codes.dtype)], axis=1),
                            table["residual_norm"].to_numpy(),
                            extended,
                            model_codes=codes,
                        ),
                    )
    return report


def _metadata(files: list[FilePath]) -> tuple[CodesInfo, int]:
    """Read the metadata that all files have to share, and the number of their rows."""
    first: CodesInfo | None = None
    rows = 0
    for file in files:
        with open_parquet(file) as parquet:
            rows += parquet.metadata.num_rows
            info = CodesInfo.from_metadata(parquet.schema_arrow.metadata, path=file).model
        if first is not None and info != first:
            raise ArtefactError(
                f"'{file}' holds ids of another model, beam or method than '{files[0]}'; keep the "
                "ids of one model in a folder"
            )
        first = info
    if first is None:
        raise UsageError("there are no files of ids")
    return first, rows


def _plain(file: FilePath) -> pa.Table:
    """Read a file's ids as the model gave them."""
    with open_parquet(file) as parquet:
        table = parquet.read()
    if "model_codes" in table.column_names:
        table = table.drop_columns(["codes"])
        table = table.rename_columns([n.removeprefix("model_") for n in table.column_names])
    return table


def _codes(table: pa.Table, levels: int = -1) -> npt.NDArray[np.unsignedinteger[npt.NBitBase]]:
    """Return the codes ``(rows, levels)`` of a table; without rows it has to be told the levels."""
    flat = table["codes"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), levels)  # type: ignore[no-any-return]


def _share_out(files: list[FilePath], info: CodesInfo, folder: Path, parts: int) -> None:
    """Write each file's rows into the parts of their codes."""
    hashes = []
    for number, file in enumerate(files):
        table = _plain(file)
        hashes.append(ItemIds(table["item_id"]).hash64())
        owner = part_of(_codes(table, len(info.codebook_sizes)).astype(np.uint64), parts)
        for part in range(parts):
            rows = pa.array(np.flatnonzero(owner == part))
            place = folder / f"part-{part:05d}"
            place.mkdir(exist_ok=True)
            numbered = table.take(rows).append_column("row", rows)
            pq.write_table(numbered, place / f"file-{number:06d}.parquet")
    refuse_repeats(hashes)


def _number(folder: Path, part: int) -> int:
    """Number the items of each bucket of a part; return the highest number."""
    place = folder / f"part-{part:05d}"
    names = sorted(path.name for path in place.glob("file-*"))
    tables = [pq.read_table(place / name) for name in names]
    whole = pa.concat_tables(tables)
    tokens = np.empty(0, np.int64)
    if len(whole):
        norms = whole["residual_norm"].to_numpy()
        tokens = append_tokens(_codes(whole), norms, ItemIds(whole["item_id"]))
    # The tokens of each file follow one another.
    pieces = np.split(tokens, np.cumsum([len(table) for table in tables])[:-1])
    for name, table, piece in zip(names, tables, pieces, strict=True):
        columns = table.select(["row", "codes", "residual_norm"])
        columns = columns.append_column("token", pa.array(piece))
        pq.write_table(columns, place / name.replace("file-", "tokens-"))
    return int(tokens.max(initial=0))


def _report(folder: Path, parts: int, capacity: int) -> UniqueReport:
    """Add up what the report says, part by part."""
    totals: Counter[str] = Counter()
    squares = 0.0
    for part in range(parts):
        names = sorted((folder / f"part-{part:05d}").glob("tokens-*"))
        table = pa.concat_tables([pq.read_table(name) for name in names])
        if not len(table):
            continue
        tokens = table["token"].to_numpy()
        _, sizes = np.unique(bucket_keys(_codes(table)), return_counts=True)
        norms = table["residual_norm"].to_numpy().astype(np.float64)
        over = sizes[sizes > capacity]
        totals["items"] += len(table)
        totals["unique_before"] += len(sizes)
        totals["shared_before"] += int(sizes[sizes > 1].sum())
        # The last token of a full bucket is shared by all that found no place, and its first owner.
        totals["shared_after"] += int((over - capacity + 1).sum())
        totals["unplaced"] += int((tokens >= capacity).sum())
        squares += float((norms**2).sum())
    names_of = ("items", "unique_before", "shared_before", "shared_after", "unplaced")
    distortion = squares / max(totals["items"], 1)
    return UniqueReport(
        method="append",
        capacity=capacity,
        **{name: totals[name] for name in names_of},
        unique_after=totals["items"] - totals["unplaced"],
        moved=0,
        distortion_before=distortion,
        distortion_after=distortion,
        largest_extra=0.0,
        unplaced_rows=np.empty(0, np.int64),
    )


def _tokens(folder: Path, number: int, parts: int) -> npt.NDArray[np.int64]:
    """Bring a file's tokens back into the order of its rows."""
    files = [folder / f"part-{n:05d}" / f"tokens-{number:06d}.parquet" for n in range(parts)]
    whole = pa.concat_tables([pq.read_table(file, columns=["row", "token"]) for file in files])
    tokens = np.empty(len(whole), np.int64)
    tokens[whole["row"].to_numpy()] = whole["token"].to_numpy()
    return tokens
