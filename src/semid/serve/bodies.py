"""Bodies of requests and answers: JSON, Arrow IPC streams and .npy; nothing else is opened."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semid.data.columns import is_float_list
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.errors import brief
from semid.quantization.blocks import BLOCK_ROWS
from semid.serve.batching import Refused

ARROW, NPY, JSON = "application/vnd.apache.arrow.stream", "application/x-npy", "application/json"
MAX_ID_BYTES = 1024

Array = npt.NDArray[np.float32]
M = TypeVar("M", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EncodeRequest(_Body):
    """Embeddings of items; the ids are optional."""

    embeddings: list[list[float]] = Field(description="one list of numbers per item")
    item_ids: list[str | int] | None = Field(None, description="ids of the items, none twice")


class AddRequest(_Body):
    """New items; an id that is published keeps its codes, so a request may be repeated."""

    embeddings: list[list[float]]
    item_ids: list[str | int]


class DecodeRequest(_Body):
    """Codes, one list per item."""

    codes: list[list[int]]


class VersionRequest(_Body):
    """The number of a version of the bundle."""

    version: int = Field(ge=1)


class RecommendRequest(_Body):
    """Histories of item ids, oldest first."""

    histories: list[list[str | int]] = Field(min_length=1)
    k: int = Field(10, ge=1, le=1000)
    exclude_history: bool = True
    within_ids: Literal["popularity", "embedding", "random"] = "popularity"
    cold_slots: int = Field(0, ge=0, le=1000)


class Rows(NamedTuple):
    """Embeddings ``(n, dim)`` of a request, and the item ids if it has any."""

    x: Array
    ids: ItemIds | None


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """Return the body; Refused beyond a size (413) or a time (408)."""
    too_large = Refused(413, f"the body is larger than {max_bytes:,} bytes; send fewer rows")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > max_bytes:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {seconds:g} seconds") from None
    return b"".join(chunks)


def parse_json(model: type[M], body: bytes) -> M:
    """Return a JSON body with types; Refused (422) names the first place that does not fit."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise Refused(
            422, problem_of(error.errors(include_url=False, include_input=False))
        ) from None


def problem_of(errors: Any) -> str:
    """Return the first problem that pydantic found as a sentence."""
    first = errors[0]
    loc = first["loc"][first["loc"][:1] == ("query",) :]
    place = ".".join(map(str, loc))
    return brief(ValueError(f"{place}: {first['msg']}" if place else first["msg"]))


def read_rows(content_type: str, body: bytes, *, dim: int, max_rows: int) -> Rows:
    """Read embeddings from a body of any of the three formats, and check them.

    Raises:
        Refused: a body that is not what it says (422), or has too many rows (413).
        EmbeddingError, IdsError: rows or ids that cannot be used.
    """
    kind = content_type.partition(";")[0].strip().lower()
    ids: Any = None
    if kind == NPY:
        x: Any = _read_npy(body)
    elif kind == ARROW:
        return _checked(*_read_arrow(body, max_rows), dim=dim, max_rows=max_rows)
    else:
        parsed = parse_json(EncodeRequest, body)
        ids = parsed.item_ids
        if len({len(row) for row in parsed.embeddings}) > 1:
            raise Refused(422, "embeddings: rows have different lengths; all need the model's")
        with np.errstate(over="ignore"):
            x = np.array(parsed.embeddings, np.float32)
    return _checked(x, ids, dim=dim, max_rows=max_rows)


def _checked(x: npt.NDArray[Any], ids: Any, *, dim: int, max_rows: int) -> Rows:
    if x.ndim == 1 and x.size:
        x = x[None]
    if x.ndim != 2 or not len(x):
        raise Refused(422, f"embeddings have shape {x.shape}; give (items, {dim}), one at least")
    if len(x) > max_rows:
        raise Refused(413, f"{len(x):,} rows; one request takes {max_rows:,}: send several")
    if x.shape[1] != dim:
        raise Refused(422, f"embeddings have width {x.shape[1]}, the model takes width {dim}")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(x).all():
        row = int(np.argmin(np.isfinite(x).all(axis=1)))
        raise Refused(422, f"embeddings: row {row} has NaN, inf or a number beyond float32")
    if ids is None:
        return Rows(x, None)
    names = (
        ids if isinstance(ids, ItemIds) else ItemIds([str(each) for each in ids], source="item_ids")
    )
    if len(names) != len(x):
        raise Refused(422, f"{len(names)} item_ids for {len(x)} embeddings; give one per row")
    lengths = [len(name.encode()) for name in names.strings().to_pylist()]
    if not all(0 < length <= MAX_ID_BYTES for length in lengths):
        raise Refused(422, f"item_ids: give texts of 1 to {MAX_ID_BYTES} bytes")
    return Rows(x, names)


