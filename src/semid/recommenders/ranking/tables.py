"""Columns of a table, wherever it lies: Parquet, CSV, or a frame in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.data.columns import ARROW_CONVERSION_ERRORS
from semid.data.csv_files import csv_columns, is_csv, read_csv
from semid.data.frames import is_frame, open_frame
from semid.data.parquet_files import ParquetFiles
from semid.errors import InputError, UsageError, brief

__all__ = ["Table", "dense_values", "open_table"]


class Table(NamedTuple):
    """A table whose columns are read when asked for.

    Attributes:
        names: its columns.
        read: returns some of them as an Arrow table.
        label: what it is called in errors.
    """

    names: list[str]
    read: Callable[[Sequence[str]], pa.Table]
    label: str


def open_table(source: Any, *, what: str) -> Table:
    """Open a table.

    Args:
        source: path of Parquet (file, folder or glob) or CSV; an Arrow table, pandas or polars
            frame; or a dictionary of columns.
        what: what it is called in errors.

    Raises:
        UsageError: it is none of these, or there is no such file.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if is_csv(path):
            names = csv_columns(path, error=InputError)
            return Table(
                names, lambda cs: read_csv(path, list(cs), text=[], error=InputError), f"'{source}'"
            )
        files = ParquetFiles.open(path, error=InputError)
        return Table(list(files.schemas[0].names), lambda cs: files.read(list(cs)), f"'{source}'")
    if isinstance(source, dict):
        try:
            source = pa.table(source)
        except (*ARROW_CONVERSION_ERRORS, ValueError) as error:
            raise UsageError(
                f"{what} cannot be read as columns of equal length: {brief(error)}"
            ) from None
    if is_frame(source):
        frame = open_frame(source)
        return Table(
            list(frame.schema.names),
            lambda cs: pa.table({c: frame.column(c) for c in cs}),
            frame.label,
        )
    raise UsageError(
        f"{what} is a {type(source).__name__}; give a path to Parquet or CSV, an Arrow table, a "
        "pandas or polars frame, or a dictionary of columns"
    )


def dense_values(column: Any, *, name: str, label: str) -> npt.NDArray[np.float32]:
    """Return a column of numbers ``(n,)`` as float32.

    Raises:
        InputError: it holds no numbers, or some are null, NaN or infinite.
    """
    kind = column.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    ):
        raise InputError(
            f"column '{name}' of {label} holds {kind}; a dense column holds numbers: cast it, or "
            "name it as a categorical column (--categorical, categorical=)"
        )
    values = (
        column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        if isinstance(column, pa.Array)
        else column.cast(pa.float64()).to_numpy()
    )
    bad = ~np.isfinite(values)
    if bad.any():
        raise InputError(
            f"dense column '{name}' of {label} holds {int(bad.sum())} rows with null, NaN or inf "
            f"(first: row {int(np.argmax(bad))}); fill them in or drop those rows"
        )
    found: npt.NDArray[np.float32] = values.astype(np.float32)
    return found
