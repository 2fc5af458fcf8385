"""Ids of other programs, by what their files hold: JSON, tables, arrays and tensors.

Readers tell item ids, codes and tokens apart by their form, so that one name, ``auto``, reads what
LC-Rec, LETTER, MiniOneRec, UniGenRec, OpenOneRec, TorchEasyRec, GRID and own scripts write.
"""

from __future__ import annotations

import logging
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.codes import MAX_CODEWORDS, METADATA_KEY, SemanticIds
from semid.data.files import find_parquet
from semid.data.source import map_npy
from semid.data.tables import csv_delimiter, open_table
from semid.documents import read_json
from semid.errors import ArtefactError, InputError, UsageError
from semid.exports.formats import tensor_layout
from semid.exports.id_files import read_grid, wrap_codes
from semid.filesystems import open_parquet

logger = logging.getLogger(__name__)

ID_COLUMNS = ("item_id", "pid", "asin", "id")
CODE_COLUMNS = ("codes", "sid", "semantic_id", "semantic_ids", "code")

_TOKEN = re.compile(r"<[^<>]*?(\d{1,10})>")  # ten digits: codes are below 2**32
_NUMBERED = re.compile(r"(.*?)(\d+)")
_PLAIN = re.compile(r"[\s\[\](),;:|/_-]*\d{1,10}([\s\[\](),;:|/_-]+\d{1,10})*[\s\[\](),;:|/_-]*")
_FORMS = 'a list such as [1, 2] or ["<a_1>", "<b_2>"], or a text such as "<a_1><b_2>" or "1-2"'


def parse_codes(value: Any) -> list[int]:
    """Return the codes of one item, from numbers, tokens with a number each, or a text of them.

    Raises:
        ValueError: if there are none, or something else.
    """
    if isinstance(value, str):
        if "<" in value:
            return [int(number) for number in _TOKEN.findall(value)]
        if _PLAIN.fullmatch(value):
            return [int(number) for number in re.findall(r"\d+", value)]
        raise ValueError(value)
    codes = []
    for part in value:
        if isinstance(part, bool) or not isinstance(part, int | np.integer | str):
            raise ValueError(part)
        (code,) = parse_codes(part) if isinstance(part, str) else (int(part),)
        if not 0 <= code < MAX_CODEWORDS:
            raise ValueError(part)
        codes.append(code)
    return codes


def code_matrix(values: Sequence[Any], where: str) -> tuple[npt.NDArray[np.int64], bool]:
    """Return codes ``(items, levels)`` of one value per item, and whether some have a token more.

    Programs that make ids unique may give colliding items alone a further token. It becomes a last
    level: 0 for items without it, else its number plus 1.
    """
    rows = []
    for row, value in enumerate(values):
        try:
            codes = parse_codes(value)
        except (TypeError, ValueError):
            codes = []
        if not codes:
            raise ArtefactError(
                f"{where}: row {row} holds {reprlib.repr(value)}; its codes are expected, {_FORMS}"
            )
        rows.append(codes)
    lengths = sorted({len(codes) for codes in rows})
    if not lengths or len(lengths) > 2 or lengths[-1] - lengths[0] > 1:
        raise ArtefactError(
            f"{where}: items have {', '.join(map(str, lengths[:8]))} codes; all need as many, or "
            "some one token more"
        )
    if len(lengths) == 1:
        return np.array(rows, dtype=np.int64), False
    levels = lengths[0]
    return np.array(
        [[*codes[:levels], codes[levels] + 1 if len(codes) > levels else 0] for codes in rows],
        dtype=np.int64,
    ), True


def _wrap(
    codes: npt.NDArray[Any], has_extra: bool, where: str, *, items: Any, tokenizer: Any
) -> SemanticIds:
    ids = wrap_codes(codes, items=items, tokenizer=tokenizer)
    if has_extra:
        logger.warning(
            "%s: %d of %d items have a further token, which becomes level %d (0 for the others)",
            where,
            int((codes[:, -1] > 0).sum()),
            len(codes),
            codes.shape[1],
        )
        if tokenizer is None:
            info = replace(ids.info, unique="append")
            ids = replace(ids, info=info, model_codes=ids.codes[:, :-1])
    return ids


def read_json_ids(
    path: str | os.PathLike[str], *, items: Any = None, tokenizer: Any = None
) -> SemanticIds:
    """Read an object of row numbers or item ids, or a list with one entry per item."""
    where = f"'{path}'"
    document = read_json(path, advice="give a JSON file of ids")
    if isinstance(document, list):
        document = {str(row): value for row, value in enumerate(document)}
    if not isinstance(document, dict) or not document:
        raise ArtefactError(f"{where} holds no object and no list of ids")
    keys = list(document)
    if set(keys) == {str(row) for row in range(len(keys))}:
        values = [document[str(row)] for row in range(len(keys))]
    else:
        _refuse_items(items, where)
        items, values = keys, list(document.values())
    return _wrap(*code_matrix(values, where), where, items=items, tokenizer=tokenizer)


