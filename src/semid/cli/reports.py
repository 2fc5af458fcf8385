"""Reports and studies: report, compare, audit, advise, demo, prepare, reproduce."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import semid
from semid.cli import shared as cli
from semid.errors import UsageError, check_choice

RELEASES = ("amazon", "movielens")


def prepare(
    release: str,
    source: Path,
    output: cli.OutputPath,
    items: Path | None = None,
    core: Annotated[int | None, typer.Option(min=0, max=2**31 - 1)] = None,
    embed: str | None = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Read a release into items, interactions with ratings and, with --embed, embeddings.

    Example: semid prepare amazon reviews_Beauty.json.gz --items meta_Beauty.json.gz -o data/beauty

    Args:
        release: amazon or movielens.
        source: Review file (.json.gz, 2014 or 2023), or MovieLens folder.
        output: Folder for items.parquet and interactions.parquet.
        items: Amazon's meta_*.json.gz of the same category.
        core: Minimum interactions per user and per item; default: amazon 5, movielens 0.
        embed: sentence-transformers model: writes embeddings.f16.npy of the texts.
    """
    from semid.data.releases import read_amazon, read_movielens

    check_choice("RELEASE", release, RELEASES)
    cli.hold_output(output, overwrite=overwrite, inputs=(source, items))
    if release == "amazon":
        dataset = read_amazon(source, items=items, core=5 if core is None else core)
    else:
        if items is not None:
            raise UsageError("--items goes with amazon; a MovieLens folder has its own movies file")
        dataset = read_movielens(source, core=core or 0)
    dataset.write(output, embed=embed, overwrite=overwrite)
    for note in dataset.notes:
        cli.say(note)
    cli.say(f"written: {output}")


