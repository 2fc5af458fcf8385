"""Training of a ranking model: optimizer, task and `train_ranker`."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semid.artefact import fingerprint
from semid.codes import SemanticIds
from semid.errors import UsageError, check_choice
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.recommenders.ranking.builder import RankingData
from semid.recommenders.ranking.features import CodeFeatures, CodeTable, code_table
from semid.recommenders.ranking.metrics import (
    auc,
    auc_difference,
    evaluate,
    log_loss,
    predict_logits,
)
from semid.recommenders.ranking.network import RankerConfig, RankingNetwork, make_network
from semid.recommenders.ranking.ranker import Ranker
from semid.recommenders.ranking.schema import BatchSource, RankingRows
from semid.training.checkpoint import open_checkpoint, run_key
from semid.training.loggers import Logger
from semid.training.loop import Evaluation, train
from semid.training.options import TrainOptions

TRAINING: dict[str, Any] = {
    "epochs": 30,
    "batch_size": 8_012,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "clip_norm": None,
    "patience": 3,
}
"""Defaults: batch size and learning rate are the MoC paper's, the others are ours."""


def rank_options(training: TrainOptions | Mapping[str, Any] | None) -> TrainOptions:
    """Return options with the defaults of ranking filled in."""
    return TrainOptions.of(training, defaults=TRAINING)


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW that updates parameters with sparse gradients only in the rows of the batch."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._update_rows(parameter, group)
                    parameter.grad = None
        return super().step(closure)

    def _update_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        # Moments and decay of a row stand still while it does not occur ("lazy" Adam, as in
        # `torch.optim.SparseAdam`); the bias correction counts all steps.
        gradient = parameter.grad.coalesce()
        # Coalesced, every row occurs once, with the sum of its gradients.
        rows, values = gradient.indices()[0], gradient.values()
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like
            state.update(
                step=torch.zeros(()), exp_avg=zeros(parameter), exp_avg_sq=zeros(parameter)
            )
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        rate = float(group["lr"])
        # Adam's moments of these rows alone, then the decoupled decay and the step.
        mean = state["exp_avg"][rows].mul_(beta1).add_(values, alpha=1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        updated = parameter[rows]
        if group["weight_decay"]:
            updated.mul_(1 - rate * group["weight_decay"])
        parameter[rows] = updated.addcdiv_(mean, scale, value=-rate / (1 - beta1**step))


def make_optimizer(
    network: RankingNetwork, options: TrainOptions, features: CodeFeatures | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer; ``features`` holds learning rate and decay of the code tables."""
    codes = [table.codes for table in network.all_tables if table.codes is not None]
    code_ids = {id(parameter) for parameter in codes}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in code_ids]
    groups: list[dict[str, Any]] = [{"params": others}]
    if codes:
        features = features or CodeFeatures()
        decay = options.weight_decay if features.weight_decay is None else features.weight_decay
        groups.append({"params": codes, "weight_decay": decay, "rate": features.rate})
    optimizer = RowwiseAdamW if network.sparse else torch.optim.AdamW
    return optimizer(
        groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )


class RankingTask:
    """Task of `semid.training.loop.train`; the validation AUC chooses the checkpoint."""

    def __init__(
        self,
        network: RankingNetwork,
        source: BatchSource,
        validation: RankingRows,
        *,
        features: CodeFeatures | None = None,
    ) -> None:
        self.module: nn.Module = network
        self.steps_per_epoch, self.batches = source.steps_per_epoch, source.batches
        self.network, self.validation, self.features = network, validation, features
        self.labels = validation.label.cpu().numpy()

    def optimizer(self, options: TrainOptions) -> torch.optim.Optimizer:
        """Return the optimizer; called by the loop."""
        return make_optimizer(self.network, options, self.features)

    def start_epoch(self, epoch: int) -> None:
        """Do nothing: batches are a function of the epoch."""

    def evaluate(self, epoch: int) -> Evaluation:
        """Return the validation AUC."""
        # The AUC alone decides; the others are for logs.
        logits = predict_logits(self.network, self.validation)
        figures = {"log_loss": log_loss(self.labels, logits)}
        if self.network.fusion is not None:
            figures["fusion_norm"] = self.network.fusion.norm()
        return Evaluation(auc(self.labels, logits), higher_is_better=True, logs=figures)


@with_progress
def train_ranker(
    data: RankingData,
    *,
    ids: SemanticIds | None = None,
    features: CodeFeatures | Mapping[str, Any] | None = None,
    config: RankerConfig | Mapping[str, Any] | None = None,
    training: TrainOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: ProgressArgument = None,
    logger: Logger | None = None,
) -> Ranker:
    """Train a ranking model, keep the epoch with the best validation AUC, and measure it.

    Args:
        data: ranking data from `prepare_ranking_data`, or a `RankingStream`.
        ids: Semantic IDs of the items; None trains without codes.
        features: how codes are used; with ids the defaults of `CodeFeatures`.
        config: architecture of the model.
        training: training options; defaults in `TRAINING`.
        seed: seed of initial weights, order of rows and dropout.
        device: ``auto`` (CUDA if available), ``cpu`` or ``cuda``.
        checkpoint: folder for the state of the run.
        resume: continue from ``checkpoint`` if it holds a state of this run.
        progress: callback that receives progress events.
        logger: logger that receives the metrics of every epoch.

    Returns:
        A `Ranker` on the CPU with the weights of the best epoch; ``report`` holds all metrics.

    Raises:
        UsageError: features without ids, or a value out of range.
        IdsError: no item has codes.
        DivergedError: the loss is not finite.
    """
    # Options are checked before anything is built.
    if ids is not None or features is not None:
        features = CodeFeatures.of(features)
    config = RankerConfig.of(config)
    options = rank_options(training)
    if ids is None and features is not None:
        raise UsageError("features= says how codes are used, but there are none: give ids=")
    table = None
    if ids is not None and features is not None:
        table = code_table(ids, data.schema.items.ids, features)
    item_id = features is None or features.item_id
    network = make_network(data.schema, table, config, item_id=item_id, seed=seed)
    whole = {
        "clip_norm": options.clip_norm is not None,
        "embedding_penalty": config.embedding_penalty > 0,
    }
    if network.sparse and any(whole.values()):
        raise UsageError(
            f"{' and '.join(name for name in whole if whole[name])} need whole tables at every "
            "step, and large ones are updated row by row: leave it out, or pass sparse=False"
        )
    torch_device = training_device(device)
    network.to(torch_device)
    # Batches bring their rows to the device; the parts that are evaluated stay there.
    held = {name: rows.to(torch_device) for name, rows in data.parts.items() if name != "train"}
    task = RankingTask(
        network,
        data.batches(options.batch_size, seed=seed, device=torch_device),
        held["validation"],
        features=features,
    )
    # The key names the run: a checkpoint of other settings or other data is refused.
    settings = {
        "kind": "ranker",
        "protocol": data.protocol,
        "architecture": config.to_dict(),
        "features": None if features is None else vars(features),
        "training": vars(options),
        "seed": seed,
    }
    key = "" if checkpoint is None else run_key(settings, data_digest(data, table))
    with open_checkpoint(checkpoint, key=key, resume=resume) as store:
        result = train(
            task,
            options,
            seed=seed,
            progress=progress or QuietProgress(),
            store=store,
            log=logger,
            title=config.model,
        )
    # `train` has put the best weights back; they are measured on every held part.
    report = {
        "protocol": _protocol(data, ids, features),
        "seed": seed,
        **evaluate(network, replace(data, parts=held)),
        **({} if network.fusion is None else {"fusion_norm": network.fusion.norm()}),
        "training": result.to_dict(),
        "parameters": network.parameter_counts(),
        "items_without_codes": None if table is None else table.without,
        "code_collisions": None if table is None else table.collisions,
    }
    network.to("cpu")
    return Ranker(
        schema=data.schema,
        network=network,
        config=config,
        features=features,
        codes=table,
        codes_info=None if ids is None else ids.info,
        report=report,
    )


def _protocol(data: RankingData, ids: SemanticIds | None, features: CodeFeatures | None) -> str:
    """Return the protocol, with the codes and how they are used."""
    if ids is None or features is None:
        return data.protocol
    return f"{data.protocol} codes={ids.info.label} use={features.mode}"


def compare_with_baseline(ranker: Ranker, baseline: Ranker, data: RankingData) -> dict[str, Any]:
    """Return what stands beside the report of a model with codes: that of one without.

    Returns:
        The metrics of ``baseline`` on each part, and ``auc_difference``: by how much the test AUC
        of ``ranker`` is above, with its standard error over test rows.
    """
    test = data.parts["test"]
    scores = [predict_logits(each.network, test) for each in (ranker, baseline)]
    figures = auc_difference(test.label.cpu().numpy(), *scores)
    value, error = (None if math.isnan(figure) else figure for figure in figures)
    parts = ("validation", "test", "cold", "slices")
    return {
        **{part: baseline.report[part] for part in parts if part in baseline.report},
        "auc_difference": {"value": value, "error": error},
    }


def training_device(device: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here."""
    available = torch.cuda.is_available()
    check_choice("--device (device=)", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not available:
        raise UsageError("--device cuda (device=) needs a GPU that torch can use; take auto or cpu")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def data_digest(data: RankingData, table: CodeTable | None = None) -> str:
    """Hash everything that a run trains on, so that a resume on other data is refused."""
    # Vocabularies and attributes, the rows of all parts in memory, the log on disk, the codes.
    digest = hashlib.sha256(fingerprint(data.schema.tensors()).encode())
    digest.update(data.log_digest.encode())
    for name, rows in sorted(data.parts.items()):
        digest.update(name.encode())
        for column in (rows, rows.history):
            for tensor in () if column is None else vars(column).values():
                if isinstance(tensor, torch.Tensor):
                    digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    if table is not None:
        digest.update(np.ascontiguousarray(table.rows).tobytes())
    return digest.hexdigest()