def _refuse_items(items: Any, where: str) -> None:
    if items is not None:
        raise UsageError(f"{where} has item ids of its own; leave out --ids (items=)")


def read_table_ids(path: Any, *, items: Any = None, tokenizer: Any = None) -> SemanticIds:
    """Read a CSV or Parquet table: a column of codes, or one integer column per level."""
    table = open_table(path, what="ids", error=InputError)
    level_columns: list[str] = []
    codes_column = next((name for name in CODE_COLUMNS if name in table.names), None)
    if codes_column is None:
        level_columns = _level_columns(table.names)
    id_column = next((name for name in ID_COLUMNS if name in table.names), None)
    if id_column is None and items is None:
        others = [name for name in table.names if name not in {codes_column, *level_columns}]
        id_column = others[0] if len(others) == 1 else None
    if id_column is not None:
        _refuse_items(items, table.label)
    columns = [*([codes_column] if codes_column else level_columns)]
    if not columns:
        raise InputError(
            f"{table.label} has the columns {', '.join(table.names[:12])}; codes are a column "
            f"called {' or '.join(CODE_COLUMNS[:2])}, or numbered columns such as code_1, code_2"
        )
    text = [id_column] if id_column else []
    read = table.read([*text, *columns], text=text)
    items = read[id_column] if id_column else items
    if codes_column is None:
        for name in columns:
            if not pa.types.is_integer(read[name].type) or read[name].null_count:
                raise InputError(f"column '{name}' of {table.label} holds no whole numbers")
        codes = np.stack([read[name].to_numpy().astype(np.int64) for name in columns], axis=1)
        return _wrap(codes, False, table.label, items=items, tokenizer=tokenizer)
    values = read[codes_column]
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    matrix = code_matrix(values.to_pylist(), f"column '{codes_column}' of {table.label}")
    return _wrap(*matrix, table.label, items=items, tokenizer=tokenizer)


def _level_columns(names: Sequence[str]) -> list[str]:
    """Return the longest series of columns whose names differ in a last number, in its order."""
    series: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            series.setdefault(match[1], []).append((int(match[2]), name))
    longest = max(series.values(), key=len, default=[])
    return [name for _, name in sorted(longest)]


def read_array_ids(
    path: str | os.PathLike[str], *, items: Any = None, tokenizer: Any = None
) -> SemanticIds:
    """Read an .npy of integers ``(items, levels)``."""

    def check(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or dtype.kind not in "iu" or 0 in shape:
            raise ArtefactError(
                f"'{path}' holds {dtype} of shape {shape}; codes are integers of shape (items, "
                "levels)"
            )
        if shape[0] < shape[1]:
            raise ArtefactError(
                f"'{path}' has shape {shape}, fewer items than levels; write it transposed"
            )

    codes = np.array(map_npy(Path(path), check))
    return wrap_codes(codes, items=items, tokenizer=tokenizer)


def _suffix(path: Path) -> str:
    return ".csv" if csv_delimiter(path) else path.suffix.lower()


_READERS: dict[str, Callable[..., SemanticIds]] = {
    ".json": read_json_ids,
    ".npy": read_array_ids,
    ".csv": read_table_ids,
    ".parquet": read_table_ids,
    ".pt": read_grid,
    ".pth": read_grid,
}


def read_any_ids(
    path: str | os.PathLike[str],
    *,
    items: Any = None,
    tokenizer: Any = None,
    orientation: str | None = None,
) -> SemanticIds:
    """Read ids of any format, semid's own included, by the file's suffix and content.

    Args:
        path: JSON, CSV, Parquet, ``.npy``, or a tensor ``.pt``.
        items: item ids in the row order of the file, if it holds none.
        tokenizer: model whose codes these are.
        orientation: axes of a tensor, as in `import_ids`.

    Raises:
        UsageError: for another suffix, item ids beside those of the file, or an orientation of
            what is no tensor.
        ArtefactError: if the file cannot be read.

    Cost: JSON and text are parsed item by item, about a second per 100,000 items.
    """
    file = Path(path)
    suffix = ".parquet" if file.is_dir() else _suffix(file)
    if suffix not in _READERS:
        raise UsageError(f"'{path}' ends in '{file.suffix}'; give one of {', '.join(_READERS)}")
    if not file.exists():
        raise UsageError(f"'{path}' does not exist; check the path")
    options = tensor_layout(orientation, f"'{path}'", is_tensor=_READERS[suffix] is read_grid)
    if suffix == ".parquet" and _is_own(file):
        _refuse_items(items, f"'{path}'")
        ids = SemanticIds.read(file)
        if tokenizer is not None:
            ids.check_codebook(tokenizer.codebook_fingerprint)
        return ids
    return _READERS[suffix](file, items=items, tokenizer=tokenizer, **options)


def _is_own(path: Path) -> bool:
    with open_parquet(find_parquet(path)[0]) as parquet:
        return METADATA_KEY in (parquet.schema_arrow.metadata or {})
