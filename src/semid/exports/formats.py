"""Export and import formats by name: what each needs, and how to call it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semid.codes import SemanticIds
from semid.errors import UsageError, check_choice
from semid.health import collisions
from semid.output import check_output
from semid.registry import Registry, import_target
from semid.tokenizers.base import Tokenizer

__all__ = ["EXPORTS", "IMPORTS", "ExportFormat", "export", "import_ids"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportFormat:
    """One format that can be written.

    Attributes:
        function: its writer, or ``module:name`` of it, imported when used.
        ids: whether it writes Semantic IDs.
        model: whether it needs the model.
        tokens: whether its reader tells items apart by their ids, so that shared ids are a fault.
        about: one line for the help.
    """

    function: str | Callable[..., Any]
    ids: bool
    model: bool
    tokens: bool
    about: str


EXPORTS = Registry("semid.exports", {
    "lcrec": ExportFormat(
        "semid.exports.lcrec:write_lcrec", True, False, True,
        "LC-Rec, LETTER, MiniOneRec: NAME.index.json",
    ),
    "grid": ExportFormat(
        "semid.exports.grid:write_grid", True, False, True,
        "GRID, NVIDIA SID-GR: a LongTensor (levels, items)",
    ),
    "openonerec": ExportFormat(
        "semid.exports.openonerec:write_openonerec", True, False, True,
        "OpenOneRec: a folder with pid and codes in Parquet, and the ids as text",
    ),
    "torcheasyrec": ExportFormat(
        "semid.exports.torcheasyrec:write_torcheasyrec", True, False, False,
        "TorchEasyRec: Parquet of item_id and codes",
    ),
    "huggingface": ExportFormat(
        "semid.exports.huggingface:write_huggingface", True, True, True,
        "Hugging Face: a folder with added tokens, their embeddings and the trie",
    ),
    "faiss": ExportFormat(
        "semid.exports.faiss_index:write_faiss", True, True, False,
        "FAISS: an IndexResidualQuantizer with the same codes",
    ),
    "fuxictr": ExportFormat(
        "semid.exports.fuxictr:write_fuxictr", True, False, False,
        "FuxiCTR: a folder with an item table and its feature_cols in YAML",
    ),
    "onnx": ExportFormat(
        "semid.exports.onnx:write_onnx", False, True, False,
        "ONNX: the encoder, embeddings to codes, any batch size",
    ),
    "torch-export": ExportFormat(
        "semid.exports.torch_export:write_torch_export", False, True, False,
        "torch.export: the encoder as a .pt2 file",
    ),
})  # fmt: skip
"""Entry points of the group ``semid.exports`` name an `ExportFormat`."""

IMPORTS = {
    "lcrec": "semid.exports.lcrec:read_lcrec",
    "grid": "semid.exports.grid:read_grid",
}


def export(
    to: str,
    output: str | os.PathLike[str],
    *,
    ids: SemanticIds | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write ids or a model in a format of `EXPORTS`.

    Args:
        to: name of the format.
        output: file or folder to write, whole or not at all.
        ids: Semantic IDs, for the formats that carry some.
        tokenizer: the model, for the formats that need its codebooks or its encoder.
        overwrite: replace an existing output.
        options: passed on to the format's own writer.

    Returns:
        ``output``.

    Raises:
        UsageError: for an unknown format, or without what it needs.
        OutputExistsError: if ``output`` exists and ``overwrite`` is false.
        FingerprintError: if the ids were made with another codebook than the model's.
    """
    chosen: ExportFormat = EXPORTS.load(to, flag="--to")
    if chosen.ids and ids is None:
        raise UsageError(f"the export to {to} writes Semantic IDs: give the ids file (ids=)")
    if chosen.model and tokenizer is None:
        raise UsageError(f"the export to {to} needs the model: give --model (tokenizer=)")
    check_output(output, overwrite=overwrite)
    target = Path(output)
    if ids is not None and tokenizer is not None:
        ids.check_codebook(tokenizer.codebook_fingerprint)
    if ids is not None and chosen.tokens and len(ids):
        found = collisions(ids.codes)
        if found.unique_ids < found.items:
            logger.warning(
                "%d items have only %d distinct ids, and a generator cannot tell the others apart; "
                "make them unique first with: semid unique",
                found.items,
                found.unique_ids,
            )
    function = chosen.function
    write = import_target(function) if isinstance(function, str) else function
    needs: dict[str, Any] = {"overwrite": overwrite, **options}
    if chosen.model or (tokenizer is not None and to == "torcheasyrec"):
        needs["tokenizer"] = tokenizer
    write(*([ids] if chosen.ids else []), target, **needs)
    return target


def import_ids(
    source: str,
    path: str | os.PathLike[str],
    *,
    items: Any = None,
    tokenizer: Tokenizer | None = None,
    orientation: str | None = None,
) -> SemanticIds:
    """Read ids that another program wrote.

    Args:
        source: name of the format, one of `IMPORTS`.
        path: the file.
        items: item ids in the file's row order (`ItemIds` or a sequence); row numbers without.
        tokenizer: the model whose codes these are; they then carry its fingerprint, and are checked
            against its codebooks. Without one they carry the fingerprint ``imported``, which no
            model accepts.
        orientation: which side of a GRID tensor are the levels, see `semid.exports.grid.read_grid`.

    Raises:
        UsageError: for an unknown format, or an orientation for one that has none.
        ArtefactError: if the file cannot be read as that format.
        InputError: if the codes do not fit the model, or the items not the rows.
    """
    read = import_target(IMPORTS[check_choice("--from", source, list(IMPORTS))])
    options: dict[str, Any] = {} if orientation is None else {"orientation": orientation}
    if options and source != "grid":
        raise UsageError(
            f"--orientation (orientation=) is for tensors of grid and does not apply to {source}; "
            "leave it out"
        )
    ids: SemanticIds = read(path, items=items, tokenizer=tokenizer, **options)
    return ids
