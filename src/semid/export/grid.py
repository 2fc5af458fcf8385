"""GRID and NVIDIA SID-GR: ``torch.save`` of a LongTensor ``[levels, items]``.

Ids made unique by an appended token have one row more, the deduplication digit. Columns are items
in row order.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from semid.codes import SemanticIds
from semid.errors import ArtefactError
from semid.export.tokens import imported
from semid.output import atomic_file
from semid.tokenizers.base import Tokenizer

__all__ = ["read_grid", "write_grid"]


def write_grid(ids: SemanticIds, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the tensor.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    tensor = torch.from_numpy(ids.codes.astype("int64").T.copy())
    with atomic_file(path, overwrite=overwrite) as work:
        torch.save(tensor, work)


def read_grid(
    path: str | os.PathLike[str], *, items: Any = None, tokenizer: Tokenizer | None = None
) -> SemanticIds:
    """Read such a tensor, without running any code in the file.

    Arguments as for `semid.export.formats.import_ids`.

    Raises:
        ArtefactError: if the file holds anything else.
    """
    if not Path(path).is_file():
        raise ArtefactError(f"'{path}' does not exist; give a file that torch.save wrote")
    try:
        tensor = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError):
        raise ArtefactError(f"'{path}' cannot be read as a tensor that torch.save wrote") from None
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.ndim != 2
        or tensor.is_floating_point()
        or tensor.numel() == 0
    ):
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArtefactError(f"'{path}' holds {shape}; integers [levels, items] are expected")
    return imported(tensor.T.contiguous().numpy().astype("int64"), items=items, tokenizer=tokenizer)
