"""Files of ids: LC-Rec, GRID, OpenOneRec, TorchEasyRec and FuxiCTR."""

from __future__ import annotations

import json
import logging
import os
import re
import reprlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.catalogue.placement import group_numbers, last_level_inputs
from semid.catalogue.uniqueness import rows_of
from semid.codes import MAX_CODEWORDS, MAX_LEVELS, CodesInfo, SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.documents import read_json
from semid.errors import ArtefactError, InputError, UsageError, brief, check_choice
from semid.exports.formats import ExportFormat
from semid.health import check_codes
from semid.lazy import torch
from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.nearest import index_codebook, nearest_m
from semid.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

IMPORTED = "imported"
"""Fingerprint of ids whose codebook is unknown; no model accepts it."""


def level_letter(level: int) -> str:
    """Return ``a`` to ``z``, then ``aa``, ``ab`` and so on, for levels from 0."""
    name = ""
    number = level + 1
    while number:
        number, digit = divmod(number - 1, 26)
        name = chr(ord("a") + digit) + name
    return name


def wrap_codes(
    codes: npt.NDArray[Any], *, items: Any = None, tokenizer: Tokenizer | None = None
) -> SemanticIds:
    """Return codes ``(items, levels)`` of another program as `SemanticIds`; see `import_ids`.

    One level more than the model has is an appended token.

    Raises:
        InputError: if the codes do not fit the model, or the items not the rows.
    """
    check_codes(codes)
    if codes.shape[1] > MAX_LEVELS or codes.max() >= MAX_CODEWORDS:
        raise InputError(
            f"codes up to {codes.max()} on {codes.shape[1]} levels; Semantic IDs have codes below "
            f"2**32 on at most {MAX_LEVELS} levels: is this another kind of file?"
        )
    item_ids = ItemIds.range(len(codes)) if items is None else ItemIds(items)
    if len(item_ids) != len(codes):
        raise InputError(
            f"{len(item_ids)} item ids for {len(codes)} rows of codes; give one per row"
        )
    sizes = tuple(int(largest) + 1 for largest in codes.max(axis=0))
    model_codes = None
    if tokenizer is None:
        info = CodesInfo(
            tokenizer=IMPORTED,
            codebook_sizes=sizes,
            hierarchical=True,
            codebook_fingerprint=IMPORTED,
            weights_fingerprint=IMPORTED,
        )
    else:
        info = tokenizer.codes_info()
        if codes.shape[1] == tokenizer.levels + 1:
            model_codes = codes[:, :-1]
            sizes = (*info.codebook_sizes, max(sizes[-1], 256))
            info = CodesInfo(**{**info.__dict__, "codebook_sizes": sizes, "unique": "append"})
        check_codes(codes, info.codebook_sizes)
    norms = np.full(len(codes), np.nan, dtype=np.float32)
    return SemanticIds(item_ids, codes, norms, info, model_codes)


# LC-Rec, LETTER, MiniOneRec: ``{"0": ["<a_236>", "<b_231>", "<c_226>"], ...}``. Keys are row
# numbers as strings, from 0. UniGenRec has one text per item, ``"<a_236><b_231><c_226>"``.

_TOKEN = re.compile(r"<([a-z]+)_([0-9]{1,10})>")  # ten digits: codes are below 2**32


def _write_lcrec(path: Path, *, ids: SemanticIds, token: str = "<{letter}_{code}>") -> None:
    """Write a list of tokens per row; ``token`` spells one by its letter, level and code."""
    try:
        if token.format(letter="a", level=0, code=1) == token.format(letter="a", level=0, code=2):
            raise ValueError("every code has the same token")
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise UsageError(
            f"token={token!r} ({brief(error)}): spell a token with {{letter}}, {{level}} and "
            "{code}, such as '<{letter}_{code}>'"
        ) from None
    letters = [level_letter(level) for level in range(ids.levels)]
    with path.open("w", encoding="utf8") as file:
        file.write("{")
        for row, codes in enumerate(ids.codes.tolist()):
            tokens = [
                token.format(letter=letters[level], level=level, code=code)
                for level, code in enumerate(codes)
            ]
            file.write(f"{',' if row else ''}\n{json.dumps(str(row))}: {json.dumps(tokens)}")
        file.write("\n}\n")


