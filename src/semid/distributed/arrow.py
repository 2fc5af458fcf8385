"""Encoding inside other people's pipelines: Spark's ``mapInArrow`` and Ray Data's ``map_batches``.

Both hand Arrow batches of rows to a function in a worker process. The artefact is loaded there,
once per process, and a row's codes depend on that row alone, so batches of any size give the codes
that `Tokenizer.encode` gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import METADATA_KEY, PARQUET_OPTIONS, CodesInfo, SemanticIds, ids_schema
from semid.data.columns import float_list_width, pick_embedding_column, require_column
from semid.data.files import find_parquet
from semid.data.ids import ItemIds
from semid.data.items import DEFAULT_ID_COLUMN, code_rows
from semid.data.list_sources import ArrowSource
from semid.data.source import EmbeddingSource
from semid.data.tables import open_frame
from semid.distributed.ray_workers import RayOptions, check_slots, connect
from semid.errors import ArtefactError, UsageError, brief, check_choice
from semid.filesystems import FilePath, open_parquet
from semid.loading import load_tokenizer
from semid.output import claim_output
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import BLOCK_ROWS
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.encoding import new_folder, refuse_repeats

FINGERPRINT = "fingerprint"
"""Column of the text that says which model and beam a row's codes are of."""


@lru_cache(maxsize=2)
def _loaded(model: str) -> Tokenizer:
    """Load an artefact once per process."""
    tokenizer: Tokenizer = load_tokenizer(model)
    tokenizer.threads = 1  # engines give a task one CPU slot
    return tokenizer


@dataclass(frozen=True)
class _RowEncoder:
    """Encodes a table of rows with the columns and the settings of one pipeline."""

    model: str
    embedding_column: str | None = None
    id_column: str | None = None
    on_invalid: str = "error"
    beam_width: int | None = None

    def __post_init__(self) -> None:
        check_choice("on_invalid", self.on_invalid, ("error", "skip"))

    def __call__(self, table: pa.Table) -> SemanticIds | None:
        """Return the Semantic IDs of the rows; None if no row is left."""
        label, name = "a batch of rows", self.id_column or DEFAULT_ID_COLUMN
        if name not in table.column_names:
            raise UsageError(
                f"{label} has no column '{name}'; it has {', '.join(table.column_names)}: rows of "
                "a cluster have no numbers, so name the ids with id_column="
            )
        if not len(table):
            return None
        tokenizer = _loaded(self.model)
        frame = open_frame(table)
        column = pick_embedding_column(frame.schema, self.embedding_column, label=label)
        # Lists of any length are as wide as the model: a small batch has no width of its own.
        is_fixed = float_list_width(frame.schema.field(column).type) is not None
        source: EmbeddingSource = ArrowSource(
            frame.chunks(column),
            dtype=frame.value_type(column),
            ids=ItemIds(
                frame.column(name), source=f"id column '{name}' of {label}", allow_empty=False
            ),
            label=f"embedding column '{column}' of {label}",
            dim=None if is_fixed else tokenizer.dim,
        )
        if self.on_invalid == "skip":
            source = source.subset(source.valid_rows())
        return tokenizer.encode(source, beam_width=self.beam_width) if len(source) else None


