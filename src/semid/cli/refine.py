"""``semid refine``: fit all codebooks of a model again together."""

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
    Source,
    hold_output,
    open_source,
    say,
)

__all__ = ["refine"]


def refine(
    model: Annotated[Path, typer.Argument(help="Folder written by 'semid fit'.")],
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the refined model.")],
    rounds: Annotated[int, typer.Option(help="Most rounds of encoding and least squares.")] = 8,
    annealing_rounds: Annotated[
        int, typer.Option(help="Rounds with falling noise, which leave the nearest optimum.")
    ] = 12,
    beam_width: Annotated[int, typer.Option(help="Beam while refining, and of the model.")] = 8,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Lower the error of a residual model by refining its levels together; codes change.

    Example: semid refine model/ items.parquet -o refined/
    """
    from semid.loading import load_tokenizer
    from semid.progress import make_progress
    from semid.quantization.refine import RefineOptions
    from semid.tokenizers.refining import refine as refined

    hold_output(output, overwrite=overwrite, inputs=(model, source, ids))
    options = RefineOptions(rounds=rounds, annealing_rounds=annealing_rounds, beam_width=beam_width)
    opened = open_source(
        source,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    with make_progress(quiet=quiet) as progress:
        refined_model = refined(load_tokenizer(model), opened, options=options, progress=progress)
    refined_model.save(output, overwrite=overwrite)
    assert refined_model.report is not None
    rounds_done = refined_model.report.details["refine"]
    if rounds_done:
        share = 1.0 - rounds_done[-1]["error"] / rounds_done[0]["before"]
        say(f"{len(rounds_done)} rounds: squared error on held-out items {share:.1%} lower")
    else:
        say("no round lowered the error on held-out items; the codebooks are unchanged")
    say(refined_model.report.summary)
    say(f"model: {output}")
