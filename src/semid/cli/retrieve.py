"""``semid retrieve`` trains next-item models, ``semid recommend`` asks one for items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import semid
from semid.cli import staging
from semid.cli.flags import are_checked, check_keys, split_list
from semid.cli.rank import Logs, options_under
from semid.cli.shared import (
    INPUT,
    InteractionColumns,
    Log,
    OutputPath,
    Overwrite,
    Quiet,
    Resume,
    check_device,
    check_inputs,
    hold_output,
    is_given,
    make_progress,
    name_checkpoint,
    open_log,
    refuse_unused,
    say,
)
from semid.errors import UsageError, check_choice


def retrieve(
    context: typer.Context,
    logs: Logs,
    output: OutputPath,
    settings: Annotated[dict[str, Any], "retrieve"],
    columns: InteractionColumns,
    ids: Annotated[Path | None, typer.Option(rich_help_panel=INPUT)] = None,
    embeddings: Annotated[str | None, typer.Option(rich_help_panel=INPUT)] = None,
    items: Annotated[str | None, typer.Option(rich_help_panel=INPUT)] = None,
    model: str = "composed",
    seeds: Annotated[int, typer.Option(min=1, max=1000)] = 1,
    seed: int = 0,
    cold_items: Annotated[float, typer.Option(min=0, max=0.5)] = 0.0,
    report: Path | None = None,
    log: Log = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train a model that recommends each user's next item, and test it on the last one.

    Several models, or several seeds, give a comparison with paired differences.

    Options of one model: semid retrieve --model parallel --help

    Example: semid retrieve logs.parquet --ids ids.parquet -o retriever/

    Example: semid retrieve logs.parquet --ids ids.parquet --model all --seeds 3 -o comparison/

    Args:
        output: Folder for the model, or for the comparison.
        ids: Semantic IDs of the items, from 'semid encode' or 'semid unique'.
        embeddings: Embeddings of the items, for text-knn and --text.
        items: Table of items: names the rows of an .npy, and its column 'title' shows in --report.
        model: composed, parallel, generative, sasrec, popularity, text-knn or tiger; several with
            commas; all leaves out tiger, which takes hours.
        seeds: Number of seeds, from 0; more than one gives a comparison.
        seed: Seed of the initial weights and of the order of histories.
        cold_items: Share of the items that is held out of training, to test new items.
        report: HTML page with curves, slices and examples.
        device: Device.
    """
    from semid.recommenders.retrieval import MODELS
    from semid.runs import partial_path
    from semid.training.distributed import is_main

    if not 0 <= cold_items <= 0.5:  # NaN fails too, which older releases of click let pass
        raise UsageError(f"--cold-items is {cold_items}; give a share from 0 to 0.5")
    # What needs no torch is checked before it is imported. The output is claimed before anything is
    # read, so that a typo costs no minutes.
    reads = (logs, ids, embeddings, items)
    check_device(device)
    models = () if model == "all" else split_list("model", model) or ("composed",)
    for name in models:
        MODELS.check(name, flag="--model")
    check_keys("retrieve", settings, *models)
    if are_checked(context, "retrieve", settings):
        check_inputs(*reads)
        columns.check(logs)
    compares = len(models) != 1 or seeds > 1
    if compares:
        _check_comparison(context, output)
    if is_main():  # under torchrun the first process alone writes and prints
        state = None if compares else Path(partial_path(output))
        hold_output(output, overwrite=overwrite or (compares and resume), inputs=reads, state=state)
        if report is not None:
            hold_output(report, overwrite=overwrite, inputs=(*reads, output))
    from semid.recommenders.retrieval.data import prepare_retrieval_data

    models = models or _models(ids, embeddings)
    run = {**_run_options(context, settings, models, embeddings, device), "ids": None}
    if ids is not None:
        run["ids"] = semid.SemanticIds.read(ids)
    data = prepare_retrieval_data(
        logs,
        ids=run["ids"],
        embeddings=embeddings,
        items=items if embeddings is not None else None,
        cold_items=cold_items,
        **vars(columns),
    )
    if compares:
        run |= {"models": models, "seeds": seeds}
        runs, retrievers = _compare(data, output, run, resume, quiet, loads=report is not None)
    else:
        run |= {"model": models[0], "seed": seed, "resume": resume}
        shown = {"model": models[0], "logs": logs, "ids": ids, "seed": seed}
        runs, retrievers = _train(data, output, run, shown, log, overwrite, quiet)
    if report is not None and is_main():
        from semid.report.retrieval import write_retrieval_page
        from semid.reproduce.retrieval_grid import page_entries

        entries = page_entries(runs, retrievers)
        write_retrieval_page(report, entries, data, items=items, overwrite=overwrite)
        say(f"report: {report}")


