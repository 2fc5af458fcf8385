"""``semid rank`` trains one ranking model with Semantic IDs, ``semid rank-grid`` compares many."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import semid
from semid.cli import shared as cli
from semid.cli.flags import are_checked, check_keys, known_flags, split_list
from semid.errors import check_choice

PARTS = ("validation", "test", "cold")
Logs = Annotated[
    str,
    typer.Argument(metavar="LOGS", help="Interactions: Parquet file, folder, quoted glob, or CSV."),
]


MODEL, TRAINING = typer.Option(rich_help_panel="Model"), typer.Option(rich_help_panel="Training")


@dataclass(frozen=True)
class RankSource:
    """Options of both commands: the items, the network, and the device.

    Attributes:
        items: Table of items with brand, categories and the like; it also names the rows of an
            .npy.
        id_column: Item ids in --items; default item_id.
        hidden: Widths of the perceptron's layers.
        dropout: Dropout in the perceptron.
        device: Device.
    """

    PANEL = cli.INPUT

    items: str | None = None
    id_column: str | None = None
    hidden: Annotated[str, MODEL] = "400,400"
    dropout: Annotated[float, typer.Option(min=0, max=1, rich_help_panel="Model")] = 0.2
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", rich_help_panel="Training")] = (
        "auto"
    )

    def check(self, command: str, settings: dict[str, Any]) -> None:
        """Refuse what is wrong without torch."""
        cli.check_device(self.device)
        check_keys(command, settings)
        split_list("hidden", self.hidden, "ints")

    def config(self, settings: dict[str, Any], fusion: bool) -> Any:
        """Return the configuration of the ranker."""
        model_options = {
            "hidden": split_list("hidden", self.hidden, "ints"),
            "dropout": self.dropout,
        }
        values = options_under(settings, "config")
        options = {**model_options, **options_under(values, "options")}
        # What lies below `options.` belongs to the network, not to the ranker itself.
        values = {key: value for key, value in values.items() if not key.startswith("options.")}
        return semid.RankerConfig.of({**values, "fusion": fusion, "options": options})

    def read(
        self, logs: str, columns: cli.InteractionColumns, config: Any, *, stream: bool = False
    ) -> Any:
        """Read the interactions and the items."""
        names: dict[str, Any] = {**vars(columns), "id_column": self.id_column}
        if not stream:
            return semid.prepare_ranking_data(logs, items=self.items, config=config, **names)
        # A stream takes rows as they come and keeps no order of a user's interactions.
        for name in ("time_column", "ties", "ties_seed"):
            del names[name]
        return semid.RankingStream.open(logs, items=self.items, config=config, **names)


def rank(
    context: typer.Context,
    logs: Logs,
    output: cli.OutputPath,
    settings: Annotated[dict[str, Any], "rank"],
    source: RankSource,
    columns: cli.InteractionColumns,
    ids: Path | None = None,
    fusion: Annotated[str, typer.Option(metavar="on|off", rich_help_panel="Model")] = "off",
    seed: Annotated[int, typer.Option(rich_help_panel="Training")] = 0,
    stream: bool = False,
    analyze: Path | None = None,
    no_baseline: bool = False,
    log: cli.Log = None,
    overwrite: cli.Overwrite = False,
    resume: cli.Resume = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train a ranking model and measure it; 'semid rank-grid' compares many.

    Example: semid rank logs.parquet --items items.parquet --ids ids.parquet -o ranker/

    Args:
        output: Folder for the model.
        ids: Semantic IDs of the items, from 'semid encode'.
        fusion: Mixture-of-Codes fusion.
        seed: Seed of the initial weights and of the order of rows.
        stream: Read the log from disk in each epoch; needs a label.
        analyze: JSON file for the metrics of the code embeddings (MoC).
        no_baseline: With --ids: train no second model, without codes, to compare with.
    """
    from semid.recommenders.ranking import MODELS
    from semid.runs import partial_path
    from semid.training.distributed import is_main

    # What needs no torch is checked before it is imported.
    reads = (logs, source.items, ids)
    source.check("rank", settings)
    MODELS.check(settings.get("config.model", "deepfm"), flag="--model (model=)")
    check_choice("--fusion", fusion, ("on", "off"))
    _refuse_unused(context, settings, source, ids=ids, stream=stream, fusion=fusion)
    data_config = semid.RankingDataConfig.of(options_under(settings, "data"))
    if are_checked(context, "rank", settings):
        cli.check_inputs(*reads)
        columns.check(logs)
    if is_main():  # under torchrun the first process alone writes and prints
        cli.hold_output(output, overwrite=overwrite, inputs=reads, state=partial_path(output))
        if analyze is not None:
            cli.hold_output(analyze, overwrite=overwrite, inputs=reads)
    from semid.recommenders.ranking.training import rank_options, training_device

    training_device(source.device)
    run = {
        "config": source.config(settings, fusion == "on"),
        "training": rank_options(options_under(settings, "training")),
        "device": source.device,
        "seed": seed,
        "resume": resume,
    }
    code_settings = {**options_under(settings, "features"), "seed": seed}
    semid.CodeFeatures.of(code_settings)  # checked before the log is read
    data = source.read(logs, columns, data_config, stream=stream)
    codes: dict[str, Any] = {}
    if ids is not None:
        # Residual codes have a table per level, parallel ones a table per codebook.
        semantic_ids = semid.SemanticIds.read(ids)
        mode = "levels" if semantic_ids.info.hierarchical else "parallel"
        features = semid.CodeFeatures.of({"mode": mode, **code_settings})
        codes = {"ids": semantic_ids, "features": features}
    shown = {"logs": logs, "ids": ids, "seed": seed, "protocol": data.protocol}
    compared = bool(codes) and not no_baseline
    ranker = _train(data, output, run, codes, shown, log, compared, overwrite, quiet)
    if not is_main():
        return
    if analyze is not None:
        _write_analysis(analyze, ranker, data, overwrite=overwrite)
    _say_figures(ranker.report)
    cli.say(f"model: {output}")


