"""``semid drift``: has the catalogue moved away from its codebooks?"""

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
    Threads,
    hold_output,
    open_source,
    refuse_unused,
    say,
)

__all__ = ["drift"]


def drift(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder written by 'semid fit'.")],
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help="Embeddings as they were at the fit.")
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="Embeddings as they are now.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the figures.")
    ] = None,
    ids: Ids = None,
    after_ids: Annotated[
        str | None, typer.Option(help="As --ids, for AFTER; default: the same table.")
    ] = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare two snapshots of a catalogue under one codebook, and say when to refresh.

    Example: semid drift model/ last_month.parquet today.parquet
    """
    import json

    from semid.catalogue.drift import drift as drifted
    from semid.loading import load_tokenizer
    from semid.output import atomic_file
    from semid.progress import make_progress

    if output is None:
        refuse_unused(context, ["overwrite"], "there is no --output")
    else:
        reads = (model, before, after, ids, after_ids)
        hold_output(output, overwrite=overwrite, inputs=reads)
    tokenizer = load_tokenizer(model)
    tokenizer.threads = threads
    old, new = (
        open_source(
            source,
            ids=table,
            embedding_column=embedding_column,
            id_column=id_column,
            on_invalid=on_invalid,
        )
        for source, table in ((before, ids), (after, after_ids or ids))
    )
    with make_progress(quiet=quiet) as progress:
        result = drifted(tokenizer, old, new, progress=progress)
    if output is not None:
        with atomic_file(output, overwrite=overwrite) as work:
            work.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf8")
    say(result.summary())
