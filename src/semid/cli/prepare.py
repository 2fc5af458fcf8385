"""``semid prepare``: a public release, as downloaded, in the layout that semid reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semid.cli.options import Overwrite, hold_output, say

__all__ = ["prepare"]

RELEASES = ("amazon", "movielens")


def prepare(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="amazon or movielens.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Review file (.json.gz, 2014 or 2023), or MovieLens folder."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for items.parquet and interactions.parquet."),
    ],
    items: Annotated[
        Path | None, typer.Option(help="Amazon's meta_*.json.gz of the same category.")
    ] = None,
    core: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**31 - 1,
            help="Interactions a user and an item need; amazon 5, movielens 0.",
        ),
    ] = None,
    embed: Annotated[
        str | None,
        typer.Option(help="sentence-transformers model: writes embeddings.f16.npy of the texts."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Read a release into items, interactions with ratings and, with --embed, embeddings.

    Example: semid prepare amazon reviews_Beauty.json.gz --items meta_Beauty.json.gz -o data/beauty
    """
    from semid.data.releases import read_amazon, read_movielens
    from semid.errors import UsageError, check_choice

    check_choice("RELEASE", release, RELEASES)
    hold_output(output, overwrite=overwrite, inputs=(source, items))
    if release == "amazon":
        found = read_amazon(source, items=items, core=5 if core is None else core)
    else:
        if items is not None:
            raise UsageError("--items goes with amazon; a MovieLens folder has its own movies file")
        found = read_movielens(source, core=core or 0)
    found.write(output, embed=embed, overwrite=overwrite)
    for note in found.notes:
        say(note)
    say(f"written: {output}")