def report(
    context: typer.Context,
    model: Path,
    embeddings: cli.Source,
    output: cli.OutputPath,
    source: cli.SourceOptions,
    columns: cli.InteractionColumns,
    interactions: str | None = None,
    items: str | None = None,
    relations: str | None = None,
    seed: int = 0,
    threads: cli.Threads = None,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Diagnose a fitted model on a catalogue: a verdict, figures, and an explorer of the codes.

    Example: semid report model/ items.parquet -o report.html

    Args:
        model: Folder written by 'semid fit'.
        output: File to write: .html, .json or .md.
        interactions: Parquet or CSV of user_id, item_id and position or timestamp; adds retrieval,
            AUCs and popularity.
        items: Table with item_id and title (or text), for names in the report; default: the --ids
            table, else the embeddings' own.
        relations: Parquet or CSV of item_id, related_item_id: a second ground truth.
        seed: Seed of the samples.
    """
    reads = (model, embeddings, source.ids, items, interactions, relations)
    cli.hold_output(output, overwrite=overwrite, inputs=reads)
    opened = source.open(embeddings)
    log = columns.read(context, interactions)
    with cli.make_progress(quiet=quiet) as progress:
        result = semid.diagnose(
            cli.open_tokenizer(model),
            opened,
            interactions=log,
            items=items if items is not None else _titles(source, embeddings, opened),
            relations=relations,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    result.write(output, overwrite=overwrite)
    cli.say(result.verdict.summary())
    cli.say(f"report: {output}")


def _titles(source: cli.SourceOptions, embeddings: str, opened: Any) -> Any:
    """Return titles from the tables already named, where they have some."""
    from semid.data.items import read_items
    from semid.errors import IdsError

    try:
        return read_items(source.ids or embeddings, ids=opened.ids, id_column=source.id_column)
    except (UsageError, IdsError):
        return None


def compare(
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(metavar="MODEL MODEL... EMBEDDINGS")],
    output: cli.OutputPath,
    source: cli.SourceOptions,
    columns: cli.InteractionColumns,
    interactions: str | None = None,
    items: str | None = None,
    relations: str | None = None,
    seed: int = 0,
    threads: cli.Threads = None,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Compare models on one catalogue: ranks and trade-offs by view, never one score.

    Example: semid compare model_a/ model_b/ items.parquet --interactions logs.parquet -o c.html

    Args:
        paths: Folders written by 'semid fit', two or more, then the embeddings.
        output: File to write: .html, .json or .md.
        interactions: Parquet or CSV of user_id, item_id and position or timestamp.
        items: Table with item_id and title (or text), for names of items; default: the --ids
            table, else the embeddings' own.
        relations: Parquet or CSV of item_id, related_item_id: a second ground truth.
        seed: Seed of samples, noise and negatives.
    """
    if len(paths) < 3:
        raise UsageError(
            f"{len(paths)} paths given; name at least two model folders and then the embeddings"
        )
    reads = (*paths, source.ids, interactions, items, relations)
    cli.hold_output(output, overwrite=overwrite, inputs=reads)
    # The command line gives one list: the models, then the embeddings.
    models, embeddings = paths[:-1], paths[-1]
    if len({Path(path).resolve() for path in models}) < len(models):
        raise UsageError("a model is named twice; name each model folder once")
    # Models are called like their folders, or by the whole path where two folders share a name.
    short = [Path(path).resolve().name for path in models]
    names = short if len(set(short)) == len(short) else models
    opened = source.open(embeddings)
    log = columns.read(context, interactions)
    with cli.make_progress(quiet=quiet) as progress:
        result = semid.compare(
            {name: cli.open_tokenizer(path) for name, path in zip(names, models, strict=True)},
            opened,
            interactions=log,
            items=items if items is not None else _titles(source, embeddings, opened),
            relations=relations,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    result.write(output, overwrite=overwrite)
    for finding in result.findings:
        cli.say(f"{finding}.")
    cli.say(f"comparison: {output}")


def audit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="IDS")],
    columns: cli.InteractionColumns,
    output: Annotated[Path | None, cli.OUTPUT] = None,
    interactions: Annotated[str | None, typer.Option(rich_help_panel=cli.LOG)] = None,
    items: str | None = None,
    category_column: str | None = None,
    ids: str | None = None,
    orientation: str | None = None,
    seed: int = 0,
    overwrite: cli.Overwrite = False,
) -> None:
    """Report on ids of any program, from their codes alone.

    Usage, collisions and prefixes; with --interactions also how often consecutive items of users
    share a prefix, beside codes given to random items and, with --items, categories as codes.

    Example: semid audit Beauty.index.json --ids items.parquet --interactions log.parquet

    Args:
        file: Ids: JSON, CSV, Parquet, .npy or a tensor, as 'semid import' reads them.
        output: Report: .html, .json or .md; without it the figures are printed alone.
        interactions: Log of users' interactions.
        items: Table with item_id and the categories of the items.
        category_column: Column of the categories; default categories or category.
        ids: Table with one item id per row, for a file that holds none.
        orientation: Axes of a tensor: levels-first or items-first.
        seed: Seed of the controls, ties and intervals.
    """
    from semid.data.items import load_ids
    from semid.exports.any_ids import read_any_ids

    if output is None:
        cli.refuse_unused(context, ["overwrite"], "there is no --output")
    else:
        cli.hold_output(output, overwrite=overwrite, inputs=(file, interactions, items, ids))
    names = None if ids is None else load_ids(ids)
    layout = {} if orientation is None else {"orientation": orientation}
    result = semid.audit(
        read_any_ids(file, items=names, **layout),
        interactions=columns.read(context, interactions),
        items=items,
        category_column=category_column,
        source=file.name,
        seed=seed,
    )
    cli.say(result.summary())
    if output is not None:
        result.write(output, overwrite=overwrite)
        cli.say(f"report: {output}")


