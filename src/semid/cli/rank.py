"""``semid rank``: train and measure ranking models with Semantic IDs, one or a grid of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from semid.cli.options import (
    EmbeddingColumn,
    ItemColumn,
    OnInvalid,
    Overwrite,
    Quiet,
    Resume,
    TimeColumn,
    UserColumn,
    hold_output,
    refuse_unused,
    say,
)

__all__ = ["rank"]


def rank(
    context: typer.Context,
    logs: Annotated[
        str,
        typer.Argument(
            metavar="LOGS", help="Interactions: Parquet file, folder, quoted glob, or CSV."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the model, or for the grid's results."),
    ],
    items: Annotated[
        str | None,
        typer.Option(help="Table of items: brand, categories; names the rows of an .npy too."),
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Semantic IDs of the items, from 'semid encode'.")
    ] = None,
    model: Annotated[str, typer.Option(help="deepfm, deepim, autoint or dcnv2.")] = "deepfm",
    label: Annotated[
        str,
        typer.Option(help="'COLUMN>=NUMBER', 'sampled(uniform,k)' or 'sampled(popularity,k)'."),
    ] = "sampled(uniform,1)",
    split: Annotated[str, typer.Option(help="random, leave-last-out or time.")] = "random",
    fractions: Annotated[
        str, typer.Option(help="Shares of train, validation and test.")
    ] = "0.8,0.1,0.1",
    cold_items: Annotated[
        float, typer.Option(help="Share of the items that training never sees.")
    ] = 0.0,
    min_count: Annotated[
        int, typer.Option(help="Training rows below which a user or item shares the unknown row.")
    ] = 1,
    history: Annotated[int, typer.Option(help="Items of a user's history the model sees.")] = 0,
    categorical: Annotated[
        str | None, typer.Option(help="Columns of the log that are categories, with commas.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Columns of the log that are numbers, with commas.")
    ] = None,
    item_columns: Annotated[
        str | None, typer.Option(help="Item columns with one value; default brand.")
    ] = None,
    multi_columns: Annotated[
        str | None, typer.Option(help="Item columns with several; default categories.")
    ] = None,
    code_mode: Annotated[
        str | None,
        typer.Option(
            help="levels, parallel, multi, prefix or ngram; default by the kind of codes."
        ),
    ] = None,
    scale: Annotated[int | None, typer.Option(help="Codes to use; default all.")] = None,
    control: Annotated[
        str, typer.Option(help="none, random, shuffled or widened, to compare with.")
    ] = "none",
    item_id: Annotated[
        bool, typer.Option("--item-id/--no-item-id", help="Keep the item id beside the codes.")
    ] = True,
    fusion: Annotated[
        str, typer.Option(help="Mixture-of-Codes fusion: on or off; a grid takes 'on,off'.")
    ] = "off",
    fusion_rank: Annotated[int, typer.Option(help="Of the fusion's bottleneck.")] = 16,
    width: Annotated[int, typer.Option(help="Of an embedding.")] = 16,
    hidden: Annotated[str, typer.Option(help="Widths of the perceptron.")] = "400,400",
    dropout: Annotated[float, typer.Option(help="In the perceptron.")] = 0.2,
    epochs: Annotated[int | None, typer.Option(help="Most passes; default 30.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step; default 8012.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam; default 0.001.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without gain after which it stops; default 3.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    seed: Annotated[int, typer.Option(help="Start of the weights and order of the rows.")] = 0,
    data_seed: Annotated[int, typer.Option(help="Split and negatives.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the log from disk every epoch; needs a label.")
    ] = False,
    analyze: Annotated[
        Path | None, typer.Option(help="JSON file for MoC's metrics of the code embeddings.")
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="Item embeddings: runs a grid, fitting the tokenizers it needs."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Grid: none, random, shuffled, widened, me, moc, or tokenizers.")
    ] = "none,me,rqvae,moc",
    scales: Annotated[str, typer.Option(help="Grid: codes an item.")] = "1,2,3,7",
    models: Annotated[str, typer.Option(help="Grid: models, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="Grid: seeds 0 to this number.")] = 5,
    codebook_size: Annotated[int, typer.Option(help="Grid: codewords a level.")] = 256,
    user_column: UserColumn = "user_id",
    item_column: ItemColumn = "item_id",
    time_column: TimeColumn = None,
    id_column: Annotated[
        str | None, typer.Option(help="Item ids in --items; default item_id.")
    ] = None,
    embedding_column: EmbeddingColumn = None,
    on_invalid: OnInvalid = "error",
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train a ranking model and measure it; with --embeddings, compare many.

    Example: semid rank logs.parquet --items items.parquet --ids ids.parquet -o ranker/
    """
    from semid.recommenders.ranking.data import RankingDataConfig
    from semid.recommenders.ranking.features import CodeFeatures
    from semid.recommenders.ranking.network import RankerConfig
    from semid.recommenders.ranking.training import rank_options, training_device
    from semid.tokenizers.encoding import partial_folder

    _refuse_unused(context)
    training_device(device)
    options = RankingDataConfig(
        label=label,
        split=split,
        fractions=_three(fractions),
        cold_items=cold_items,
        min_count=min_count,
        history=history,
        categorical=_names(categorical) or (),
        dense=_names(dense) or (),
        item_columns=_names(item_columns),
        multi_columns=_names(multi_columns),
        seed=data_seed,
    )
    switches = _switches(fusion)
    architecture = RankerConfig(
        model=model,
        width=width,
        fusion=switches[0],
        fusion_rank=fusion_rank,
        options={"hidden": _numbers("--hidden", hidden), "dropout": dropout},
    )
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "patience": patience,
        "precision": precision,
    }
    training = rank_options({name: value for name, value in given.items() if value is not None})
    columns: dict[str, Any] = {
        "user_column": user_column,
        "item_column": item_column,
        "id_column": id_column,
    }
    reads = (logs, items, ids)
    if embeddings is not None:
        from semid.output import atomic_folder
        from semid.recommenders.ranking.models import MODELS
        from semid.reproduce.ranking_grid import GRID_FILES, Grid

        grid = Grid(
            methods=_names(methods) or (),
            scales=_numbers("--scales", scales),
            models=tuple(sorted(MODELS)) if models == "all" else _names(models) or (),
            fusion=switches,
            seeds=seeds,
            codebook_size=codebook_size,
            config=architecture,
            training=training,
        )
        # A grid that is resumed must be one that semid wrote, as one that is replaced.
        inputs = (*reads, embeddings)
        hold_output(output, overwrite=overwrite or resume, inputs=inputs)
        if output.exists() and not resume:
            with atomic_folder(output, overwrite=True, grows=GRID_FILES):
                pass
        _grid(
            grid,
            (logs, items, options, {**columns, "time_column": time_column}),
            (embeddings, embedding_column, on_invalid),
            output,
            device=device,
            quiet=quiet,
        )
        return
    hold_output(output, overwrite=overwrite, inputs=reads, state=partial_folder(output))
    if analyze is not None:
        hold_output(analyze, overwrite=overwrite, inputs=reads)
    features = {
        "mode": code_mode,
        "scale": scale,
        "control": control,
        "item_id": item_id,
        "seed": seed,
    }
    CodeFeatures.of({**features, "mode": code_mode or "levels"})  # checked before the log is read
    _single(
        (logs, items, options, columns, time_column, stream),
        (ids, features),
        {"config": architecture, "training": training, "seed": seed, "device": device},
        output,
        analyze=analyze,
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
    )


