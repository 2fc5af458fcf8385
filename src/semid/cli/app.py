"""The `semid` program: its commands, and how errors reach a person."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from semid.cli.catalogue import check, compact, drift, embed, export, import_, refresh, unique
from semid.cli.flags import expand
from semid.cli.help import OptionsCommand
from semid.cli.models import encode, fit, refine
from semid.cli.rank import rank, rank_grid
from semid.cli.reports import advise, audit, compare, demo, prepare, report, reproduce
from semid.cli.retrieve import recommend, retrieve
from semid.cli.serve import serve
from semid.cli.shared import release_outputs
from semid.cli.staging import named
from semid.errors import SemidError, brief, printable
from semid.progress import without_default_progress

HELP = """Semantic IDs for recommendation: learn them, know whether they are good, use them.

A first run on your own data:

\b
    semid fit items.parquet -o model/
    semid encode model/ items.parquet -o ids.parquet
    semid report model/ items.parquet -o report.html

Without data of your own, 'semid demo' makes a catalogue and runs all three.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Errors are one sentence; --debug anywhere shows the traceback.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("embed", embed, "Embed texts of items."),
    ("fit", fit, "Learn codebooks from embeddings and judge them."),
    ("encode", encode, "Give every item its codes."),
    ("report", report, "Write a quality report about one model."),
    ("compare", compare, "Compare several models side by side."),
    ("audit", audit, "Report on ids of any program, from codes alone."),
    ("advise", advise, "Recommend a tokenizer and its size."),
    ("refine", refine, "Lower a model's error by refining all levels together."),
    ("unique", unique, "Tell items with equal ids apart."),
    ("drift", drift, "Measure how far a catalogue has moved from its model."),
    ("check", check, "Decide whether new ids may be released."),
    ("refresh", refresh, "Fit again and keep the ids that can be kept."),
    ("compact", compact, "Start a new bundle from another."),
    ("rank", rank, "Train a ranking model with codes."),
    ("rank-grid", rank_grid, "Compare ranking models, methods and seeds."),
    ("retrieve", retrieve, "Train and test models of the next item."),
    ("recommend", recommend, "Recommend items with such a model."),
    ("serve", serve, "Answer requests over a published catalogue."),
    ("export", export, "Write ids or a model for another program."),
    ("import", import_, "Read ids of another program."),
    ("prepare", prepare, "Convert a public data set to semid's layout."),
    ("reproduce", reproduce, "Run a paper's experiments and write its page."),
    ("demo", demo, "Run everything on a synthetic catalogue."),
)
for _name, _command, _summary in _COMMANDS:
    app.command(_name, cls=OptionsCommand, short_help=_summary)(expand(_command))


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"semid {version('semid')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Hold the options of the program itself; the help text is given to the Typer app."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0 done, 1 failed, 2 usage, 3 check failed, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr):  # a name may hold characters that a terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Results go to standard output; errors, warnings and progress to the other stream.
    console = Console(stderr=True)
    _configure(console, debug)
    try:
        with without_default_progress():  # commands show what `make_progress` chooses
            app([argument for argument in words if argument != "--debug"], standalone_mode=True)
    except KeyboardInterrupt:
        _print_errors(console, "error: interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        name = f"{type(error).__name__}: {brief(error)}"
        if isinstance(error, SemidError):
            _print_errors(console, *(f"error: {line}" for line in str(error).split("\n")))
        elif isinstance(error, OSError | MemoryError):
            _print_errors(console, f"error: {name}")
        else:
            advice = "please report it; --debug shows the traceback"
            _print_errors(console, f"internal error: {name}; {advice}")
        sys.exit(getattr(error, "exit_code", 1))
    finally:
        release_outputs()


def _configure(console: Console, debug: bool) -> None:
    level = logging.DEBUG if debug else logging.WARNING
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console, show_time=False, show_path=debug, markup=False
        )
        logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    else:
        logging.basicConfig(
            level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True
        )
    # Names in warnings come from the user's data.
    logging.getLogger().handlers[0].addFilter(_escape)
    logging.getLogger("numba").setLevel(logging.WARNING)
    if not debug:
        warnings.simplefilter("ignore")


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(named(record.getMessage())), None
    return True


def _print_errors(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(
            printable(named(line)), style="bold red", markup=False, highlight=False, soft_wrap=True
        )
