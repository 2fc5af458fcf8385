"""``semid demo``: the whole main job on a catalogue made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semid.cli.options import Overwrite, Quiet, hold_output, say

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for everything the demo writes.")
    ] = Path("demo"),
    items: Annotated[
        int, typer.Option(min=1000, max=10_000_000, help="Items in the catalogue.")
    ] = 20_000,
    codebook_size: Annotated[int, typer.Option(min=2, max=65_536, help="Codewords a level.")] = 256,
    levels: Annotated[int, typer.Option(min=1, max=256, help="Codes an item.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the catalogue and the fit.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a synthetic catalogue, fit codebooks, encode it and write the quality report.

    Hierarchical topics, long-tailed popularity, readable titles and user sequences: what a real
    catalogue would show, before you have one at hand.
    """
    from semid.data.synthetic import SyntheticCatalogue
    from semid.output import atomic_folder
    from semid.progress import make_progress
    from semid.report import diagnose
    from semid.tokenizers.encoding import encode_to_parquet
    from semid.tokenizers.rqkmeans import RQKMeans

    hold_output(output, overwrite=overwrite, inputs=())
    with atomic_folder(output, overwrite=overwrite) as folder, make_progress(quiet=quiet) as steps:
        SyntheticCatalogue(items=items, seed=seed).write(folder / "data")
        embeddings, table = folder / "data/embeddings.npy", folder / "data/items.parquet"
        model = RQKMeans(levels=levels, codebook_size=codebook_size, seed=seed)
        model.fit(embeddings, ids=table, progress=steps)
        model.save(folder / "model")
        encode_to_parquet(model, embeddings, folder / "ids.parquet", ids=table, progress=steps)
        diagnosis = diagnose(
            model,
            embeddings,
            ids=table,
            items=table,
            interactions=folder / "data/interactions.parquet",
        )
        diagnosis.write(folder / "report.html")
    if model.report is not None:
        say(model.report.summary)
    say(
        f"""
{output}/data/          {items:,} items with titles, embeddings and user sequences
{output}/model/         the codebooks
{output}/ids.parquet    {levels} codes an item
{output}/report.html    open it in a browser

The same on your own data:

  semid fit     embeddings.npy --ids items.parquet -o model/
  semid encode  model/ embeddings.npy --ids items.parquet -o ids.parquet
  semid report  model/ embeddings.npy --ids items.parquet -o report.html"""
    )
