"""The `semid` program: its commands, and how errors reach a person."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from semid.cli.compare import compare
from semid.cli.demo import demo
from semid.cli.drift import drift
from semid.cli.encode import encode
from semid.cli.export import export
from semid.cli.fit import fit
from semid.cli.import_ import import_
from semid.cli.options import release_outputs
from semid.cli.prepare import prepare
from semid.cli.rank import rank
from semid.cli.refine import refine
from semid.cli.refresh import refresh
from semid.cli.report import report
from semid.cli.reproduce import reproduce
from semid.cli.unique import unique
from semid.errors import SemidError, brief, printable

__all__ = ["app", "main"]

HELP = """Semantic IDs for recommendation: learn them, know whether they are good, use them.

A first run on data of your own:

    semid fit     items.parquet -o model/             learn the codebooks
    semid encode  model/ items.parquet -o ids.parquet     give every item its codes
    semid report  model/ items.parquet -o report.html     see whether they are good

No data at hand? 'semid demo' makes a catalogue and runs all three.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Errors are one sentence; --debug anywhere shows the traceback.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(fit)
app.command()(encode)
app.command()(report)
app.command()(compare)
app.command()(refine)
app.command()(unique)
app.command()(drift)
app.command()(refresh)
app.command()(rank)
app.command()(export)
app.command("import")(import_)
app.command()(prepare)
app.command()(reproduce)
app.command()(demo)


def _version(wanted: bool) -> None:
    if wanted:
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
    """Run the program and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    for stream in (sys.stdout, sys.stderr):  # a name may hold characters that a terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    console = Console(stderr=True)
    _configure(console, debug)
    try:
        app([argument for argument in given if argument != "--debug"], standalone_mode=True)
    except SemidError as error:
        if debug:
            raise
        _complain(console, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain(console, "interrupted")
        sys.exit(130)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        _complain(console, f"{type(error).__name__}: {brief(error)}")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _print_error(
            console,
            f"internal error: {type(error).__name__}: {brief(error)}; please report it; --debug "
            "shows the traceback",
        )
        sys.exit(1)
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
    record.msg, record.args = printable(record.getMessage()), None
    return True


def _complain(console: Console, message: str) -> None:
    for line in message.split("\n"):
        _print_error(console, f"error: {line}")


def _print_error(console: Console, line: str) -> None:
    console.print(printable(line), style="bold red", markup=False, highlight=False, soft_wrap=True)