def _read_lcrec(
    path: str | os.PathLike[str], *, items: Any = None, tokenizer: Tokenizer | None = None
) -> SemanticIds:
    """Read an index JSON; `ArtefactError` names the first entry that is not of the format."""
    document = read_json(path, advice="give the .index.json that LC-Rec or semid export wrote")
    if not isinstance(document, dict) or not document:
        raise ArtefactError(f"'{path}' holds no object of row numbers; is it an .index.json?")
    codes: list[list[int]] = []
    for row in range(len(document)):
        if str(row) not in document:
            raise ArtefactError(
                f"'{path}' has {len(document)} entries but none for row '{row}'; keys are row "
                "numbers from 0"
            )
        tokens = document[str(row)]
        if isinstance(tokens, str):  # UniGenRec: "<a_1><b_2>"
            tokens = [f"{part}>" for part in tokens.removesuffix(">").split(">")]
        if not isinstance(tokens, list):
            raise ArtefactError(
                f"'{path}': row '{row}' holds {reprlib.repr(tokens)}; a list of tokens such as "
                '["<a_1>", "<b_2>"] or their text "<a_1><b_2>" is expected'
            )
        codes.append([_parse_token(path, row, level, part) for level, part in enumerate(tokens)])
        if len(codes[-1]) != len(codes[0]) or not codes[0]:
            raise ArtefactError(
                f"'{path}': row '{row}' has {len(codes[-1])} tokens, row '0' {len(codes[0])}; "
                "every item needs the same number, at least one"
            )
    return wrap_codes(np.array(codes, dtype=np.int64), items=items, tokenizer=tokenizer)


def _parse_token(path: str | os.PathLike[str], row: int, level: int, text: Any) -> int:
    match = _TOKEN.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[1] != level_letter(level):
        raise ArtefactError(
            f"'{path}': row '{row}' holds {reprlib.repr(text)} at level {level}; "
            f"'<{level_letter(level)}_NUMBER>' is expected, its number below 2**32"
        )
    return int(match[2])


LCREC = ExportFormat(_write_lcrec, _read_lcrec, options=("token",), distinct=True)


# GRID, NVIDIA SID-GR: ``torch.save`` of a LongTensor ``[levels, items]``, columns in row order. An
# appended token is one row more, the deduplication digit.

