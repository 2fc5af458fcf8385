"""``semid fit``: learn codebooks and judge them."""

from __future__ import annotations

import shutil
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

__all__ = ["fit"]


def fit(
    embeddings: Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the model; must not exist.")
    ],
    tokenizer: Annotated[str, typer.Option(help="Which tokenizer to fit.")] = "rqkmeans",
    levels: Annotated[int, typer.Option(min=1, help="Codes an item.")] = 3,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codewords a level.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same data: same codes.")] = 0,
    iterations: Annotated[int, typer.Option(min=1, help="Most Lloyd iterations a level.")] = 25,
    tolerance: Annotated[
        float, typer.Option(help="Stop when an iteration gains less than this share.")
    ] = 1e-4,
    restarts: Annotated[int, typer.Option(min=1, help="Seedings a level; the best is kept.")] = 1,
    sample_per_code: Annotated[
        int | None,
        typer.Option(min=1, help="Train on so many rows a codeword; default: all rows."),
    ] = None,
    full_pass: Annotated[
        bool, typer.Option(help="After a sample: one more iteration over all rows.")
    ] = True,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale rows to unit length.")
    ] = False,
    center: Annotated[bool, typer.Option("--center", help="Subtract the training mean.")] = False,
    beam_width: Annotated[int, typer.Option(min=1, help="Beam while encoding; 1 is greedy.")] = 1,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of items held out and judged; 0 trains on all.")
    ] = 0.05,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Learn codebooks from embeddings, save them, and say whether they are healthy.

    Example: semid fit items.parquet --levels 3 --codebook-size 4096 -o model/
    """
    from semid.artefact import check_output
    from semid.errors import check_choice
    from semid.progress import make_progress
    from semid.quantization.kmeans import KMeansOptions
    from semid.tokenizers.encoding import partial_folder
    from semid.tokenizers.rqkmeans import RQKMeans

    check_choice("--tokenizer", tokenizer, ["rqkmeans"])
    check_output(output, overwrite=overwrite)
    model = RQKMeans(
        levels=levels,
        codebook_size=codebook_size,
        seed=seed,
        normalize=normalize,
        center=center,
        beam_width=beam_width,
        validation_fraction=validation_fraction,
        kmeans=KMeansOptions(
            iterations=iterations,
            tolerance=tolerance,
            restarts=restarts,
            sample_per_code=sample_per_code,
            full_pass=full_pass,
        ),
        threads=threads,
    )
    source = open_source(
        embeddings,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    state = partial_folder(output)
    try:
        with make_progress(quiet=quiet) as progress:
            model.fit(source, checkpoint=state, resume=resume, progress=progress)
    except KeyboardInterrupt:
        if (state / "state.safetensors").exists():
            typer.echo(
                f"stopped; '{state}' keeps the run: repeat the command with --resume", err=True
            )
        raise
    model.save(output, overwrite=overwrite)
    shutil.rmtree(state, ignore_errors=True)
    if model.report is not None:
        typer.echo(
            f"fitted {tokenizer} on {model.report.trained_items:,} items in "
            f"{model.report.seconds:,.1f} s"
        )
        typer.echo(model.report.summary)
    typer.echo(f"model: {output}")
