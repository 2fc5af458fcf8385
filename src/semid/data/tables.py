"""The reader of tables: CSV, Parquet and tables in memory, column by column.

pandas, polars and torch are recognized by the module their classes come from and never imported
here: who passes a frame has imported its library already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.feather as feather

from semid.data.columns import (
    ARROW_CONVERSION_ERRORS,
    conversion_problem,
    plain_columns,
    refuse_repeated,
    require_column,
    storage,
    whole_text,
)
from semid.data.files import HEAD_BYTES, UNKNOWN, ParquetFiles, recognize, wrong_format
from semid.data.list_sources import ObjectChunk
from semid.errors import InputError, UsageError, brief
from semid.filesystems import local_path

_LIBRARIES = ("numpy", "pandas", "polars", "pyarrow", "torch")

_COLLECT: dict[str, Callable[[Any], Any]] = {
    "pyarrow.RecordBatchReader": lambda reader: reader.read_all(),
    "pyarrow.Dataset": lambda dataset: dataset.to_table(),
    "pyarrow.Scanner": lambda scanner: scanner.to_table(),
    "polars.LazyFrame": lambda frame: frame.collect(),
    "duckdb.DuckDBPyRelation": lambda relation: relation.to_arrow_table(),
    "dask.DataFrame": lambda frame: frame.compute(),
    "dask.FrameBase": lambda frame: frame.compute(),
    "datasets.Dataset": lambda dataset: dataset.with_format("arrow")[:],
    "datasets.IterableDataset": lambda rows: pa.Table.from_pylist(list(rows)),
}
"""Tables that are read piece by piece, by library and class, and how they come into memory.

