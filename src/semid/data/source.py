"""Embeddings: blocks in order and rows at random, of arrays, ``.npy`` files and torch tensors."""

from __future__ import annotations

import ast
import copy as copy_module
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.blocks import BLOCK, RawBlock, RowProblems, reblock, within_range
from semid.data.columns import TextModel
from semid.data.files import wrong_format
from semid.data.ids import ItemIds
from semid.errors import EmbeddingError, IdsError, UsageError, brief
from semid.output import atomic_file

# Bytes of an ``.npy`` header; that of a matrix has 118.
MAX_HEADER = 1 << 16


class EmbeddingSource(ABC):
    """Embeddings of a catalogue, wherever they lie; nothing ever copies the whole matrix.

    Made by `semid.data.embeddings.open_embeddings`. Values arrive as float32 whatever they are
    stored as, and a value that is null, NaN or infinite never leaves a source: reading raises.
    """

    ids: ItemIds  # the item ids, in row order
    dim: int  # width of a row
    label: str  # what the embeddings are called in errors, in the user's words
    text_model: TextModel | None = None  # the encoder that made them of texts, where known
    cheap_rows: bool = True  # whether rows at random cost only those rows

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        facts = ", ".join(f"{key}={value!r}" for key, value in self.describe().items())
        return f"{type(self).__name__}({facts})"

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a log line needs: kind, path where there is one, dtype, items, dim."""

    @abstractmethod
    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        """Yield the rows from ``first``, a multiple of ``size``, on, in pieces of any length."""

    @abstractmethod
    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        """Read rows (n,) that are known to exist, in the order asked for."""

    def _raw_blocks(self, size: int, first: int = 0) -> Iterator[RawBlock]:
        """Yield the rows from ``first`` on, ``size`` at a time (the last may be shorter)."""
        return reblock(self._pieces(size, first), size)

    def _set_shape(self, label: str, shape: Sequence[int | None], ids: ItemIds | None) -> None:
        """Set ``label``, ``dim`` and ``ids`` of a matrix; a width of None is that of null rows."""
        if None in shape and shape[0]:
            raise EmbeddingError(f"{label} holds nothing but nulls in its {shape[0]} rows")
        sizes = tuple(size or 0 for size in shape)
        check_matrix(label, sizes)
        rows, self.dim = sizes
        self.label = label
        self.ids = matching_ids(ids, rows, label)

    def blocks(
        self, size: int = BLOCK, *, first: int = 0, copy: bool = True
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each block's first row and rows (n, dim) float32, C-contiguous and finite."""
        if size < 1:
            raise UsageError(f"block size {size} is not positive")
        if first < 0 or first % size:
            raise UsageError(f"first={first} is not a multiple of the block size {size}")
        start = first
        for raw in self._raw_blocks(size, first):
            if raw.flags is not None or not within_range(raw.values):
                raise EmbeddingError(self._inspect()[1])
            owned = raw.values.copy() if copy and raw.shared else raw.values
            yield start, owned
            start += len(owned)

    def rows(self, indices: Any) -> np.ndarray:
        """Return the rows at ``indices`` (n,), any order, repeats allowed: (n, dim) float32."""
        # Parquet decodes every row group that holds one of them: rows at random cost a pass there.
        numbers = _check_indices(indices, len(self))
        raw = self._raw_rows(numbers)
        if raw.flags is not None or not within_range(raw.values):
            problems = RowProblems(self.label, self.dim, self.ids)
            problems.add(raw, numbers)
            raise EmbeddingError(problems.sentences())
        return raw.values.copy() if raw.shared else raw.values

    def validate(self) -> None:
        """Read everything once and raise an EmbeddingError that lists every kind of problem."""
        if sentences := self._inspect()[1]:
            raise EmbeddingError(sentences)

    def valid_rows(self) -> np.ndarray:
        """Return which rows can be used: boolean mask (items,), from one pass over the rows."""
        return self._inspect()[0]

    def subset(self, mask_or_indices: Any) -> EmbeddingSource:
        """Return a lazy view of the rows of a mask (items,) or of row numbers (n,), each once."""
        return SubsetSource.of(self, mask_or_indices)

    def with_ids(self, ids: ItemIds) -> EmbeddingSource:
        """Return the same embeddings under other ids, one per row (shares all memory)."""
        view = copy_module.copy(self)
        view.ids = matching_ids(ids, len(self), self.label)
        return view

    def to_npy(self, path: str | Path, *, overwrite: bool = False) -> EmbeddingSource:
        """Write the rows to an ``.npy`` file in float32 and return it as a memory-mapped source."""
        with atomic_file(path, overwrite=overwrite) as work:
            write_npy(work, (block for _, block in self.blocks()), shape=(len(self), self.dim))
        return open_npy(Path(path), ids=self.ids)

    def _inspect(self) -> tuple[np.ndarray, list[str]]:
        """Read everything once; return the mask of usable rows (items,) and every problem."""
        mask = np.zeros(len(self), dtype=bool)
        problems = RowProblems(self.label, self.dim, self.ids)
        start = 0
        for raw in self._raw_blocks(BLOCK):
            rows = np.arange(start, start + len(raw.values))
            mask[rows] = problems.add(raw, rows)
            start += len(rows)
        return mask, problems.sentences()


