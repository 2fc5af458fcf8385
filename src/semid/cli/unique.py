"""``semid unique``: tell items with equal ids apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semid.cli.options import (
    EmbeddingColumn,
    IdColumn,
    Ids,
    OnInvalid,
    Overwrite,
    Quiet,
    hold_output,
    open_source,
    refuse_unused,
    say,
)

__all__ = ["unique"]


def unique(
    context: typer.Context,
    ids_file: Annotated[
        str,
        typer.Argument(metavar="IDS", help="File, folder or URI written by 'semid encode'."),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="Parquet file to write; a folder or URI where IDS is one and the method append.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="'append' adds a token inside each bucket, the closest to the centroid first; "
            "'reassign' takes the nearest free codes of the last level; 'none' goes back to the "
            "model's codes."
        ),
    ] = "append",
    model: Annotated[
        Path | None, typer.Option(help="Folder written by 'semid fit'; needed for reassign.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="The items' embeddings; needed for reassign.")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**31 - 1, help="reassign: items an id may have (1). append: tokens (256)."
        ),
    ] = None,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make ids unique, as a step that can be repeated, replaced and taken back.

    The model's own codes stay beside, in the column model_codes.

    Example: semid unique ids.parquet --method append -o unique.parquet
    """
    from semid.catalogue.uniqueness import make_unique
    from semid.codes import UNIQUE_METHODS, SemanticIds
    from semid.errors import UsageError, check_choice
    from semid.loading import load_tokenizer
    from semid.progress import make_progress

    check_choice("--method", method, UNIQUE_METHODS)
    if method == "reassign" and (model is None or embeddings is None):
        raise UsageError(
            "--method reassign looks for the next-nearest codewords: give --model and --embeddings"
        )
    if method != "reassign":
        searched = ["model", "embeddings", "ids", "embedding_column", "id_column", "on_invalid"]
        refuse_unused(context, searched, f"--method {method} looks at the codes alone")
    if method == "none":
        refuse_unused(context, ["capacity"], "--method none goes back to the model's codes")
    if method == "append" and not output.endswith(".parquet") and not Path(ids_file).is_file():
        # Ids of any size, a part at a time.
        from semid.distributed.unique_parts import unique_folder

        report = unique_folder(ids_file, output, capacity=capacity, overwrite=overwrite)
        say(report.summary())
        say(f"ids: {output}")
        return
    hold_output(output, overwrite=overwrite, inputs=(ids_file, model, embeddings, ids))
    source = None
    if embeddings is not None:
        source = open_source(
            embeddings,
            ids=ids,
            embedding_column=embedding_column,
            id_column=id_column,
            on_invalid=on_invalid,
        )
    with make_progress(quiet=quiet) as progress:
        done = make_unique(
            SemanticIds.read(ids_file),
            method=method,
            tokenizer=None if model is None else load_tokenizer(model),
            embeddings=source,
            capacity=capacity,
            progress=progress,
        )
    done.ids.write(output, overwrite=overwrite)
    say(done.report.summary())
    say(f"ids: {output}")