def _check_comparison(context: typer.Context, output: Path) -> None:
    """Refuse what does not go with several models or seeds."""
    from semid.training.distributed import one_process

    if not one_process():
        raise UsageError(
            "several models or seeds run one after another in one process: leave out torchrun, or "
            "give one --model and one --seed"
        )
    if uri := staging.placed(output):
        staging.refuse(uri)
    refuse_unused(context, ["seed"], "a comparison takes the seeds from 0")
    refuse_unused(context, ["log"], "a comparison has several runs and results of its own")


def _run_options(
    context: typer.Context,
    settings: dict[str, Any],
    models: Sequence[str],
    embeddings: str | None,
    device: str,
) -> dict[str, Any]:
    """Return options of the models, of training and the device, checked before files are read."""
    from semid.recommenders.ranking.training import training_device
    from semid.recommenders.retrieval import MODELS
    from semid.recommenders.retrieval.training import TRAINING
    from semid.training.options import TrainOptions

    training_device(device)
    check_keys("retrieve", settings, *models)
    kinds = [MODELS.load(name, flag="--model") for name in models]
    options, training = options_under(settings, "options"), options_under(settings, "training")
    reads_vectors = options.get("text") or any("vectors" in kind.needs for kind in kinds)
    if embeddings is not None and not reads_vectors:
        refuse_unused(context, ["embeddings"], "text-knn and --text alone read it")
    for kind in kinds:
        fields = kind.options.of(None).to_dict()
        kind.options.of({key: value for key, value in options.items() if key in fields})
    conduct = TrainOptions.of(training, defaults=TRAINING)
    return {"options": options, "training": conduct, "device": device}


def _compare(
    data: Any, output: Path, run: dict[str, Any], resume: bool, quiet: bool, *, loads: bool
) -> tuple[list[Any], list[Any]]:
    """Train all models with all seeds; return the runs, and with ``loads`` the models."""
    from semid.output import atomic_folder
    from semid.reproduce.retrieval_grid import (
        COMPARISON_FILES,
        compare_retrievers,
        load_models,
        write_tables,
    )

    # A comparison is a folder that grows; --overwrite begins it anew, once all inputs were read.
    if output.exists() and not resume:
        with atomic_folder(output, overwrite=True, grows=COMPARISON_FILES):
            pass
    with make_progress(quiet=quiet) as progress:
        runs = compare_retrievers(data, output, progress=progress, **run)
        retrievers = load_models(output, runs) if loads else []
    say(write_tables(output, runs))
    say(f"results: {output}")
    return runs, retrievers