def _train(
    data: Any, output: Path, run: dict[str, Any], codes: dict[str, Any], shown: dict[str, Any],
    log: str | None, compared: bool, overwrite: bool, quiet: bool,
) -> Any:  # fmt: skip
    """Train a ranker, and if it is compared one without codes; save and return it."""
    from semid.recommenders.ranking.training import compare_with_baseline
    from semid.runs import partial_path, remove_state_folder
    from semid.training.distributed import is_main

    state = Path(partial_path(output))
    with cli.open_log(log) as logger:
        if logger is not None:
            options = {name: run[name].to_dict() for name in ("config", "training")}
            used = {"features": vars(codes["features"])} if codes else {}
            logger.parameters = {**shown, **options, **used}
        with (
            cli.name_checkpoint(state),
            cli.make_progress(quiet=quiet or not is_main()) as progress,
        ):
            run["progress"] = progress
            ranker = semid.train_ranker(data, checkpoint=state, logger=logger, **codes, **run)
            if compared:
                # Its own checkpoint: a run that stops after it need not train it again.
                baseline = semid.train_ranker(data, checkpoint=state / "baseline", **run)
                ranker.report["baseline"] = compare_with_baseline(ranker, baseline, data)
        if is_main():
            ranker.save(output, overwrite=overwrite)
            remove_state_folder(state)
            if logger is not None:
                test = ranker.report["test"]
                numbers = {f"test_{k}": v for k, v in test.items() if isinstance(v, int | float)}
                logger.finish(f"test: {_cells(test)}", numbers, output)
    return ranker


def _write_analysis(path: Path, ranker: Any, data: Any, *, overwrite: bool) -> None:
    """Write the metrics of the code embeddings."""
    from semid.output import atomic_file
    from semid.recommenders.ranking.analysis import analyze_codes

    figures = analyze_codes(ranker.network, data.parts["test"])
    with atomic_file(path, overwrite=overwrite) as work:
        work.write_text(json.dumps(figures.to_dict()) + "\n", encoding="utf8")


