"""What ``semid fit --engine ray`` does once its options are read."""

from __future__ import annotations

from typing import Any

from semid.cli.fitting import save_model, say_fitted, state_folder
from semid.cli.options import say
from semid.distributed.ray_workers import RayOptions
from semid.errors import UsageError
from semid.progress import make_progress
from semid.runs import remove_state_folder
from semid.tokenizers.factory import make_tokenizer

__all__ = ["run_fit_on_ray"]


def run_fit_on_ray(
    kind: str,
    values: dict[str, Any],
    embeddings: str,
    output: str,
    *,
    layout: RayOptions,
    columns: dict[str, str | None],
    refused: dict[str, Any],
    overwrite: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Fit on Ray, save and say how it went.

    Args:
        kind: the tokenizer. Residual K-means is spread over actors that hold shards; tokenizers
            that train a network run their loop in the processes of Ray Train.
        values: its arguments.
        embeddings: path or URI.
        output: folder or URI for the model.
        layout: workers, CPUs, cluster.
        columns: names of the columns.
        refused: flags that do not go with ``--engine ray``, and what was given for them.
        overwrite: replace an existing model.
        resume: continue a run that was stopped.
        quiet: no progress.

    Raises:
        UsageError: a flag that does not apply.
    """
    named = [flag for flag, value in refused.items() if value is not None]
    if named:
        raise UsageError(
            f"{', '.join(named)} do not go with --engine ray; leave them out, or fit with --engine "
            "local (under torchrun for several processes)"
        )
    model = make_tokenizer(kind, values)
    state = state_folder(output)
    if model.fits_shards:
        from semid.distributed.ray_fit import fit_on_ray
        from semid.distributed.units import Catalogue

        catalogue = Catalogue.open(embeddings, **columns)
        with make_progress(quiet=quiet) as progress:
            done = fit_on_ray(
                model,
                catalogue,
                options=layout,
                checkpoint=state,
                resume=resume,
                progress=progress,
            )
        rows = ", ".join(f"{count:,}" for count in done.rows)
        say(f"{done.workers} workers held the training rows: {rows}", err=True)
    else:
        from semid.distributed.ray_train import fit_with_ray_train

        model = fit_with_ray_train(
            kind,
            values,
            embeddings,
            columns=columns,
            options=layout,
            checkpoint=state,
            resume=resume,
        )
    save_model(model, output, overwrite=overwrite)
    remove_state_folder(state)
    say_fitted(model, output)