def _train(
    data: Any, output: Path, run: dict[str, Any], shown: dict[str, Any], log: str | None,
    overwrite: bool, quiet: bool,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """Train one model and save it; return its run and itself, in the first process."""
    from semid.recommenders.retrieval import MODELS
    from semid.reproduce.retrieval_grid import RetrievalRun
    from semid.runs import partial_path, remove_state_folder
    from semid.training.distributed import is_main

    kind, state = MODELS.load(run["model"]), Path(partial_path(output))
    if "codes" not in kind.needs:
        run["ids"] = None
    with open_log(log) as logger, make_progress(quiet=quiet or not is_main()) as progress:
        if logger is not None:
            options = {"options": kind.options.of(run["options"]), "training": run["training"]}
            options = {name: each.to_dict() for name, each in options.items()}
            logger.parameters = {**shown, "protocol": data.protocol, **options}
        with name_checkpoint(state):
            extra = {"checkpoint": state, "progress": progress, "logger": logger}
            retriever = semid.train_retriever(data, **run, **extra)
        if not is_main():
            return [], []
        retriever.save(output, overwrite=overwrite)
        remove_state_folder(state)
        if logger is not None:
            test = retriever.results["test"].metrics
            numbers = {f"test_{name}": estimate.value for name, estimate in test.items()}
            verdict = f"recall@10 {numbers['test_recall@10']:.4f}, {data.protocol}"
            logger.finish(verdict, numbers, output)
    summary = RetrievalRun.of(retriever)
    _say_results(summary.results)
    say(f"model: {output}")
    return [summary], [retriever]


def _models(ids: Path | None, embeddings: str | None) -> tuple[str, ...]:
    """Return all models that the inputs allow, and say which are left out."""
    from semid.recommenders.retrieval import MODELS

    present = {"codes": ids is not None, "vectors": embeddings is not None}
    names = []
    for name in MODELS:
        missing = [need for need in MODELS.load(name).needs if not present[need]]
        if name != "tiger" and not missing:
            names.append(name)
        elif missing:
            flags = {"codes": "--ids", "vectors": "--embeddings"}
            say(f"without {name}: it needs {flags[missing[0]]}", err=True)
    return tuple(names)


def _say_results(results: Any) -> None:
    """Print the metrics of one model."""
    say(f"protocol: {results.protocol}")
    for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@50", "mrr"):
        estimate = results.metrics[name]
        interval = ""
        if estimate.low is not None:
            interval = f" [{estimate.low:.4f}, {estimate.high:.4f}]"
        say(f"{name:10} {estimate.value:.4f}{interval}")
    for name, part in results.slices.items():
        say(f"  recall@10 {part.metrics['recall@10'].value:.4f}  {name} ({part.users:,} users)")
    say(f"items of the catalogue in any first 10: {100 * results.coverage:.1f} %")


def recommend(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of 'semid retrieve'.")],
    output: OutputPath,
    columns: InteractionColumns,
    histories: Annotated[str | None, typer.Option(rich_help_panel=INPUT)] = None,
    k: Annotated[int, typer.Option("--k", min=1, max=100_000)] = 10,
    include_history: bool = False,
    within_ids: Annotated[str, typer.Option(metavar="popularity|embedding|random")] = "popularity",
    cold_slots: Annotated[int, typer.Option(min=0, max=100_000)] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Recommend the next items to users.

    Writes a Parquet file with the columns user_id, items and scores, best first.

    Example: semid recommend retriever/ --histories users.parquet --k 20 -o recommendations.parquet

    Args:
        output: Parquet file.
        histories: Interactions of the users, a row each or lists; default: the training log's.
        k: Items per user.
        include_history: Items of the user's history may be recommended.
        within_ids: Order of items that share an id: by training interactions, by the embedding's
            distance to the last item (models that read embeddings), or at random.
        cold_slots: Places at the end for items that training never saw.
    """
    from semid.artefact import read_config
    from semid.catalogue.prefixes import BUCKET_ORDERS

    # What needs no torch is checked before it is imported.
    check_choice("--within-ids", within_ids, BUCKET_ORDERS)
    hold_output(output, overwrite=overwrite, inputs=(model, histories))
    if (kind := read_config(model)["kind"]) != "retriever":
        raise UsageError(f"'{model}' holds a {kind}; give a folder that 'semid retrieve' wrote")
    if histories is None:
        names = [name for name in columns.NAMES if is_given(context, name)]
        refuse_unused(context, names, "no --histories are given")
    else:
        check_inputs(histories)
        columns.check(histories)
    from semid.recommenders.retrieval.recommend import write_recommendations

    retriever = semid.load(model)
    log = None if histories is None else columns.read(context, histories)
    with make_progress(quiet=quiet) as progress:
        users = write_recommendations(
            retriever,
            output,
            log,
            k=k,
            exclude_history=not include_history,
            within_ids=within_ids,
            cold_slots=cold_slots,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"{users:,} users: {output}")