def _say_figures(report: dict[str, Any]) -> None:
    """Print the metrics of each part, and below each that of the model without codes."""
    cli.say(f"protocol: {report['protocol']}")
    baseline = report.get("baseline", {"slices": {}})
    parts = [(part, report[part], baseline.get(part)) for part in PARTS if part in report]
    for name, figures in report["slices"].items():
        parts.append((f"  test, {name} items", figures, baseline["slices"].get(name)))
    for name, figures, without in parts:
        cli.say(f"{name} ({figures['rows']:,} rows): {_cells(figures)}")
        if without is not None:
            indent = " " * (len(name) - len(name.lstrip()) + 2)
            cli.say(f"{indent}without codes: {_cells({**without, 'popularity_auc': None})}")
    if "baseline" in report and None not in (difference := baseline["auc_difference"]).values():
        value, margin = difference["value"], 1.96 * difference["error"]
        cli.say(
            f"codes - none: test AUC {value:+.4f}, {value - margin:+.4f} to {value + margin:+.4f} "
            "(95 % over test rows, one seed; 'semid rank-grid' compares several)"
        )


def rank_grid(
    context: typer.Context,
    logs: Logs,
    output: cli.OutputPath,
    settings: Annotated[dict[str, Any], "rank-grid"],
    source: RankSource,
    columns: cli.InteractionColumns,
    embeddings: str | None = None,
    ids: Path | None = None,
    methods: str = "none,me,rqvae,moc",
    scales: str = "1,2,3,7",
    models: str = "all",
    fusion: str = "off",
    seeds: Annotated[int, typer.Option(min=1, max=10_000)] = 5,
    codebook_size: Annotated[int, typer.Option(min=2, max=2**32)] = 256,
    embedding_column: Annotated[str | None, typer.Option(rich_help_panel=cli.INPUT)] = None,
    on_invalid: Annotated[
        str, typer.Option(metavar="error|skip", rich_help_panel=cli.INPUT)
    ] = "error",
    overwrite: cli.Overwrite = False,
    resume: cli.Resume = False,
    quiet: cli.Quiet = False,
) -> None:
    """Compare ranking models by method, number of codes and seed, fitting the tokenizers needed.

    Example: semid rank-grid logs.parquet --embeddings items.parquet --methods none,moc -o grid/

    Example: semid rank-grid logs.parquet --ids ids.parquet --methods none,ids -o grid/

    Args:
        output: Folder for the results.
        embeddings: Item embeddings, for the tokenizers that the grid needs.
        ids: Semantic IDs of the items, for the method ids.
        methods: none, ids, random, shuffled, widened, me, moc, or tokenizers.
        scales: Codes per item.
        models: Ranking models, or all.
        fusion: Mixture-of-Codes fusion: on, off or both.
        seeds: Number of seeds, from 0.
        codebook_size: Codewords per level.
        embedding_column: Column of the vectors; default 'embedding', else the only column of float
            lists.
        on_invalid: Rows with null, NaN or inf: 'error' refuses them, 'skip' leaves them out.
    """
    from semid.output import atomic_file, atomic_folder
    from semid.recommenders.ranking import MODELS
    from semid.reproduce import GRID_METHODS, check_grid_inputs

    # What needs no torch is checked before it is imported.
    source.check("rank-grid", settings)
    switches, numbers = _switches(fusion), split_list("scales", scales, "ints")
    _refuse_unused(context, settings, source, fusion="on" if True in switches else "off")
    chosen = tuple(MODELS) if models == "all" else split_list("models", models)
    for name in chosen:
        MODELS.check(name, flag="--models (models=)")
    method_names = split_list("methods", methods)
    for name in method_names:
        check_choice("--methods (methods=)", name, GRID_METHODS)
    check_grid_inputs(method_names, ids=ids is not None, embeddings=embeddings is not None)
    if embeddings is None:
        needless = ["scales", "codebook_size", "embedding_column", "on_invalid"]
        cli.refuse_unused(context, needless, "without --embeddings no tokenizer is fitted")
    inputs = (logs, source.items, embeddings, ids)
    data_config = semid.RankingDataConfig.of(options_under(settings, "data"))
    if are_checked(context, "rank-grid", settings):
        cli.check_inputs(*inputs)
        columns.check(logs)
    from semid.recommenders.ranking.training import rank_options, training_device
    from semid.reproduce.ranking_grid import GRID_FILES, Grid, grid_tables, run_grid

    training_device(source.device)
    grid = Grid(
        methods=method_names,
        scales=numbers,
        models=chosen,
        fusion=switches,
        seeds=seeds,
        codebook_size=codebook_size,
        config=source.config(settings, switches[0]),
        training=rank_options(options_under(settings, "training")),
    )
    # A grid that is resumed must be one that semid wrote, as one that is replaced.
    cli.hold_output(output, overwrite=overwrite or resume, inputs=inputs)
    opened = None
    if embeddings is not None:
        # Rows of an .npy have no ids: they are those of the table of items.
        named = Path(embeddings).suffix == ".npy"
        opened = cli.SourceOptions(
            ids=source.items if named else None,
            embedding_column=embedding_column,
            id_column=None if named else source.id_column,
            on_invalid=on_invalid,
        ).open(embeddings)
    data = source.read(logs, columns, data_config)
    semantic_ids = None if ids is None else semid.SemanticIds.read(ids)
    if output.exists() and not resume:
        # A replaced grid starts from an empty folder, which gets one line per finished run. What is
        # there goes once all inputs were read.
        with atomic_folder(output, overwrite=True, grows=GRID_FILES):
            pass
    with cli.make_progress(quiet=quiet) as progress:
        rows = run_grid(
            grid,
            data,
            output,
            embeddings=opened,
            ids=semantic_ids,
            device=source.device,
            progress=progress,
        )
    tables = grid_tables(rows)
    with atomic_file(output / "tables.md", mark=False) as work:
        work.write_text(tables + "\n", encoding="utf8")
    cli.say(tables)
    cli.say(f"results: {output}")