class ArrowEncoder:
    """A function for Spark: ``df.mapInArrow(encode, encode.schema(df))``.

    Args:
        model: artefact folder or URI that every worker can read.
        embedding_column: the column of float lists; None takes ``embedding``, else the only one.
        id_column: the id column; None takes ``item_id``.
        on_invalid: ``error`` ends the job at rows with null, NaN or infinite values or of another
            width than the model's; ``skip`` drops them and their ids.
        beam_width: partial codes kept per row; None takes the tokenizer's own.

    Raises:
        UsageError: another ``on_invalid``.
    """

    def __init__(
        self,
        model: FilePath,
        *,
        embedding_column: str | None = None,
        id_column: str | None = None,
        on_invalid: str = "error",
        beam_width: int | None = None,
    ) -> None:
        self._encode = _RowEncoder(str(model), embedding_column, id_column, on_invalid, beam_width)

    def schema(self, frame: Any) -> str:
        """Return the columns of the result for Spark; the ids have the type they have in ``frame``.

        Spark has neither unsigned numbers nor lists of one length, so codes are ``array<bigint>``.
        It has no metadata of a table either: ``fingerprint`` is what semid's own files keep there,
        about 400 characters of text that say the model and the beam, the same in every row.

        Raises:
            UsageError: the id column is not there.
        """
        types = dict(frame.dtypes)
        name = require_column(
            self._encode.id_column or DEFAULT_ID_COLUMN,
            list(types),
            label="the frame",
            flag="id_column=",
        )
        return (
            f"item_id {types[name]}, codes array<bigint>, residual_norm float, {FINGERPRINT} string"
        )

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Encode batches one after another.

        Raises:
            EmbeddingError: rows of another width, or with null, NaN or inf.
            IdsError: ids that are null, empty, or repeated within a batch. Repeats among batches
                are found by `import_encoded`.
            UsageError: a column is not there.
        """
        for batch in batches:
            ids = self._encode(pa.Table.from_batches([batch]))
            if ids is None:
                continue
            # In the types that Spark knows.
            flat = pa.array(np.ascontiguousarray(ids.codes, dtype=np.int64).reshape(-1))
            edges = pa.array(np.arange(0, len(ids) + 1, dtype=np.int32) * np.int32(ids.levels))
            columns = {
                "item_id": ids.items.to_arrow(),
                "codes": pa.ListArray.from_arrays(edges, flat),
                "residual_norm": pa.array(ids.residual_norms),
                FINGERPRINT: pa.repeat(ids.info.to_metadata()[METADATA_KEY].decode(), len(ids)),
            }
            yield pa.RecordBatch.from_pydict(columns)


def ids_of_table(table: pa.Table, *, where: str = "the table") -> SemanticIds:
    """Bring what an `ArrowEncoder` gave back into semid's types.

    Args:
        table: ``item_id``, ``codes``, ``residual_norm`` and ``fingerprint`` of at least one item.
        where: what the table is called in errors.

    Raises:
        ArtefactError: columns that are missing or of another kind, or rows of several models.
        InputError: codes outside the model's codebooks.
        IdsError: item ids that are null, empty or repeated.
    """
    names = ["item_id", "codes", "residual_norm", FINGERPRINT]
    if missing := [name for name in names if name not in table.column_names]:
        raise ArtefactError(
            f"{where} lacks the columns {', '.join(missing)}; give the rows that ArrowEncoder wrote"
        )
    documents = table[FINGERPRINT].unique().to_pylist()
    if len(documents) != 1 or documents[0] is None:
        raise ArtefactError(
            f"{where} has rows of {len(documents)} models or beams, by its column {FINGERPRINT}; "
            "give the rows of one run"
        )
    info = CodesInfo.from_metadata({METADATA_KEY: str(documents[0]).encode()}, path=where)
    codes = code_rows(table, "codes", len(info.codebook_sizes), where=where)
    norms = table["residual_norm"]
    if not pa.types.is_floating(norms.type) or norms.null_count:
        raise ArtefactError(f"column 'residual_norm' of {where} holds no numbers; encode it again")
    items = ItemIds(table["item_id"], source=f"item ids of {where}", allow_empty=False)
    return SemanticIds(items, codes, norms.to_numpy().astype(np.float32), info)


@with_progress
def import_encoded(
    source: FilePath,
    output: FilePath,
    *,
    overwrite: bool = False,
    progress: ProgressArgument = None,
) -> int:
    """Turn the Parquet that Spark wrote of an `ArrowEncoder` into a folder of ids.

    Args:
        source: Parquet file, folder or URI with the columns of `ArrowEncoder.schema`.
        output: folder or URI for the ids, as ``semid encode`` writes them.
        overwrite: replace an existing output.
        progress: callback that receives progress events.

    Returns:
        The number of items.

    Raises:
        ArtefactError: files that hold something else, or rows of several models or beams.
        IdsError: ids that are null, empty or repeated, in whichever files.

    Cost: one read and one write. Memory: 65,536 rows, and 8 bytes per item with which repeated ids
    are found.
    """
    progress = progress or QuietProgress()
    with claim_output(output, overwrite=overwrite, inputs=[source]):
        files = find_parquet(source)
        hashes: list[npt.NDArray[np.uint64]] = []
        schema = None
        progress.start("import", total=len(files))
        with new_folder(output, overwrite=overwrite) as target:
            for number, file in enumerate(files):
                with contextlib.ExitStack() as opened:
                    writer = None  # Spark writes files without rows too
                    for ids in _pieces(file):
                        table = ids.to_arrow()
                        # The first piece decides for all: its model, and the type of its ids.
                        schema = schema or table.schema
                        if table.schema.metadata != schema.metadata:
                            raise ArtefactError(
                                f"'{file}' holds ids of another model or beam than the files "
                                "before it; give the rows of one run"
                            )
                        if writer is None:
                            sink = opened.enter_context(target.stream(f"part-{number:06d}.parquet"))
                            writer = pq.ParquetWriter(sink, schema, **PARQUET_OPTIONS)
                            opened.enter_context(writer)
                        hashes.append(ids.items.hash64())
                        writer.write_table(table.cast(schema))
                progress.step()
            if schema is None:
                raise ArtefactError(f"'{source}' holds no rows; give what Spark wrote")
            refuse_repeats(hashes)
    return sum(map(len, hashes))


def _pieces(file: FilePath) -> Iterator[SemanticIds]:
    """Yield the ids of a file that Spark wrote, a block of rows at a time."""
    try:
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(BLOCK_ROWS):
                yield ids_of_table(pa.Table.from_batches([batch]), where=f"'{file}'")
    except (pa.ArrowException, OSError) as error:
        raise ArtefactError(
            f"'{file}' cannot be read as Parquet ({brief(error)}); copy or encode it again"
        ) from None


class TableEncoder:
    """A class for Ray Data: ``ds.map_batches(TableEncoder, fn_constructor_args=[model], ...)``.

    Arguments are those of `ArrowEncoder`, by position.
    """

    def __init__(self, *arguments: Any) -> None:
        self._encode = _RowEncoder(*arguments)
        self._info = _loaded(self._encode.model).codes_info(self._encode.beam_width)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode a batch; the result has the columns and types of ``semid encode``."""
        ids = self._encode(table)
        if ids is None:
            kind = table.schema.field(self._encode.id_column or DEFAULT_ID_COLUMN).type
            return ids_schema(kind, self._info).empty_table()
        return ids.to_arrow()


