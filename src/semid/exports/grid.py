"""GRID and NVIDIA SID-GR: ``torch.save`` of a LongTensor ``[levels, items]``.

Ids made unique by an appended token have one row more, the deduplication digit. Columns are items
in row order.
"""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.errors import ArtefactError, check_choice
from semid.exports.tokens import imported
from semid.output import atomic_file
from semid.tokenizers.base import Tokenizer

__all__ = ["ORIENTATIONS", "read_grid", "write_grid"]

logger = logging.getLogger(__name__)

ORIENTATIONS = ("levels-first", "items-first")
EXPECTED = "a matrix of integers, [levels, items] or [items, levels], is expected"
INTEGERS = {
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}


def write_grid(ids: SemanticIds, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the tensor.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    tensor = torch.from_numpy(ids.codes.astype("int64").T.copy())
    with atomic_file(path, overwrite=overwrite) as work:
        torch.save(tensor, work)


def read_grid(
    path: str | os.PathLike[str],
    *,
    items: Any = None,
    tokenizer: Tokenizer | None = None,
    orientation: str | None = None,
) -> SemanticIds:
    """Read such a tensor, without running any code in the file.

    Args:
        path: the file.
        items: item ids, as for `semid.exports.formats.import_ids`.
        tokenizer: the model whose codes these are, or None.
        orientation: ``levels-first``, as GRID writes it, or ``items-first``. None takes the one
            that fits the item ids or the model, and otherwise the shorter side as the levels, which
            is logged.

    Raises:
        ArtefactError: if the file holds anything else.
        UsageError: for an unknown orientation.
    """
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
        raise ArtefactError(f"'{path}' holds {kind}; {EXPECTED}")
    if (
        tensor.ndim != 2
        or tensor.numel() == 0
        or tensor.dtype not in INTEGERS
        or tensor.layout is not torch.strided
        or tensor.device.type == "meta"  # holds no values
        # A view that repeats its values would take memory that the file does not have.
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ArtefactError(f"'{path}' holds {kind} of shape {tuple(tensor.shape)}; {EXPECTED}")
    if orientation is None:
        orientation = _orientation(path, tuple(tensor.shape), items, tokenizer)
    else:
        check_choice("--orientation (orientation=)", orientation, ORIENTATIONS)
    codes = tensor.T if orientation == "levels-first" else tensor
    return imported(codes.contiguous().numpy(), items=items, tokenizer=tokenizer)


def _orientation(
    path: str | os.PathLike[str],
    shape: tuple[int, ...],
    items: Any,
    tokenizer: Tokenizer | None,
) -> str:
    """Choose which side of a tensor are the levels, and say so where only its shape tells."""
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