def _refuse_unused(
    context: typer.Context,
    settings: dict[str, Any],
    source: RankSource,
    *,
    fusion: str,
    ids: Path | None = None,
    stream: bool = False,
) -> None:
    """Refuse options that change nothing beside the others that were given."""
    is_grid = context.command.name == "rank-grid"
    if not is_grid and ids is None:
        code_flags = [key for key in settings if key.startswith("features.")]
        names = {flag.key: flag.name for flag in known_flags("rank")}
        codes = [names[key] or "settings" for key in code_flags]
        cli.refuse_unused(
            context, [*codes, "analyze", "no_baseline"], "there are no codes without --ids"
        )
    if source.items is None:
        cli.refuse_unused(context, ["id_column"], "it names a column of --items")
    split = settings.get("data.split", "random")
    if split == "leave-last-out":
        cli.refuse_unused(context, ["fractions"], "leave-last-out tests each user's last item")
    if fusion == "off":
        cli.refuse_unused(context, ["fusion_rank"], "it goes with --fusion on")
    if stream:
        cli.refuse_unused(context, ["time_column", "ties", "ties_seed"], "--stream reads no order")
    elif settings.get("data.history", 0) == 0 and split == "random":
        cli.refuse_unused(
            context,
            ["time_column", "ties", "ties_seed"],
            "an order serves --history and the other values of --split",
        )


def options_under(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings below a dotted name."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): value for k, value in settings.items() if k.startswith(prefix)}


def _cells(figures: dict[str, Any]) -> str:
    columns = {
        "AUC": figures["auc"],
        "popularity alone": figures["popularity_auc"],
        "log loss": figures["log_loss"],
        "AUC by user": figures["user_auc"],
    }
    return ", ".join(f"{k} {v:.4f}" for k, v in columns.items() if v is not None) or "one label"


def _switches(text: str) -> tuple[bool, ...]:
    names = split_list("fusion", text) or ("off",)
    for name in names:
        check_choice("--fusion", name, ("on", "off"))
    return tuple(name == "on" for name in dict.fromkeys(names))
