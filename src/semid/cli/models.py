"""Commands on models: fit, refine and encode."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

import semid
from semid.cli import shared as cli
from semid.cli.flags import are_checked, check_keys
from semid.errors import UsageError

_BEHAVIOR = {
    "barq": {"behavior_weight": 2.0},
    "drqvae": {"contrastive_weight": 0.0, "uniformity_weight": 0.0},
}
"""Weights by which tokenizers learn from behavior, with their defaults."""


def _tokenizer_names() -> list[str]:
    from semid.tokenizers.factory import TOKENIZERS

    return TOKENIZERS.names()


def fit(
    context: typer.Context,
    embeddings: cli.Source,
    output: cli.Output,
    settings: Annotated[dict[str, Any], "fit"],
    source: cli.SourceOptions,
    columns: cli.InteractionColumns,
    ray: cli.RayFlags,
    tokenizer: Annotated[str | None, typer.Option(autocompletion=_tokenizer_names)] = None,
    recipe: str | None = None,
    log: cli.Log = None,
    interactions: Annotated[str | None, typer.Option(rich_help_panel=cli.LOG)] = None,
    pairs: Annotated[str | None, typer.Option(rich_help_panel=cli.LOG)] = None,
    neighbors: Annotated[str | None, typer.Option(rich_help_panel=cli.LOG)] = None,
    threads: cli.Threads = None,
    overwrite: cli.Overwrite = False,
    resume: cli.Resume = False,
    quiet: cli.Quiet = False,
) -> None:
    """Learn codebooks from embeddings, save them, and say whether they are healthy.

    Options of one tokenizer: semid fit --tokenizer barq --help

    Example: semid fit items.parquet --levels 3 --codebook-size 4096 -o model/

    Example: semid fit s3://b/items --codebook-size 4096 -o s3://b/model --engine ray --workers 64

    Args:
        output: Folder or URI for the model; must not exist.
        tokenizer: rqkmeans (default), rqgmm, pq, opq, vqvae, rqvae, rqpvae, fsq, drqvae, mocvae,
            barq, codebooks, or pipeline (in a recipe); with --help: the options of this one.
        recipe: Name of a recipe, or a TOML file; flags take precedence over it.
        interactions: drqvae, barq: log whose consecutive items are pairs.
        pairs: drqvae, barq: table of item_id and related_item_id.
        neighbors: drqvae, barq: second embeddings, whose nearest neighbors are pairs.
    """
    from semid.tokenizers.factory import make_tokenizer, read_recipe
    from semid.training.distributed import is_main

    if is_main():  # of several processes the first alone writes, and may have done so by now
        reads = (embeddings, source.ids, recipe, interactions, pairs, neighbors)
        cli.hold_output(output, overwrite=overwrite, inputs=reads, state=_state_folder(output))
    uses_ray = ray.uses_ray  # checked before files are read
    # Flags replace what a recipe says, and a recipe what the tokenizer would choose.
    values = {} if recipe is None else read_recipe(recipe)
    kind = tokenizer or values.get("tokenizer", "rqkmeans")
    values = {**values, **settings}
    values.pop("tokenizer", None)
    check_keys("fit", {k: v for k, v in settings.items() if not isinstance(v, dict)}, kind)
    if uses_ray:
        optional = ("ids", "log", "threads", "interactions", "pairs", "neighbors")
        named = [name for name in optional if context.params[name] is not None]
        named += ["on_invalid"] if source.on_invalid != "error" else []
        named += [name for name in columns.NAMES if cli.is_given(context, name)]
        if named:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in named)
            raise UsageError(
                f"{flags} do not go with --engine ray; leave them out, or fit with --engine local "
                "(under torchrun for several processes)"
            )
        with cli.make_progress(quiet=quiet) as progress:
            run_state = {"checkpoint": _state_folder(output), "resume": resume}
            model = _fit_on_ray(kind, values, embeddings, source, ray, run_state, progress)
        _finish(model, output, overwrite=overwrite)
        return
    with cli.open_log(log) as logger:
        opened = None
        if are_checked(
            context, "fit", values
        ):  # then files may be refused before torch is imported
            cli.check_inputs(interactions, pairs, neighbors)
            opened = source.open(embeddings)
        _refuse_unused(context, kind, values)
        model = make_tokenizer(kind, values, threads=threads, logger=logger)
        opened = source.open(embeddings) if opened is None else opened
        behavior = _behavior(columns.read(context, interactions), pairs, neighbors, opened.ids)
        state = _state_folder(output)
        if logger is not None:
            logger.parameters = {"tokenizer": kind, "embeddings": embeddings, **model.settings}
        with (
            cli.name_checkpoint(state),
            cli.make_progress(quiet=quiet or not is_main()) as progress,
        ):
            model.fit(opened, checkpoint=state, resume=resume, progress=progress, **behavior)
        if is_main():  # under torchrun the first process alone writes and speaks
            _finish(model, output, overwrite=overwrite)
        if logger is not None and model.report is not None:
            logger.finish(model.report.health.level, model.report.figures, output)


def _behavior_weights(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the weights by which a tokenizer learns from behavior, importing only what it must."""
    from semid.tokenizers.factory import TOKENIZERS, make_tokenizer

    if kind in TOKENIZERS.targets and kind != "pipeline":
        return {name: values.get(name, usual) for name, usual in _BEHAVIOR.get(kind, {}).items()}
    model = make_tokenizer(kind, values)
    learner = getattr(model, "_encoder", model)  # a pipeline has its encoder's
    return {name: getattr(learner, name) for name in model.behavior_weights}


