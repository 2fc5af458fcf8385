"""Options that several commands share, so that they are spelt and explained once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "CpusPerWorker",
    "EmbeddingColumn",
    "Engine",
    "IdColumn",
    "Ids",
    "OnInvalid",
    "Overwrite",
    "Quiet",
    "RayAddress",
    "Resume",
    "Source",
    "StoreBytes",
    "Threads",
    "Workers",
    "check_engine",
    "hold_output",
    "open_source",
    "ray_options",
    "release_outputs",
]

Source = Annotated[
    str,
    typer.Argument(
        metavar="EMBEDDINGS",
        help=".npy file, Parquet file, folder of Parquet files, a quoted glob, or a URI such as "
        "s3://bucket/items.",
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

Engine = Annotated[
    str,
    typer.Option(help="local (this machine) or ray (a cluster; pip install 'semid[ray]')."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="With --engine ray: actors; default: one a free CPU.")
]
CpusPerWorker = Annotated[
    int | None,
    typer.Option(min=1, help="With --engine ray: CPU slots and threads of an actor; default: 1."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="With --engine ray: cluster, e.g. auto; default: RAY_ADDRESS, else its own."),
]
StoreBytes = Annotated[
    int | None,
    typer.Option(
        help="With --engine ray: object store of a cluster that is started here, bytes; default: "
        "512 MiB."
    ),
]


_HELD = contextlib.ExitStack()


def hold_output(output: Any, *, overwrite: bool, inputs: Sequence[Any], state: Any = None) -> None:
    """Check an output before the work, and hold it until the command has ended.

    Args:
        output: path or URI.
        overwrite: as given.
        inputs: everything that the command reads.
        state: folder for an unfinished run, for commands that keep one.

    Raises:
        OutputExistsError, UsageError: as for `semid.output.check_output`.
        OutputBusyError: another run holds it.
    """
    from semid.output import claim_output

    _HELD.enter_context(claim_output(output, overwrite=overwrite, inputs=inputs, state=state))


def release_outputs() -> None:
    """Release what `hold_output` holds; called when the command has ended."""
    _HELD.close()


def check_engine(engine: str, **only_ray: Any) -> str:
    """Refuse an unknown engine, and options of one that was not chosen.

    Args:
        engine: as given.
        **only_ray: options that go with Ray alone, None where not given.

    Raises:
        UsageError: saying which.
    """
    from semid.errors import UsageError, check_choice

    check_choice("--engine", engine, ("local", "ray"))
    named = [f"--{name.replace('_', '-')}" for name, v in only_ray.items() if v is not None]
    if engine != "ray" and named:
        raise UsageError(
            f"{' and '.join(named)} go with --engine ray; on this machine alone give --processes "
            "(encode) or start torchrun (fit)"
        )
    return engine


def ray_options(
    workers: int | None, cpus_per_worker: int | None, address: str | None, store_bytes: int | None
) -> Any:
    """Return the layout on Ray that the shared options ask for."""
    from semid.distributed.ray_start import RayOptions

    given = {"cpus_per_worker": cpus_per_worker, "store_bytes": store_bytes}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return RayOptions(workers=workers, address=address, **chosen)


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
        source if "://" in source or not Path(source).exists() else Path(source),
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
