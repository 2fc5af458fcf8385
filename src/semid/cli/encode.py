"""``semid encode``: codes of all items, and of new items of a catalogue."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from semid.cli.shared import (
    Count,
    Output,
    Overwrite,
    Quiet,
    RayFlags,
    Resume,
    Source,
    SourceOptions,
    Threads,
    hold_output,
    make_progress,
    refuse_unused,
    say,
)
from semid.errors import UsageError


def encode(
    context: typer.Context,
    model: str,
    embeddings: Source,
    output: Output,
    source: SourceOptions,
    ray: RayFlags,
    beam_width: Annotated[int | None, typer.Option(min=1)] = None,
    catalogue: Path | None = None,
    novelty: Path | None = None,
    novel_beyond: float = 0.99,
    processes: Count = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
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
    from semid.loading import load_tokenizer
    from semid.tokenizers.context import check_beam_width
    from semid.tokenizers.encoding import encode_to_parquet

    uses_ray = ray.uses_ray
    if catalogue is None:
        only = "only additions to a --catalogue use it"
        refuse_unused(context, ["novelty", "novel_beyond"], only)
    check_threshold(novel_beyond)
    if beam_width is not None:
        check_beam_width(beam_width)
    folder = Path(embeddings).is_dir() or "://" in embeddings
    shared = uses_ray or processes is not None or "://" in output
    plain = catalogue is None and source.ids is None
    shared = shared or (plain and folder and not output.endswith(".parquet"))
    if shared:
        if catalogue is not None or source.ids is not None:
            raise UsageError(
                "--catalogue and --ids read all items at once and do not go with several workers "
                "(--engine ray, --processes, a folder or a URI as output); leave one out"
            )
        if uses_ray and (processes is not None or threads is not None):
            raise UsageError(
                "--processes and --threads go with --engine local; on Ray give --workers and "
                "--cpus-per-worker"
            )
        refuse_unused(
            context, ["threads"], "several processes share the CPUs; give --processes alone"
        )
        from semid.distributed.encode_folder import LocalOptions

        layout = ray.options if uses_ray else LocalOptions(processes=processes)
        _share(
            model,
            embeddings,
            output,
            layout,
            source,
            beam_width=beam_width,
            overwrite=overwrite,
            resume=resume,
            quiet=quiet,
        )
        return
    if catalogue is not None:
        if resume or beam_width is not None:
            raise UsageError(
                "--resume and --beam-width do not go with --catalogue: new items are encoded in "
                "one go, with the catalogue's own beam"
            )
    else:
        from semid.tokenizers.encoding import partial_folder

        reads = (model, embeddings, source.ids)
        state = partial_folder(output)
        hold_output(output, overwrite=overwrite, inputs=reads, state=state)
    if catalogue is not None:
        _hold_outputs((model, embeddings, source.ids), catalogue, Path(output), novelty, overwrite)
    tokenizer = load_tokenizer(model)
    tokenizer.threads = threads
    opened = source.open(embeddings)
    if catalogue is not None:
        _add(tokenizer, opened, catalogue, Path(output), novelty, novel_beyond, overwrite, quiet)
        return
    with make_progress(quiet=quiet) as progress:
        encode_to_parquet(
            tokenizer,
            opened,
            output,
            beam_width=beam_width,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    say(f"encoded {len(opened):,} items with {tokenizer.levels} codes each: {output}")


def _share(
    model: str,
    embeddings: str,
    output: str,
    layout: Any,
    source: SourceOptions,
    *,
    beam_width: int | None,
    overwrite: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Encode with several workers."""
    from semid.distributed.encode_folder import encode_folder

    with make_progress(quiet=quiet) as progress:
        done = encode_folder(
            model,
            embeddings,
            output,
            engine=layout,
            embedding_column=source.embedding_column,
            id_column=source.id_column,
            on_invalid=source.on_invalid,
            beam_width=beam_width,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            announce=lambda sentence: say(sentence, err=True),
        )
    shares = ", ".join(f"{rows:,}" for rows in done.by_process.values()) or "none"
    say(f"encoded {done.encoded:,} of {done.rows:,} items (by worker: {shares}): {output}")


def _grows(output: Path, catalogue: Path) -> bool:
    """Whether a bundle gets one more version in its own folder."""
    return output.is_dir() and output.resolve() == catalogue.resolve()


def _hold_outputs(
    reads: tuple[Any, ...], catalogue: Path, output: Path, novelty: Path | None, overwrite: bool
) -> None:
    """Hold what adding to published ids writes."""
    if not _grows(output, catalogue):
        replace = overwrite and output.suffix == ".parquet"
        hold_output(output, overwrite=replace, inputs=(*reads, catalogue))
    if novelty is not None:
        hold_output(novelty, overwrite=overwrite, inputs=(*reads, catalogue))
        if novelty.resolve() == output.resolve() or output.resolve() in novelty.resolve().parents:
            raise UsageError(f"--novelty '{novelty}' is in --output; give another file")


def _add(
    tokenizer: Any,
    source: Any,
    catalogue: Path,
    output: Path,
    novelty: Path | None,
    threshold: float,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Add items to published ids."""
    from semid.catalogue.additions import add_items
    from semid.catalogue.bundle import CatalogueBundle, read_catalogue
    from semid.runs import hold_path

    grows = _grows(output, catalogue)
    # A bundle that grows in place is read, extended and written under one hold. Otherwise another
    # run could append in between, and what counted as new here would be published already.
    with hold_path(output) if grows else nullcontext():
        published = read_catalogue(catalogue)
        with make_progress(quiet=quiet) as progress:
            done = add_items(published, tokenizer, source, threshold=threshold, progress=progress)
        if output.suffix == ".parquet" and not grows:
            done.ids.write(output, overwrite=overwrite)
            where = str(output)
        else:
            bundle = CatalogueBundle(output) if grows else CatalogueBundle.create(output, published)
            where = f"{output}, version {bundle.append(done.ids)}"
    if novelty is not None:
        done.report.write(novelty, overwrite=overwrite)
    say(done.report.summary())
    say(f"ids of {len(done.ids):,} items: {where}")
