"""What several commands share: groups of options, outputs that are held, messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from semid.cli import staging
from semid.errors import UsageError, check_choice, printable

INPUT, RUN, LOG = "Input", "Run", "Interactions"

# Types of parameters. Their help is here if it is the same in every command; otherwise, and for
# plain types, it is in the docstring of the command, see `semid.cli.flags.expand`.
OUTPUT = typer.Option("--output", "-o")
Output = Annotated[str, OUTPUT]
OutputPath = Annotated[Path, OUTPUT]
Count = Annotated[int | None, typer.Option(min=1, max=4096)]
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
Log = Annotated[
    str | None,
    typer.Option(
        help="Where parameters, figures of each epoch, verdict and model go: jsonl:PATH, "
        "tensorboard:FOLDER, mlflow or wandb.",
        rich_help_panel=RUN,
    ),
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


@dataclass(frozen=True)
class SourceOptions:
    """How embeddings are read; the same options in every command that reads some.

    Attributes:
        ids: Table or text file with one item id per row, for an .npy; FILE:COLUMN names the column.
        embedding_column: Column of the vectors; default 'embedding', else the only column of float
            lists.
        id_column: Column of the item ids; default 'item_id'.
        on_invalid: Rows with null, NaN or inf: 'error' refuses them, 'skip' leaves them out.
    """

    PANEL = INPUT

    ids: str | None = None
    embedding_column: str | None = None
    id_column: str | None = None
    on_invalid: Annotated[str, typer.Option(metavar="error|skip")] = "error"

    def open(self, path: str, *, ids: str | None = None) -> Any:
        """Open embeddings; ``ids`` replaces the table of item ids."""
        from semid.data.embeddings import open_embeddings

        options = {**vars(self), "ids": ids or self.ids}
        # An existing file is passed as a `Path`: its name is no glob.
        return open_embeddings(
            path if "://" in path or not Path(path).exists() else Path(path), **options
        )


@dataclass(frozen=True)
class InteractionColumns:
    """Names of the columns of interactions.

    Attributes:
        user_column: Column of the users in the interactions.
        item_column: Column of the items in the interactions.
        time_column: Column of the time or order in the interactions; default timestamp, else
            position.
        ties: Order of a user's interactions at the same time: shuffled, or that of the file.
        ties_seed: Seed of the shuffle.
    """

    PANEL = LOG
    NAMES = ("user_column", "item_column", "time_column", "ties", "ties_seed")

    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = None
    ties: Annotated[str, typer.Option(metavar="shuffle|file")] = "shuffle"
    ties_seed: int = 0

    def check(self, path: str) -> None:
        """Refuse interactions without these columns, before what takes long is imported."""
        from semid.data.interactions import TIES, check_columns

        check_choice("--ties (ties=)", self.ties, TIES)
        check_columns(path, **{name: vars(self)[name] for name in self.NAMES[:3]})

    def read(self, context: typer.Context, path: str | None) -> Any:
        """Read the interactions, or return None without any."""
        if path is None:
            refuse_unused(context, self.NAMES, "no --interactions are given")
            return None
        from semid.data.interactions import read_interactions

        return read_interactions(path, rating_column="", **vars(self))


@dataclass(frozen=True)
class RayFlags:
    """Where work runs: on this machine, or on a cluster of Ray.

    Attributes:
        engine: This machine, or a cluster (pip install 'semid[ray]').
        workers: With --engine ray: number of actors; default: one per free CPU.
        cpus_per_worker: With --engine ray: CPU slots and threads per actor; default 1.
        ray_address: With --engine ray: address of the cluster, such as auto; default: RAY_ADDRESS,
            else a cluster of its own.
        store_bytes: With --engine ray: bytes of the object store of a cluster that is started here;
            default 512 MiB.
        wait_seconds: With --engine ray: seconds to wait for a free CPU slot when no worker is left;
            default 120.
    """

    PANEL = "Ray"

    engine: Annotated[str, typer.Option(metavar="local|ray")] = "local"
    workers: Annotated[int | None, typer.Option(min=1, max=100_000)] = None
    cpus_per_worker: Count = None
    ray_address: str | None = None
    store_bytes: int | None = None
    wait_seconds: int | None = None

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

        names = ("cpus_per_worker", "store_bytes", "wait_seconds")
        layout: dict[str, Any] = {
            name: value for name in names if (value := getattr(self, name)) is not None
        }
        return RayOptions(workers=self.workers, address=self.ray_address, **layout)


def check_device(device: str) -> None:
    """Refuse what is no device; whether there is a GPU is known to torch alone."""
    check_choice("--device (device=)", device, ("auto", "cpu", "cuda"))


def open_tokenizer(path: str | Path, *, threads: int | None = None) -> Any:
    """Open a tokenizer; with a number of threads, for use by all that it does."""
    from semid.loading import load_tokenizer

    tokenizer = load_tokenizer(path)
    if threads is not None:
        tokenizer.threads = threads
    return tokenizer


def check_inputs(*paths: str | Path | None) -> None:
    """Refuse paths on this machine that do not exist, before what takes long is imported."""
    for path in paths:
        text = str(path)
        if path is None or "://" in text or any(mark in text for mark in "*?["):
            continue
        if not Path(text).expanduser().exists():
            raise UsageError(f"'{text}' does not exist; check the path")


_HELD = contextlib.ExitStack()


def hold_output(output: Any, *, overwrite: bool, inputs: Sequence[Any], state: Any = None) -> None:
    """Check an output before the work, and hold it until the command has ended."""
    from semid.output import claim_output

    uri = staging.placed(output)
    if uri is not None:
        named = [staging.named(each) for each in inputs if each is not None]
        _HELD.enter_context(claim_output(uri, overwrite=overwrite, inputs=named))
    # What an unfinished run left at the place on this machine is no output of anybody's.
    options: dict[str, Any] = {"overwrite": overwrite or uri is not None, "state": state}
    _HELD.enter_context(claim_output(output, inputs=inputs, **options))


def local_input(path: str) -> Path:
    """Return a path on this machine for what a path or URI names."""
    return staging.fetch(path) if "://" in path else Path(path)


def local_output(path: str) -> Path:
    """Return a path on this machine for an output that may be a URI."""
    return staging.place(path) if "://" in path else Path(path)


def release_outputs() -> None:
    """Release what `hold_output` holds; called when the command has ended."""
    _HELD.close()
    staging.release()


def say(text: str, *, err: bool = False) -> None:
    """Print a line; control characters in names of the user's data are escaped."""
    typer.echo(printable(staging.named(text)), err=err)


def make_progress(*, quiet: bool) -> Any:
    """Return the progress of a command, see `semid.progress.make_progress`."""
    from semid.progress import make_progress as make

    return make(quiet=quiet)


def open_log(text: str | None) -> contextlib.AbstractContextManager[Any]:
    """Return the logger that --log names, in the first process; else a context of None."""
    from semid.training.distributed import is_main
    from semid.training.loggers import make_logger

    return contextlib.nullcontext() if text is None or not is_main() else make_logger(text)


@contextlib.contextmanager
def name_checkpoint(folder: Path) -> Iterator[None]:
    """Say where a run that is interrupted can be continued from."""
    from semid.training.distributed import is_main

    try:
        yield
    except KeyboardInterrupt:
        if is_main() and (folder / "state.safetensors").exists():
            say(f"stopped; '{folder}' keeps the run: repeat the command with --resume", err=True)
        raise


def refuse_unused(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that were given on the command line and would change nothing."""
    flags = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and is_given(context, parameter.name)
    ]
    # An option that does nothing is a misunderstanding, which a result would hide.
    if flags:
        raise UsageError(f"{' and '.join(flags)} would change nothing: {reason}")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
