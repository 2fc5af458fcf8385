"""``semid refresh``: fit again on a changed catalogue, keeping the ids that can be kept."""

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

__all__ = ["refresh"]


def refresh(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="The generation before: a folder of 'semid fit'.")],
    embeddings: Source,
    catalogue: Annotated[
        Path, typer.Option(help="The published ids: a Parquet file, or a bundle's folder.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder: model/, ids.parquet, refresh.json.")
    ],
    max_churn: Annotated[
        float | None,
        typer.Option(help="Share of published ids that may change; default: no limit."),
    ] = None,
    interactions: Annotated[
        str | None, typer.Option(help="Log whose item counts weight the churn: popularity.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Fit from scratch too, and report it beside.")
    ] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Do not start from the old codebooks.")
    ] = False,
    user_column: UserColumn = "user_id",
    item_column: ItemColumn = "item_id",
    time_column: TimeColumn = None,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit again on a changed catalogue with codes aligned to the published ones.

    Reports the ids that changed, by level, prefix and popularity, next to the quality gained.

    Example: semid refresh model/ items.parquet --catalogue ids.parquet --max-churn 0.1 -o next/
    """
    import json

    from semid.catalogue.bundle import read_catalogue
    from semid.catalogue.matching import item_counts
    from semid.catalogue.refresh import check_max_churn
    from semid.catalogue.refresh import refresh as refreshed
    from semid.loading import load_tokenizer
    from semid.output import atomic_folder
    from semid.progress import make_progress

    check_max_churn(max_churn)
    reads = (model, embeddings, catalogue, ids, interactions)
    hold_output(output, overwrite=overwrite, inputs=reads)
    tokenizer = load_tokenizer(model)
    tokenizer.threads = threads
    source = open_source(
        embeddings,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    log = open_interactions(context, interactions)
    with make_progress(quiet=quiet) as progress:
        result = refreshed(
            tokenizer,
            read_catalogue(catalogue),
            source,
            popularity=None if log is None else item_counts(log, source.ids),
            max_churn=max_churn,
            warm_start=not cold,
            compare=compare,
            progress=progress,
        )
    with atomic_folder(output, overwrite=overwrite) as folder:
        result.tokenizer.save(folder / "model")
        result.ids.write(folder / "ids.parquet")
        (folder / "refresh.json").write_text(
            json.dumps(result.report.to_dict(), indent=2) + "\n", encoding="utf8"
        )
    say(result.report.summary())
    say(f"model, ids and report: {output}")