def _refuse_unused(context: typer.Context) -> None:
    """Refuse options that change nothing beside the others that were given."""
    parameters = context.params
    if parameters["embeddings"] is None:
        unused = ["methods", "scales", "models", "seeds", "codebook_size"]
        unused += ["embedding_column", "on_invalid"]
        refuse_unused(context, unused, "only a grid uses it; give --embeddings to run one")
        if parameters["ids"] is None:
            codes = ["code_mode", "scale", "control", "analyze", "item_id"]
            refuse_unused(context, codes, "there are no codes without --ids")
    else:
        unused = ["ids", "model", "code_mode", "scale", "control", "item_id", "seed"]
        unused += ["analyze", "stream"]
        refuse_unused(
            context,
            unused,
            "with --embeddings a grid runs, which has --models, --methods, --scales and --seeds",
        )
    if parameters["items"] is None:
        refuse_unused(context, ["id_column"], "it names a column of --items")
    if parameters["split"] == "leave-last-out":
        refuse_unused(context, ["fractions"], "leave-last-out tests each user's last item")
    if parameters["fusion"] == "off":
        refuse_unused(context, ["fusion_rank"], "it goes with --fusion on")
    if parameters["stream"]:
        refuse_unused(context, ["time_column"], "--stream reads no order")
    elif parameters["history"] == 0 and parameters["split"] == "random":
        refuse_unused(
            context, ["time_column"], "an order serves --history and the other values of --split"
        )