def advise(
    context: typer.Context,
    embeddings: cli.Source,
    source: cli.SourceOptions,
    columns: cli.InteractionColumns,
    interactions: Annotated[str | None, typer.Option(rich_help_panel=cli.LOG)] = None,
    sample: Annotated[int, typer.Option(min=500, max=10_000_000)] = 20_000,
    repeats: Annotated[int, typer.Option(min=2, max=100)] = 3,
    behind: Annotated[float, typer.Option(min=0, max=1)] = 0.05,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    threads: cli.Threads = None,
    quiet: cli.Quiet = False,
) -> None:
    """Recommend a tokenizer, levels and codebook size, from cheap fits on samples of a catalogue.

    Takes minutes. The first lines say what candidates are ranked by, and why.

    Example: semid advise items.parquet --interactions logs.parquet

    Args:
        interactions: Log of users' interactions, in an order: adds tokenizers that learn from it,
            and ranks by what codes keep of it.
        sample: Largest number of items of a fit.
        repeats: Number of samples, each fitted anew; the intervals are over them.
        behind: How far behind the best the choice may be, as a share.
        seed: Seed of samples and fits.
        as_json: Print one JSON object instead of text.
    """
    log = columns.read(context, interactions)
    opened = source.open(embeddings)
    sizes = {"sample": sample, "repeats": repeats, "behind": behind}
    with cli.make_progress(quiet=quiet) as progress:
        advice = semid.advise(
            opened, interactions=log, seed=seed, threads=threads, progress=progress, **sizes
        )
    text = json.dumps(advice.to_dict(), indent=2) if as_json else advice.summary()
    cli.say(text)


