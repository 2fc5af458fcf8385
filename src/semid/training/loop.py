"""The training loop of every model in semid: steps, evaluation, selection, checkpoints.

It knows a model that gives a loss, batches, and an evaluation, and nothing of what is trained.
All randomness of a step is a function of the seed and the step's number, so a run that was stopped
continues to the same bits on the same device.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from semid.errors import DivergedError
from semid.progress import Progress
from semid.seeds import child_seed
from semid.training.distributed import (
    all_sum_,
    broadcast_from_rank0,
    in_parallel,
    is_main,
    join_processes,
    rank,
    world_size,
)
from semid.training.interrupt import Interrupts, deferred_interrupts
from semid.training.loggers import Logger, MultiLogger
from semid.training.options import TrainOptions
from semid.training.precision import resolve_precision
from semid.training.schedule import learning_rate
from semid.training.stages import StateStore
from semid.training.state import load_module_, load_optimizer_, module_arrays, optimizer_arrays

__all__ = ["BLOWN_UP", "Evaluation", "Step", "TrainResult", "Trainee", "train"]

logger = logging.getLogger(__name__)

BLOWN_UP = 1e4
"""A loss so many times the first step's counts as divergence, although it is still finite."""


class Step(NamedTuple):
    """What a model's ``forward`` returns.

    Attributes:
        loss: scalar to be minimized, a mean over this process's rows.
        logs: detached scalars worth seeing, by name.
    """

    loss: Tensor
    logs: dict[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """How good a model is after an epoch.

    Attributes:
        score: what checkpoints are chosen by; one that is not finite is never chosen while there
            is another.
        higher_is_better: the direction of ``score``.
        healthy: whether the model may be chosen while a healthy one exists.
        logs: figures worth keeping, by name.
    """

    score: float
    higher_is_better: bool = False
    healthy: bool = True
    logs: dict[str, float] = field(default_factory=dict)

    def rank(self) -> tuple[bool, float]:
        """Return a key that is larger for better evaluations; healthy ones come first."""
        score = self.score if self.higher_is_better else -self.score
        return self.healthy and math.isfinite(score), score if math.isfinite(score) else -math.inf


class Trainee(Protocol):
    """What the loop trains.

    Attributes:
        module: its ``forward(batch)`` returns a `Step`; what it has to remember lies in its
            parameters and buffers.
        steps_per_epoch: optimizer steps an epoch, the same in every process.

    It may also have ``optimizer(options)``, which returns the optimizer to use instead of AdamW
    over all parameters; a parameter group's ``rate`` then multiplies the learning rate of a step.
    """

    module: nn.Module
    steps_per_epoch: int

    def start_epoch(self, epoch: int) -> None:
        """Prepare for an epoch (not called again for one that is resumed midway)."""
        ...

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Any, float]]:
        """Yield this process's ``(batch, weight)`` of an epoch from step ``first`` on.

        The weight corrects for unequal shares of a batch, see `semid.training.batches.own_share`.
        """
        ...

    def evaluate(self, epoch: int) -> Evaluation:
        """Judge the model as it is; called in every process, the first one's word counts."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. The module holds the best epoch's weights.

    Attributes:
        best_epoch: number of the chosen epoch, from 0.
        best: its evaluation.
        first: the first evaluation with a score.
        epochs: epochs run.
        stopped_early: whether patience ran out.
        precision: ``fp32`` or ``bf16``.
        history: figures of every epoch.
    """

    best_epoch: int
    best: Evaluation
    first: Evaluation
    epochs: int
    stopped_early: bool
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