def _single(
    source: tuple[str, str | None, Any, dict[str, Any], str | None, bool],
    codes: tuple[Path | None, dict[str, Any]],
    run: dict[str, Any],
    output: Path,
    *,
    analyze: Path | None,
    overwrite: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Train one model, save it and say how good it is."""
    from semid.codes import SemanticIds
    from semid.output import atomic_file
    from semid.progress import make_progress
    from semid.recommenders.ranking.analysis import analyze_codes
    from semid.recommenders.ranking.data import prepare_ranking_data
    from semid.recommenders.ranking.features import CodeFeatures
    from semid.recommenders.ranking.stream import RankingStream
    from semid.recommenders.ranking.training import train_ranker
    from semid.runs import remove_state_folder
    from semid.tokenizers.encoding import partial_folder

    logs, items, options, columns, time_column, stream = source
    data: Any
    if stream:
        data = RankingStream.open(logs, items=items, config=options, **columns)
    else:
        data = prepare_ranking_data(
            logs, items=items, config=options, time_column=time_column, **columns
        )
    file, settings = codes
    ids = features = None
    if file is not None:
        ids = SemanticIds.read(file)
        mode = settings["mode"] or ("levels" if ids.info.hierarchical else "parallel")
        features = CodeFeatures(**{**settings, "mode": mode})
    state = partial_folder(output)
    try:
        with make_progress(quiet=quiet) as progress:
            ranker = train_ranker(
                data,
                ids=ids,
                features=features,
                checkpoint=state,
                resume=resume,
                progress=progress,
                **run,
            )
    except KeyboardInterrupt:
        if (state / "state.safetensors").exists():
            say(f"stopped; '{state}' keeps the run: repeat the command with --resume", err=True)
        raise
    ranker.save(output, overwrite=overwrite)
    remove_state_folder(state)
    if analyze is not None:
        figures = analyze_codes(ranker.network, data.parts["test"])
        with atomic_file(analyze, overwrite=overwrite) as work:
            work.write_text(json.dumps(figures.to_dict()) + "\n", encoding="utf8")
    say(f"protocol: {ranker.report['protocol']}")
    for part in ("validation", "test", "cold"):
        if part in ranker.report:
            say(_figures(part, ranker.report[part]))
    for name, figures in ranker.report["slices"].items():
        say(_figures(f"  test, {name} items", figures))
    say(f"model: {output}")


def _grid(
    grid: Any,
    source: tuple[str, str | None, Any, dict[str, Any]],
    vectors: tuple[str, str | None, str],
    output: Path,
    *,
    device: str,
    quiet: bool,
) -> None:
    """Run what is missing of a grid and print its tables."""
    from semid.cli.options import open_source
    from semid.output import atomic_file
    from semid.progress import make_progress
    from semid.recommenders.ranking.data import prepare_ranking_data
    from semid.reproduce.grid_tables import grid_tables
    from semid.reproduce.ranking_grid import run_grid

    logs, items, options, columns = source
    path, column, on_invalid = vectors
    named = Path(path).suffix == ".npy"
    embeddings = open_source(
        path,
        ids=items if named else None,
        embedding_column=column,
        id_column=None if named else columns["id_column"],
        on_invalid=on_invalid,
    )
    data = prepare_ranking_data(logs, items=items, config=options, **columns)
    with make_progress(quiet=quiet) as progress:
        rows = run_grid(grid, data, output, embeddings=embeddings, device=device, progress=progress)
    tables = grid_tables(rows)
    with atomic_file(output / "tables.md", mark=False) as work:
        work.write_text(tables + "\n", encoding="utf8")
    say(tables)
    say(f"results: {output}")


def _figures(name: str, figures: dict[str, Any]) -> str:
    shown = {
        "AUC": figures["auc"],
        "popularity alone": figures["popularity_auc"],
        "log loss": figures["log_loss"],
        "AUC by user": figures["user_auc"],
    }
    cells = ", ".join(f"{k} {'-' if v is None else f'{v:.4f}'}" for k, v in shown.items())
    return f"{name} ({figures['rows']:,} rows): {cells}"


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    from semid.errors import UsageError

    try:
        return tuple(int(part) for part in _names(text) or ())
    except ValueError:
        raise UsageError(f"{flag} '{text}': give whole numbers with commas between") from None


def _three(text: str) -> tuple[float, float, float]:
    from semid.errors import UsageError
    from semid.recommenders.ranking.splits import check_fractions

    try:
        return check_fractions([float(part) for part in _names(text) or ()])
    except UsageError:
        raise
    except ValueError:
        raise UsageError(f"--fractions '{text}': give three shares, 0.8,0.1,0.1") from None


def _switches(text: str) -> tuple[bool, ...]:
    from semid.errors import check_choice

    names = _names(text) or ("off",)
    for name in names:
        check_choice("--fusion", name, ("on", "off"))
    return tuple(name == "on" for name in dict.fromkeys(names))
