"""The training loop of every model in semid: steps, evaluation, selection, checkpoints.

The randomness of a step is a function of the seed and of the step's number, so a run that was
stopped continues to the same bits on the same device.
"""

from __future__ import annotations

import ctypes
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from semid.errors import DivergedError
from semid.progress import Progress
from semid.seeds import child_seed
from semid.training.checkpoint import (
    StateStore,
    load_module_,
    load_optimizer_,
    module_arrays,
    optimizer_arrays,
    with_prefix,
    without_prefix,
)
from semid.training.distributed import (
    all_sum_,
    broadcast_from_rank0,
    explained_ends,
    in_parallel,
    is_main,
    join_processes,
    rank,
    world_size,
)
from semid.training.loggers import Logger
from semid.training.options import TrainOptions, learning_rate, resolve_precision

logger = logging.getLogger(__name__)

DIVERGENCE_FACTOR = 1e4
"""A loss this many times that of the first step counts as divergence, although it is finite."""


class Step(NamedTuple):
    """What ``forward`` returns: the mean loss over its rows, and detached scalars to show."""

    loss: Tensor
    logs: dict[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model after an epoch."""

    score: float  # criterion for the best epoch; one that is not finite loses to any other
    higher_is_better: bool = False  # direction of ``score``
    healthy: bool = True  # an unhealthy model loses to any healthy one
    logs: dict[str, float] = field(default_factory=dict)  # figures to log, by name

    def rank(self) -> tuple[bool, float]:
        """Return a key that is larger for better evaluations; healthy ones come first."""
        score = self.score if self.higher_is_better else -self.score
        return self.healthy and math.isfinite(score), score if math.isfinite(score) else -math.inf


NOT_EVALUATED = Evaluation(math.inf)
"""Stands for an epoch between two evaluations: without a score, and never the best."""


class TrainingTask(Protocol):
    """A model, its batches and its evaluation: what the loop trains.

    It may also have ``optimizer(options)``, which returns the optimizer to use instead of AdamW
    over all parameters; a parameter group's ``rate`` then multiplies the learning rate of a step.
    """

    module: nn.Module  # ``forward(batch)`` returns a `Step`; state is in parameters and buffers
    steps_per_epoch: int  # optimizer steps per epoch, the same in every process

    def start_epoch(self, epoch: int) -> None:
        """Prepare for an epoch (not called again for one that is resumed midway)."""
        ...

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Any, float]]:
        """Yield this process's ``(batch, weight)`` of an epoch from step ``first`` on."""
        ...

    def evaluate(self, epoch: int) -> Evaluation:
        """Evaluate the model; called in every process, the result of rank 0 is used."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run; the module has the weights of the best epoch."""

    best_epoch: int
    best: Evaluation
    first: Evaluation  # the first evaluation with a score
    epochs: int
    stopped_early: bool  # whether patience ran out
    precision: str
    history: tuple[dict[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what a report needs, JSON-able."""
        return {
            "best_epoch": self.best_epoch,
            "best_score": self.best.score,
            "best_healthy": self.best.healthy,
            "first_score": self.first.score,
            "epochs": self.epochs,
            "stopped_early": self.stopped_early,
            "precision": self.precision,
            "history": list(self.history),
        }


@explained_ends()
def train(
    task: TrainingTask,
    options: TrainOptions,
    *,
    seed: int,
    progress: Progress,
    store: StateStore | None = None,
    log: Logger | None = None,
    title: str = "train",
) -> TrainResult:
    """Train until the epochs or the patience run out, and put the best epoch's weights back.

    `Evaluation.rank` decides which epoch is best. ``store`` receives the state at the start, at the
    end of every epoch, every ``checkpoint_seconds`` within an epoch, and when the run is stopped
    (its step is finished first). A loss or weight that is not finite, or a loss of more than
    `DIVERGENCE_FACTOR` times the first, is a `DivergedError`: the store keeps the last good state
    and the module its weights.

    Under ``torchrun`` each process takes its share of every batch. All end with the same weights,
    and a stop signal to one of them stops all after the same step.
    """
    join_processes()
    device = next(task.module.parameters()).device
    with (
        deferred_interrupts() as interrupts,
        reused_buffers(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        run = _Run(task, options, seed=seed, store=store, progress=progress, device=device)
        return run.to_end(interrupts, log, title)


def _figures(evaluation: Evaluation) -> dict[str, float]:
    """Return what is logged of an evaluation; an epoch that cannot be chosen has no score."""
    score = {"score": evaluation.score} if math.isfinite(evaluation.score) else {}
    return {**score, **evaluation.logs}


class _Run:
    """State of one call of `train`."""

    def __init__(
        self,
        task: TrainingTask,
        options: TrainOptions,
        *,
        seed: int,
        store: StateStore | None,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.task, self.options, self.seed = task, options, seed
        self.store, self.progress, self.device = store, progress, device
        self.module = task.module
        make_optimizer = getattr(task, "optimizer", None)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(
                [p for p in self.module.parameters() if p.requires_grad],
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
                fused=True,
            )
            if make_optimizer is None
            else make_optimizer(options)
        )
        self.precision = resolve_precision(options.precision, device)
        self.total = options.epochs * task.steps_per_epoch
        self.step = 0
        self.first_loss: float | None = None
        self.evaluations: list[Evaluation] = []
        self.best_epoch = -1
        self.best_arrays: dict[str, np.ndarray] = {}
        self.started_epoch = -1  # last epoch for which start_epoch was called
        self.stopping = False
        # A state holds all that a step depends on, so that the run continues to the same bits.
        state = None if store is None else store.state
        if state is not None:
            self._restore(*state)
        self.forward = in_parallel(self.module)
        self.saved_at = time.monotonic()

    def to_end(self, interrupts: Interrupts, log: Logger | None, title: str) -> TrainResult:
        """Run the remaining steps and return the result."""
        per_epoch, total = self.task.steps_per_epoch, self.total
        self.progress.start(title, total=total)
        self.progress.step(self.step)
        while self.step < total and not self._exhausted():
            # A resumed run begins inside an epoch, whose first steps are skipped.
            epoch, done = divmod(self.step, per_epoch)
            if epoch > self.started_epoch:
                self.task.start_epoch(epoch)
                self.started_epoch = epoch
                self._save()
            self._epoch(epoch, done, interrupts)
            self._evaluate(epoch, log)
            self._save()
            if self._should_stop(interrupts):
                raise KeyboardInterrupt
        if interrupts.pending:  # too late to tell the other processes; all is saved
            raise KeyboardInterrupt
        best = self.evaluations[self.best_epoch]
        if not math.isfinite(best.score) and not best.higher_is_better:
            self._diverged("no epoch ended with a finite error")
        load_module_(self.module, self.best_arrays)
        if not best.healthy:
            logger.warning("no epoch was healthy; the one with the best score is kept")
        return TrainResult(
            best_epoch=self.best_epoch,
            best=best,
            first=next((e for e in self.evaluations if math.isfinite(e.score)), best),
            epochs=len(self.evaluations),
            stopped_early=self._exhausted() and len(self.evaluations) < self.options.epochs,
            precision=self.precision,
            history=tuple(_figures(e) for e in self.evaluations),
        )

    def _is_evaluated(self, epoch: int) -> bool:
        done = epoch + 1
        return done % self.options.evaluate_every == 0 or done == self.options.epochs

    def _exhausted(self) -> bool:
        patience = self.options.patience
        # An epoch without an evaluation may be the best one, so nothing ends with it.
        if (
            patience is None
            or self.best_epoch < 0
            or not self._is_evaluated(len(self.evaluations) - 1)
        ):
            return False
        scored = math.isfinite(self.evaluations[self.best_epoch].score)
        return scored and len(self.evaluations) - 1 - self.best_epoch >= patience

    def _epoch(self, epoch: int, done: int, interrupts: Interrupts) -> None:
        self.forward.train()
        for batch, weight in self.task.batches(epoch, done):
            loss, logs = self._step(batch, weight, interrupts.pending)
            last = (self.step % self.task.steps_per_epoch) == 0
            try:
                self.progress.step(1, epoch=epoch, loss=loss, **logs)
            except KeyboardInterrupt:
                interrupts.pending = True
            if last:
                return  # the state is saved after the evaluation
            if self._should_stop(interrupts):
                self._save()
                raise KeyboardInterrupt
            if time.monotonic() - self.saved_at >= self.options.checkpoint_seconds:
                self._save()

    def _should_stop(self, interrupts: Interrupts) -> bool:
        """Whether to stop here; several processes stop after the same step."""
        return self.stopping if world_size() > 1 else interrupts.pending

    def _step(self, batch: Any, weight: float, stop: bool) -> tuple[float, dict[str, float]]:
        options = self.options
        self._seed_step()
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("rate", 1.0) * learning_rate(
                self.step,
                total=self.total,
                peak=options.learning_rate,
                schedule=options.schedule,
                warmup=options.warmup,
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            result: Step = self.forward(batch)
        # One reduction carries both the mean loss and whether any process was asked to stop.
        share = result.loss.detach() * weight
        total, stops = all_sum_(torch.stack([share, share.new_tensor(float(stop))])).tolist()
        loss, self.stopping = total / world_size(), stops > 0
        # A loss that has exploded is refused before it reaches the weights.
        if self.first_loss is None:
            self.first_loss = loss
        if not math.isfinite(loss) or loss > DIVERGENCE_FACTOR * max(self.first_loss, 1e-12):
            self._diverged(f"the loss became {loss:.4g}")
        self.optimizer.zero_grad(set_to_none=True)
        (result.loss * weight).backward()  # type: ignore[no-untyped-call]
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), options.clip_norm)
        self.optimizer.step()
        self.step += 1
        return loss, {name: float(value) for name, value in result.logs.items()}

    def _seed_step(self) -> None:
        """Seed a step by the seed of the run and the step's number."""
        # torch.manual_seed queues a call with a stack trace for every absent kind of device, which
        # costs more than a small step and accumulates.
        seed = child_seed(self.seed, "step", self.step, rank())
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _evaluate(self, epoch: int, log: Logger | None) -> None:
        if not self._is_evaluated(epoch):
            self.evaluations.append(NOT_EVALUATED)
            return
        self.module.eval()
        with torch.no_grad():
            evaluation = broadcast_from_rank0(self.task.evaluate(epoch), self.device)
        self.module.train()
        self.evaluations.append(evaluation)
        if self.best_epoch < 0 or evaluation.rank() > self.evaluations[self.best_epoch].rank():
            self.best_epoch = epoch
            self.best_arrays = module_arrays(self.module)
        if log is not None and is_main():
            log.log({"epoch": epoch, **_figures(evaluation)}, step=self.step)

    def _diverged(self, what: str) -> None:
        advice = ""
        if self.best_arrays:
            load_module_(self.module, self.best_arrays)
        if self.store is not None:
            advice = "; the last good state is kept in the checkpoint"
        raise DivergedError(
            f"training diverged at step {self.step}: {what} (learning_rate="
            f"{self.options.learning_rate:g}, clip_norm={self.options.clip_norm}); lower "
            f"--learning-rate (learning_rate) tenfold, or set clip_norm{advice}"
        )

    def _save(self) -> None:
        model = module_arrays(self.module)
        if not all(np.isfinite(a).all() for a in model.values() if a.dtype.kind == "f"):
            self._diverged("a weight is not finite")
        self.saved_at = time.monotonic()
        if self.store is None or not is_main():
            return
        arrays = {
            **with_prefix("model.", model),
            **with_prefix("best.", self.best_arrays),
            **with_prefix("optimizer.", optimizer_arrays(self.optimizer)),
        }
        record = {
            "step": self.step,
            "begun": self.started_epoch,
            "first_loss": self.first_loss,
            "best_epoch": self.best_epoch,
            "precision": self.precision,
            "evaluations": [dict(vars(e)) for e in self.evaluations],
        }
        self.store.save(arrays, record)

    def _restore(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        load_module_(self.module, without_prefix("model.", arrays))
        load_optimizer_(self.optimizer, without_prefix("optimizer.", arrays))
        self.best_arrays = without_prefix("best.", arrays)
        self.step, self.started_epoch = record["step"], record["begun"]
        self.first_loss, self.best_epoch = record["first_loss"], record["best_epoch"]
        self.precision = record["precision"]
        self.evaluations = [Evaluation(**e) for e in record["evaluations"]]


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@contextmanager
def reused_buffers() -> Iterator[None]:
    """Let glibc keep freed memory for the next step; other C libraries are left as they are.

    A step needs the buffers of the step before. glibc maps large ones anew each time and gives
    them back after use: the page faults take up to a tenth of training on a CPU.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim, _ = libc.mallopt, libc.malloc_trim, libc.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        yield
        return
    # Buffers of up to 32 MB, the most that glibc allows, come from the heap, which stays.
    mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # glibc's own adjustment, which a call of mallopt ends, stops at these values.
        mallopt(M_TRIM_THRESHOLD, 2**26)
        trim(0)


@dataclass
class Interrupts:
    """Whether a signal asked the run to stop."""

    pending: bool = False

    def ask(self, *signal_and_frame: Any) -> None:
        """Handle a signal; a second one stops at once."""
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Yield an object whose ``pending`` turns true on SIGINT or SIGTERM."""
    # Python allows handlers in the main thread alone; they are put back at the end.
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, interrupts.ask)
    try:
        yield interrupts
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