def _refuse_unused(context: typer.Context, kind: str, values: dict[str, Any]) -> None:
    """Refuse options that the chosen tokenizer would take and not use, and behavior that lacks."""
    from semid.cli.flags import known_flags
    from semid.tokenizers.behavior import missing_behavior

    sources = ("interactions", "pairs", "neighbors")
    weights = _behavior_weights(kind, values)
    learns = any(weights.values())
    if learns and not any(context.params[name] for name in sources):
        raise missing_behavior(kind, weights)
    if context.params["interactions"] is None:
        cli.refuse_unused(context, ["check_behavior"], "it takes users of --interactions")
    parts = ("training.", "network.")
    training = [flag.name for flag in known_flags("fit") if flag.key.startswith(parts)]
    training.append("device")
    behavior = [*sources, *cli.InteractionColumns.NAMES]
    if not weights:
        cli.refuse_unused(context, behavior, f"{kind} learns from embeddings alone")
    elif not learns:
        flag = "--" + next(iter(weights)).replace("_", "-")
        unused = [*behavior, "temperature"]
        if kind == "barq":  # without behavior there is no network
            unused += [*training, "check_behavior"]
        cli.refuse_unused(context, unused, f"{flag} is 0, so nothing is learned from behavior")
    kmeans = values.get("kmeans") or {}
    if not (values.get("kmeans.sample_per_code") or kmeans.get("sample_per_code")):
        cli.refuse_unused(context, ["full_pass"], "it follows a sample; give --sample-per-code")


def _behavior(
    interactions: Any, pairs: str | None, neighbors: str | None, ids: Any
) -> dict[str, Any]:
    """Return the arguments of `Tokenizer.fit` that name behavior."""
    if pairs is not None and neighbors is not None:
        raise UsageError("--pairs and --neighbors both name pairs; give one of them")
    if neighbors is None:
        return {"interactions": interactions, "pairs": pairs}

    # Rows of an .npy have no ids: they are the catalogue's.
    named = None if Path(neighbors).suffix != ".npy" else ids.to_arrow()
    return {"interactions": interactions, "pairs": semid.Neighbors(Path(neighbors), ids=named)}


def _fit_on_ray(
    kind: str,
    values: dict[str, Any],
    embeddings: str,
    source: cli.SourceOptions,
    ray: cli.RayFlags,
    state: dict[str, Any],
    progress: Any,
) -> Any:
    """Fit on Ray: K-means over actors that hold shards, networks in processes of Ray Train."""
    from semid.tokenizers.factory import make_tokenizer

    names = {"embedding_column": source.embedding_column, "id_column": source.id_column}
    model, layout = make_tokenizer(kind, values), ray.options
    if not model.fits_shards:
        from semid.distributed.ray_fit import fit_with_ray_train

        return fit_with_ray_train(kind, values, embeddings, columns=names, options=layout, **state)
    from semid.distributed.ray_fit import fit_on_ray
    from semid.distributed.units import Catalogue

    catalogue = Catalogue.open(embeddings, **names)
    done = fit_on_ray(model, catalogue, options=layout, progress=progress, **state)
    rows = ", ".join(f"{count:,}" for count in done.rows)
    cli.say(f"{done.workers} workers held the training rows: {rows}", err=True)
    return model


def _state_folder(output: str) -> Path:
    """Return where the state of a run lies: beside the output; for a URI, in this folder."""
    from semid.filesystems import is_uri
    from semid.runs import partial_path

    if is_uri(output):
        return Path(f"{output.rstrip('/').rpartition('/')[2]}.partial")
    return Path(partial_path(output))


