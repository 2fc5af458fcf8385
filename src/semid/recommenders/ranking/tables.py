"""Columns of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.errors import InputError

__all__ = ["dense_values"]


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