def train(
    trainee: Trainee,
    options: TrainOptions,
    *,
    seed: int,
    progress: Progress,
    store: StateStore | None = None,
    log: Logger | None = None,
    task: str = "train",
) -> TrainResult:
    """Train until the epochs or the patience run out, and put the best epoch's weights back.

    Args:
        trainee: the model, its batches and its evaluation.
        options: how the run is conducted.
        seed: any integer; decides dropout and everything else drawn during a step.
        progress: told about every step.
        store: where the state is kept: at the start, at the end of every epoch, within an epoch
            every ``checkpoint_seconds``, and when the run is stopped; None keeps nothing.
        log: told the figures of every epoch.
        task: name shown by ``progress``.

    Returns:
        How it went. `Evaluation.rank` decides which epoch is best.

    Raises:
        DivergedError: the loss or a weight is not finite, or the loss is `BLOWN_UP`. The store
            keeps the last good state and the module its weights.
        KeyboardInterrupt: the run was stopped; the step it was in is finished and saved.

    Runs unchanged under ``torchrun``: each process takes its share of every batch, all end with the
    same weights, and a wish to stop in one of them stops all after the same step.
    """
    join_processes()
    device = next(trainee.module.parameters()).device
    with (
        deferred_interrupts() as interrupts,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        run = _Run(trainee, options, seed=seed, store=store, progress=progress, device=device)
        return run.to_end(interrupts, log or MultiLogger(), task)


def _figures(found: Evaluation) -> dict[str, float]:
    """Return what is logged of an evaluation; an epoch that cannot be chosen has no score."""
    score = {"score": found.score} if math.isfinite(found.score) else {}
    return {**score, **found.logs}


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        trainee: Trainee,
        options: TrainOptions,
        *,
        seed: int,
        store: StateStore | None,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.trainee, self.options, self.seed = trainee, options, seed
        self.store, self.progress, self.device = store, progress, device
        self.module = trainee.module
        # A trainee may bring an optimizer of its own; a group's "rate" is a multiple of the rate.
        make = getattr(trainee, "optimizer", None)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(
                [p for p in self.module.parameters() if p.requires_grad],
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
                fused=True,
            )
            if make is None
            else make(options)
        )
        self.precision = resolve_precision(options.precision, device)
        self.step = 0
        self.first_loss: float | None = None
        self.evaluations: list[Evaluation] = []
        self.best_epoch = -1
        self.best_arrays: dict[str, np.ndarray] = {}
        self.begun = -1  # the last epoch that start_epoch was called for
        self.stopping = False
        found = None if store is None else store.state
        if found is not None:
            self._restore(*found)
        self.forward = in_parallel(self.module)
        self.saved_at = time.monotonic()

    def to_end(self, interrupts: Interrupts, log: Logger, task: str) -> TrainResult:
        """Run what is left and return the result."""
        per_epoch, total = self.trainee.steps_per_epoch, self._total()
        self.progress.start(task, total=total)
        self.progress.step(self.step)
        while self.step < total and not self._exhausted():
            epoch, done = divmod(self.step, per_epoch)
            if epoch > self.begun:
                self.trainee.start_epoch(epoch)
                self.begun = epoch
                self._save()
            self._epoch(epoch, done, interrupts)
            self._judge(epoch, log)
            self._save()
            if self._asked(interrupts):
                raise KeyboardInterrupt
        if interrupts.pending:  # too late for the others to hear of it; all is saved
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

    def _total(self) -> int:
        return self.options.epochs * self.trainee.steps_per_epoch

    def _exhausted(self) -> bool:
        patience = self.options.patience
        if patience is None or self.best_epoch < 0:
            return False
        scored = math.isfinite(self.evaluations[self.best_epoch].score)
        return scored and len(self.evaluations) - 1 - self.best_epoch >= patience

    def _epoch(self, epoch: int, done: int, interrupts: Interrupts) -> None:
        self.forward.train()
        for batch, weight in self.trainee.batches(epoch, done):
            loss, logs = self._step(batch, weight, interrupts.pending)
            last = (self.step % self.trainee.steps_per_epoch) == 0
            try:
                self.progress.step(1, epoch=epoch, loss=loss, **logs)
            except KeyboardInterrupt:
                interrupts.pending = True
            if last:
                return  # the state is saved after the evaluation
            if self._asked(interrupts):
                self._save()
                raise KeyboardInterrupt
            if time.monotonic() - self.saved_at >= self.options.checkpoint_seconds:
                self._save()

    def _asked(self, interrupts: Interrupts) -> bool:
        """Say whether to stop here: of several processes, only where all know of it."""
        return self.stopping if world_size() > 1 else interrupts.pending

    def _step(self, batch: Any, weight: float, stop: bool) -> tuple[float, dict[str, float]]:
        options = self.options
        self._seed_step()
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("rate", 1.0) * learning_rate(
                self.step,
                total=self._total(),
                peak=options.learning_rate,
                schedule=options.schedule,
                warmup=options.warmup,
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            result: Step = self.forward(batch)
        own = result.loss.detach() * weight
        total, asked = all_sum_(torch.stack([own, own.new_tensor(float(stop))])).tolist()
        loss, self.stopping = total / world_size(), asked > 0
        if self.first_loss is None:
            self.first_loss = loss
        if not math.isfinite(loss) or loss > BLOWN_UP * max(self.first_loss, 1e-12):
            self._diverged(f"the loss became {loss:.4g}")
        self.optimizer.zero_grad(set_to_none=True)
        (result.loss * weight).backward()  # type: ignore[no-untyped-call]
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), options.clip_norm)
        self.optimizer.step()
        self.step += 1
        return loss, {name: float(value) for name, value in result.logs.items()}

    def _seed_step(self) -> None:
        """Make what is drawn in a step a function of the seed and the step's number.

        Not by `torch.manual_seed`: it queues a call for every kind of device that is absent, with
        a stack trace each, which costs more than a small step and never ends.
        """
        seed = child_seed(self.seed, "step", self.step, rank())
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _judge(self, epoch: int, log: Logger) -> None:
        self.module.eval()
        with torch.no_grad():
            found = broadcast_from_rank0(self.trainee.evaluate(epoch), self.device)
        self.module.train()
        self.evaluations.append(found)
        if self.best_epoch < 0 or found.rank() > self.evaluations[self.best_epoch].rank():
            self.best_epoch = epoch
            self.best_arrays = module_arrays(self.module)
        if is_main():
            log.log({"epoch": epoch, **_figures(found)}, step=self.step)

    def _diverged(self, what: str) -> None:
        kept = ""
        if self.best_arrays:
            load_module_(self.module, self.best_arrays)
        if self.store is not None:
            kept = "; the last good state is kept in the checkpoint"
        raise DivergedError(
            f"training diverged at step {self.step}: {what} (learning_rate="
            f"{self.options.learning_rate:g}, clip_norm={self.options.clip_norm}); lower "
            f"--learning-rate (learning_rate) tenfold, or set clip_norm{kept}"
        )

    def _save(self) -> None:
        model = module_arrays(self.module)
        if not all(np.isfinite(a).all() for a in model.values() if a.dtype.kind == "f"):
            self._diverged("a weight is not finite")
        self.saved_at = time.monotonic()
        if self.store is None or not is_main():
            return
        arrays = {f"model.{name}": array for name, array in model.items()}
        arrays |= {f"best.{name}": array for name, array in self.best_arrays.items()}
        arrays |= {f"optimizer.{n}": a for n, a in optimizer_arrays(self.optimizer).items()}
        record = {
            "step": self.step,
            "begun": self.begun,
            "first_loss": self.first_loss,
            "best_epoch": self.best_epoch,
            "precision": self.precision,
            "evaluations": [dict(vars(e)) for e in self.evaluations],
        }
        self.store.save(arrays, record)

    def _restore(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {
                name.removeprefix(prefix): array
                for name, array in arrays.items()
                if name.startswith(prefix)
            }

        load_module_(self.module, part("model."))
        load_optimizer_(self.optimizer, part("optimizer."))
        self.best_arrays = part("best.")
        self.step, self.begun = record["step"], record["begun"]
        self.first_loss, self.best_epoch = record["first_loss"], record["best_epoch"]
        self.precision = record["precision"]
        self.evaluations = [Evaluation(**e) for e in record["evaluations"]]
