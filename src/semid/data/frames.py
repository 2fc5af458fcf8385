"""Tables in memory: Arrow, pandas, polars, and whatever offers Arrow's C stream.

pandas, polars and torch are recognized by the module their classes come from and never imported
here: who passes a frame has imported its library already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from semid.data.columns import (
    ARROW_CONVERSION_ERRORS,
    conversion_problem,
    refuse_repeated,
    storage,
)
from semid.data.list_sources import Chunk, ObjectChunk
from semid.errors import InputError, UsageError

_LIBRARIES = ("numpy", "pandas", "polars", "pyarrow", "torch")


def library_of(value: Any) -> str:
    """Return which of numpy, pandas, polars, pyarrow or torch a value comes from, or ''."""
    roots = (base.__module__.split(".")[0] for base in type(value).__mro__)
    return next((root for root in roots if root in _LIBRARIES), "")


def is_frame(value: Any) -> bool:
    """Whether a value is a table or a single column of pandas, polars, Arrow or its C stream."""
    library = library_of(value)
    return library in ("pandas", "polars", "pyarrow") or (
        not library and hasattr(value, "__arrow_c_stream__")
    )


class Frame:
    """A table with named columns, each of which becomes Arrow when it is read.

    Args:
        kind: ``arrow``, ``pandas`` or ``polars``.
        schema: names and Arrow types of the columns (a pandas object column by its first values).
        read: returns a whole column as an Arrow chunked array.

    Attributes:
        label: the table in the user's words.
    """

    def __init__(self, kind: str, schema: pa.Schema, read: Callable[[str], Any]) -> None:
        self.kind = kind
        self.schema = schema
        self.label = f"the {kind} table"
        self._read = read

    def column(self, name: str) -> Any:
        """Return a whole column as an Arrow chunked array."""
        refuse_repeated([name], self.schema.names, label=self.label)
        return self._read(name)

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Return a column in pieces that become Arrow a block at a time."""
        chunks: Sequence[Chunk] = self.column(name).chunks
        return chunks

    def value_type(self, name: str) -> str:
        """Return the type of the values in a list column, for logs."""
        return str(storage(self.schema.field(name).type).value_type)


class PandasFrame(Frame):
    """A pandas frame. Object columns of arrays stay as they are until a block is read."""

    def __init__(self, frame: Any) -> None:
        # By position: two columns may have one name.
        columns = [(str(name), frame.iloc[:, i]) for i, name in enumerate(frame.columns)]
        self._series = dict(columns)
        # An index with a name is a column to its owner: often the item id.
        index = frame.index.name
        if index is not None and str(index) not in self._series:
            columns.append((str(index), frame.index.to_series()))
            self._series[str(index)] = columns[-1][1]
        schema = pa.schema([(name, _pandas_type(series)) for name, series in columns])
        super().__init__("pandas", schema, self._to_arrow)

    def _to_arrow(self, name: str) -> Any:
        try:
            array = pa.array(self._series[name], from_pandas=True)
        except ARROW_CONVERSION_ERRORS as error:
            raise InputError(
                f"column '{name}' of {self.label} "
                + conversion_problem(error, f"frame['{name}'].astype(str)")
            ) from error
        return array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Return a column in pieces that become Arrow a block at a time."""
        refuse_repeated([name], self.schema.names, label=self.label)
        series = self._series[name]
        if series.dtype != object:
            return super().chunks(name)
        return [ObjectChunk(series.to_numpy(), label=f"column '{name}' of {self.label}")]


def open_frame(value: Any) -> Frame:
    """Wrap a table, or one column, as a `Frame`."""
    name, library = type(value).__name__, library_of(value)
    if library in ("pandas", "polars") and name in ("DataFrame", "Series"):
        if name == "Series":
            value = value.to_frame("embedding" if value.name in (None, "") else str(value.name))
        if library == "pandas":
            return PandasFrame(value)
        # A column at a time: a frame whose columns are chunked differently would be copied.
        return Frame(
            "polars",
            value.head(0).to_arrow().schema,
            lambda column: value[column].to_frame().to_arrow().column(0),
        )
    if isinstance(value, pa.RecordBatch):
        value = pa.Table.from_batches([value])
    elif isinstance(value, pa.Array | pa.ChunkedArray):
        value = pa.table({"embedding": value})
    elif not library:
        value = pa.table(value)  # through the Arrow C stream
    if isinstance(value, pa.Table):
        return Frame("arrow", value.schema, value.column)
    hint = "; collect it first: frame.collect()" if name == "LazyFrame" else ""
    raise UsageError(
        f"a {library} {name} is not a table in memory{hint}. Give a DataFrame, an Arrow table, or "
        "the path of a file"
    )


def _pandas_type(series: Any) -> pa.DataType:
    """Return the Arrow type of a pandas column; of an object column, by its first values."""
    head = series[series.notna()].iloc[:8] if series.dtype == object else series.iloc[:0]
    try:
        return pa.array(head, from_pandas=True).type
    except ARROW_CONVERSION_ERRORS:
        # Reading the column says what is wrong with its values; here only its shape counts.
        looks_like_list = len(head) and isinstance(head.iloc[0], list | tuple | np.ndarray)
        return pa.large_list(pa.float64()) if looks_like_list else pa.null()
