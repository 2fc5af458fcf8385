"""Training of a next-item model: its task for the training loop, and `train_retriever`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from semid.codes import SemanticIds
from semid.errors import InteractionsError
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.recommenders.ranking.training import training_device
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import Packed, RetrievalData, pack, prepare_retrieval_data
from semid.recommenders.retrieval.evaluation import target_ranks
from semid.recommenders.retrieval.metrics import user_metrics
from semid.recommenders.retrieval.networks import NextItemModel, make_model
from semid.recommenders.retrieval.retriever import Retriever
from semid.training.batches import epoch_batches, process_share, steps_per_epoch
from semid.training.checkpoint import open_checkpoint, run_key
from semid.training.distributed import rank, world_size
from semid.training.loggers import Logger
from semid.training.loop import Evaluation, train
from semid.training.options import TrainOptions

TRAINING: dict[str, Any] = {
    "epochs": 16,
    "batch_size": 128,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "clip_norm": 1.0,
    "patience": None,
}
"""Defaults of training; a batch counts histories. The last epochs, at low rates, gain: all run."""


class RetrievalTask:
    """Task of `semid.training.loop.train`; NDCG@10 on the validation items chooses the epoch."""

    def __init__(
        self,
        model: NextItemModel,
        data: RetrievalData,
        options: TrainOptions,
        *,
        max_length: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.module: nn.Module = model
        self.model, self.seed, self.device = model, seed, device
        self.windows = data.training(max_length)
        if not self.windows:
            raise InteractionsError(
                "no user has two items to train on besides the two that validate and test: models "
                "that are trained need some histories of four items; take popularity or text-knn"
            )
        self.batch_size, self.counts = options.batch_size, data.items.counts
        self.steps_per_epoch = steps_per_epoch(len(self.windows), options.batch_size)
        self.histories, self.targets = data.histories("validation", max_length)

    def start_epoch(self, epoch: int) -> None:
        """Do nothing: batches are a function of the epoch."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Packed, float]]:
        """Yield packed batches of histories, and each process's weight."""
        batches = epoch_batches(len(self.windows), self.batch_size, seed=self.seed, epoch=epoch)
        for rows in batches[first:]:
            share, _ = process_share(rows, rank=rank(), world=world_size())
            if not len(share):  # more processes than histories: this one repeats one for nothing
                yield pack(*([each] for each in self.windows[rows[0]])).to(self.device), 0.0
                continue
            inputs, targets = zip(*(self.windows[row] for row in share), strict=True)
            # The loss is a mean over places, so a process counts by its places.
            places = sum(map(len, targets))
            total = sum(len(self.windows[row][1]) for row in rows)
            yield pack(inputs, targets).to(self.device), places * world_size() / total

    def evaluate(self, epoch: int) -> Evaluation:
        """Return NDCG@10 on the validation items."""
        # All users are ranked among all items: a sample would choose another epoch by chance.
        ranks = target_ranks(
            *(self.model, self.histories, self.targets),
            counts=self.counts,
            device=self.device,
            lists=False,
        ).items
        figures = {name: float(values.mean()) for name, values in user_metrics(ranks).items()}
        logs = {"recall@10": figures["recall@10"]}
        return Evaluation(figures["ndcg@10"], higher_is_better=True, logs=logs)


@with_progress
def train_retriever(
    interactions: Any,
    *,
    ids: SemanticIds | None = None,
    model: str = "composed",
    embeddings: Any = None,
    items: Any = None,
    options: Any = None,
    training: TrainOptions | Mapping[str, Any] | None = None,
    cold_items: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: ProgressArgument = None,
    logger: Logger | None = None,
    **columns: Any,
) -> Retriever:
    """Train a next-item model, keep the epoch with the best validation NDCG@10, and test it.

    Each user's last item is the test target, the one before it the validation target; all earlier
    ones are trained on. All items of the catalogue are candidates.

    Args:
        interactions: the log, as `semid.read_interactions` reads it, or a `RetrievalData`.
        ids: Semantic IDs of the catalogue; models without codes take its items alone.
        model: ``popularity``, ``text-knn``, ``sasrec``, ``composed``, ``parallel``, ``generative``
            or ``tiger``.
        embeddings: vectors of the items, for ``text-knn`` and for ``text=True``.
        items: item ids of ``embeddings`` that have none.
        options: options of the model, an object or a mapping.
        training: training options; defaults in `TRAINING`.
        cold_items: share of the catalogue that is held out of all training histories.
        seed: seed of initial weights, order of histories, dropout and sampled items.
        device: ``auto`` (CUDA if available), ``cpu`` or ``cuda``.
        checkpoint: folder for the state of the run.
        resume: continue from ``checkpoint`` if it holds a state of this run.
        progress: callback that receives progress events.
        logger: logger that receives the metrics of every epoch.
        columns: ``user_column``, ``item_column``, ``time_column``, ``ties`` and ``ties_seed`` of
            the log.

    Returns:
        A `Retriever` on the CPU with the weights of the best epoch; ``report`` holds the metrics.

    Raises:
        UsageError: a value out of range, or a model without what it needs.
        InteractionsError: no order, no known item, or no user with three items.
        DivergedError: the loss is not finite.

    Cost: with a full softmax, an epoch takes time in proportion to training items times catalogue.
    """
    began, cpu = time.perf_counter(), time.process_time()
    # Options are checked before the log is read.
    kind = MODELS.load(model, flag="--model (model=)")
    model_options = kind.options.of(options)
    conduct = TrainOptions.of(training, defaults=TRAINING)
    torch_device = training_device(device)
    data = interactions
    if not isinstance(data, RetrievalData):
        data = prepare_retrieval_data(
            *(interactions,),
            ids=ids,
            embeddings=embeddings,
            items=items,
            cold_items=cold_items,
            **columns,
        )
    # Initial weights come from the seed alone, so a resumed run begins with the same ones.
    network = make_model(model, data.items, model_options, seed=seed)
    report: dict[str, Any] = {"seed": seed, "protocol": data.protocol}
    if kind.trains:
        settings = {
            "kind": "retriever",
            "model": model,
            "options": model_options.to_dict(),
            "protocol": data.protocol,
            "training": conduct.to_dict(),
            "seed": seed,
        }
        key = "" if checkpoint is None else run_key(settings, data.digest)
        # The key names the run: a checkpoint of other settings or other data is refused.
        network.to(torch_device)
        task = RetrievalTask(
            *(network, data, conduct),
            max_length=model_options.max_length,
            seed=seed,
            device=torch_device,
        )
        with open_checkpoint(checkpoint, key=key, resume=resume) as store:
            result = train(
                task,
                conduct,
                seed=seed,
                progress=progress or QuietProgress(),
                store=store,
                log=logger,
                title=model,
            )
        report["training"] = result.to_dict()
    retriever = Retriever(
        model=model,
        options=model_options,
        network=network,
        items=data.items,
        sequences=data.sequences,
        codes_info=None if ids is None else ids.info,
        report=report,
    )
    # `train` has put the weights of the best epoch back; they are measured on both targets.
    for part in ("validation", "test"):
        results = retriever.evaluate(data, part=part)
        report[part] = results.to_dict()
        retriever.results[part] = results
    network.to("cpu")
    report["seconds"] = time.perf_counter() - began
    report["cpu_seconds"] = time.process_time() - cpu
    report["parameters"] = int(np.sum([p.numel() for p in network.parameters()]))
    return retriever
