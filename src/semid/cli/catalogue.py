"""Commands on ids: unique, drift, refresh, compact, export, import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import semid
from semid.cli import shared as cli
from semid.errors import UsageError, check_choice


def embed(
    items: Annotated[Path, typer.Argument(metavar="ITEMS", help="Table of items: Parquet or CSV.")],
    output: cli.OutputPath,
    model: Annotated[str, typer.Option()],
    text_column: str | None = None,
    template: str | None = None,
    id_column: str | None = None,
    revision: str | None = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65_536)] = 32,
    no_normalize: bool = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    overwrite: cli.Overwrite = False,
    resume: cli.Resume = False,
    quiet: cli.Quiet = False,
) -> None:
    """Embed texts of items by a sentence encoder (pip install 'semid[text]').

    Writes Parquet: item_id, embedding, and the encoder's name and revision in the metadata.

    Example: semid embed items.parquet --text-column text --model all-MiniLM-L6-v2 -o x.parquet

    Example: semid embed items.csv --template '{title}. {brand}' --model ./encoder -o x.parquet

    Args:
        output: Parquet file to write.
        model: sentence-transformers model: a name on the Hugging Face Hub, or a folder.
        text_column: Column of the text; default text.
        template: Several columns as one text, instead of --text-column, such as '{title}. {brand}'.
        id_column: Column of the item ids; default item_id.
        revision: Revision of a model on the Hub; default: the newest.
        batch_size: Texts per step of the encoder.
        no_normalize: Leave vectors their lengths; by default they get length 1.
        device: Device.
    """
    from semid.runs import partial_path

    cli.hold_output(output, overwrite=overwrite, inputs=(items,), state=partial_path(output))
    with cli.make_progress(quiet=quiet) as progress:
        semid.embed(
            items,
            output,
            model=model,
            text_column=text_column,
            template=template,
            id_column=id_column,
            revision=revision,
            batch_size=batch_size,
            normalize=not no_normalize,
            device=device,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    cli.say(f"embeddings: {output}")


def unique(
    context: typer.Context,
    ids_file: Annotated[str, typer.Argument(metavar="IDS")],
    output: cli.Output,
    source: cli.SourceOptions,
    method: str = "append",
    model: Path | None = None,
    embeddings: str | None = None,
    capacity: Annotated[int | None, typer.Option(min=1, max=2**31 - 1)] = None,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Tell items with equal ids apart; the step can be repeated, replaced and undone.

    The model's codes are kept in the column model_codes.

    Example: semid unique ids.parquet --method append -o unique.parquet

    Args:
        ids_file: File, folder or URI written by 'semid encode'.
        output: Parquet file to write; a folder or URI if IDS is one and the method is append.
        method: 'append' adds a token inside each bucket, the closest to the centroid first;
            'reassign' takes the nearest free codes of the last level; 'none' goes back to the
            model's codes.
        model: Folder written by 'semid fit'; needed for reassign.
        embeddings: The items' embeddings; needed for reassign.
        capacity: reassign: items per id (default 1). append: number of tokens (default 256).
    """
    from semid.codes import UNIQUE_METHODS

    check_choice("--method", method, UNIQUE_METHODS)
    if method == "reassign" and (model is None or embeddings is None):
        raise UsageError(
            "--method reassign looks for the next-nearest codewords: give --model and --embeddings"
        )
    if method != "reassign":
        searched = ["model", "embeddings", "ids", "embedding_column", "id_column", "on_invalid"]
        cli.refuse_unused(context, searched, f"--method {method} looks at the codes alone")
    if method == "none":
        cli.refuse_unused(context, ["capacity"], "--method none goes back to the model's codes")
    if method == "append" and not output.endswith(".parquet") and not Path(ids_file).is_file():
        # Ids of any size, a part at a time.
        from semid.distributed.unique_parts import unique_folder

        report = unique_folder(ids_file, output, capacity=capacity, overwrite=overwrite)
        cli.say(report.summary())
        cli.say(f"ids: {output}")
        return
    # A single file is read and written here, whichever file system it lies on.
    ids_file, output = str(cli.local_input(ids_file)), str(cli.local_output(output))
    cli.hold_output(output, overwrite=overwrite, inputs=(ids_file, model, embeddings, source.ids))
    with cli.make_progress(quiet=quiet) as progress:
        done = semid.make_unique(
            semid.SemanticIds.read(ids_file),
            method=method,
            tokenizer=None if model is None else cli.open_tokenizer(model),
            embeddings=None if embeddings is None else source.open(embeddings),
            capacity=capacity,
            progress=progress,
        )
    done.ids.write(output, overwrite=overwrite)
    cli.say(done.report.summary())
    cli.say(f"ids: {output}")


