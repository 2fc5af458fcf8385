"""Values as row numbers of an embedding table; row 0 is for whatever training did not see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.data.ids import ItemIds
from semid.errors import InputError

__all__ = ["UNKNOWN", "Vocabulary", "as_text"]

UNKNOWN = 0
"""The row of values that are not in a vocabulary."""


class Vocabulary:
    """Values that have a row of their own, from row 1 on.

    Args:
        values: distinct strings or integers, in the order of their rows.
        source: what they are called in errors.
    """

    def __init__(self, values: Any, *, source: str = "values") -> None:
        self.ids = values if isinstance(values, ItemIds) else ItemIds(values, source=source)

    def __len__(self) -> int:
        """Count the rows, the unknown one included."""
        return len(self.ids) + 1

    def rows(self, values: Any) -> npt.NDArray[np.int64]:
        """Return the row of each value ``(n,)``; 0 for unknown ones and nulls."""
        return self.ids.index_of(values) + 1

    def strings(self) -> list[str]:
        """Return the values as strings, in the order of their rows from 1 on."""
        found: list[str] = self.ids.strings().to_pylist()
        return found

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return arrays that `of` reads: the characters of all values, and where each ends."""
        parts = [text.encode() for text in self.strings()]
        ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        return {
            f"{name}.bytes": np.frombuffer(b"".join(parts), dtype=np.uint8).copy(),
            f"{name}.ends": ends,
        }

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], name: str) -> Vocabulary:
        """Read what `tensors` gave."""
        text = tensors[f"{name}.bytes"].tobytes()
        ends = tensors[f"{name}.ends"]
        good = ends.ndim == 1 and len(ends) > 0 and ends.dtype.kind == "i"
        if not good or ends[0] != 0 or ends[-1] != len(text) or (np.diff(ends) < 0).any():
            raise ValueError(f"'{name}.ends' does not divide '{name}.bytes' into texts")
        values = [
            text[a:b].decode() for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]
        return cls(pa.array(values, type=pa.large_string()))


def as_text(
    column: Any,
    *,
    name: str,
    label: str,
    advice: str = "cast it, or name it as a dense column (--dense, dense=)",
) -> pa.Array:
    """Return a column of categories ``(n,)`` as strings; nulls stay nulls.

    Args:
        column: the column.
        name: its name.
        label: its table in the user's words.
        advice: what to do about a column of another type.

    Raises:
        InputError: it holds something else than strings, integers or truth values.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    good = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
        or kind == pa.string_view()
    )
    if not good:
        raise InputError(
            f"column '{name}' of {label} holds {kind}; a category is a string, an integer or a "
            f"truth value: {advice}"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(kind)
    array = column.cast(pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        array = array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)
    return array