def matching_ids(ids: ItemIds | None, rows: int, label: str) -> ItemIds:
    """Return the ids, or row numbers, after checking that there is one per row."""
    if ids is None:
        return ItemIds.range(rows)
    if len(ids) != rows:
        raise IdsError(
            f"{label} has {rows} rows and there are {len(ids)} ids; give one id per row, in the "
            "same order"
        )
    return ids


def write_npy(
    path: Path, blocks: Iterable[np.ndarray], *, shape: tuple[int, int], dtype: str = "<f4"
) -> None:
    """Write blocks of rows as one ``.npy`` file."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)


def _check_indices(indices: Any, count: int) -> np.ndarray:
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise UsageError(
            f"row numbers are {numbers.dtype} of shape {numbers.shape}; give a flat array of "
            "integers"
        )
    numbers = numbers.astype(np.int64, copy=False)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        raise UsageError(
            f"row numbers run from {numbers.min()} to {numbers.max()}; the rows are 0 to "
            f"{count - 1}"
        )
    return numbers


class SubsetSource(EmbeddingSource):
    """A lazy view of unique rows of another source; see `EmbeddingSource.subset`."""

    def __init__(self, base: EmbeddingSource, indices: np.ndarray) -> None:
        self.base = base
        self.indices = indices
        self.ids = base.ids.take(indices)
        self.dim = base.dim
        self.label = base.label
        self.text_model = base.text_model
        self._rising = bool((indices[1:] > indices[:-1]).all())

    @classmethod
    def of(cls, base: EmbeddingSource, mask_or_indices: Any) -> SubsetSource:
        """Check the mask or the row numbers, and flatten a subset of a subset."""
        mask = np.asarray(mask_or_indices)
        if mask.dtype == bool:
            if mask.shape != (len(base),):
                raise UsageError(
                    f"the mask has shape {mask.shape} and there are {len(base)} rows; give one "
                    "value per row"
                )
            mask_or_indices = np.flatnonzero(mask)
        rows = _check_indices(mask_or_indices, len(base))
        if len(np.unique(rows)) != len(rows):
            raise UsageError("the row numbers of a subset repeat; name every row once")
        # A view of a view would look rows up twice.
        if isinstance(base, SubsetSource):
            view = cls(base.base, base.indices[rows])
            view.ids = base.ids.take(rows)
            return view
        return cls(base, rows)

    def describe(self) -> dict[str, Any]:
        """Return the base's facts with this subset's number of items."""
        return {**self.base.describe(), "items": len(self), "subset_of": len(self.base)}

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        if not self._rising or self.base.cheap_rows:
            for start in range(first, len(self), size):
                yield self.base._raw_rows(self.indices[start : start + size])
            return
        if first >= len(self):
            return
        # One pass over the base, which reads its rows in order only.
        # Blocks before that of the first row asked for are not read.
        start = int(self.indices[first]) // BLOCK * BLOCK
        for raw in self.base._raw_blocks(BLOCK, start):
            stop = start + len(raw.values)
            low, high = np.searchsorted(self.indices, (start, stop))
            low = max(int(low), first)
            if high > low:
                yield raw.take(self.indices[low:high] - start)
            if high == len(self.indices):
                return
            start = stop

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        return self.base._raw_rows(self.indices[indices])


class ArraySource(EmbeddingSource):
    """A matrix (items, dim) of float16, float32 or float64, in memory or memory-mapped."""

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
        _refuse_type(label, array.dtype)
        self._set_shape(label, array.shape, ids)
        self._array = array
        self._path = path

    def describe(self) -> dict[str, Any]:
        """Return kind, path, dtype, items and dim."""
        facts = {"kind": "npy", "path": str(self._path)} if self._path else {"kind": "array"}
        return {**facts, "dtype": str(self._array.dtype), "items": len(self), "dim": self.dim}

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
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
            raise EmbeddingError(_WRONG_TYPE.format(label, tensor.dtype))
        if tensor.device.type == "meta":
            raise EmbeddingError(f"{label} is on the device 'meta' and holds no values")
        if tensor.is_nested:
            raise EmbeddingError(f"{label} is nested; give a dense one of shape (items, dim)")
        if str(tensor.layout) != "torch.strided":
            raise EmbeddingError(f"{label} is {tensor.layout}; give a dense one: x.to_dense()")
        self._set_shape(label, tuple(tensor.shape), ids)
        self._tensor = tensor.detach()

    def describe(self) -> dict[str, Any]:
        """Return kind, device, dtype, items and dim."""
        return {
            "kind": "tensor",
            "device": str(self._tensor.device),
            "dtype": str(self._tensor.dtype).removeprefix("torch."),
            **{"items": len(self), "dim": self.dim},
        }

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        for start in range(first, len(self), size):
            part = self._tensor[start : start + size]
            # `.cpu()` and `.float()` copy only where the tensor is elsewhere or of another type.
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

    def check(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        _refuse_type(label, dtype)
        check_matrix(label, shape)

    return ArraySource(map_npy(path, check), ids=ids, label=label, path=path)


def map_npy(
    path: Path, check: Callable[[np.dtype[Any], tuple[int, ...]], None]
) -> npt.NDArray[Any]:
    """Map the matrix in an ``.npy`` file, once ``check`` has not refused its type and shape."""
    label = f"'{path}'"
    dtype, fortran, shape, offset = _read_header(path)
    if dtype.hasobject:
        raise EmbeddingError(
            f"{label} holds pickled Python objects, which are never loaded; save a numeric matrix "
            "instead: numpy.save(path, numpy.stack(rows).astype('float32'))"
        )
    check(dtype, shape)
    # Python integers: the product of a damaged header can exceed 64 bits.
    needed = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    size = path.stat().st_size
    if size < needed:
        raise EmbeddingError(
            f"{label} is truncated: its header promises {shape[0]} rows of {shape[1]} {dtype} "
            f"({needed} bytes) and the file has {size} bytes; write or copy it again"
        )
    return np.memmap(
        path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C"
    )


def check_matrix(label: str, shape: tuple[int, ...]) -> None:
    """Refuse what is not a matrix with at least one row and one column."""
    if len(shape) != 2:
        hints = {
            1: "; for one item, x[None, :]",
            3: "; average or select one vector per item, or x.reshape(len(x), -1)",
        }
        raise EmbeddingError(
            f"{label} has shape {tuple(shape)}; embeddings are a matrix (items, width)"
            f"{hints.get(len(shape), '')}"
        )
    if shape[0] == 0 or shape[1] == 0:
        what = "no rows" if shape[0] == 0 else "rows of width 0"
        raise EmbeddingError(
            f"{label} has {what} (shape {tuple(shape)}); give at least one item and one value"
        )


_WRONG_TYPE = (
    "{} holds {}; embeddings are float16, float32 or float64. Convert real numbers with "
    "x.astype('float32'); item ids or codes are not embeddings"
)


def _refuse_type(label: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise EmbeddingError(_WRONG_TYPE.format(label, dtype))


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
    # Nesting without end is a MemoryError or a RecursionError of ast.
    except (ValueError, LookupError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        if sentence := wrong_format(path, "embeddings", allowed="npy"):
            sentence += " (its name ends in .npy, and it is not an .npy file)"
        else:
            endless = isinstance(error, MemoryError | RecursionError)
            problem = "its header is nested too deeply" if endless else brief(error)
            sentence = f"'{path}' is not an .npy file ({problem}); write it with numpy.save"
        raise EmbeddingError(sentence) from error
