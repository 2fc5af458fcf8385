"""Reconstruction probe: how well an item's embedding can be rebuilt from its codes' embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.codes import SemanticIds
from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.errors import InputError
from semid.progress import Progress, QuietProgress
from semid.recommenders.ranking.features import CodeFeatures, CodeTable, code_table
from semid.recommenders.ranking.layers import Perceptron
from semid.results import Result
from semid.seeds import child_seed
from semid.training.batches import epoch_batches, steps_per_epoch
from semid.training.loop import Evaluation, Step, train
from semid.training.options import TrainOptions

Ints = npt.NDArray[np.int64]

SALT = "information kept"

TRAINING: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 512,
    "learning_rate": 3e-3,
    "patience": 10,
    "clip_norm": None,
}


@dataclass(frozen=True)
class ReconstructionProbe(Result):
    """How well codes rebuild embeddings."""

    error: float  # squared error over variance on items that were held out
    train_error: float  # the same on the items trained on, at the chosen epoch
    items: int  # items trained on
    held_out: int  # items held out
    slots: int  # embeddings an item has
    epochs: int  # epochs run


class _Rebuild(nn.Module):
    """Embeddings of an item's codes, side by side, through a perceptron."""

    rows: Tensor

    def __init__(self, table: CodeTable, width: int, dim: int) -> None:
        super().__init__()
        offsets = np.cumsum([0, *table.sizes[:-1]])
        self.register_buffer("rows", torch.from_numpy(table.rows + offsets), persistent=False)
        self.table = nn.Embedding(sum(table.sizes), width)
        nn.init.normal_(self.table.weight, std=0.1)  # at 1, items rebuild noise for many epochs
        # A two-layer perceptron with 512 hidden units (MoC §3.1).
        slots = len(table.sizes)
        self.net = Perceptron(slots * width, (512,), out=dim, batch_norm=False, dropout=0.0)

    def rebuild(self, items: Tensor) -> Tensor:
        """Return ``(n, dim)`` for catalogue rows ``(n,)``."""
        rebuilt: Tensor = self.net(self.table(self.rows[items]).flatten(1))
        return rebuilt

    def forward(self, batch: tuple[Tensor, Tensor]) -> Step:
        """Return the mean squared error of items and their embeddings."""
        items, x = batch
        return Step((self.rebuild(items).float() - x).square().mean(), {})


class _Task:
    def __init__(
        self, module: _Rebuild, x: Tensor, rows: Ints, held: Ints, batch_size: int, seed: int
    ) -> None:
        self.module: nn.Module = module
        self.rebuild, self.x, self.rows, self.held = module.rebuild, x, rows, held
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = steps_per_epoch(len(rows), batch_size)

    def start_epoch(self, epoch: int) -> None:
        """Do nothing."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Any, float]]:
        """Yield catalogue rows and their embeddings."""
        batches = epoch_batches(len(self.rows), self.batch_size, seed=self.seed, epoch=epoch)
        for batch in batches[first:]:
            items = torch.from_numpy(self.rows[batch])
            yield (items + 1, self.x[items]), 1.0

    def error(self, rows: Ints) -> float:
        """Return squared error over variance of catalogue rows (from 0)."""
        # Squared error over the variance around the mean of the training items, block by block.
        total = spread = 0.0
        mean = self.x[torch.from_numpy(self.rows)].mean(0)
        for part in np.array_split(rows, max(1, len(rows) // 8192)):
            items = torch.from_numpy(part)
            x = self.x[items]
            total += float((self.rebuild(items + 1).float() - x).square().sum())
            spread += float((x - mean).square().sum())
        return total / max(spread, 1e-30)

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the held-out error."""
        return Evaluation(self.error(self.held))


def probe_reconstruction(
    embeddings: Any,
    ids: SemanticIds,
    *,
    features: CodeFeatures | None = None,
    width: int = 64,
    held_out: float = 0.1,
    training: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ReconstructionProbe:
    """Rebuild item embeddings ``(items, dim)`` from trainable embeddings of their codes.

    ``held_out`` is the share of the items for the error, chosen by a hash of their id; ``training``
    are options that differ from `TRAINING`.

    Source: MoC §3.1, fig. 1.
    """
    source = open_embeddings(embeddings)
    if len(source) != len(ids):
        raise InputError(
            f"{len(source)} embeddings and {len(ids)} ids; give one of each for every item"
        )
    table = code_table(ids, ids.items, features or CodeFeatures())
    mask = held_out_mask(ids.items, held_out, salt=SALT)
    if not mask.any() or mask.all():
        raise InputError(f"held_out={held_out} of {len(ids)} items leaves one side empty")
    rows, held = np.flatnonzero(~mask), np.flatnonzero(mask)
    rebuilt = source.rows(np.arange(len(source)))
    # Elements of unit embeddings with hundreds of dimensions vary by hundredths, far from the
    # outputs of a new network; the share of the variance is the same in any unit.
    rebuilt = rebuilt - rebuilt[rows].mean(axis=0)
    x = torch.from_numpy(rebuilt / max(float(np.sqrt(np.square(rebuilt[rows]).mean())), 1e-12))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(child_seed(seed, "kept"))
        module = _Rebuild(table, width, x.shape[1])
    options = TrainOptions.of(training, defaults=TRAINING)
    task = _Task(module, x, rows, held, options.batch_size, seed)
    result = train(
        task, options, seed=seed, progress=progress or QuietProgress(), title="information kept"
    )
    module.eval()
    with torch.no_grad():
        return ReconstructionProbe(
            error=task.error(held),
            train_error=task.error(rows),
            items=len(rows),
            held_out=len(held),
            slots=len(table.sizes),
            epochs=result.epochs,
        )