def drift(
    context: typer.Context,
    model: Path,
    before: str,
    after: str,
    source: cli.SourceOptions,
    output: Annotated[Path | None, cli.OUTPUT] = None,
    after_ids: str | None = None,
    threads: cli.Threads = None,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Compare two snapshots of a catalogue under one codebook, and say when to refresh.

    Example: semid drift model/ last_month.parquet today.parquet

    Args:
        model: Folder written by 'semid fit'.
        before: Embeddings at the time of the fit.
        after: Current embeddings.
        output: JSON file for the figures.
        after_ids: Item ids of AFTER, like --ids; default: the same table.
    """
    from semid.output import atomic_file

    if output is None:
        cli.refuse_unused(context, ["overwrite"], "there is no --output")
    else:
        reads = (model, before, after, source.ids, after_ids)
        cli.hold_output(output, overwrite=overwrite, inputs=reads)
    tokenizer = cli.open_tokenizer(model, threads=threads)
    old = source.open(before)
    new = source.open(after, ids=after_ids)
    with cli.make_progress(quiet=quiet) as progress:
        result = semid.drift(tokenizer, old, new, progress=progress)
    if output is not None:
        with atomic_file(output, overwrite=overwrite) as work:
            work.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf8")
    cli.say(result.summary())


def check(
    context: typer.Context,
    old: Path,
    new: Path,
    columns: cli.InteractionColumns,
    thresholds: Path | None = None,
    interactions: str | None = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Check whether new ids may replace the published ones; exit with 3 if not.

    Compares changed and lost ids, ids that belong to other items now, prefixes and tokens,
    collisions, usage and errors with the largest values that are allowed.

    Example: semid check published/ next/ --thresholds release.toml --json

    Args:
        old: Published ids: a Parquet file, a bundle, or a folder of 'semid refresh'.
        new: Ids to release, as OLD.
        thresholds: TOML file of 'figure = maximum', or 'figure = false'; default: those of the
            documentation.
        interactions: Log whose item counts (popularity) weight the changed ids.
        as_json: Print one JSON object instead of text.
    """
    from semid.catalogue.matching import item_counts
    from semid.catalogue.release import check_release, read_maxima, read_release

    maxima = None if thresholds is None else read_maxima(thresholds)
    published, candidate = read_release(old), read_release(new)
    log = columns.read(context, interactions)
    result = check_release(
        published,
        candidate,
        popularity=None if log is None else item_counts(log, published.items),
        maxima=maxima,
    )
    cli.say(json.dumps(result.to_dict(), indent=2) if as_json else result.summary())
    if not result.passed:
        raise typer.Exit(3)


def refresh(
    context: typer.Context,
    model: Path,
    embeddings: cli.Source,
    catalogue: Annotated[Path, typer.Option()],
    output: cli.OutputPath,
    source: cli.SourceOptions,
    columns: cli.InteractionColumns,
    max_churn: float | None = None,
    interactions: str | None = None,
    compare: bool = False,
    cold: bool = False,
    threads: cli.Threads = None,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Fit again on a changed catalogue with codes aligned to the published ones.

    Reports the ids that changed, by level, prefix and popularity, next to the quality gained.

    Example: semid refresh model/ items.parquet --catalogue ids.parquet --max-churn 0.1 -o next/

    Args:
        model: Previous model: a folder written by 'semid fit'.
        catalogue: Published ids: a Parquet file, or the folder of a bundle.
        output: Folder: model/, ids.parquet, refresh.json.
        max_churn: Share of published ids that may change; default: no limit.
        interactions: Log whose item counts (popularity) weight the churn.
        compare: Also fit from scratch, and report both.
        cold: Do not start from the previous codebooks.
    """
    from semid.catalogue.bundle import read_catalogue
    from semid.catalogue.matching import item_counts
    from semid.catalogue.refresh import check_max_churn
    from semid.output import atomic_folder

    check_max_churn(max_churn)
    reads = (model, embeddings, catalogue, source.ids, interactions)
    cli.hold_output(output, overwrite=overwrite, inputs=reads)
    tokenizer = cli.open_tokenizer(model, threads=threads)
    opened = source.open(embeddings)
    log = columns.read(context, interactions)
    with cli.make_progress(quiet=quiet) as progress:
        result = semid.refresh(
            tokenizer,
            read_catalogue(catalogue),
            opened,
            popularity=None if log is None else item_counts(log, opened.ids),
            max_churn=max_churn,
            warm_start=not cold,
            compare=compare,
            progress=progress,
        )
    # The new model and its ids appear together: neither is used with an older one.
    with atomic_folder(output, overwrite=overwrite) as folder:
        result.tokenizer.save(folder / "model")
        result.ids.write(folder / "ids.parquet")
        text = json.dumps(result.report.to_dict(), indent=2) + "\n"
        (folder / "refresh.json").write_text(text, encoding="utf8")
    cli.say(result.report.summary())
    cli.say(f"model, ids and report: {output}")


def compact(catalogue: Path, output: cli.OutputPath) -> None:
    """Start a new bundle from the last version of another, whose files it joins into one.

    The old bundle stays as it is, with all its versions.

    Example: semid compact published/ -o next/

    Args:
        catalogue: Published ids: the folder of a bundle, or an ids file.
        output: Folder of the new bundle; must not exist.
    """
    from semid.catalogue.bundle import CatalogueBundle, read_catalogue

    cli.hold_output(output, overwrite=False, inputs=(catalogue,))
    ids = read_catalogue(catalogue)
    CatalogueBundle.create(output, ids)
    cli.say(f"{len(ids):,} items: {output}, version 1")


def export(
    context: typer.Context,
    to: Annotated[str, typer.Option()],
    output: cli.OutputPath,
    source: cli.SourceOptions,
    columns: cli.InteractionColumns,
    ids_file: Annotated[Path | None, typer.Argument(metavar="[IDS]")] = None,
    model: Path | None = None,
    interactions: str | None = None,
    candidates: Annotated[int, typer.Option(min=0, max=4096)] = 0,
    embeddings: str | None = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Write ids, histories or a model as another program reads them.

    Example: semid export unique.parquet --to lcrec -o Beauty.index.json

    Example: semid export unique.parquet --to static --set offsets=[0,256,512] -o static.npz

    Args:
        to: lcrec, lcrec-sequences, grid, grid-sequences, openonerec, torcheasyrec, huggingface,
            faiss, fuxictr, atlas, flashrec, sid2pid, sid-gr, static, onnx or torch-export.
        output: File or folder to write.
        ids_file: Ids file or bundle; not needed for onnx and torch-export.
        model: Folder written by 'semid fit'; needed for huggingface, faiss, onnx and torch-export.
        interactions: Users' interactions; needed for lcrec-sequences and grid-sequences, counted
            by sid2pid.
        candidates: torcheasyrec: alternative ids per item; needs --embeddings.
        embeddings: Embeddings of the items, for atlas and for the alternative ids of torcheasyrec.
        settings: Option of one format, with a value of TOML: token of lcrec, end_code of flashrec,
            base of sid2pid; offsets and vocab_size of sid-gr and static, dense_lookup_layers of
            static; items of sid-gr and atlas, projection (umap or pca) and neighbors of atlas.
    """
    from semid.catalogue.bundle import read_catalogue
    from semid.cli.flags import given_values

    inputs = (ids_file, model, embeddings, source.ids, interactions)
    cli.hold_output(output, overwrite=overwrite, inputs=inputs)
    options: dict[str, Any] = given_values((), {"settings": settings})
    if candidates:
        if to != "torcheasyrec":
            raise UsageError(f"--candidates goes with --to torcheasyrec, not with {to}")
        if embeddings is None or model is None:
            raise UsageError("--candidates are nearest codewords: give --model and --embeddings")
        options["candidates"] = candidates
        options["embeddings"] = source.open(embeddings)
    elif to == "atlas" and embeddings is not None:
        options["embeddings"] = source.open(embeddings)
    else:
        unused = ["embeddings", "ids", "embedding_column", "id_column", "on_invalid"]
        cli.refuse_unused(
            context, unused, "embeddings serve atlas, and torcheasyrec with --candidates"
        )
    semid.export(
        to,
        output,
        ids=None if ids_file is None else read_catalogue(ids_file),
        tokenizer=None if model is None else cli.open_tokenizer(model),
        interactions=columns.read(context, interactions),
        overwrite=overwrite,
        **options,
    )
    cli.say(f"{to}: {output}")


def import_(
    context: typer.Context,
    file: str,
    output: cli.Output,
    source: Annotated[str, typer.Option("--from")] = "auto",
    model: Path | None = None,
    ids: str | None = None,
    id_column: Annotated[str | None, typer.Option(rich_help_panel=cli.INPUT)] = None,
    orientation: str | None = None,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Read ids or codebooks of another program, so that semid's commands work on them.

    Example: semid import Beauty.index.json --from lcrec --ids items.parquet -o ids.parquet

    Args:
        file: The other program's file.
        source: Ids of any layout of JSON, CSV, Parquet, .npy or tensor (auto), of lcrec or grid
            alone, or of semid's ArrowEncoder in Spark (spark); codebooks of faiss, openonerec,
            torcheasyrec or grid-checkpoint, which become a model.
        output: Parquet file to write; a folder for ids of spark and for codebooks.
        model: Model that made the codes; the ids then carry its fingerprint.
        ids: Table with one item id per row, FILE or FILE:COLUMN.
        id_column: Column of the item ids; default 'item_id'.
        orientation: Axes of a GRID tensor: levels-first or items-first; guessed and printed by
            default.
    """
    from semid.data.items import load_ids
    from semid.exports.formats import CODEBOOK_SOURCES

    unused = ["model", "ids", "id_column", "orientation"]
    if source == "spark":
        from semid.distributed.arrow import import_encoded

        cli.refuse_unused(context, unused, "rows of Spark name their items and their model")
        if output.endswith(".parquet"):
            raise UsageError(f"ids of spark are written to a folder: give -o {output[:-8]}/")
        with cli.make_progress(quiet=quiet) as progress:
            items = import_encoded(file, output, overwrite=overwrite, progress=progress)
        cli.say(f"imported {items:,} items: {output}")
        return
    file, output = str(cli.local_input(file)), str(cli.local_output(output))
    if source in CODEBOOK_SOURCES:
        cli.refuse_unused(context, unused, "it is for files of ids")
        cli.hold_output(output, overwrite=overwrite, inputs=(file,))
        cli.check_inputs(file)
        imported_model = semid.import_codebooks(source, file)
        imported_model.save(output, overwrite=overwrite)
        sizes = ", ".join(map(str, imported_model.codebook_sizes))
        cli.say(f"imported codebooks of {sizes} codewords: {output}")
        return
    if ids is None:
        cli.refuse_unused(context, ["id_column"], "it names a column of --ids")
    cli.hold_output(output, overwrite=overwrite, inputs=(file, model, ids))
    cli.check_inputs(file)
    imported = semid.import_ids(
        source,
        file,
        items=None if ids is None else load_ids(ids, id_column=id_column),
        tokenizer=None if model is None else cli.open_tokenizer(model),
        orientation=orientation,
    )
    imported.write(output, overwrite=overwrite)
    cli.say(f"imported {len(imported):,} items with {imported.levels} codes each: {output}")