def encode_dataset(
    dataset: Any,
    model: FilePath,
    *,
    options: RayOptions | None = None,
    embedding_column: str | None = None,
    id_column: str | None = None,
    on_invalid: str = "error",
    beam_width: int | None = None,
    batch_rows: int = 65_536,
) -> Any:
    """Encode the rows of a Ray Dataset; for files use `encode_folder`, which goes on after a stop.

    Args:
        dataset: a `ray.data.Dataset` with embeddings and item ids.
        model: artefact folder or URI that every worker can read.
        options: workers and CPUs of each; at least one CPU slot stays free for Ray Data's reads.
        embedding_column: as for `ArrowEncoder`.
        id_column: as for `ArrowEncoder`.
        on_invalid: as for `ArrowEncoder`.
        beam_width: as for `ArrowEncoder`.
        batch_rows: rows of a batch.

    Returns:
        A lazy dataset of ``item_id``, ``codes`` and ``residual_norm``.

    Raises:
        UsageError: actors would take every CPU slot, and the tasks that read would wait for one
            for ever.
    """
    options = options or RayOptions()
    ray = connect(options)
    # Ray Data's own tasks read the rows: with every slot taken by actors they would never start.
    workers = check_slots(ray, options, readers=1)
    return dataset.map_batches(
        TableEncoder,
        fn_constructor_args=[str(model), embedding_column, id_column, on_invalid, beam_width],
        batch_format="pyarrow",
        batch_size=batch_rows,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=options.cpus_per_worker,
    )
