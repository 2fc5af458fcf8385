"""What ``semid fit`` does once its options are read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from semid.cli.options import say
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import UsageError
from semid.filesystems import is_uri, send_folder
from semid.progress import make_progress
from semid.runs import remove_state_folder
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.encoding import partial_folder
from semid.training.distributed import is_main

__all__ = [
    "behavior",
    "run_fit",
    "save_model",
    "say_fitted",
    "state_folder",
]


def behavior(
    interactions: Any, pairs: str | None, neighbors: str | None, *, ids: ItemIds
) -> dict[str, Any]:
    """Return the arguments of `Tokenizer.fit` that name behavior.

    Args:
        interactions: logs, opened.
        pairs: path of a table of related items.
        neighbors: path of second embeddings.
        ids: the catalogue, which names the rows of second embeddings that have no ids.

    Raises:
        UsageError: pairs and neighbors are both given.
    """
    if pairs is not None and neighbors is not None:
        raise UsageError("--pairs and --neighbors both name pairs; give one of them")
    if neighbors is None:
        return {"interactions": interactions, "pairs": pairs}
    from semid.tokenizers.behavior import Neighbors

    named = None if Path(neighbors).suffix != ".npy" else ids.to_arrow()
    return {"interactions": interactions, "pairs": Neighbors(Path(neighbors), ids=named)}


def run_fit(
    model: Tokenizer,
    source: EmbeddingSource,
    output: str | Path,
    learnt_from: dict[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Fit, save and say how it went; under ``torchrun`` the first process alone writes and speaks.

    Args:
        model: the tokenizer to fit.
        source: opened embeddings.
        output: folder for the model; the state of the run lies beside it while it runs. For a URI,
            it lies in the current folder under the URI's last name.
        learnt_from: further arguments of ``fit``.
        overwrite: replace an existing model.
        resume: continue a run that was stopped.
        quiet: no progress.
    """
    speaks = is_main()
    state = state_folder(output)
    try:
        with make_progress(quiet=quiet or not speaks) as progress:
            model.fit(source, checkpoint=state, resume=resume, progress=progress, **learnt_from)
    except KeyboardInterrupt:
        if speaks and (state / "state.safetensors").exists():
            say(f"stopped; '{state}' keeps the run: repeat the command with --resume", err=True)
        raise
    if not speaks:
        return
    save_model(model, output, overwrite=overwrite)
    remove_state_folder(state)
    say_fitted(model, output)


def state_folder(output: str | Path) -> Path:
    """Return where the state of a run towards ``output`` lies."""
    if is_uri(output):
        return Path(f"{str(output).rstrip('/').rpartition('/')[2]}.partial")
    return partial_folder(output)


def save_model(model: Tokenizer, output: str | Path, *, overwrite: bool) -> None:
    """Save to a folder or a URI; ``config.json``, which readers look for, is sent last."""
    if not is_uri(output):
        model.save(output, overwrite=overwrite)
        return
    with tempfile.TemporaryDirectory(prefix="semid-") as work:
        model.save(Path(work) / "model")
        send_folder(Path(work) / "model", str(output), last="config.json")


def say_fitted(model: Tokenizer, output: str | Path) -> None:
    """Say how a fit went and where the model is."""
    if model.report is not None:
        say(
            f"fitted {model.kind} on {model.report.trained_items:,} items in "
            f"{model.report.seconds:,.1f} s"
        )
        say(model.report.summary)
    say(f"model: {output}")
