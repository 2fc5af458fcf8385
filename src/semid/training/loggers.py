"""Where the figures of a training run go."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from semid.errors import MissingExtraError, UsageError

__all__ = [
    "LOGGERS",
    "JsonLinesLogger",
    "Logger",
    "MLflowLogger",
    "MultiLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "make_logger",
]

LOGGERS = ("jsonl", "tensorboard", "mlflow", "wandb")


class Logger(Protocol):
    """What the loop reports figures to."""

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Take figures of one step or epoch; ``step`` counts optimizer steps."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


class JsonLinesLogger:
    """Appends one JSON object a call to a file.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("a", encoding="utf8")  # noqa: SIM115 - closed by close()

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes TensorBoard event files.

    Args:
        folder: what ``tensorboard --logdir`` is pointed at.

    Raises:
        MissingExtraError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        _need("tensorboard", extra="tensorboard", purpose="logging to TensorBoard")
        summary = importlib.import_module("torch.utils.tensorboard")
        self._writer = summary.SummaryWriter(str(folder))

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Write one scalar a figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class MLflowLogger:
    """Logs to the active MLflow run, or to one of its own.

    Args:
        run: name of the run to start if none is active.

    Raises:
        MissingExtraError: the package ``mlflow`` is not installed.
    """

    def __init__(self, run: str | None = None) -> None:
        self._mlflow = _need("mlflow", extra="mlflow", purpose="logging to MLflow")
        self._own = self._mlflow.active_run() is None
        if self._own:
            self._mlflow.start_run(run_name=run)

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Log metrics."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        """End the run if it was started here."""
        if self._own:
            self._mlflow.end_run()


class WandbLogger:
    """Logs to Weights & Biases.

    Args:
        run: name of the run.

    Raises:
        MissingExtraError: the package ``wandb`` is not installed.
    """

    def __init__(self, run: str | None = None) -> None:
        self._run = _need("wandb", extra="wandb", purpose="logging to Weights & Biases").init(
            name=run
        )

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Log figures."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MultiLogger:
    """Passes everything on to several loggers; to none, it drops it."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = tuple(loggers)

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Pass figures on."""
        for logger in self._loggers:
            logger.log(figures, step=step)

    def close(self) -> None:
        """Close all."""
        for logger in self._loggers:
            logger.close()


class _DeferredLogger:
    """A logger that is opened by its first figures, so that a refused run leaves no empty log."""

    def __init__(self, kind: type[Any], where: str | None) -> None:
        self._kind, self._where = kind, where
        self._logger: Logger | None = None

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Pass figures on."""
        if self._logger is None:
            self._logger = self._kind(self._where)
        self._logger.log(figures, step=step)

    def close(self) -> None:
        """Close the logger if it was opened."""
        if self._logger is not None:
            self._logger.close()


def make_logger(text: str) -> Logger:
    """Make a logger from ``KIND`` or ``KIND:WHERE``; its first figures open it.

    Args:
        text: ``jsonl:PATH``, ``tensorboard:FOLDER``, ``mlflow`` or ``wandb``, the last two with an
            optional ``:RUN``.

    Raises:
        UsageError: another kind, or no place for one that writes files.
        MissingExtraError: its package is not installed.
    """
    kind, _, where = text.partition(":")
    if kind not in LOGGERS or (kind in ("jsonl", "tensorboard") and not where):
        raise UsageError(
            f"--log '{text}': give jsonl:PATH, tensorboard:FOLDER, mlflow[:RUN] or wandb[:RUN]"
        )
    if kind == "jsonl" and Path(where).is_dir():
        raise UsageError(f"--log '{text}': '{where}' is a folder; give a file, such as run.jsonl")
    if kind != "jsonl":
        _need(kind, extra=kind, purpose=f"--log {kind}")
    kinds: dict[str, type[Any]] = {
        "jsonl": JsonLinesLogger,
        "tensorboard": TensorBoardLogger,
        "mlflow": MLflowLogger,
        "wandb": WandbLogger,
    }
    return _DeferredLogger(kinds[kind], where or None)


def _need(package: str, *, extra: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, extra=extra, purpose=purpose) from None
