"""Export to and import from the formats of other programs, by name.

A format is one `ExportFormat`, declared beside its writer and its reader.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from semid.codes import SemanticIds
from semid.data.interactions import read_interactions
from semid.errors import UsageError, check_choice
from semid.health import collisions
from semid.output import atomic_file, atomic_folder, check_output
from semid.registry import Registry
from semid.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

EXPORTS = Registry(
    "semid.exports",
    {
        "lcrec": "semid.exports.id_files:LCREC",
        "lcrec-sequences": "semid.exports.sequences:LCREC_SEQUENCES",
        "grid": "semid.exports.id_files:GRID",
        "grid-sequences": "semid.exports.sequences:GRID_SEQUENCES",
        "openonerec": "semid.exports.id_files:OPENONEREC",
        "torcheasyrec": "semid.exports.id_files:TORCHEASYREC",
        "huggingface": "semid.exports.huggingface:HUGGINGFACE",
        "faiss": "semid.exports.encoders:FAISS",
        "fuxictr": "semid.exports.id_files:FUXICTR",
        "atlas": "semid.exports.atlas:ATLAS",
        "flashrec": "semid.exports.serving:FLASHREC",
        "sid2pid": "semid.exports.serving:SID2PID",
        "sid-gr": "semid.exports.serving:SID_GR",
        "static": "semid.exports.serving:STATIC",
        "onnx": "semid.exports.encoders:ONNX",
        "torch-export": "semid.exports.encoders:TORCH_EXPORT",
    },
)
"""The `ExportFormat` of each name. Entry points of the group ``semid.exports`` add others."""

READERS = Registry("semid.readers", {"auto": "semid.exports.any_ids:read_any_ids"})
"""Functions that read ids of several formats."""

IMPORTS = ("lcrec", "grid")
"""Names of semid's own formats of ids that can be read."""

CODEBOOK_SOURCES = ("faiss", "openonerec", "torcheasyrec", "grid-checkpoint")
"""Programs whose codebooks `semid.import_codebooks` reads."""


@dataclass(frozen=True)
class ExportFormat:
    """One format of another program.

    Attributes:
        write: writes to a temporary path that becomes the output: ``write(path, ids=..., tokenizer=
            ..., **options)``, with the arguments that the format uses.
        read: reads a file: ``read(path, items=..., tokenizer=..., **options)``; None if semid
            cannot read the format.
        ids: whether Semantic IDs are written.
        model: whether the model is ``required``, ``optional`` or ``unused``.
        folder: whether the output is a folder.
        interactions: whether `Interactions` are ``required``, ``optional`` or ``unused``.
        options: names of the further arguments of ``write``.
        distinct: whether the reader tells items apart by their ids, so that shared ids are an
            error there.
    """

    write: Callable[..., None]
    read: Callable[..., SemanticIds] | None = None
    ids: bool = True
    model: Literal["required", "optional", "unused"] = "unused"
    folder: bool = False
    interactions: Literal["required", "optional", "unused"] = "unused"
    options: tuple[str, ...] = ()
    distinct: bool = False