def _finish(model: Any, output: str, *, overwrite: bool) -> None:
    """Save the model, remove the state of the run, and say how it went."""
    from semid.filesystems import is_uri, send_folder
    from semid.runs import remove_state_folder

    if is_uri(output):
        with tempfile.TemporaryDirectory(prefix="semid-") as work:
            model.save(Path(work) / "model")
            # Readers look for config.json, so it is sent last.
            send_folder(Path(work) / "model", output, last="config.json")
    else:
        model.save(output, overwrite=overwrite)
    # The state goes only once the model is saved, so that a failed save can be resumed.
    remove_state_folder(_state_folder(output))
    if model.report is not None:
        items, seconds = model.report.trained_items, model.report.seconds
        cli.say(f"fitted {model.kind} on {items:,} items in {seconds:,.1f} s")
        cli.say(model.report.summary)
    cli.say(f"model: {output}")


def refine(
    model: Path,
    embeddings: cli.Source,
    output: cli.OutputPath,
    source: cli.SourceOptions,
    rounds: int = 8,
    annealing_rounds: int = 24,
    beam_width: int = 8,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Lower the error of a residual model by refining its levels together; codes change.

    Example: semid refine model/ items.parquet -o refined/

    Args:
        model: Folder written by 'semid fit'.
        output: Folder for the refined model.
        rounds: Maximum number of rounds of encoding and least squares.
        annealing_rounds: Rounds with falling noise, which leave the nearest optimum.
        beam_width: Beam width while refining, and of the model.
    """
    cli.hold_output(output, overwrite=overwrite, inputs=(model, embeddings, source.ids))
    options = semid.RefineOptions(
        rounds=rounds, annealing_rounds=annealing_rounds, beam_width=beam_width
    )
    opened = source.open(embeddings)
    with cli.make_progress(quiet=quiet) as progress:
        refined = semid.refine(
            cli.open_tokenizer(model), opened, options=options, progress=progress
        )
    refined.save(output, overwrite=overwrite)
    assert refined.report is not None
    # Errors on held-out items, before the first round and after the last.
    history = refined.report.details["refine"]
    if history:
        share = 1.0 - history[-1]["error"] / history[0]["before"]
        cli.say(f"{len(history)} rounds: squared error on held-out items {share:.1%} lower")
    else:
        cli.say("no round lowered the error on held-out items; the codebooks are unchanged")
    cli.say(refined.report.summary)
    cli.say(f"model: {output}")


def encode(
    context: typer.Context,
    model: str,
    embeddings: cli.Source,
    output: cli.Output,
    source: cli.SourceOptions,
    ray: cli.RayFlags,
    beam_width: Annotated[int | None, typer.Option(min=1)] = None,
    catalogue: Path | None = None,
    novelty: Path | None = None,
    novel_beyond: float = 0.99,
    processes: cli.Count = None,
    threads: cli.Threads = None,
    overwrite: cli.Overwrite = False,
    resume: cli.Resume = False,
    quiet: cli.Quiet = False,
) -> None:
    """Give every item its codes; items need not have been part of the fit.

    Writes Parquet: item_id, codes, residual_norm, and the codebook's fingerprint.

    Example: semid encode model/ items.parquet -o ids.parquet

    Example: semid encode model/ new.parquet --catalogue ids.parquet -o ids-2.parquet

    Example: semid encode model/ items/ -o ids/ --processes 8

    Example: semid encode s3://b/model s3://b/items -o s3://b/ids --engine ray --workers 64

    Args:
        model: Folder or URI written by 'semid fit'.
        output: Parquet file to write. With several workers also a folder or a URI, which gets one
            file per unit of row groups.
        beam_width: Beam width; default: that of the model.
        catalogue: Published ids to add to, a Parquet file or a bundle's folder; no published id
            moves. An --output that is no .parquet is a bundle: the same folder gets one more
            version.
        novelty: With --catalogue: Parquet file of the new items and how novel each is.
        novel_beyond: Share of the training distribution beyond which an item is novel.
        processes: With --engine local: processes that share the row groups of Parquet files;
            default: one for a file, one per CPU if the output is a folder or a URI.
    """
    from semid.catalogue.additions import check_threshold
    from semid.runs import partial_path
    from semid.tokenizers.context import check_beam_width
    from semid.tokenizers.encoding import encode_to_parquet

    options: dict[str, Any]
    uses_ray = ray.uses_ray
    if catalogue is None:
        only = "only additions to a --catalogue use it"
        cli.refuse_unused(context, ["novelty", "novel_beyond"], only)
    check_threshold(novel_beyond)
    if beam_width is not None:
        check_beam_width(beam_width)
    # A folder of items becomes a folder of ids, unit by unit; one file is written in one go.
    is_folder = Path(embeddings).is_dir() or "://" in embeddings
    reads_all = catalogue is not None or source.ids is not None
    by_unit = not reads_all and is_folder and not output.endswith(".parquet")
    if uses_ray or processes is not None or "://" in output or by_unit:
        if reads_all:
            raise UsageError(
                "--catalogue and --ids read all items at once and do not go with several workers "
                "(--engine ray, --processes, a folder or a URI as output); leave one out"
            )
        if uses_ray and (processes is not None or threads is not None):
            raise UsageError(
                "--processes and --threads go with --engine local; on Ray give --workers and "
                "--cpus-per-worker"
            )
        only = "several processes share the CPUs; give --processes alone"
        cli.refuse_unused(context, ["threads"], only)
        from semid.distributed.encode_folder import LocalOptions

        options = {name: value for name, value in vars(source).items() if name != "ids"}
        options |= {"beam_width": beam_width, "overwrite": overwrite, "resume": resume}
        options["engine"] = ray.options if uses_ray else LocalOptions(processes=processes)
        _encode_in_units(model, embeddings, output, quiet=quiet, **options)
        return
    reads = (model, embeddings, source.ids)
    if catalogue is None:
        cli.hold_output(output, overwrite=overwrite, inputs=reads, state=partial_path(output))
    elif resume or beam_width is not None:
        raise UsageError(
            "--resume and --beam-width do not go with --catalogue: new items are encoded in one "
            "go, with the catalogue's own beam"
        )
    else:
        _hold_outputs(reads, catalogue, Path(output), novelty, overwrite)
    tokenizer = cli.open_tokenizer(model, threads=threads)
    opened = source.open(embeddings)
    with cli.make_progress(quiet=quiet) as progress:
        if catalogue is not None:
            options = {"threshold": novel_beyond, "progress": progress}
            done, where = _add(tokenizer, opened, catalogue, Path(output), overwrite, **options)
        else:
            options = {"beam_width": beam_width, "resume": resume, "progress": progress}
            encode_to_parquet(tokenizer, opened, output, overwrite=overwrite, **options)
    if catalogue is None:
        cli.say(f"encoded {len(opened):,} items with {tokenizer.levels} codes each: {output}")
        return
    if novelty is not None:
        done.report.write(novelty, overwrite=overwrite)
    cli.say(done.report.summary())
    cli.say(f"ids of {len(done.ids):,} items: {where}")


def _encode_in_units(
    model: str, embeddings: str, output: str, *, quiet: bool, **options: Any
) -> None:
    """Encode unit by unit, on Ray or in processes of this machine."""
    from semid.distributed.encode_folder import encode_folder

    options["announce"] = lambda sentence: cli.say(sentence, err=True)
    with cli.make_progress(quiet=quiet) as progress:
        done = encode_folder(model, embeddings, output, progress=progress, **options)
    shares = ", ".join(f"{rows:,}" for rows in done.by_process.values()) or "none"
    cli.say(f"encoded {done.encoded:,} of {done.rows:,} items (by worker: {shares}): {output}")


def _grows(output: Path, catalogue: Path) -> bool:
    """Whether a bundle gets one more version in its own folder."""
    return output.is_dir() and output.resolve() == catalogue.resolve()


def _hold_outputs(
    reads: tuple[Any, ...], catalogue: Path, output: Path, novelty: Path | None, overwrite: bool
) -> None:
    """Hold what adding to published ids writes."""
    if not _grows(output, catalogue):
        # A bundle is never replaced by another one: it holds published versions.
        replace = overwrite and output.suffix == ".parquet"
        cli.hold_output(output, overwrite=replace, inputs=(*reads, catalogue))
    if novelty is not None:
        cli.hold_output(novelty, overwrite=overwrite, inputs=(*reads, catalogue))
        if novelty.resolve() == output.resolve() or output.resolve() in novelty.resolve().parents:
            raise UsageError(f"--novelty '{novelty}' is in --output; give another file")


def _add(
    tokenizer: Any, source: Any, catalogue: Path, output: Path, overwrite: bool, **options: Any
) -> tuple[Any, str]:
    """Add items to published ids; return the additions and where the ids are."""
    from semid.catalogue.additions import add_items
    from semid.catalogue.bundle import CatalogueBundle, read_catalogue
    from semid.runs import hold_path

    grows = _grows(output, catalogue)
    # A bundle that grows in place is read, extended and written under one hold. Otherwise another
    # run could append in between, and what counted as new here would be published already.
    with hold_path(output) if grows else nullcontext():
        published = read_catalogue(catalogue)
        done = add_items(published, tokenizer, source, **options)
        if output.suffix == ".parquet" and not grows:
            done.ids.write(output, overwrite=overwrite)
            return done, str(output)
        bundle = CatalogueBundle(output) if grows else CatalogueBundle.create(output, published)
        return done, f"{output}, version {bundle.append(done.ids)}"
