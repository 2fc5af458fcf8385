"""``semid import``: ids that another program wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semid.cli.options import IdColumn, Overwrite, hold_output, refuse_unused, say

__all__ = ["import_"]


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other program's file.")],
    source: Annotated[str, typer.Option("--from", help="lcrec or grid.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    model: Annotated[
        Path | None,
        typer.Option(help="The model whose codes these are; the ids then carry its fingerprint."),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option("--ids", help="Table with an item id a row, FILE or FILE:COLUMN."),
    ] = None,
    id_column: IdColumn = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            help="Sides of a GRID tensor: levels-first or items-first; by default a guess is made "
            "and printed."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Read another program's ids, so that semid's tools work on them.

    Example: semid import Beauty.index.json --from lcrec --ids items.parquet -o ids.parquet
    """
    from semid.data.id_sources import load_ids
    from semid.exports.formats import import_ids
    from semid.loading import load_tokenizer

    if ids is None:
        refuse_unused(context, ["id_column"], "it names a column of --ids")
    hold_output(output, overwrite=overwrite, inputs=(file, model, ids))
    found = import_ids(
        source,
        file,
        items=None if ids is None else load_ids(ids, id_column=id_column),
        tokenizer=None if model is None else load_tokenizer(model),
        orientation=orientation,
    )
    found.write(output, overwrite=overwrite)
    say(f"imported {len(found):,} items with {found.levels} codes each: {output}")
