"""Options that several commands share, so that they are spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "EmbeddingColumn",
    "IdColumn",
    "Ids",
    "OnInvalid",
    "Overwrite",
    "Quiet",
    "Resume",
    "Source",
    "Threads",
    "open_source",
]

Source = Annotated[
    str,
    typer.Argument(
        metavar="EMBEDDINGS",
        help=".npy file, Parquet file, folder of Parquet files, or a quoted glob.",
    ),
]
Ids = Annotated[
    str | None,
    typer.Option(
        "--ids",
        help="Table or text file with an item id a row, for an .npy; FILE:COLUMN names the column.",
    ),
]
EmbeddingColumn = Annotated[
    str | None,
    typer.Option(help="Column of the vectors; default 'embedding', else the only float-list one."),
]
IdColumn = Annotated[str | None, typer.Option(help="Column of the item ids; default 'item_id'.")]
OnInvalid = Annotated[
    str, typer.Option(help="Rows with null, NaN or inf: 'error' refuses, 'skip' leaves them out.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads; default: what the machine allows. Never changes a result."),
]


def open_source(
    source: str,
    *,
    ids: str | None,
    embedding_column: str | None,
    id_column: str | None,
    on_invalid: str,
) -> Any:
    """Open the embeddings as the shared options say."""
    from semid.data.embeddings import open_embeddings

    return open_embeddings(
        Path(source) if Path(source).exists() else source,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
