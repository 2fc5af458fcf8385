"""Where the figures of a training run go."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from semid.errors import MissingExtraError, UsageError


class Logger(Protocol):
    """What the loop reports figures to."""

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Record the figures of one step or epoch; ``step`` counts optimizer steps."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


# How to record figures, and how to end; None if there is nothing to end.
_Sink = tuple[Callable[..., Any], Callable[[], Any] | None]


def _open_json_lines(path: str) -> _Sink:
    """Append one JSON object per call to a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = Path(path).open("a", encoding="utf8")  # noqa: SIM115 - closed by close()

    def log(figures: Mapping[str, float], step: int) -> None:
        file.write(json.dumps({"step": step, **figures}) + "\n")
        file.flush()

    return log, file.close


def _open_tensorboard(folder: str) -> _Sink:
    """Write event files, one scalar per figure, where ``tensorboard --logdir`` is pointed at."""
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)

    def log(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _open_mlflow(run: str | None) -> _Sink:
    """Log to the active MLflow run, or to a new one, which is ended here."""
    mlflow = importlib.import_module("mlflow")
    if mlflow.active_run() is not None:
        return mlflow.log_metrics, None
    mlflow.start_run(run_name=run)
    return mlflow.log_metrics, mlflow.end_run


def _open_wandb(run: str | None) -> _Sink:
    """Log to a new run of Weights & Biases."""
    session = importlib.import_module("wandb").init(name=run)
    return session.log, session.finish


_KINDS: dict[str, Callable[[Any], _Sink]] = {
    "jsonl": _open_json_lines,
    "tensorboard": _open_tensorboard,
    "mlflow": _open_mlflow,
    "wandb": _open_wandb,
}


class _DeferredLogger:
    """A logger that is opened by its first figures, so that a refused run leaves no empty log."""

    def __init__(self, kind: str, where: str | None) -> None:
        self._kind, self._where = kind, where
        self._sink: _Sink | None = None

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Record figures."""
        if self._sink is None:
            self._sink = _KINDS[self._kind](self._where)
        self._sink[0](dict(figures), step=step)

    def close(self) -> None:
        """Close what was opened."""
        if self._sink is not None and self._sink[1] is not None:
            self._sink[1]()


def make_logger(text: str) -> Logger:
    """Make a logger from ``KIND:WHERE``: jsonl, tensorboard, mlflow or wandb."""
    kind, _, where = text.partition(":")
    if kind not in _KINDS or (kind in ("jsonl", "tensorboard") and not where):
        raise UsageError(
            f"--log '{text}': give jsonl:PATH, tensorboard:FOLDER, mlflow[:RUN] or wandb[:RUN]"
        )
    if kind == "jsonl" and Path(where).is_dir():
        raise UsageError(f"--log '{text}': '{where}' is a folder; give a file, such as run.jsonl")
    if kind != "jsonl":
        try:
            importlib.import_module(kind)
        except ImportError:
            raise MissingExtraError(kind, extra=kind, purpose=f"--log {kind}") from None
    return _DeferredLogger(kind, where or None)