Embeddings and interactions are passed over several times, which a stream allows once.
"""


def library_of(value: Any) -> str:
    """Return which of numpy, pandas, polars, pyarrow or torch a value comes from, or ''."""
    roots = (base.__module__.split(".")[0] for base in type(value).__mro__)
    return next((root for root in roots if root in _LIBRARIES), "")


def collected(value: Any) -> Any:
    """Return a table in memory for a dataset, a stream or a query; other values as they are."""
    for base in type(value).__mro__:
        name = f"{base.__module__.partition('.')[0].removeprefix('_')}.{base.__name__}"
        if name in _COLLECT:
            return _COLLECT[name](value)
    return value


def is_frame(value: Any) -> bool:
    """Whether a value is a table or a single column of pandas, polars, Arrow or its C stream."""
    library = library_of(value)
    return library in ("pandas", "polars", "pyarrow") or (
        not library and hasattr(value, "__arrow_c_stream__")
    )


class Frame:
    """A table with named columns, each of which becomes Arrow when it is read."""

    def __init__(self, kind: str, schema: pa.Schema, read: Callable[[str], Any]) -> None:
        self.kind = kind  # ``arrow``, ``pandas`` or ``polars``
        self.schema = schema  # of a pandas object column the type of its first values
        self.label = f"the {kind} table"
        self._read = read  # returns a whole column as an Arrow chunked array

    def column(self, name: str) -> Any:
        """Return a whole column as an Arrow chunked array."""
        refuse_repeated([name], self.schema.names, label=self.label)
        return self._read(name)

    def chunks(self, name: str) -> Sequence[Any]:
        """Return a column in pieces that become Arrow a block at a time."""
        return list(self.column(name).chunks)

    def value_type(self, name: str) -> str:
        """Return the type of the values in a list column, for logs."""
        return str(storage(self.schema.field(name).type).value_type)


class PandasFrame(Frame):
    """A pandas frame. Object columns of arrays stay as they are until a block is read."""

    def __init__(self, frame: Any) -> None:
        # By position: two columns may have one name.
        columns = [(str(name), frame.iloc[:, i]) for i, name in enumerate(frame.columns)]
        # An index with a name is a column to its owner: often the item id.
        index = frame.index.name
        if index is not None and str(index) not in dict(columns):
            columns.append((str(index), frame.index.to_series()))
        self._series = dict(columns)
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

    def chunks(self, name: str) -> Sequence[Any]:
        """Return a column in pieces that become Arrow a block at a time."""
        refuse_repeated([name], self.schema.names, label=self.label)
        series = self._series[name]
        if series.dtype != object:
            return super().chunks(name)
        return [ObjectChunk(series.to_numpy(), label=f"column '{name}' of {self.label}")]


def open_frame(value: Any, *, label: str = "") -> Frame:
    """Wrap a table, or one column, as a `Frame`; ``label`` is its name in messages."""
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
        frame = Frame("arrow", value.schema, value.column)
        frame.label = label or frame.label
        return frame
    raise UsageError(
        f"a {library} {name} is no table; give a DataFrame, an Arrow table, or the path of a file"
    )


def open_arrow(path: Any, *, error: type[InputError] = InputError) -> Frame | None:
    """Open an Arrow or Feather file, or a folder that Hugging Face's datasets saved; else None.

    The file is mapped into memory, so that rows are read when they are needed.
    """
    location = local_path(path) if isinstance(path, str | Path) else None
    if location is None:
        return None
    state = location / "state.json"
    if location.is_dir() and not state.is_file():
        return None
    if not location.is_dir() and not (
        location.is_file() and recognize(_head(location)).name == "arrow"
    ):
        return None
    try:
        files = [location]
        if location.is_dir():  # the order of the parts is said in the state, not in their names
            parts = json.loads(state.read_text(encoding="utf8"))["_data_files"]
            files = [location / Path(part["filename"]).name for part in parts]
        table = pa.concat_tables([_mapped(file) for file in files])
        table.column_names  # noqa: B018 - decodes them
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as failure:
        raise error(f"'{path}' could not be read as Arrow ({brief(failure)})") from failure
    return open_frame(table, label=f"'{path}'")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _mapped(path: Path) -> pa.Table:
    if _head(path).startswith(b"FEA1"):
        return feather.read_table(path)
    file = pa.memory_map(str(path))
    if _head(path).startswith(b"ARROW1"):
        return pa.ipc.open_file(file).read_all()
    return pa.ipc.open_stream(file).read_all()


def _pandas_type(series: Any) -> pa.DataType:
    """Return the Arrow type of a pandas column; of an object column, by its first values."""
    head = series[series.notna()].iloc[:8] if series.dtype == object else series.iloc[:0]
    try:
        return pa.array(head, from_pandas=True).type
    except ARROW_CONVERSION_ERRORS:
        # Reading the column says what is wrong with its values; here only its shape counts.
        looks_like_list = len(head) and isinstance(head.iloc[0], list | tuple | np.ndarray)
        return pa.large_list(pa.float64()) if looks_like_list else pa.null()


_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
_SEPARATED = {"comma", "tab", "semicolon", "bar"}


@dataclass(frozen=True)
class Table:
    """A table whose columns are read when they are asked for."""

    names: list[str]  # its columns
    label: str  # the table in the user's words
    _read: Callable[..., pa.Table]

    def read(
        self,
        columns: Sequence[str],
        *,
        text: Sequence[str] = (),
        numbers: Sequence[str] = (),
        coded: bool = False,
    ) -> pa.Table:
        """Read columns into memory; the types of a CSV file are inferred from its first megabyte.

        But columns of ``text`` stay text, so that ``007`` is not 7, and ``numbers`` are float64.
        ``coded`` dictionary-codes the text of Parquet too, which saves memory where values repeat.
        """
        table = self._read(list(columns), text=text, numbers=numbers, coded=coded)
        return plain_columns(table)

    def require(self, column: str, *, flag: str) -> str:
        """Return ``column`` if the table has exactly one such column; see `require_column`."""
        return require_column(column, self.names, label=self.label, flag=flag)


def open_table(
    source: Any, *, what: str = "the table", error: type[InputError] = InputError
) -> Table:
    """Open a table in memory, or in a file, folder, glob or URI; reads the names of its columns."""
    if isinstance(source, str | Path):
        if (frame := open_arrow(source, error=error)) is not None:
            return _of_frame(frame)
        path = local_path(source)
        if path is not None and csv_delimiter(path):
            return _open_csv(path, f"'{source}'", error)
        files = ParquetFiles.open(source if path is None else path, error=error)
        return Table(
            list(files.schemas[0].names),
            files.label,
            lambda columns, text, numbers, coded: files.read(
                columns, dictionaries=text if coded else ()
            ),
        )
    if isinstance(source, dict):
        try:
            source = pa.table({name: whole_text(column) for name, column in source.items()})
        except (*ARROW_CONVERSION_ERRORS, ValueError) as failure:
            raise UsageError(
                f"{what} cannot be read as columns of equal length: {brief(failure)}"
            ) from None
    source = collected(source)
    if is_frame(source):
        return _of_frame(open_frame(source))
    raise UsageError(
        f"{what} cannot be read from a {type(source).__name__}; give a path to Parquet or CSV, an "
        "Arrow table, a pandas or polars frame, or a dictionary of columns"
    )


def _of_frame(frame: Frame) -> Table:
    return Table(
        list(frame.schema.names),
        frame.label,
        lambda columns, text, numbers, coded: pa.table({c: frame.column(c) for c in columns}),
    )


def csv_delimiter(path: Path) -> str:
    """Return the separator that the name of a CSV or TSV file promises, empty for other files."""
    name = re.sub(r"\.(gz|bz2)$", "", path.name.lower())
    return _DELIMITERS.get(PurePath(name).suffix, "")


def _open_csv(path: Path, label: str, error: type[InputError]) -> Table:
    def read(
        columns: list[str], *, text: Sequence[str], numbers: Sequence[str], coded: bool
    ) -> pa.Table:
        refuse_repeated(columns, names, label=label)
        text = [n for n in columns if n in text or kinds[n].startswith("token")]
        numbers = [n for n in columns if n in numbers or kinds[n] == "float"]
        # Dictionary-coded text takes the memory of the distinct values, and `007` stays text.
        types = {column: pa.dictionary(pa.int32(), pa.string()) for column in text}
        options = pa_csv.ConvertOptions(
            include_columns=[written[column] for column in columns],
            column_types={
                written[column]: kind
                for column, kind in (types | {c: pa.float64() for c in numbers}).items()
            },
            strings_can_be_null=True,
            # Only an empty field is missing: an item may well be called "NA" or "null".
            null_values=[""],
        )
        table = _read_csv(path, options, pa_csv.CSVStreamingReader.read_all, error)
        if len(table) == 0:
            raise error(f"{label} has a header and no rows; give at least one row")
        for place, name in enumerate(columns):
            if kinds[name].endswith("_seq"):
                lists = pc.split_pattern(table.column(place).cast(pa.large_string()), " ")
                table = table.set_column(place, name, lists)
        return table.rename_columns(columns)

    header = list(_read_csv(path, None, lambda reader: reader.schema.names, error))
    # RecBole writes types into the header: `user_id:token`, `item_id_list:token_seq`.
    typed = re.search(r"\.(inter|item)\b", path.name.lower()) is not None
    parts = [name.rpartition(":") if typed and ":" in name else (name, "", "") for name in header]
    names = [name for name, _, _ in parts]
    written = dict(zip(names, header, strict=True))
    kinds = {name: kind for name, _, kind in parts}
    return Table(names, label, read)


def _read_csv(
    path: Path,
    options: pa_csv.ConvertOptions | None,
    read: Callable[[pa_csv.CSVStreamingReader], Any],
    error: type[InputError],
) -> Any:
    """Open a CSV file, apply ``read``, and say what is wrong with a file that is none."""
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist; check the path")
    delimiter = csv_delimiter(path)
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            head = stream.read(HEAD_BYTES)
        # Compressed files are judged by their content.
        kind = recognize(head)
        if kind.name in _SEPARATED:
            # Only a header without the separator that the name promises shows that it is another.
            readable = delimiter.encode() in head.partition(b"\n")[0]
        else:
            readable = kind.name in ("text", "empty") or kind is UNKNOWN
        if not readable:
            raise error(str(wrong_format(path, "table", kind)))
        parse = pa_csv.ParseOptions(delimiter=delimiter)
        with pa_csv.open_csv(str(path), parse_options=parse, convert_options=options) as reader:
            return read(reader)
    except (pa.ArrowException, OSError, UnicodeError) as failure:
        if path.stat().st_size == 0:
            raise error(f"'{path}' is empty; its first line must name the columns") from failure
        # Arrow raises OSError for what is not compressed as the file's name says.
        sentence = wrong_format(path, "table") if isinstance(failure, OSError) else None
        raise error(
            sentence or f"'{path}' could not be read as CSV ({brief(failure)}); correct the file"
        ) from failure
