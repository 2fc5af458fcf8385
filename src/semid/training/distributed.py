"""The few words a model needs to train in several processes; all are no-ops in one.

``torchrun`` sets the environment, `process_group` reads it, and the loop wraps the model in
`torch.nn.parallel.DistributedDataParallel`. Nothing else in semid knows of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["all_sum_", "is_main", "process_group", "rank", "world_size"]


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, 0 in a single one."""
    return dist.get_rank() if _ready() else int(os.environ.get("RANK", "0"))


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


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started, unless the caller has; leave at the end."""
    wanted = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available()
    if not wanted or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
