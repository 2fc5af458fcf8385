"""Where the figures of a training run go."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from semid.errors import UsageError, import_extra


class Logger(Protocol):
    """What the loop reports figures to."""

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Record the figures of one step or epoch; ``step`` counts optimizer steps."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


class _Tracker(Protocol):
    """A place that is open; `RunLogger` says when each method is called."""

    def start(self, parameters: Mapping[str, Any]) -> None: ...

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def finish(self, verdict: str, model: Path | None) -> None: ...

    def close(self, failed: bool) -> None: ...


class _JsonLines:
    """One JSON object per line: the parameters, the figures of each step, the verdict."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("a", encoding="utf8")  # noqa: SIM115 - closed by close()

    def start(self, parameters: Mapping[str, Any]) -> None:
        self._write({"parameters": dict(parameters)})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **figures})

    def finish(self, verdict: str, model: Path | None) -> None:
        self._write({"verdict": verdict, "model": None if model is None else str(model)})

    def close(self, failed: bool) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()


class _TensorBoard:
    """Event files, one scalar per figure, where ``tensorboard --logdir`` is pointed at."""

    def __init__(self, folder: str) -> None:
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)

    def start(self, parameters: Mapping[str, Any]) -> None:
        lines = [f"    {name} = {value}" for name, value in parameters.items()]
        self._writer.add_text("parameters", "\n".join(lines))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, verdict: str, model: Path | None) -> None:
        self._writer.add_text("verdict", verdict)
        self._writer.add_text("model", str(model))

    def close(self, failed: bool) -> None:
        self._writer.close()


class _MLflow:
    """The active MLflow run, or a new one, which is ended here."""

    def __init__(self, run: str | None) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._is_new = self._mlflow.active_run() is None
        if self._is_new:
            self._mlflow.start_run(run_name=run)

    def start(self, parameters: Mapping[str, Any]) -> None:
        # MLflow refuses values of more than 6,000 characters.
        self._mlflow.log_params({name: str(value)[:6000] for name, value in parameters.items()})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        # MLflow's names have no "@".
        named = {name.replace("@", "_at_"): value for name, value in figures.items()}
        self._mlflow.log_metrics(named, step=step)

    def finish(self, verdict: str, model: Path | None) -> None:
        self._mlflow.set_tag("verdict", verdict)
        if model is not None:
            self._mlflow.log_artifacts(str(model), artifact_path="model")

    def close(self, failed: bool) -> None:
        if self._is_new:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _WeightsAndBiases:
    """A new run of Weights & Biases."""

    def __init__(self, run: str | None) -> None:
        self._wandb = importlib.import_module("wandb")
        self._session = self._wandb.init(name=run)

    def start(self, parameters: Mapping[str, Any]) -> None:
        self._session.config.update(dict(parameters))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._session.log(dict(figures), step=step)

    def finish(self, verdict: str, model: Path | None) -> None:
        self._session.summary.update({"verdict": verdict})
        if model is not None:
            artifact = self._wandb.Artifact(f"model-{self._session.id}", type="model")
            artifact.add_dir(str(model))
            self._session.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self._session.finish(exit_code=int(failed))


_KINDS: dict[str, Callable[[Any], _Tracker]] = {
    "jsonl": _JsonLines,
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WeightsAndBiases,
}


class RunLogger:
    """The record of one run: parameters, figures of each step, and at the end verdict and model.

    It is opened by what is first recorded, so that a refused run leaves no empty log. As a context
    manager it ends the run, as failed after an exception.
    """

    def __init__(self, kind: str, where: str | None) -> None:
        self._kind, self._where = kind, where
        self._tracker: _Tracker | None = None
        self._step = 0
        self.parameters: Mapping[str, Any] = {}  # recorded when the log is opened

    def _opened(self) -> _Tracker:
        if self._tracker is None:
            self._tracker = _KINDS[self._kind](self._where)
            self._tracker.start(dict(_flat(self.parameters)))
        return self._tracker

    def log(self, figures: Mapping[str, float], *, step: int) -> None:
        """Record figures."""
        self._step = step
        self._opened().log(figures, step)

    def finish(
        self, verdict: str, figures: Mapping[str, float | None], model: str | os.PathLike[str]
    ) -> None:
        """Record the verdict, the final figures, and the model's folder, if it is no URI."""
        # Trackers show the figures of the last step: the final ones are not to be older.
        numbers = {name: value for name, value in figures.items() if value is not None}
        self.log(numbers, step=self._step)
        folder = Path(model)
        self._opened().finish(verdict, folder if folder.is_dir() else None)

    def close(self, failed: bool = False) -> None:
        """Close what was opened."""
        if self._tracker is not None:
            self._tracker.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested parameters under names such as ``training.epochs``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def make_logger(text: str) -> RunLogger:
    """Make a logger from ``KIND:WHERE``: jsonl, tensorboard, mlflow or wandb."""
    kind, _, where = text.partition(":")
    if kind not in _KINDS or (kind in ("jsonl", "tensorboard") and not where):
        raise UsageError(
            f"--log '{text}': give jsonl:PATH, tensorboard:FOLDER, mlflow[:RUN] or wandb[:RUN]"
        )
    if kind == "jsonl" and Path(where).is_dir():
        raise UsageError(f"--log '{text}': '{where}' is a folder; give a file, such as run.jsonl")
    if kind != "jsonl":
        import_extra(kind, extra=kind, purpose=f"--log {kind}")
    return RunLogger(kind, where or None)
