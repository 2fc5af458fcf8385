"""``semid export``: ids and models in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from semid.cli.options import (
    EmbeddingColumn,
    IdColumn,
    Ids,
    OnInvalid,
    Overwrite,
    hold_output,
    open_source,
    refuse_unused,
    say,
)

__all__ = ["export"]


def export(
    context: typer.Context,
    to: Annotated[
        str,
        typer.Option(
            help="lcrec, grid, openonerec, torcheasyrec, huggingface, faiss, fuxictr, onnx or "
            "torch-export."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File or folder to write.")],
    ids_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[IDS]", help="Ids file or bundle; not needed for onnx and torch-export."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder written by 'semid fit'; needed for huggingface, faiss, onnx and "
            "torch-export."
        ),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(
            min=0, max=4096, help="torcheasyrec: alternative ids an item; needs --embeddings."
        ),
    ] = 0,
    embeddings: Annotated[
        str | None, typer.Option(help="torcheasyrec: embeddings, for the alternatives.")
    ] = None,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    overwrite: Overwrite = False,
) -> None:
    """Write ids or a model as another program reads them.

    Example: semid export unique.parquet --to lcrec -o Beauty.index.json
    """
    from semid.catalogue.bundle import read_catalogue
    from semid.errors import UsageError
    from semid.exports.formats import export as written
    from semid.loading import load_tokenizer

    hold_output(output, overwrite=overwrite, inputs=(ids_file, model, embeddings, ids))
    options: dict[str, Any] = {}
    if candidates:
        if to != "torcheasyrec":
            raise UsageError(f"--candidates goes with --to torcheasyrec, not with {to}")
        if embeddings is None or model is None:
            raise UsageError("--candidates are nearest codewords: give --model and --embeddings")
        options["candidates"] = candidates
        options["embeddings"] = open_source(
            embeddings,
            ids=ids,
            embedding_column=embedding_column,
            id_column=id_column,
            on_invalid=on_invalid,
        )
    else:
        unused = ["embeddings", "ids", "embedding_column", "id_column", "on_invalid"]
        refuse_unused(context, unused, "embeddings serve --to torcheasyrec with --candidates")
    written(
        to,
        output,
        ids=None if ids_file is None else read_catalogue(ids_file),
        tokenizer=None if model is None else load_tokenizer(model),
        overwrite=overwrite,
        **options,
    )
    say(f"{to}: {output}")