ORIENTATIONS = ("levels-first", "items-first")
_MATRIX = "a matrix of integers, [levels, items] or [items, levels], is expected"
_INTEGERS = {f"torch.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _write_grid(path: Path, *, ids: SemanticIds) -> None:
    torch.save(torch.from_numpy(ids.codes.astype("int64").T.copy()), path)


def read_grid(
    path: str | os.PathLike[str],
    *,
    items: Any = None,
    tokenizer: Tokenizer | None = None,
    orientation: str | None = None,
) -> SemanticIds:
    """Read a tensor without running any code in the file; see `import_ids`."""
    if not Path(path).is_file():
        raise ArtefactError(f"'{path}' does not exist; give a file that torch.save wrote")
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums in its files
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum does not match")
        tensor = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises about ten classes for files that it did not write
        raise ArtefactError(
            f"'{path}' cannot be read as a tensor that torch.save wrote: it is damaged, cut short "
            "or something else; pickled Python objects are never loaded"
        ) from error
    if not isinstance(tensor, torch.Tensor) or tensor.is_nested:
        kind = "nested tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArtefactError(f"'{path}' holds {kind}; {_MATRIX}")
    if (
        tensor.ndim != 2
        or tensor.numel() == 0
        or str(tensor.dtype) not in _INTEGERS
        or tensor.layout is not torch.strided
        or tensor.device.type == "meta"  # holds no values
        # A view that repeats its values would take memory that the file does not have.
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ArtefactError(f"'{path}' holds {kind} of shape {tuple(tensor.shape)}; {_MATRIX}")
    if orientation is None:
        orientation = _guess_orientation(path, tuple(tensor.shape), items, tokenizer)
    else:
        check_choice("--orientation (orientation=)", orientation, ORIENTATIONS)
    codes = tensor.T if orientation == "levels-first" else tensor
    return wrap_codes(codes.contiguous().numpy(), items=items, tokenizer=tokenizer)


def _guess_orientation(
    path: str | os.PathLike[str],
    shape: tuple[int, ...],
    items: Any,
    tokenizer: Tokenizer | None,
) -> str:
    """Choose which side of a tensor are the levels; log it where only the shape tells."""
    levels = set() if tokenizer is None else {tokenizer.levels, tokenizer.levels + 1}
    fits = [
        (items is None or len(ItemIds(items)) == shape[1 - side])
        and (tokenizer is None or shape[side] in levels)
        for side in (0, 1)
    ]
    if fits[0] != fits[1]:
        return ORIENTATIONS[0] if fits[0] else ORIENTATIONS[1]
    side = 0 if shape[0] <= shape[1] else 1
    logger.warning(
        "'%s' has shape %s and is read %s, %d items with %d codes each; give --orientation %s "
        "(orientation=) if it is the other way round",
        path,
        shape,
        ORIENTATIONS[side],
        shape[1 - side],
        shape[side],
        ORIENTATIONS[1 - side],
    )
    return ORIENTATIONS[side]


GRID = ExportFormat(_write_grid, read_grid, distinct=True)


# OpenOneRec: Parquet of ``pid`` and ``codes``, and the ids as the text that its models read,
# ``<|sid_begin|><s_a_1><s_b_2><s_c_3><|sid_end|>``.

_SID_TEXT = re.compile(r"<\|sid_begin\|>((?:<s_[a-z]+_\d+>)+)<\|sid_end\|>")
_SID_TOKEN = re.compile(r"<s_([a-z]+)_(\d+)>")


def sid_text(codes: Sequence[int]) -> str:
    """Return one id's codes ``(levels,)`` as OpenOneRec's text."""
    inner = "".join(f"<s_{level_letter(level)}_{int(code)}>" for level, code in enumerate(codes))
    return f"<|sid_begin|>{inner}<|sid_end|>"


def parse_text(text: str) -> list[int]:
    """Return the codes that `sid_text` wrote.

    Raises:
        InputError: if the text is not one id.
    """
    match = _SID_TEXT.fullmatch(text.strip())
    tokens = _SID_TOKEN.findall(match[1]) if match else []
    letters = [letter for letter, _ in tokens]
    if not tokens or letters != [level_letter(level) for level in range(len(tokens))]:
        raise InputError(f"{text!r} is not an id like {sid_text((1, 2, 3))!r}")
    return [int(code) for _, code in tokens]


def numbered_items(ids: SemanticIds) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Return a number per item: its id if all are integers, else its row, and then its name."""
    written = ids.items.strings()
    try:
        numbers = written.cast(pa.int64())
        if numbers.cast(written.type).equals(written):  # ``7``, not ``007``
            return numbers.to_numpy(zero_copy_only=False), {}
    except pa.ArrowInvalid:
        pass
    return np.arange(len(ids)), {"item_id": ids.items.to_arrow()}


def _write_openonerec(path: Path, *, ids: SemanticIds) -> None:
    """Write ``pid_codes.parquet`` and ``sid_text.parquet`` (``pid``, ``sid``).

    ``pid`` is the item id where all are integers as they are written (``7``, not ``007``);
    otherwise the row number, and both tables have the column ``item_id`` too.
    """
    pids, names = numbered_items(ids)
    texts = pa.array([sid_text(row) for row in ids.codes.tolist()], type=pa.string())
    codes = {"pid": pids, "codes": _lists(ids.codes), **names}
    pq.write_table(pa.table(codes), path / "pid_codes.parquet")
    pq.write_table(pa.table({"pid": pids, "sid": texts, **names}), path / "sid_text.parquet")


def _lists(codes: npt.NDArray[Any]) -> pa.ListArray:
    """Return codes ``(items, n)`` as one list<int64> per item."""
    offsets = pa.array(np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(codes.astype(np.int64).reshape(-1)))


OPENONEREC = ExportFormat(_write_openonerec, folder=True, distinct=True)


# TorchEasyRec: Parquet of ``item_id`` and ``codes`` list<int64>, in row order. ``candidate_codes``
# is a flat list<int64> of candidates * levels codes per item.


def _write_torcheasyrec(
    path: Path,
    *,
    ids: SemanticIds,
    tokenizer: Tokenizer | None = None,
    embeddings: Any = None,
    embedding_ids: Any = None,
    candidates: int = 0,
) -> None:
    """Write the table; 0 candidates leave the column ``candidate_codes`` out."""
    columns = {"item_id": ids.items.to_arrow(), "codes": _lists(ids.codes)}
    if candidates:
        if tokenizer is None or embeddings is None:
            raise UsageError(
                f"candidates={candidates} are nearest codewords: give --model and --embeddings "
                "(tokenizer=, embeddings=)"
            )
        codes = candidate_codes(ids, tokenizer, embeddings, candidates, embedding_ids=embedding_ids)
        columns["candidate_codes"] = _lists(codes.reshape(len(ids), -1))
    pq.write_table(pa.table(columns), path)


def candidate_codes(
    ids: SemanticIds,
    tokenizer: Tokenizer,
    embeddings: Any,
    candidates: int,
    *,
    embedding_ids: Any = None,
) -> npt.NDArray[np.int64]:
    """Return ``(items, candidates, levels)`` ids: the model's prefix with the nearest last codes.

    Raises:
        UsageError: if more candidates are asked for than the last codebook has codewords.
        IdsError: if an item has no embedding.
    """
    last = tokenizer.codebooks[-1]
    if not 1 <= candidates <= len(last):
        raise UsageError(f"candidates={candidates}: give 1 to {len(last)}, the last codebook's")
    source = open_embeddings(embeddings, ids=embedding_ids)
    rows, codebook = rows_of(ids.items, source), index_codebook(last)
    model_codes = ids.encoded.astype(np.int64)
    result = np.repeat(model_codes[:, None, :], candidates, axis=1)
    for start in range(0, len(ids), BLOCK_ROWS):
        span = slice(start, start + BLOCK_ROWS)
        latent = tokenizer.latent(source.rows(rows[span]))
        inputs = torch.from_numpy(last_level_inputs(tokenizer, latent, model_codes[span]))
        result[span, :, -1] = nearest_m(inputs.contiguous(), codebook, candidates).labels.numpy()
    return result


TORCHEASYREC = ExportFormat(
    _write_torcheasyrec,
    model="optional",
    options=("candidates", "embeddings", "embedding_ids"),
)


# FuxiCTR: an item table, and the entries of ``feature_cols`` for a ``dataset_config``.


def _write_fuxictr(path: Path, *, ids: SemanticIds) -> None:
    """Write ``items.parquet`` and ``feature_cols.yaml``.

    ``sid_1`` to ``sid_L`` are the codes; ``sid_prefix_2`` to ``sid_prefix_L`` number the distinct
    prefixes of that many codes. Parallel codes have no prefixes.
    """
    columns = {f"sid_{n + 1}": ids.codes[:, n].astype(np.int64) for n in range(ids.levels)}
    if ids.info.hierarchical:
        for depth in range(2, ids.levels + 1):
            columns[f"sid_prefix_{depth}"] = group_numbers(ids.codes[:, :depth])
    table: dict[str, Any] = {"item_id": ids.items.to_arrow(), **columns}
    pq.write_table(pa.table(table), path / "items.parquet")
    lines = [
        "# Entries for feature_cols of a FuxiCTR dataset_config; join items.parquet on item_id.",
        "feature_cols:",
        *(
            f"  - {{name: {name}, active: True, dtype: int, type: categorical}}"
            f"  # {len(np.unique(values))} distinct values"
            for name, values in columns.items()
        ),
    ]
    (path / "feature_cols.yaml").write_text("\n".join(lines) + "\n", encoding="utf8")


FUXICTR = ExportFormat(_write_fuxictr, folder=True)
