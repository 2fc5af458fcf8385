"""``semid encode``: give every item its codes."""

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
    Resume,
    Source,
    Threads,
    open_source,
)

__all__ = ["encode"]


def encode(
    model: Annotated[Path, typer.Argument(help="Folder written by 'semid fit'.")],
    embeddings: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    beam_width: Annotated[
        int | None, typer.Option(min=1, help="Beam; default: what the model was fitted with.")
    ] = None,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Encode items with a fitted model; items need not have been seen by the fit.

    Writes Parquet: item_id, codes, residual_norm, and the codebook's fingerprint.

    Example: semid encode model/ items.parquet -o ids.parquet
    """
    from semid.artefact import check_output
    from semid.loading import load
    from semid.progress import make_progress
    from semid.tokenizers.encoding import encode_to_parquet

    check_output(output, overwrite=overwrite)
    tokenizer = load(model)
    tokenizer.threads = threads
    source = open_source(
        embeddings,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    with make_progress(quiet=quiet) as progress:
        encode_to_parquet(
            tokenizer,
            source,
            output,
            beam_width=beam_width,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    typer.echo(f"encoded {len(source):,} items with {tokenizer.levels} codes each: {output}")