def _read_npy(body: bytes) -> npt.NDArray[Any]:
    """Read an array of floats; the header is checked against the bytes that are there."""
    file = io.BytesIO(body)
    try:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    except (KeyError, ValueError, OSError, SyntaxError, RecursionError, MemoryError):
        raise Refused(422, "the body is no .npy array of version 1 or 2") from None
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise Refused(422, f"the array holds {dtype}; give float16, float32 or float64")
    data = memoryview(body)[file.tell() :]
    count = 1
    for length in shape:
        count *= length  # Python's integers: a product of numpy's could overflow
    if len(shape) not in (1, 2) or count * dtype.itemsize != len(data):
        raise Refused(422, f"the array says shape {shape} and has {len(data):,} bytes of data")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_arrow(body: bytes, max_rows: int) -> tuple[Array, ItemIds | None]:
    """Read the columns ``embedding`` and, if there, ``item_id`` of an Arrow IPC stream."""
    try:
        # A small body can say that it unpacks to terabytes, so packed ones are refused unread.
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
            if not is_plain_message(memoryview(message.metadata)):
                raise Refused(
                    422, "the Arrow stream is compressed or has dictionaries; send it plain"
                )
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            names = [name for name in ("embedding", "item_id") if name in reader.schema.names]
            if "embedding" not in names or not is_float_list(reader.schema.field("embedding").type):
                raise Refused(422, "the Arrow stream has no column 'embedding' of lists of floats")
            batches = [batch.select(names) for batch in reader]
        if sum(batch.num_rows for batch in batches) > max_rows:
            raise Refused(413, f"too many rows; one request takes {max_rows:,}: send several")
        table = pa.Table.from_batches(batches)
        # Offsets of a stranger may point anywhere: nothing is read before they are checked.
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error, KeyError) as error:
        raise Refused(422, f"the body is no Arrow IPC stream ({brief(error)})") from None
    source = open_embeddings(table, ids=None if "item_id" in names else ItemIds.range(len(table)))
    x = np.concatenate(
        [np.empty((0, source.dim), np.float32), *(b for _, b in source.blocks(BLOCK_ROWS))]
    )
    return x, source.ids if "item_id" in names else None


def is_plain_message(metadata: memoryview) -> bool:
    """Return whether an Arrow message is a schema or an uncompressed record batch.

    The metadata are a flatbuffer (Schema.fbs, Message.fbs): a table holds the distance to its
    vtable, and the vtable the offset of each field, 0 for one that is not there.
    """

    def field_at(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = int(struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0])
        return table + offset if offset else 0

    root = struct.unpack_from("<I", metadata, 0)[0]
    kind, header = field_at(root, 1), field_at(root, 2)
    if not kind or not header:
        return False
    if metadata[kind] == 1:  # MessageHeader.Schema
        return True
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return metadata[kind] == 3 and not field_at(batch, 3)  # RecordBatch without `compression`


def answer(
    request: Request | None,
    version: int,
    content: dict[str, Any],
    *,
    main: str = "",
    status: int = 200,
) -> Response:
    """Return an answer in the format that the request accepts; arrays become lists in JSON.

    Arrow takes the arrays of ``content`` as columns, .npy the array ``main`` alone.
    """
    headers = {"x-semid-version": str(version)}
    accepted = request.headers.get("accept", "") if request is not None and main else ""
    if NPY in accepted:
        buffer = io.BytesIO()
        np.save(buffer, content[main], allow_pickle=False)
        return Response(buffer.getvalue(), status, headers, NPY)
    if ARROW in accepted:
        columns = {k: _column(v) for k, v in content.items() if isinstance(v, np.ndarray | list)}
        table = pa.table(columns).replace_schema_metadata({"version": str(version)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return Response(sink.getvalue().to_pybytes(), status, headers, ARROW)
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in content.items()}
    text = json.dumps({"version": version, **plain}, separators=(",", ":"), allow_nan=False)
    return Response(text, status, headers, JSON)


def _column(values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.array(values)
