"""Choosing columns: by the name given, by convention, or not at all and saying why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.documents import parse_json, record
from semid.errors import EmbeddingError, UsageError, brief, nearest_name


def numbers_to_arrow(values: np.ndarray) -> pa.Array:
    """Return numbers (n,) as an Arrow array that shares their memory.

    `pyarrow.array` would import pandas, where it is installed, to see whether they are a series.
    """
    values = np.ascontiguousarray(values)
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """The encoder that made embeddings of texts, as metadata of files and models say it."""

    KEY = b"semid.text_model"

    model: str  # its name on the Hugging Face Hub, or its folder
    revision: str | None = None  # the commit there, or a digest of its weights
    template: str = "{text}"  # columns in braces, of which each text was made
    normalized: bool = True  # whether vectors have length 1

    def __str__(self) -> str:
        """Return name and revision, and whether vectors keep their lengths."""
        name = self.model if self.revision is None else f"{self.model} at {self.revision}"
        return name if self.normalized else f"{name}, not normalized"

    def is_other(self, other: TextModel) -> bool:
        """Whether vectors of the other lie in another space."""
        known = self.revision is not None and other.revision is not None
        same = self.revision == other.revision if known else self.model == other.model
        return not same or self.normalized != other.normalized

    @property
    def is_on_hub(self) -> bool:
        """Whether it has come from the Hugging Face Hub."""
        return self.revision is not None and not self.revision.startswith("sha256:")

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the metadata of an Arrow schema that carries this."""
        return {self.KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def of_schemas(cls, schemas: Iterable[pa.Schema], label: str) -> TextModel | None:
        """Return what the metadata of all files say, None where some say nothing."""
        metadata: list[Mapping[bytes, bytes]] = [schema.metadata or {} for schema in schemas]
        encoders = [each[cls.KEY] for each in metadata if cls.KEY in each]
        where = f"the encoder in the schema of {label}"
        models = [
            record(cls, parse_json(each, where=where), where) for each in dict.fromkeys(encoders)
        ]
        for model in models[1:]:
            if model.is_other(models[0]):
                raise EmbeddingError(
                    f"the files of {label} are embeddings of different models: {models[0]} and "
                    f"{model}; give files of one"
                )
        return models[0] if models and len(encoders) == len(metadata) else None


def storage(kind: pa.DataType) -> pa.DataType:
    """Return the plain type under an extension type (such as Arrow's fixed-shape tensor)."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(storage(kind)) for test in tests)


def is_float_list(kind: pa.DataType) -> bool:
    """Whether a column can hold embeddings: lists of float16, float32 or float64."""
    if _tensor_shape(kind)[1:]:  # which axes of a larger tensor are features is not known
        return False
    return is_list(kind) and bool(pa.types.is_floating(storage(kind).value_type))


def _tensor_shape(kind: pa.DataType) -> tuple[int, ...]:
    return tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) else ()


def float_list_width(kind: pa.DataType) -> int | None:
    """Return the width that the type itself fixes, or None."""
    kind = storage(kind)
    return kind.list_size if pa.types.is_fixed_size_list(kind) else None


# What `pyarrow.array` raises for Python values that do not make one column.
ARROW_CONVERSION_ERRORS = (pa.ArrowException, TypeError, UnicodeError, OverflowError)


def conversion_problem(error: Exception, cast: str) -> str:
    """Say why Python values make no Arrow column and which ``cast`` helps, after its name."""
    if isinstance(error, OverflowError):
        return f"holds integers beyond 64 bits: give them as strings, for example {cast}"
    if isinstance(error, UnicodeEncodeError):
        text = error.object[error.start : error.start + 1]
        return f"holds text that is not valid Unicode ({text!a}): repair or re-encode it"
    return f"mixes types ({brief(error)}): cast it to one, for example {cast}"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, dictionary-coded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def id_type_problem(kind: pa.DataType) -> str | None:
    """Name a type that ids cannot have and say what to do; None for strings and integers."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_text(plain) or pa.types.is_integer(plain):
        return None
    advice = "cast the column, for example to string"
    if pa.types.is_floating(plain):
        advice = (
            "cast whole numbers to int64 (pandas makes floats of integers where some are missing: "
            "drop those rows first)"
        )
    elif pa.types.is_binary(plain) or pa.types.is_large_binary(plain):
        advice = "decode the bytes, for example by a cast to string"
    elif pa.types.is_boolean(plain):
        advice = "name the column that tells the items apart"
    return f"{kind}; ids are strings or integers: {advice}"


def common_type(kinds: Sequence[pa.DataType]) -> pa.DataType:
    """Return the type of columns read one after another, or raise an ArrowException."""
    # All kinds of text become one.
    if len(set(kinds)) > 1 and all(map(is_text, kinds)):
        return pa.large_string()
    # Arrow widens numbers by itself; text of 32 and 64-bit offsets it does not join.
    schemas = [pa.schema([("column", kind)]) for kind in kinds]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Join tables of the same columns row by row, each column in its `common_type`."""
    for name in tables[0].column_names if tables else ():
        kinds = {table.schema.field(name).type for table in tables if name in table.column_names}
        if len(kinds) > 1 and all(map(is_text, kinds)):
            tables = [_to_large_text(table, name) for table in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _to_large_text(table: pa.Table, name: str) -> pa.Table:
    number = table.schema.get_field_index(name)
    if number < 0:
        return table
    field = table.schema.field(number).with_type(pa.large_string())
    return table.set_column(number, field, table.column(number).cast(pa.large_string()))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return a type whose rows Arrow can take: views and runs become what they stand for."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if is_list(kind) and (value := plain_type(kind.value_type)) != kind.value_type:
        return pa.large_list(value)
    return kind


def plain_columns(table: pa.Table) -> pa.Table:
    """Return a table whose rows Arrow can take; see `plain_type`."""
    for number, field in enumerate(table.schema):
        if (kind := plain_type(field.type)) != field.type:
            column = table.column(number)
            if pa.types.is_run_end_encoded(field.type):
                decoded = [pc.run_end_decode(chunk) for chunk in column.chunks]
                column = pa.chunked_array(decoded, field.type.value_type)
            column = column.cast(kind)
            table = table.set_column(number, field.with_type(kind), column)
    return table


def whole_text(values: Any) -> Any:
    """Return numpy's text of one width as objects, of which Arrow keeps what follows a NUL."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "U":
        return values.astype(object)
    return values


def normalize_ids(column: Any) -> Any:
    """Return a column of ids in a type whose nulls Arrow counts and whose rows it can take."""
    if column.type == pa.string_view():
        return column.cast(pa.large_string())
    if not pa.types.is_dictionary(column.type):
        return column
    # Nulls among the values of a dictionary are not in `null_count`.
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if any(chunk.dictionary.null_count for chunk in chunks):
        return column.cast(column.type.value_type)
    return column


def refuse_repeated(columns: Sequence[str], names: Sequence[str], *, label: str) -> None:
    """Refuse (UsageError) a table in which one of ``columns`` occurs more than once."""
    for name in columns:
        if list(names).count(name) > 1:
            raise UsageError(f"{label} has several columns called '{name}'; rename all but one")


def require_column(name: str, columns: list[str], *, label: str, flag: str) -> str:
    """Return ``name`` if it is a column."""
    if name in columns:
        refuse_repeated([name], columns, label=label)
        return name
    raise UsageError(
        f"{label} has no column '{name}'{nearest_name(name, columns)}; it has "
        f"{listed(columns)}: name one with {flag}"
    )


def pick_embedding_column(schema: pa.Schema, column: str | None, *, label: str) -> str:
    """Choose the embedding column: the one named, else ``embedding``, else the only candidate."""
    flag = "--embedding-column (embedding_column=)"
    candidates = [field.name for field in schema if is_float_list(field.type)]
    if column is not None:
        require_column(column, schema.names, label=label, flag=flag)
    elif "embedding" in schema.names:
        column = require_column("embedding", schema.names, label=label, flag=flag)
    elif len(candidates) == 1:
        return str(candidates[0])
    elif candidates:
        raise UsageError(
            f"{label} has {len(candidates)} columns of float lists, {listed(candidates)}, and none "
            f"is called 'embedding': choose one with {flag}"
        )
    else:
        vectors = [field.name for field in schema if is_spark_vector(field.type)]
        if vectors:
            raise EmbeddingError(f"column '{vectors[0]}' of {label} {_SPARK_VECTORS}")
        types = ", ".join(f"'{f.name}' ({f.type})" for f in list(schema)[:12])
        raise EmbeddingError(
            f"{label} has no column of float lists; its columns are {types}. An embedding is one "
            "column of lists of float16, float32 or float64; for a column a dimension pass the "
            "matrix itself: frame.to_numpy()"
        )
    kind = schema.field(column).type
    if not is_float_list(kind):
        hint = f": {listed(candidates)} would do, choose with {flag}" if candidates else ""
        raise EmbeddingError(f"column '{column}' of {label} {not_float_list(kind)}{hint}")
    return column


_SPARK_VECTORS = (
    "holds vectors of Spark ML; make lists of them in Spark: "
    "df.withColumn(name, pyspark.ml.functions.vector_to_array(name, 'float32'))"
)


def is_spark_vector(kind: pa.DataType) -> bool:
    """Whether a column of this type holds DenseVector or SparseVector, as Spark gives them."""
    names = {"type", "size", "indices", "values"}
    return bool(pa.types.is_struct(kind)) and {field.name for field in kind} == names


def not_float_list(kind: pa.DataType) -> str:
    """Say what a column that holds no embeddings holds, in a sentence after its name."""
    if shape := _tensor_shape(kind):
        return (
            f"holds tensors of shape {shape}; embeddings are one vector per item: average or "
            f"select one, or write the tensors as flat lists of {math.prod(shape)}"
        )
    if is_spark_vector(kind):
        return _SPARK_VECTORS
    return f"holds {kind}; embeddings are lists of float16, float32 or float64"


def listed(names: list[str]) -> str:
    """Return the names quoted and joined, cut after twenty."""
    shown = ", ".join(f"'{n}'" for n in names[:20])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 20 else shown or "no columns"
