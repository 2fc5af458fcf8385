"""OpenOneRec: Parquet of ``pid`` and ``codes``, and the ids as the text its models read.

A text is ``<|sid_begin|><s_a_1><s_b_2><s_c_3><|sid_end|>``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import SemanticIds
from semid.errors import InputError
from semid.exports.tokens import level_letter
from semid.output import atomic_folder

__all__ = ["parse_text", "sid_text", "write_openonerec"]

TEXT = re.compile(r"<\|sid_begin\|>((?:<s_[a-z]+_\d+>)+)<\|sid_end\|>")
TOKEN = re.compile(r"<s_([a-z]+)_(\d+)>")


def sid_text(codes: Sequence[int]) -> str:
    """Return one id's codes ``(levels,)`` as OpenOneRec's text."""
    inner = "".join(f"<s_{level_letter(level)}_{int(code)}>" for level, code in enumerate(codes))
    return f"<|sid_begin|>{inner}<|sid_end|>"


def parse_text(text: str) -> list[int]:
    """Return the codes that `sid_text` wrote.

    Raises:
        InputError: if the text is not one id.
    """
    found = TEXT.fullmatch(text.strip())
    tokens = TOKEN.findall(found[1]) if found else []
    if not tokens or [letter for letter, _ in tokens] != [
        level_letter(level) for level in range(len(tokens))
    ]:
        raise InputError(f"{text!r} is not an id like {sid_text((1, 2, 3))!r}")
    return [int(code) for _, code in tokens]


def write_openonerec(
    ids: SemanticIds, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a folder with ``pid_codes.parquet`` and ``sid_text.parquet`` (``pid``, ``sid``).

    ``pid`` is the item id where all are integers; otherwise the row number, and both tables have
    the column ``item_id`` too.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    pids, named = _pids(ids)
    extra = {} if named else {"item_id": ids.items.to_arrow()}
    levels = ids.codes.shape[1]
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * levels)
    codes = pa.ListArray.from_arrays(offsets, pa.array(ids.codes.astype(np.int64).reshape(-1)))
    texts = pa.array([sid_text(row) for row in ids.codes.tolist()], type=pa.string())
    with atomic_folder(path, overwrite=overwrite) as folder:
        pq.write_table(
            pa.table({"pid": pids, "codes": codes, **extra}), folder / "pid_codes.parquet"
        )
        pq.write_table(pa.table({"pid": pids, "sid": texts, **extra}), folder / "sid_text.parquet")


def _pids(ids: SemanticIds) -> tuple[npt.NDArray[np.int64], bool]:
    """Item ids as int64 if they are integers in any type, else row numbers."""
    values: Any = ids.items.to_arrow()
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    try:
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False), True
    except pa.ArrowInvalid:
        return np.arange(len(ids)), False
