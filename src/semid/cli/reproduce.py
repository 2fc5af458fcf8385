"""``semid reproduce``: a paper's tables, figures and claims from one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semid.cli.options import (
    Quiet,
    refuse_unused,
    say,
)

__all__ = ["reproduce"]


def reproduce(
    context: typer.Context,
    paper: Annotated[str, typer.Argument(metavar="PAPER", help="drq or moc.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of data sets, see 'semid prepare'; --quick needs none."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for PAPER/runs.jsonl and the page; default results, or results-quick. "
            "With --from, the folder of the pages.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A toy on a made-up catalogue, for a look: minutes.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe of your own (TOML); default the paper's.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=4096, help="Runs at a time.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Threads of a run; default shares the CPUs out."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only runs whose title has these words; may be repeated."),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what there is to run and how long it takes.")
    ] = False,
    list_runs: Annotated[
        bool, typer.Option("--list", help="With --estimate: the titles of what is left, in order.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Make the pages from this folder's results alone."),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="With --from: refuse results of --quick.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run what is missing of a paper's experiments and write its page; repeat it to continue.

    Every run is a line of runs.jsonl and is not repeated; several such commands may share a folder.

    Example: semid reproduce drq --quick
    """
    from semid.errors import UsageError, check_choice
    from semid.progress import make_progress
    from semid.reproduce.study import PAPERS, Study, page_from

    check_choice("PAPER", paper, PAPERS)
    if publish and source is None:
        raise UsageError("--publish says how --from makes pages; give --from results")
    if source is not None:
        if estimate or quick or recipe is not None:
            raise UsageError("--from runs nothing: leave out --estimate, --quick and --recipe")
        unused = ["data", "processes", "threads", "only", "list_runs"]
        refuse_unused(context, unused, "--from makes pages of results and runs nothing")
        for path in page_from(paper, source, output or source / paper, publish=publish):
            say(f"page: {path}")
        return
    if not estimate:
        refuse_unused(context, ["list_runs"], "--list goes with --estimate")
    if quick and recipe is not None:
        raise UsageError("--quick is a recipe of its own: leave out --recipe")
    name: str | Path = recipe or (f"{paper}-quick" if quick else paper)
    place = output or Path("results-quick" if quick else "results")
    study = Study(name, data=data, output=place, only=only or ())
    if study.paper != paper:
        raise UsageError(f"--recipe '{recipe}' is for {study.paper}, not {paper}")
    for why in study.absent.values():
        say(f"left out: {why}", err=True)
    if estimate:
        found = study.estimate()
        say(f"{found.runs} runs, {found.done} done, {found.runs - found.done} to do")
        if found.seconds is None:
            say("how long: nothing has run yet to judge by; run one and ask again")
        else:
            share = max(1, processes)
            say(
                f"how long: {found.seconds / 3600:.1f} hours of one process at the speed of the "
                f"runs done, {found.seconds / 3600 / share:.1f} with {share}; {found.guessed} "
                "runs are guessed from unlike ones"
            )
        if list_runs:
            done = {row["key"] for row in study.rows()}
            for job in study.chosen:
                if job.key not in done:
                    say(f"  {job.title}")
        return
    with make_progress(quiet=quiet) as progress:
        failed = study.run(processes=processes, threads=threads, progress=progress)
    for path in study.write():
        say(f"page: {path}")
    say(f"results: {study.folder / 'runs.jsonl'}")
    if failed:
        for title, why in failed.items():
            say(f"failed: {title}: {why}", err=True)
        raise typer.Exit(1)
