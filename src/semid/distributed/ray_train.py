"""Neural tokenizers on Ray Train: the one training loop, in processes that Ray starts.

Ray Train starts the processes and joins them (gloo, or NCCL where there are GPUs), as ``torchrun``
does; from there on a tokenizer's `fit` runs unchanged, and all processes end with the same weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from semid.distributed.ray_workers import RayOptions, check_slots, connect
from semid.errors import InputError, MissingExtraError
from semid.filesystems import FilePath
from semid.loading import load_tokenizer
from semid.tokenizers.base import Tokenizer


def fit_with_ray_train(
    kind: str,
    values: dict[str, Any],
    source: FilePath,
    *,
    columns: dict[str, str | None] | None = None,
    options: RayOptions | None = None,
    checkpoint: FilePath | None = None,
    resume: bool = False,
) -> Tokenizer:
    """Fit a tokenizer in several processes.

    Returns the fitted tokenizer.
    """
    options = options or RayOptions()
    ray = connect(options)
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise MissingExtraError("ray[train]", extra="ray", purpose="Ray Train") from None
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = check_slots(ray, options)
    work = Path(tempfile.mkdtemp(prefix="semid-train-", dir=_shared(checkpoint)))
    config = {
        "kind": kind,
        "values": values,
        "source": str(source) if "://" in str(source) else os.path.abspath(source),  # noqa: PTH100
        "columns": columns or {},
        "threads": options.cpus_per_worker,
        "output": str(work / "model"),
        "checkpoint": None if checkpoint is None else str(Path(checkpoint).absolute()),
        "resume": resume,
    }
    try:
        TorchTrainer(
            _train,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus >= workers,
                resources_per_worker={"CPU": options.cpus_per_worker},
            ),
            run_config=RunConfig(storage_path=str(work / "ray"), name="semid"),
        ).fit()
        fitted: Tokenizer = load_tokenizer(work / "model")
    except ray.train.TrainingFailedError as error:
        raise InputError(
            f"a worker of Ray Train failed: {_last_line(error)}; with a checkpoint, --resume "
            "continues the run"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return fitted


def _shared(checkpoint: FilePath | None) -> str | None:
    """Put the result beside the checkpoint, on the disk that the workers share."""
    if checkpoint is None:
        return None
    parent = Path(checkpoint).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    return str(parent)


def _train(config: dict[str, Any]) -> None:
    """Run in every process: the fit that a single process would do."""
    from semid.data.embeddings import open_embeddings
    from semid.tokenizers.factory import make_tokenizer
    from semid.training.distributed import is_main

    tokenizer = make_tokenizer(config["kind"], config["values"], threads=config["threads"])
    tokenizer.fit(
        open_embeddings(config["source"], **config["columns"]),
        checkpoint=config["checkpoint"],
        resume=config["resume"],
    )
    if is_main():
        tokenizer.save(config["output"])


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
