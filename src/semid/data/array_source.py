"""Embeddings in memory or in an ``.npy`` file: numpy arrays, memory maps and torch tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semid.data.blocks import RawBlock
from semid.data.file_kinds import wrong_format
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource, matching_ids
from semid.errors import EmbeddingError, UsageError, brief

MAX_HEADER = 1 << 16
"""Bytes of an ``.npy`` header; that of a matrix has 118."""


class ArraySource(EmbeddingSource):
    """A matrix (items, dim) of float16, float32 or float64, in memory or memory-mapped.

    It is never copied as a whole. Any memory order and byte order is read; a Fortran-ordered file
    is correct but slow to read by rows.

    Raises:
        EmbeddingError: the array is no such matrix, or is empty.
        IdsError: another number of ids than rows.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        ids: ItemIds | None = None,
        label: str = "the array",
        path: Path | None = None,
    ) -> None:
        if isinstance(array, np.ma.MaskedArray):
            raise EmbeddingError(
                f"{label} is a masked array; fill or drop the masked rows first, for example with "
                "x.filled(numpy.nan) and on_invalid='skip'"
            )
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise EmbeddingError(_refused_type(label, str(array.dtype)))
        check_matrix(label, array.shape)
        self.label = label
        self.dim = array.shape[1]
        self.ids = matching_ids(ids, len(array), label)
        self._array = array
        self._path = path

    def describe(self) -> dict[str, Any]:
        """Return kind, path, dtype, items and dim."""
        facts: dict[str, Any] = {"kind": "npy" if self._path else "array"}
        if self._path:
            facts["path"] = str(self._path)
        return {**facts, "dtype": str(self._array.dtype), "items": len(self), "dim": self.dim}

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        for start in range(first, len(self), size):
            yield self._float32(self._array[start : start + size], shared=True)

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return self._float32(self._array[indices], shared=False)

    @staticmethod
    def _float32(part: np.ndarray, *, shared: bool) -> RawBlock:
        # A value beyond float32 becomes infinite here and is reported as such.
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(np.asarray(part), dtype=np.float32)
        return RawBlock(values, None, shared and np.may_share_memory(values, part))


class TensorSource(EmbeddingSource):
    """A torch tensor (items, dim) of any floating type on any device; see `ArraySource`."""

    def __init__(
        self, tensor: Any, *, ids: ItemIds | None = None, label: str = "the tensor"
    ) -> None:
        if not tensor.is_floating_point():
            raise EmbeddingError(_refused_type(label, str(tensor.dtype)))
        if tensor.device.type == "meta":
            raise EmbeddingError(f"{label} is on the device 'meta' and holds no values")
        if tensor.is_nested:
            raise EmbeddingError(f"{label} is nested; give a dense one of shape (items, dim)")
        if str(tensor.layout) != "torch.strided":
            raise EmbeddingError(f"{label} is {tensor.layout}; give a dense one: x.to_dense()")
        check_matrix(label, tuple(tensor.shape))
        self.label = label
        self.dim = int(tensor.shape[1])
        self.ids = matching_ids(ids, len(tensor), label)
        self._tensor = tensor.detach()

    def describe(self) -> dict[str, Any]:
        """Return kind, device, dtype, items and dim."""
        return {
            "kind": "tensor",
            "device": str(self._tensor.device),
            "dtype": str(self._tensor.dtype).removeprefix("torch."),
            "items": len(self),
            "dim": self.dim,
        }

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        for start in range(first, len(self), size):
            part = self._tensor[start : start + size]
            values = np.ascontiguousarray(part.cpu().float().numpy())
            address = values.__array_interface__["data"][0]
            yield RawBlock(values, None, shared=address == part.data_ptr())

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        import torch

        where = torch.from_numpy(indices).to(self._tensor.device)
        return RawBlock(np.ascontiguousarray(self._tensor[where].cpu().float().numpy()))


def open_npy(path: Path, *, ids: ItemIds | None = None) -> ArraySource:
    """Open an ``.npy`` file as a read-only memory map, without unpickling anything."""
    label = f"'{path}'"
    dtype, fortran, shape, offset = _read_header(path)
    if dtype.hasobject:
        raise EmbeddingError(
            f"{label} holds pickled Python objects, which are never loaded; save a numeric matrix "
            "instead: numpy.save(path, numpy.stack(rows).astype('float32'))"
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise EmbeddingError(_refused_type(label, str(dtype)))
    check_matrix(label, shape)
    needed = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    size = path.stat().st_size
    if size < needed:
        raise EmbeddingError(
            f"{label} is truncated: its header promises {shape[0]} rows of {shape[1]} {dtype} "
            f"({needed} bytes) and the file has {size} bytes; write or copy it again"
        )
    array = np.memmap(
        path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C"
    )
    return ArraySource(array, ids=ids, label=label, path=path)


def check_matrix(label: str, shape: tuple[int, ...]) -> None:
    """Refuse what is not a matrix with at least one row and one column."""
    if len(shape) != 2:
        hint = ""
        if len(shape) == 1:
            hint = "; for one item, x[None, :]"
        elif len(shape) == 3:
            hint = "; average or select one vector per item, or x.reshape(len(x), -1)"
        raise EmbeddingError(
            f"{label} has shape {tuple(shape)}; embeddings are a matrix (items, width){hint}"
        )
    if shape[0] == 0 or shape[1] == 0:
        what = "no rows" if shape[0] == 0 else "rows of width 0"
        raise EmbeddingError(
            f"{label} has {what} (shape {tuple(shape)}); give at least one item and one value"
        )


def _refused_type(label: str, dtype: str) -> str:
    return (
        f"{label} holds {dtype}; embeddings are float16, float32 or float64. Convert real numbers "
        "with x.astype('float32'); item ids or codes are not embeddings"
    )


def _read_header(path: Path) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """Read an ``.npy`` header as data: dtype, Fortran order, shape, where the values begin."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
                raise ValueError("it does not start like one")
            width = 2 if magic[6] == 1 else 4
            length = int.from_bytes(file.read(width), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header has {length} bytes")
            text = file.read(length)
            if len(text) < length:
                raise ValueError("its header is cut off")
        header = ast.literal_eval(text.decode("utf8" if magic[6] == 3 else "latin1"))
        if set(header) != {"descr", "fortran_order", "shape"}:
            raise ValueError("its header has other keys than descr, fortran_order and shape")
        dtype, shape = np.dtype(header["descr"]), tuple(header["shape"])
        if not isinstance(header["shape"], tuple) or not all(
            type(n) is int and 0 <= n < 2**63 for n in shape
        ):
            raise ValueError(f"its header says shape {shape!r:.80}")
        if not isinstance(header["fortran_order"], bool):
            raise ValueError("its header says neither True nor False for fortran_order")
        return dtype, header["fortran_order"], shape, 8 + width + length
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        SyntaxError,
        MemoryError,  # ast's word, as RecursionError, for nesting without end
        RecursionError,
    ) as error:
        sentence = wrong_format(path, "embeddings", allowed="npy")
        endless = isinstance(error, MemoryError | RecursionError)
        problem = "its header is nested too deeply" if endless else brief(error)
        raise EmbeddingError(
            f"'{path}' is not an .npy file ({problem}); write it with numpy.save"
            if sentence is None
            else f"{sentence} (its name ends in .npy, and it is not an .npy file)"
        ) from error
