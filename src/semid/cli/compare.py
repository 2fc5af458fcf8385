"""``semid compare``: several models side by side, by view."""

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
    Threads,
    TimeColumn,
    UserColumn,
    hold_output,
    open_interactions,
    open_source,
    say,
)

__all__ = ["compare"]


def compare(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL MODEL... EMBEDDINGS",
            help="Folders written by 'semid fit', two or more, then the embeddings.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .html, .json or .md.")
    ],
    interactions: Annotated[
        str | None,
        typer.Option(help="Parquet or CSV of user_id, item_id and position or timestamp."),
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
    seed: Annotated[int, typer.Option(help="Draws samples, noise and negatives.")] = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare models on one catalogue: ranks and trade-offs by view, never one score.

    Example: semid compare model_a/ model_b/ items.parquet --interactions logs.parquet -o c.html
    """
    from semid.errors import UsageError
    from semid.loading import load_tokenizer
    from semid.progress import make_progress
    from semid.report import compare as compare_models

    if len(paths) < 3:
        raise UsageError(
            f"{len(paths)} paths given; name at least two model folders and then the embeddings"
        )
    reads = (*paths, ids, interactions, relations)
    hold_output(output, overwrite=overwrite, inputs=reads)
    models, embeddings = paths[:-1], paths[-1]
    if len({Path(path).resolve() for path in models}) < len(models):
        raise UsageError("a model is named twice; name each model folder once")
    short = [Path(path).resolve().name for path in models]
    names = short if len(set(short)) == len(short) else models
    source = open_source(
        embeddings,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    log = open_interactions(context, interactions)
    with make_progress(quiet=quiet) as progress:
        result = compare_models(
            {name: load_tokenizer(path) for name, path in zip(names, models, strict=True)},
            source,
            interactions=log,
            relations=relations,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    result.write(output, overwrite=overwrite)
    for finding in result.findings:
        say(f"{finding}.")
    say(f"comparison: {output}")
