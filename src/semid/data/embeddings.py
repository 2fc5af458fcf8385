"""Open embeddings of any container as one `EmbeddingSource`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from semid.data.columns import TextModel, pick_embedding_column
from semid.data.files import ParquetFiles
from semid.data.ids import ItemIds
from semid.data.items import frame_ids, load_ids, parquet_ids
from semid.data.list_sources import ArrowSource, ParquetSource
from semid.data.source import ArraySource, EmbeddingSource, TensorSource, open_npy
from semid.data.tables import collected, is_frame, library_of, open_arrow, open_frame
from semid.errors import EmbeddingError, UsageError, check_choice
from semid.filesystems import is_uri

_log = logging.getLogger(__name__)


def open_embeddings(
    source: Any,
    *,
    ids: Any = None,
    embedding_column: str | None = None,
    id_column: str | None = None,
    on_invalid: str = "error",
) -> EmbeddingSource:
    """Open embeddings wherever they lie, without loading them.

    Args:
        source: a path to ``.npy`` (memory-mapped) or Parquet (file, folder, glob, or a URI such as
            ``s3://bucket/items``); a numpy array or torch tensor (items, dim); an Arrow table,
            pandas or polars frame with a column of float lists, or with nothing but columns of
            floats, one per dimension; or an `EmbeddingSource`. Values are float16, float32 or
            float64.
        ids: item ids from elsewhere, see `semid.data.items.load_ids`: a path such as
            ``items.parquet`` or ``items.parquet:asin``, an array, a list or a table. None takes
            the id column beside the embeddings, else row numbers.
        embedding_column: a table's embedding column; None takes ``embedding``, else the only
            column of float lists.
        id_column: the id column; None takes ``item_id``.
        on_invalid: ``error`` refuses rows with null, NaN or infinite values, or of another width
            than most, when they are read; ``skip`` drops them and their ids, for one pass over the
            rows now.

    Returns:
        The source. Opening reads headers, the ids and the first rows; more rows only where lists
        differ in length, to learn which length is the most frequent.

    Raises:
        UsageError: an option that does not fit, a path or a column that is not there.
        EmbeddingError: the embeddings are empty, of a wrong type or shape, or unreadable.
        IdsError: ids are null, repeated, of a wrong type, or not one per row.
    """
    check_choice("on_invalid", on_invalid, ("error", "skip"))
    opened = _open(source, ids, embedding_column, id_column)
    _log.info("embeddings: %s", opened.describe())
    return _drop_invalid(opened) if on_invalid == "skip" else opened


def _open(
    source: Any, ids: Any, embedding_column: str | None, id_column: str | None
) -> EmbeddingSource:
    # Ids from elsewhere go before a column beside the embeddings.
    separate = None if ids is None else load_ids(ids, id_column=id_column)
    frame = None
    if isinstance(source, str | Path):
        frame = open_arrow(source, error=EmbeddingError)
        if frame is None:
            return _open_path(source, separate, embedding_column, id_column)
    source = collected(source)
    if frame is not None or is_frame(source):
        frame = frame or open_frame(source)
        if embedding_column is None and _is_matrix(frame.schema):
            columns = [frame.column(name).to_numpy() for name in frame.schema.names]
            return ArraySource(np.column_stack(columns), ids=separate)
        column = pick_embedding_column(frame.schema, embedding_column, label=frame.label)
        opened = ArrowSource(
            frame.chunks(column),
            dtype=frame.value_type(column),
            ids=separate if separate is not None else frame_ids(frame, id_column),
            label=f"embedding column '{column}' of {frame.label}",
            kind=frame.kind,
        )
        opened.text_model = TextModel.of_schemas([frame.schema], frame.label)
        return opened
    _refuse_columns(type(source).__name__, embedding_column, id_column, separate)
    if isinstance(source, EmbeddingSource):
        return source if separate is None else source.with_ids(separate)
    if isinstance(source, np.ndarray):
        return ArraySource(source, ids=separate)
    if library_of(source) == "torch" and hasattr(source, "is_floating_point"):
        return TensorSource(source, ids=separate)
    if hasattr(source, "__array__"):
        return ArraySource(np.asarray(source), ids=separate)
    hint = ""
    if hasattr(source, "toarray"):
        hint = "; sparse input is not supported: give x.toarray()"
    if isinstance(source, list | tuple):
        hint = "; make a matrix of a list first: numpy.asarray(rows, dtype='float32')"
    raise UsageError(
        f"embeddings are a {type(source).__name__}; give a path (.npy, Parquet file, folder or "
        f"glob), a numpy array, a torch tensor, an Arrow table, or a pandas or polars frame{hint}"
    )


def _is_matrix(schema: pa.Schema) -> bool:
    """Whether a table has one column of numbers per dimension, as scikit-learn returns it."""
    is_float = all(pa.types.is_floating(kind) for kind in schema.types)
    return is_float and len(schema) > 1 and "embedding" not in schema.names


def _open_path(
    path: str | Path, ids: ItemIds | None, embedding_column: str | None, id_column: str | None
) -> EmbeddingSource:
    remote = is_uri(path)
    file = Path(path).expanduser()
    is_npy = file.suffix.lower() == ".npy"
    if remote and is_npy:
        raise UsageError(
            f"'{path}' is an .npy, which is mapped into memory and so must lie on this machine; "
            "copy it here, or keep embeddings there as Parquet"
        )
    if is_npy and file.is_file():
        _refuse_columns("an .npy file", embedding_column, id_column, ids)
        return open_npy(file, ids=ids)
    files = ParquetFiles.open(path if remote else file)
    column = pick_embedding_column(files.schemas[0], embedding_column, label=files.label)
    ids = parquet_ids(files, id_column) if ids is None else ids
    return ParquetSource(files, column, ids=ids)


def _refuse_columns(
    what: str, embedding_column: str | None, id_column: str | None, ids: ItemIds | None
) -> None:
    """Refuse column names for a matrix, which has none, rather than ignore them."""
    problem = ""
    if embedding_column is not None:
        problem = (
            f"--embedding-column (embedding_column='{embedding_column}') does not apply; leave it "
            "out"
        )
    elif id_column is not None and ids is None:
        problem = (
            f"--id-column (id_column='{id_column}') does not apply; name the table with the ids "
            f"too: --ids items.parquet:{id_column}"
        )
    if problem:
        raise UsageError(f"{what} has no columns, so {problem}")


def _drop_invalid(source: EmbeddingSource) -> EmbeddingSource:
    usable = source.valid_rows()
    dropped = len(source) - int(usable.sum())
    if dropped == len(source):
        raise EmbeddingError(
            f"{source.label}: every one of its {len(source)} rows has null, NaN or infinite values "
            "or another width; nothing would be left"
        )
    if not dropped:
        return source
    first = int(np.flatnonzero(~usable)[0])
    _log.warning(
        "%s: dropped %d of %d rows with null, NaN or infinite values or of another width than %d "
        "(first: item '%s', row %d)",
        *(source.label, dropped, len(source), source.dim, source.ids[first], first),
    )
    return source.subset(usable)
