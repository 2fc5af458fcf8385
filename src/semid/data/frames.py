"""Tables in memory (Arrow, pandas, polars) behind one small face.

pandas, polars and torch are recognized by the module their classes come from and never imported
here: who passes a frame has imported its library already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from semid.data.arrow_source import Chunk, ObjectChunk
from semid.data.columns import (
    ARROW_CONVERSION_ERRORS,
    conversion_problem,
    refuse_repeated,
    storage,
)
from semid.errors import InputError, UsageError

__all__ = ["Frame", "is_frame", "library_of", "open_frame"]

_LIBRARIES = ("numpy", "pandas", "polars", "pyarrow", "torch")


def library_of(value: Any) -> str:
    """Return which of numpy, pandas, polars, pyarrow or torch a value comes from, or ''."""
    for base in type(value).__mro__:
        root = base.__module__.split(".")[0]
        if root in _LIBRARIES:
            return root
    return ""


def is_frame(value: Any) -> bool:
    """Whether a value is a table or a single column of pandas, polars or Arrow."""
    return library_of(value) in ("pandas", "polars", "pyarrow")


class Frame:
    """A table with named columns; also the Arrow implementation.

    Attributes:
        schema: names and Arrow types of the columns (a pandas object column by its first values).
        kind: ``arrow``, ``pandas`` or ``polars``.
        label: the table in the user's words.
    """

    kind = "arrow"

    def __init__(self, table: Any, schema: pa.Schema) -> None:
        self.table = table
        self.schema = schema
        self.label = f"the {self.kind} table"

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> Any:
        """Return a whole column as an Arrow chunked array.

        Raises:
            UsageError: the table has several columns of that name.
        """
        refuse_repeated([name], self.schema.names, label=self.label)
        return self._column(name)

    def _column(self, name: str) -> Any:
        return self.table.column(name)

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Return a column in pieces that become Arrow a block at a time."""
        chunks: Sequence[Chunk] = self.column(name).chunks
        return chunks

    def value_type(self, name: str) -> str:
        """Return the type of the values in a list column, for logs."""
        return str(storage(self.schema.field(name).type).value_type)


class PandasFrame(Frame):
    """A pandas frame. Object columns of arrays stay as they are until a block is read."""

    kind = "pandas"

    def __init__(self, frame: Any) -> None:
        # An index with a name is a column to its owner: often the item id.
        self._index = str(frame.index.name) if frame.index.name is not None else None
        # By position: two columns may have one name.
        fields = [
            (str(name), _pandas_type(frame.iloc[:, place]))
            for place, name in enumerate(frame.columns)
        ]
        if self._index is not None and self._index not in map(str, frame.columns):
            fields.append((self._index, _pandas_type(frame.index.to_series())))
        else:
            self._index = None
        self._places = {str(name): place for place, name in enumerate(frame.columns)}
        super().__init__(frame, pa.schema(fields))

    def _column(self, name: str) -> Any:
        series = self._series(name)
        try:
            array = pa.array(series, from_pandas=True)
        except ARROW_CONVERSION_ERRORS as error:
            raise InputError(
                f"column '{name}' of {self.label} "
                + conversion_problem(error, f"frame['{name}'].astype(str)")
            ) from error
        return array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Return a column in pieces that become Arrow a block at a time."""
        refuse_repeated([name], self.schema.names, label=self.label)
        series = self._series(name)
        if series.dtype != object:
            return super().chunks(name)
        return [ObjectChunk(series.to_numpy(), label=f"column '{name}' of {self.label}")]

    def _series(self, name: str) -> Any:
        if name == self._index:
            return self.table.index.to_series()
        return self.table.iloc[:, self._places[name]]


class PolarsFrame(Frame):
    """A polars frame; each chunk of a column is shared with Arrow."""

    kind = "polars"

    def __init__(self, frame: Any) -> None:
        super().__init__(frame, frame.head(0).to_arrow().schema)

    def _column(self, name: str) -> Any:
        parts = [chunk.to_arrow() for chunk in self.table[name].get_chunks()]
        return pa.chunked_array(parts, type=None if parts else self.schema.field(name).type)


def open_frame(value: Any) -> Frame:
    """Wrap a pandas, polars or Arrow table, or one column of them, as a `Frame`.

    Raises:
        UsageError: something else of these libraries, such as a lazy frame.
    """
    name = type(value).__name__
    library = library_of(value)
    if library == "pandas" and name in ("DataFrame", "Series"):
        return PandasFrame(value if name == "DataFrame" else value.to_frame(_title(value.name)))
    if library == "polars" and name in ("DataFrame", "Series"):
        return PolarsFrame(value if name == "DataFrame" else value.to_frame(_title(value.name)))
    if isinstance(value, pa.RecordBatch):
        value = pa.Table.from_batches([value])
    if isinstance(value, pa.Array | pa.ChunkedArray):
        value = pa.table({"embedding": value})
    if isinstance(value, pa.Table):
        return Frame(value, value.schema)
    hint = "; collect it first: frame.collect()" if name == "LazyFrame" else ""
    raise UsageError(
        f"a {library} {name} is not a table in memory{hint}. Give a DataFrame, an Arrow table, or "
        "the path of a file"
    )


def _title(name: Any) -> str:
    return str(name) if name not in (None, "") else "embedding"


def _pandas_type(series: Any) -> pa.DataType:
    """Return the Arrow type of a pandas column; of an object column, by its first values."""
    head = series[series.notna()].iloc[:8] if series.dtype == object else series.iloc[:0]
    try:
        return pa.array(head, from_pandas=True).type
    except ARROW_CONVERSION_ERRORS:
        # Reading the column says what is wrong with its values; here only its shape counts.
        looks_like_list = len(head) and isinstance(head.iloc[0], list | tuple | np.ndarray)
        return pa.large_list(pa.float64()) if looks_like_list else pa.null()