def demo(
    output: cli.OutputPath = Path("demo"),
    items: Annotated[int, typer.Option(min=1000, max=10000000)] = 20_000,
    codebook_size: Annotated[int, typer.Option(min=2, max=65536)] = 256,
    levels: Annotated[int, typer.Option(min=1, max=256)] = 3,
    seed: int = 0,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Make a synthetic catalogue, fit codebooks, encode it and write the quality report.

    The catalogue has hierarchical topics, long-tailed popularity, readable titles and user
    sequences.

    Args:
        output: Folder for everything the demo writes.
        items: Items in the catalogue.
        codebook_size: Codewords per level.
        levels: Codes per item.
        seed: Seed of the catalogue and the fit.
    """
    from semid.output import atomic_folder
    from semid.tokenizers.encoding import encode_to_parquet

    cli.hold_output(output, overwrite=overwrite, inputs=())
    with (
        atomic_folder(output, overwrite=overwrite) as folder,
        cli.make_progress(quiet=quiet) as steps,
    ):
        semid.SyntheticCatalogue(items=items, seed=seed).write(folder / "data")
        embeddings, table = folder / "data/embeddings.npy", folder / "data/items.parquet"
        model = semid.RQKMeans(levels=levels, codebook_size=codebook_size, seed=seed)
        model.fit(embeddings, ids=table, progress=steps)
        model.save(folder / "model")
        encode_to_parquet(model, embeddings, folder / "ids.parquet", ids=table, progress=steps)
        # The report calls the files by their names after the folder is whole.
        source = semid.open_embeddings(embeddings, ids=table)
        source.label = f"'{output}/data/embeddings.npy'"
        log = semid.read_interactions(folder / "data/interactions.parquet")
        log = replace(log, label=f"'{output}/data/interactions.parquet'")
        diagnosis = semid.diagnose(model, source, items=table, interactions=log)
        diagnosis.write(folder / "report.html")
    if model.report is not None:
        cli.say(model.report.summary)
    cli.say(
        f"""
{output}/data/          {items:,} items with titles, embeddings and user sequences
{output}/model/         the codebooks
{output}/ids.parquet    {levels} codes per item
{output}/report.html    open it in a browser

The same on your own data:

  semid fit     embeddings.npy --ids items.parquet -o model/
  semid encode  model/ embeddings.npy --ids items.parquet -o ids.parquet
  semid report  model/ embeddings.npy --ids items.parquet -o report.html"""
    )


def reproduce(
    context: typer.Context,
    paper: str,
    data: Path | None = None,
    output: Annotated[Path | None, cli.OUTPUT] = None,
    quick: bool = False,
    recipe: Path | None = None,
    processes: Annotated[int, typer.Option(min=1, max=4096)] = 1,
    threads: cli.Count = None,
    only: list[str] | None = None,
    estimate: bool = False,
    list_runs: Annotated[bool, typer.Option("--list")] = False,
    source: Annotated[Path | None, typer.Option("--from")] = None,
    publish: bool = False,
    quiet: cli.Quiet = False,
) -> None:
    """Run the missing experiments of a paper and write its page; repeat it to continue.

    Each run is one line of runs.jsonl and is not repeated; several commands may share a folder.

    Example: semid reproduce drq --quick

    Args:
        paper: drq, moc, behavior, retrieval or predict.
        data: Folder of data sets, see 'semid prepare'; --quick needs none.
        output: Folder for PAPER/runs.jsonl and the page; default results, or results-quick. With
            --from, the folder of the pages.
        quick: A small run on a synthetic catalogue; takes minutes.
        recipe: Your own recipe (TOML); default: that of the paper.
        processes: Runs in parallel.
        threads: CPU threads per run; by default the CPUs are divided between the runs.
        only: Only runs whose title contains these words; may be repeated.
        estimate: Print what is left to run and how long it takes.
        list_runs: With --estimate: print the titles of what is left.
        source: Make the pages from the results in this folder; run nothing.
        publish: With --from: refuse results of --quick.
    """
    from semid.registry import find_recipe
    from semid.reproduce import PAPERS

    # What needs no torch is checked before it is imported.
    check_choice("PAPER", paper, PAPERS)
    if recipe is not None:
        find_recipe(recipe, "reproduce/recipes", flag="--recipe")
    if publish and source is None:
        raise UsageError("--publish says how --from makes pages; give --from results")
    if source is not None:
        if estimate or quick or recipe is not None:
            raise UsageError("--from runs nothing: leave out --estimate, --quick and --recipe")
        unused = ["data", "processes", "threads", "only", "list_runs"]
        cli.refuse_unused(context, unused, "--from makes pages of results and runs nothing")
        cli.check_inputs(source)
        from semid.reproduce.study import page_from

        for path in page_from(paper, source, output or source / paper, publish=publish):
            cli.say(f"page: {path}")
        return
    if not estimate:
        cli.refuse_unused(context, ["list_runs"], "--list goes with --estimate")
    if quick and recipe is not None:
        raise UsageError("--quick is a recipe of its own: leave out --recipe")
    cli.check_inputs(data)
    from semid.reproduce.study import Study

    name: str | Path = recipe or (f"{paper}-quick" if quick else paper)
    place = output or Path("results-quick" if quick else "results")
    study = Study(name, data=data, output=place, only=only or ())
    if study.paper != paper:
        raise UsageError(f"--recipe '{recipe}' is for {study.paper}, not {paper}")
    for why in study.absent.values():
        cli.say(f"left out: {why}", err=True)
    if estimate:
        _say_estimate(study, processes, list_runs=list_runs)
        return
    with cli.make_progress(quiet=quiet) as progress:
        failed = study.run(processes=processes, threads=threads, progress=progress)
    for path in study.write():
        cli.say(f"page: {path}")
    cli.say(f"results: {study.folder / 'runs.jsonl'}")
    if failed:
        for title, why in failed.items():
            cli.say(f"failed: {title}: {why}", err=True)
        # The page of the finished runs is written all the same; the exit code tells of failures.
        raise typer.Exit(1)


def _say_estimate(study: Any, processes: int, *, list_runs: bool) -> None:
    """Say what is left to run, and how long it takes."""
    plan = study.estimate()
    cli.say(f"{plan.runs} runs, {plan.done} done, {plan.runs - plan.done} to do")
    if plan.seconds is None:
        cli.say("how long: nothing has run yet to judge by; run one and ask again")
    else:
        hours = plan.seconds / 3600
        cli.say(
            f"how long: {hours:.1f} hours of one process at the speed of the runs done on machines "
            f"{plan.machine}, {hours / processes:.1f} with {processes}; {plan.guessed} runs are "
            "guessed from unlike ones"
        )
    if list_runs:
        done = {row["key"] for row in study.rows()}
        for job in study.selected:
            if job.key not in done:
                cli.say(f"  {job.title}")
