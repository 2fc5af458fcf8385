"""Options that several commands share, so that they are spelt and explained once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from semid.errors import UsageError, check_choice, printable

__all__ = [
    "COLUMNS_OF_INTERACTIONS",
    "CpusPerWorker",
    "EmbeddingColumn",
    "Engine",
    "IdColumn",
    "Ids",
    "ItemColumn",
    "OnInvalid",
    "Overwrite",
    "Quiet",
    "RayAddress",
    "Resume",
    "Source",
    "StoreBytes",
    "Threads",
    "TimeColumn",
    "UserColumn",
    "Workers",
    "check_engine",
    "hold_output",
    "is_given",
    "open_interactions",
    "open_source",
    "ray_options",
    "refuse_unused",
    "release_outputs",
    "say",
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
UserColumn = Annotated[str, typer.Option(help="Column of the users in the interactions.")]
ItemColumn = Annotated[str, typer.Option(help="Column of the items in the interactions.")]
TimeColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the order or time in the interactions; default position, else timestamp."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=4096, help="Threads; default: what the machine allows. Never changes a result."
    ),
]

Engine = Annotated[
    str,
    typer.Option(help="local (this machine) or ray (a cluster; pip install 'semid[ray]')."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, max=100_000, help="With --engine ray: actors; default: one a free CPU."),
]
CpusPerWorker = Annotated[
    int | None,
    typer.Option(
        min=1, max=4096, help="With --engine ray: CPU slots and threads of an actor; default: 1."
    ),
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


def say(text: str, *, err: bool = False) -> None:
    """Print a line; control characters in names of the user's data are escaped."""
    typer.echo(printable(text), err=err)


def refuse_unused(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that were given on the command line and would change nothing.

    Args:
        context: of the running command.
        names: parameters of the command that have no effect here.
        reason: why, and what to do, as the rest of a sentence.

    Raises:
        UsageError: naming the flags.
    """
    flags = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and is_given(context, parameter.name)
    ]
    if flags:
        raise UsageError(f"{' and '.join(flags)} would change nothing: {reason}")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


COLUMNS_OF_INTERACTIONS = ("user_column", "item_column", "time_column")


def open_interactions(context: typer.Context, path: str | None) -> Any:
    """Read the interactions with the columns that the shared options name, or return None.

    Raises:
        UsageError: columns are named without interactions, or do not exist.
    """
    if path is None:
        refuse_unused(
            context,
            COLUMNS_OF_INTERACTIONS,
            "no --interactions are given",
        )
        return None
    from semid.data.interactions import read_interactions

    columns = {name: context.params[name] for name in COLUMNS_OF_INTERACTIONS}
    return read_interactions(path, rating_column="", **columns)


def check_engine(engine: str, **only_ray: Any) -> str:
    """Refuse an unknown engine, and options of one that was not chosen.

    Args:
        engine: as given.
        **only_ray: options that go with Ray alone, None where not given.

    Raises:
        UsageError: saying which.
    """
    check_choice("--engine", engine, ("local", "ray"))
    named = [f"--{name.replace('_', '-')}" for name, v in only_ray.items() if v is not None]
    if engine != "ray" and named:
        raise UsageError(
            f"{' and '.join(named)} go with --engine ray; give that too, or leave them out"
        )
    return engine


def ray_options(
    workers: int | None, cpus_per_worker: int | None, address: str | None, store_bytes: int | None
) -> Any:
    """Return the layout on Ray that the shared options ask for."""
    from semid.distributed.ray_workers import RayOptions

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
