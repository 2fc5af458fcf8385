"""Encoding inside other people's pipelines: Spark's ``mapInArrow`` and Ray Data's ``map_batches``.

Both hand Arrow batches of rows to a function in a worker process. The artefact is loaded there,
once per process, and a row's codes depend on that row alone, so batches of any size give the codes
that `Tokenizer.encode` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from semid.codes import CodesInfo, SemanticIds, ids_table
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.data.items import code_rows
from semid.distributed.ray_workers import RayOptions, check_slots, connect
from semid.errors import UsageError
from semid.filesystems import FilePath
from semid.loading import load_tokenizer
from semid.tokenizers.base import Tokenizer


@lru_cache(maxsize=2)
def _loaded(model: str) -> Tokenizer:
    """Load an artefact once per process."""
    tokenizer: Tokenizer = load_tokenizer(model)
    tokenizer.threads = 1  # engines give a task one CPU slot
    return tokenizer


def _encode(
    model: str, table: pa.Table, embedding_column: str | None, id_column: str | None
) -> SemanticIds:
    if id_column not in table.column_names and (id_column or "item_id") not in table.column_names:
        raise UsageError(
            f"a batch has no column '{id_column or 'item_id'}'; it has "
            f"{', '.join(table.column_names)}: rows of a cluster have no numbers, so name the "
            "ids with id_column="
        )
    source = open_embeddings(table, embedding_column=embedding_column, id_column=id_column)
    return _loaded(model).encode(source)


class ArrowEncoder:
    """A function for Spark: ``df.mapInArrow(ArrowEncoder("s3://b/model"), ArrowEncoder.SCHEMA)``.

    Args:
        model: artefact folder or URI that every worker can read.
        embedding_column: the column of float lists; None takes ``embedding``, else the only one.
        id_column: the id column; None takes ``item_id``.

    Attributes:
        SCHEMA: the result in Spark's words. Spark has neither unsigned numbers nor lists of one
            length, so codes are ``array<bigint>``; `ids_of_table` brings them back.
    """

    SCHEMA = "item_id string, codes array<bigint>, residual_norm float"

    def __init__(
        self,
        model: FilePath,
        *,
        embedding_column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        self.model = str(model)
        self.embedding_column, self.id_column = embedding_column, id_column

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Encode batches one after another.

        Raises:
            EmbeddingError: rows of another width, or with null, NaN or inf.
            UsageError: a column is not there.
        """
        for batch in batches:
            if batch.num_rows == 0:
                continue
            table = pa.Table.from_batches([batch])
            ids = _encode(self.model, table, self.embedding_column, self.id_column)
            # In the types that Spark knows.
            flat = pa.array(np.ascontiguousarray(ids.codes, dtype=np.int64).reshape(-1))
            edges = pa.array(np.arange(0, len(ids) + 1, dtype=np.int32) * np.int32(ids.levels))
            columns = {
                "item_id": ids.items.strings().cast(pa.string()),
                "codes": pa.ListArray.from_arrays(edges, flat),
                "residual_norm": pa.array(ids.residual_norms),
            }
            yield pa.RecordBatch.from_pydict(columns)


def ids_of_table(table: pa.Table, info: CodesInfo) -> SemanticIds:
    """Bring what Spark wrote back under the model's fingerprint.

    Args:
        table: ``item_id``, ``codes`` and ``residual_norm`` of all items.
        info: ``semid.load(model).codes_info()`` of the model that made them.

    Raises:
        InputError: codes outside the model's codebooks.
        UsageError: rows of another length, or codes that are no integers.
        IdsError: item ids repeat.
    """
    return SemanticIds(
        ItemIds(table["item_id"]),
        code_rows(table, "codes", len(info.codebook_sizes), where="the table", error=UsageError),
        table["residual_norm"].to_numpy().astype(np.float32),
        info,
    )


class TableEncoder:
    """A class for Ray Data: ``ds.map_batches(TableEncoder, fn_constructor_args=[model], ...)``."""

    def __init__(
        self, model: str, embedding_column: str | None = None, id_column: str | None = None
    ) -> None:
        self.model, self.columns = model, (embedding_column, id_column)
        _loaded(model)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode a batch; the result has the columns and types of ``semid encode``."""
        ids = _encode(self.model, table, *self.columns)
        return ids_table(ids.items.to_arrow(), ids.codes, ids.residual_norms, ids.info)


def encode_dataset(
    dataset: Any,
    model: FilePath,
    *,
    options: RayOptions | None = None,
    embedding_column: str | None = None,
    id_column: str | None = None,
    batch_rows: int = 65_536,
) -> Any:
    """Encode the rows of a Ray Dataset; for files use `encode_folder`, which goes on after a stop.

    Args:
        dataset: a `ray.data.Dataset` with embeddings and item ids.
        model: artefact folder or URI that every worker can read.
        options: workers and CPUs of each; at least one CPU slot stays free for Ray Data's reads.
        embedding_column: as for `ArrowEncoder`.
        id_column: as for `ArrowEncoder`.
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
        fn_constructor_args=[str(model), embedding_column, id_column],
        batch_format="pyarrow",
        batch_size=batch_rows,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=options.cpus_per_worker,
    )
