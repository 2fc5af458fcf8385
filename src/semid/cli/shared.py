"""What several commands share: groups of options, outputs that are held, messages."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from semid.errors import UsageError, check_choice, printable

INPUT, RUN, LOG, RAY = "Input", "Run", "Interactions", "Ray"

Source = Annotated[
    str,
    typer.Argument(
        metavar="EMBEDDINGS",
        help=".npy file, Parquet file, folder of Parquet files, a quoted glob, or a URI such as "
        "s3://bucket/items.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a run that was stopped.", rich_help_panel=RUN)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=RUN)
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Number of CPU threads; all by default. The result does not depend on it.",
        rich_help_panel=RUN,
    ),
]
Ids = Annotated[
    str | None,
    typer.Option(
        "--ids",
        help="Table or text file with one item id per row, for an .npy; FILE:COLUMN names the "
        "column.",
        rich_help_panel=INPUT,
    ),
]
EmbeddingColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the vectors; default 'embedding', else the only column of float lists.",
        rich_help_panel=INPUT,
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(help="Column of the item ids; default 'item_id'.", rich_help_panel=INPUT),
]
OnInvalid = Annotated[
    str,
    typer.Option(
        metavar="error|skip",
        help="Rows with null, NaN or inf: 'error' refuses them, 'skip' leaves them out.",
        rich_help_panel=INPUT,
    ),
]


@dataclass(frozen=True)
class SourceOptions:
    """How embeddings are read; the same options in every command that reads some."""

    ids: Ids = None
    embedding_column: EmbeddingColumn = None
    id_column: IdColumn = None
    on_invalid: OnInvalid = "error"

    def open(self, path: str, *, ids: str | None = None) -> Any:
        """Open embeddings; ``ids`` replaces the table of item ids."""
        from semid.data.embeddings import open_embeddings

        return open_embeddings(
            path if "://" in path or not Path(path).exists() else Path(path),
            ids=ids or self.ids,
            embedding_column=self.embedding_column,
            id_column=self.id_column,
            on_invalid=self.on_invalid,
        )


@dataclass(frozen=True)
class InteractionColumns:
    """Names of the columns of interactions."""

    user_column: Annotated[
        str, typer.Option(help="Column of the users in the interactions.", rich_help_panel=LOG)
    ] = "user_id"
    item_column: Annotated[
        str, typer.Option(help="Column of the items in the interactions.", rich_help_panel=LOG)
    ] = "item_id"
    time_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the order or time in the interactions; default position, else "
            "timestamp.",
            rich_help_panel=LOG,
        ),
    ] = None

    NAMES = ("user_column", "item_column", "time_column")

    def read(self, context: typer.Context, path: str | None) -> Any:
        """Read the interactions, or return None without any."""
        if path is None:
            refuse_unused(context, self.NAMES, "no --interactions are given")
            return None
        from semid.data.interactions import read_interactions

        return read_interactions(path, rating_column="", **vars(self))


@dataclass(frozen=True)
class RayFlags:
    """Where work runs: on this machine, or on a cluster of Ray."""

    engine: Annotated[
        str,
        typer.Option(
            metavar="local|ray",
            help="This machine, or a cluster (pip install 'semid[ray]').",
            rich_help_panel=RAY,
        ),
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            help="With --engine ray: number of actors; default: one per free CPU.",
            rich_help_panel=RAY,
        ),
    ] = None
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="With --engine ray: CPU slots and threads per actor; default 1.",
            rich_help_panel=RAY,
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="With --engine ray: address of the cluster, such as auto; default: RAY_ADDRESS, "
            "else a cluster of its own.",
            rich_help_panel=RAY,
        ),
    ] = None
    store_bytes: Annotated[
        int | None,
        typer.Option(
            help="With --engine ray: bytes of the object store of a cluster that is started here; "
            "default 512 MiB.",
            rich_help_panel=RAY,
        ),
    ] = None

    @property
    def uses_ray(self) -> bool:
        """Whether Ray is asked for."""
        check_choice("--engine", self.engine, ("local", "ray"))
        names = [n for n, value in vars(self).items() if n != "engine" and value is not None]
        if self.engine != "ray" and names:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
            raise UsageError(f"{flags} go with --engine ray; give that too, or leave them out")
        return self.engine == "ray"

    @property
    def options(self) -> Any:
        """The layout on Ray."""
        from semid.distributed.ray_workers import RayOptions

        optional = {"cpus_per_worker": self.cpus_per_worker, "store_bytes": self.store_bytes}
        given: dict[str, Any] = {k: value for k, value in optional.items() if value is not None}
        return RayOptions(workers=self.workers, address=self.ray_address, **given)


_HELD = contextlib.ExitStack()


def hold_output(output: Any, *, overwrite: bool, inputs: Sequence[Any], state: Any = None) -> None:
    """Check an output before the work, and hold it until the command has ended."""
    from semid.output import claim_output

    _HELD.enter_context(claim_output(output, overwrite=overwrite, inputs=inputs, state=state))


def release_outputs() -> None:
    """Release what `hold_output` holds; called when the command has ended."""
    _HELD.close()


def say(text: str, *, err: bool = False) -> None:
    """Print a line; control characters in names of the user's data are escaped."""
    typer.echo(printable(text), err=err)


def make_progress(*, quiet: bool) -> Any:
    """Return the progress of a command, see `semid.progress.make_progress`."""
    from semid.progress import make_progress as make

    return make(quiet=quiet)


def refuse_unused(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that were given on the command line and would change nothing."""
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
