"""``semid report``: whether a model's codes are good, and what to do if not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semid.cli.options import (
    EmbeddingColumn,
    IdColumn,
    Ids,
    ItemColumn,
    OnInvalid,
    Overwrite,
    Quiet,
    Source,
    Threads,
    TimeColumn,
    UserColumn,
    hold_output,
    open_interactions,
    open_source,
    say,
)

__all__ = ["report"]


def report(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder written by 'semid fit'.")],
    embeddings: Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .html, .json or .md.")
    ],
    interactions: Annotated[
        str | None,
        typer.Option(
            help="Parquet or CSV of user_id, item_id and position or timestamp; adds retrieval, "
            "AUCs and popularity."
        ),
    ] = None,
    items: Annotated[
        str | None,
        typer.Option(
            help="Table with item_id and title (or text), for names in the report; default: the "
            "--ids table, else the embeddings' own."
        ),
    ] = None,
    relations: Annotated[
        str | None,
        typer.Option(help="Parquet or CSV of item_id, related_item_id: a second truth."),
    ] = None,
    user_column: UserColumn = "user_id",
    item_column: ItemColumn = "item_id",
    time_column: TimeColumn = None,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    seed: Annotated[int, typer.Option(help="Draws the samples.")] = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Diagnose a fitted model on a catalogue: a verdict, figures, and an explorer of the codes.

    Example: semid report model/ items.parquet -o report.html
    """
    from semid.data.items import read_items
    from semid.errors import IdsError, UsageError
    from semid.loading import load_tokenizer
    from semid.progress import make_progress
    from semid.report import diagnose

    reads = (model, embeddings, ids, items, interactions, relations)
    hold_output(output, overwrite=overwrite, inputs=reads)
    source = open_source(
        embeddings,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    log = open_interactions(context, interactions)
    try:  # titles from the tables already named, where they have some
        table = read_items(ids or embeddings, ids=source.ids, id_column=id_column)
    except (UsageError, IdsError):
        table = None
    with make_progress(quiet=quiet) as progress:
        result = diagnose(
            load_tokenizer(model),
            source,
            interactions=log,
            items=items if items is not None else table,
            relations=relations,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    result.write(output, overwrite=overwrite)
    say(result.verdict.summary())
    say(f"report: {output}")
