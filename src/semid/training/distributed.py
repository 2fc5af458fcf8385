"""The few words a model needs to train in several processes; all are no-ops in one.

``torchrun`` sets the environment, `join_processes` reads it, and `in_parallel` wraps the model in
`torch.nn.parallel.DistributedDataParallel`. Nothing else in semid knows of processes.
"""

from __future__ import annotations

import atexit
import inspect
import os
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "all_sum_",
    "broadcast_from_rank0",
    "in_parallel",
    "is_main",
    "join_processes",
    "local_rank",
    "neighbors",
    "rank",
    "world_size",
]

T = TypeVar("T")


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def _started() -> int:
    """Count the processes that ``torchrun`` started, whether they have met yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes() -> None:
    """Meet the processes that ``torchrun`` started, unless that has been done.

    The group stays until the program ends, however many fits it serves. Groups made and destroyed
    one after another do not meet: ``torchrun``'s store outlives a group, and the next one finds
    the addresses that the last one left there, at which nobody listens any more.
    """
    if _started() == 1 or not dist.is_available() or dist.is_initialized():
        return
    if torch.cuda.is_available() and dist.is_nccl_available():
        dist.init_process_group("cpu:gloo,cuda:nccl")
        atexit.register(_leave)  # NCCL complains of a program that ends without
    else:
        dist.init_process_group("gloo")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, 0 in a single one."""
    if _ready():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if _started() > 1 else 0


def local_rank() -> int:
    """Return the number of this process on its machine, 0 in a single one."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _started() > 1 else 0


def neighbors() -> int:
    """Count the processes of this group on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _started() > 1 else 1


def world_size() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if _ready() else 1


def is_main() -> bool:
    """Say whether this process is the one that writes files and speaks."""
    return rank() == 0


def all_sum_(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank0(value: T, device: torch.device) -> T:
    """Return the first process's ``value``, in every process.

    For what decides how long a run goes on: machines of different makes may round an evaluation
    differently, and a process that stops alone leaves the others waiting.

    Args:
        value: what this process has found; anything that can be pickled.
        device: where the model lies.
    """
    if world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0, device=device)
    return told[0]


def in_parallel(module: nn.Module) -> nn.Module:
    """Return ``module`` with gradients averaged over all processes; itself in a single one.

    Buffers are what `all_sum_` made equal, so they are not sent again before every step.
    """
    if world_size() == 1:
        return module
    wrap = nn.parallel.DistributedDataParallel
    known = inspect.signature(wrap).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, bool] = {name: False}
    return wrap(module, **options)  # type: ignore[arg-type]