def export(
    to: str,
    output: str | os.PathLike[str],
    *,
    ids: SemanticIds | None = None,
    tokenizer: Tokenizer | None = None,
    interactions: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write ids, histories or a model in the format of another program.

    Args:
        to: name of the format: ``lcrec``, ``lcrec-sequences``, ``grid``, ``grid-sequences``,
            ``openonerec``, ``torcheasyrec``, ``huggingface``, ``faiss``, ``fuxictr``, ``atlas``,
            ``flashrec``, ``sid2pid``, ``sid-gr``, ``static``, ``onnx`` or ``torch-export``.
        output: file or folder to write, whole or not at all.
        ids: Semantic IDs, for formats that contain ids.
        tokenizer: model, for formats that need its codebooks or its encoder.
        interactions: users' interactions, for formats of sequences: anything that
            `semid.read_interactions` takes. Items are numbered by their row in the ids.
        overwrite: replace an existing output.
        options: arguments of one format: ``torcheasyrec`` has ``candidates``, ``embeddings`` and
            ``embedding_ids``; ``atlas`` also ``items``, ``projection``, ``neighbors`` and ``seed``,
            see `semid.exports.atlas`; ``lcrec`` has ``token``; ``flashrec`` has ``end_code``;
            ``sid2pid`` has ``base``; ``sid-gr`` has ``offsets``, ``vocab_size`` and ``items``;
            ``static`` has ``offsets``, ``vocab_size`` and ``dense_lookup_layers``.

    Returns:
        ``output``.

    Raises:
        UsageError: for an unknown format or option, or without what the format needs.
        OutputExistsError: if ``output`` exists and ``overwrite`` is false.
        FingerprintError: if the ids were made with another codebook than the model's.

    Example:
        >>> semid.export("lcrec", "Beauty.index.json", ids=ids)
    """
    export_format: ExportFormat = EXPORTS.load(to, flag="--to")
    if export_format.ids and ids is None:
        raise UsageError(f"the export to {to} writes Semantic IDs: give the ids file (ids=)")
    if export_format.model == "required" and tokenizer is None:
        raise UsageError(f"the export to {to} needs the model: give --model (tokenizer=)")
    if export_format.interactions == "required" and interactions is None:
        raise UsageError(
            f"the export to {to} writes users' histories: give --interactions (interactions=)"
        )
    if interactions is not None and export_format.interactions == "unused":
        raise UsageError(f"--interactions (interactions=) does not apply to {to}; leave it out")
    for option in options:
        if not export_format.options:
            raise UsageError(f"{option}= does not apply to {to}; leave it out")
        check_choice(f"option of {to}", option, export_format.options)
    # Wrong arguments are refused before anything is written.
    check_output(output, overwrite=overwrite)
    if ids is not None and tokenizer is not None:
        ids.check_codebook(tokenizer.codebook_fingerprint)
    if ids is not None and export_format.distinct and len(ids):
        counts = collisions(ids.codes)
        if counts.unique_ids < counts.items:
            logger.warning(
                "%d items have only %d distinct ids, and a generator cannot tell the others apart; "
                "make them unique first with: semid unique",
                counts.items,
                counts.unique_ids,
            )
    if export_format.ids:
        options["ids"] = ids
    if export_format.model != "unused":
        options["tokenizer"] = tokenizer
    if interactions is not None:
        options["interactions"] = read_interactions(interactions, rating_column="")
    with (atomic_folder if export_format.folder else atomic_file)(
        output, overwrite=overwrite
    ) as path:
        export_format.write(path, **options)
    return Path(output)


def tensor_layout(orientation: str | None, source: str, *, is_tensor: bool) -> dict[str, Any]:
    """Return the reader's ``orientation``, if one is given; refuse it for what is no tensor."""
    if orientation is None:
        return {}
    if not is_tensor:
        raise UsageError(
            f"--orientation (orientation=) is for tensors of grid and does not apply to {source}; "
            "leave it out"
        )
    return {"orientation": orientation}


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
        source: name of the format: ``lcrec`` or ``grid``; or ``auto``, which reads JSON, CSV,
            Parquet, ``.npy`` and tensors, see `semid.exports.any_ids`.
        path: the file.
        items: item ids in the row order of the file (`ItemIds` or a sequence); row numbers by
            default.
        tokenizer: model whose codes these are. The ids then carry its fingerprint, and are checked
            against its codebooks. Without one they carry the fingerprint ``imported``, which no
            model accepts.
        orientation: layout of a GRID tensor: ``levels-first``, as GRID writes it, or
            ``items-first``. None takes the one that fits the item ids or the model, and otherwise
            the shorter side as the levels, which is logged.

    Returns:
        Semantic IDs; residual norms are unknown and NaN.

    Raises:
        UsageError: for an unknown format, or an orientation for a format that has none.
        ArtefactError: if the file cannot be read as that format.
        InputError: if the codes do not fit the model, or the items not the rows.

    Example:
        >>> ids = semid.import_ids("lcrec", "Beauty.index.json", tokenizer=model)
    """
    if source in READERS:
        options = {} if orientation is None else {"orientation": orientation}
        reader: Callable[..., SemanticIds] = READERS.load(source)
        return reader(path, items=items, tokenizer=tokenizer, **options)
    if source == "spark":
        raise UsageError(
            "ids of spark are a folder of any size: use semid import --from spark, or "
            "semid.distributed.arrow.import_encoded"
        )
    # Formats that plugins add are let through; another name must be one that semid reads.
    if source not in EXPORTS or source in EXPORTS.targets:
        check_choice("--from", source, ("auto", *IMPORTS, "spark", *CODEBOOK_SOURCES))
    export_format: ExportFormat = EXPORTS.load(source)
    if export_format.read is None:
        hint = ""
        if source in CODEBOOK_SOURCES:
            hint = "; its codebooks are read by semid.import_codebooks"
        raise UsageError(
            f"ids of {source} can be written, not read; give --from (source=) one of "
            f"{', '.join(IMPORTS)}{hint}"
        )
    options = tensor_layout(orientation, source, is_tensor=source == "grid")
    return export_format.read(path, items=items, tokenizer=tokenizer, **options)
