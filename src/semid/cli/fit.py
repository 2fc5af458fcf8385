"""``semid fit``: learn codebooks and judge them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from semid.cli.options import (
    COLUMNS_OF_INTERACTIONS,
    CpusPerWorker,
    EmbeddingColumn,
    Engine,
    IdColumn,
    Ids,
    ItemColumn,
    OnInvalid,
    Overwrite,
    Quiet,
    RayAddress,
    Resume,
    Source,
    StoreBytes,
    Threads,
    TimeColumn,
    UserColumn,
    Workers,
    check_engine,
    hold_output,
    is_given,
    open_interactions,
    open_source,
    ray_options,
    refuse_unused,
)

__all__ = ["fit"]


def fit(
    context: typer.Context,
    embeddings: Source,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder or URI for the model; must not exist.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="rqkmeans (default), vqvae, rqvae, rqpvae, drqvae, mocvae or barq.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe's name or TOML file; flags given beside it win."),
    ] = None,
    levels: Annotated[int | None, typer.Option(help="Codes an item; default 3.")] = None,
    codebook_size: Annotated[
        int | None, typer.Option(help="Codewords a level; default 256.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same data: same codes; default 0.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize", help="Scale rows to unit length.")
    ] = None,
    center: Annotated[
        bool | None, typer.Option("--center", help="Subtract the training mean.")
    ] = None,
    beam_width: Annotated[
        int | None, typer.Option(help="Beam while encoding; default 1, greedy.")
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of items held out and judged; default 0.05.")
    ] = None,
    max_iter: Annotated[
        int | None, typer.Option(help="Maximum number of Lloyd iterations per level.")
    ] = None,
    tol: Annotated[
        float | None,
        typer.Option(help="Stop when an iteration lowers the error by less than this share."),
    ] = None,
    n_init: Annotated[
        int | None, typer.Option(help="Seedings per level; the best is used.")
    ] = None,
    sample_per_code: Annotated[
        int | None, typer.Option(help="Train on so many rows a codeword; default: all rows.")
    ] = None,
    full_pass: Annotated[
        bool | None,
        typer.Option(help="After a sample: one more iteration over all rows."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Most passes of training.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of Adam.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or constant.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without gain after which training stops.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    latent: Annotated[int | None, typer.Option(help="Width of the latent.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="mocvae, vqvae: ema or gradient codebooks.")
    ] = None,
    projection: Annotated[
        bool | None, typer.Option("--projection", help="mocvae: a linear map a codebook.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    log: Annotated[
        str | None,
        typer.Option(help="jsonl:PATH, tensorboard:FOLDER, mlflow or wandb: figures an epoch."),
    ] = None,
    interactions: Annotated[
        str | None, typer.Option(help="drqvae, barq: logs whose consecutive items are pairs.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="drqvae, barq: table of item_id, related_item_id.")
    ] = None,
    neighbors: Annotated[
        str | None,
        typer.Option(
            help="drqvae, barq: second embeddings, the nearest neighbors in which are pairs."
        ),
    ] = None,
    contrastive_weight: Annotated[
        float | None, typer.Option(help="drqvae: weight of the pairs; default 0.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="drqvae: of the contrastive loss; default 0.07.")
    ] = None,
    uniformity_weight: Annotated[
        float | None, typer.Option(help="drqvae: weight of the uniformity loss.")
    ] = None,
    behavior_weight: Annotated[
        float | None, typer.Option(help="barq: weight of behavior beside content; default 2.")
    ] = None,
    content_variance: Annotated[
        float | None,
        typer.Option(help="barq: share of the variance that is quantized; default 0.95."),
    ] = None,
    balance_strength: Annotated[
        float | None, typer.Option(help="barq: highest price that evens out usage; default 0.")
    ] = None,
    kl_weight: Annotated[float | None, typer.Option(help="drqvae: weight of a KL term.")] = None,
    user_column: UserColumn = "user_id",
    item_column: ItemColumn = "item_id",
    time_column: TimeColumn = None,
    engine: Engine = "local",
    workers: Workers = None,
    cpus_per_worker: CpusPerWorker = None,
    ray_address: RayAddress = None,
    store_bytes: StoreBytes = None,
    ids: Ids = None,
    embedding_column: EmbeddingColumn = None,
    id_column: IdColumn = None,
    on_invalid: OnInvalid = "error",
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Learn codebooks from embeddings, save them, and say whether they are healthy.

    Example: semid fit items.parquet --levels 3 --codebook-size 4096 -o model/

    Example: semid fit s3://b/items --codebook-size 4096 -o s3://b/model --engine ray --workers 64
    """
    from semid.cli.fitting import behavior, run_fit, state_folder
    from semid.tokenizers.factory import make_tokenizer, read_recipe
    from semid.training.distributed import is_main
    from semid.training.loggers import make_logger

    if is_main():  # of several processes the first alone writes, and may have done so by now
        reads = (embeddings, ids, recipe, interactions, pairs, neighbors)
        hold_output(output, overwrite=overwrite, inputs=reads, state=state_folder(output))
    check_engine(
        engine,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        ray_address=ray_address,
        store_bytes=store_bytes,
    )
    flags: dict[str, Any] = {
        "levels": levels,
        "codebook_size": codebook_size,
        "seed": seed,
        "normalize": normalize,
        "center": center,
        "beam_width": beam_width,
        "validation_fraction": validation_fraction,
        "kmeans.max_iter": max_iter,
        "kmeans.tol": tol,
        "kmeans.n_init": n_init,
        "kmeans.sample_per_code": sample_per_code,
        "kmeans.full_pass": full_pass,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.schedule": schedule,
        "training.patience": patience,
        "training.precision": precision,
        "network.latent": latent,
        "rule": rule,
        "projection": projection,
        "device": device,
        "contrastive_weight": contrastive_weight,
        "temperature": temperature,
        "uniformity_weight": uniformity_weight,
        "kl_weight": kl_weight,
        "behavior_weight": behavior_weight,
        "content_variance": content_variance,
        "balance_strength": balance_strength,
    }
    wanted = {} if recipe is None else read_recipe(recipe)
    kind = tokenizer or wanted.pop("tokenizer", "rqkmeans")
    wanted.pop("tokenizer", None)
    given = {name: value for name, value in flags.items() if value is not None}
    if engine == "ray":
        from semid.cli.fitting_ray import run_fit_on_ray

        run_fit_on_ray(
            kind,
            {**wanted, **given},
            embeddings,
            output,
            layout=ray_options(workers, cpus_per_worker, ray_address, store_bytes),
            columns={"embedding_column": embedding_column, "id_column": id_column},
            refused={
                "--ids": ids,
                "--log": log,
                "--threads": threads,
                "--interactions": interactions,
                "--pairs": pairs,
                "--neighbors": neighbors,
                "--on-invalid": None if on_invalid == "error" else on_invalid,
                **{
                    f"--{name.replace('_', '-')}": context.params[name]
                    for name in COLUMNS_OF_INTERACTIONS
                    if is_given(context, name)
                },
            },
            overwrite=overwrite,
            resume=resume,
            quiet=quiet,
        )
        return
    logger = None if log is None or not is_main() else make_logger(log)
    model = make_tokenizer(kind, {**wanted, **given}, threads=threads, logger=logger)
    _refuse_unused(context, model)
    source = open_source(
        embeddings,
        ids=ids,
        embedding_column=embedding_column,
        id_column=id_column,
        on_invalid=on_invalid,
    )
    logs = open_interactions(context, interactions)
    learnt_from = behavior(logs, pairs, neighbors, ids=source.ids)
    try:
        run_fit(model, source, output, learnt_from, overwrite=overwrite, resume=resume, quiet=quiet)
    finally:
        if logger is not None:
            logger.close()


def _refuse_unused(context: typer.Context, model: Any) -> None:
    """Refuse options that the chosen tokenizer would take and not use."""
    training = [
        "epochs",
        "batch_size",
        "learning_rate",
        "schedule",
        "patience",
        "precision",
        "latent",
        "device",
        "log",
    ]
    behavior = ["interactions", "pairs", "neighbors", *COLUMNS_OF_INTERACTIONS]
    if not hasattr(model, "logger"):
        refuse_unused(context, ["log"], f"{model.kind} has no epochs to log")
    if model.behavior_argument is None:
        refuse_unused(context, behavior, f"{model.kind} learns from embeddings alone")
    elif not model.needs_behavior:
        weight = "--" + model.behavior_argument.replace("_", "-")
        unused = [*behavior, "temperature"]
        if model.kind == "barq":  # without behavior there is no network
            unused += training
        refuse_unused(context, unused, f"{weight} is 0, so nothing is learned from behavior")
    kmeans = model.settings.get("kmeans")
    if kmeans is not None and kmeans["sample_per_code"] is None:
        refuse_unused(context, ["full_pass"], "it follows a sample; give --sample-per-code")
