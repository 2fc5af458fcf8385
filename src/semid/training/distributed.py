"""Training in the processes that ``torchrun`` started; everything is a no-op in a single one.

`join_processes` reads the environment that ``torchrun`` sets, `in_parallel` wraps a model in
`torch.nn.parallel.DistributedDataParallel`, and `ProcessShardPool` spreads K-means over them.
"""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.sharding import Shard, payload_bytes
from semid.quantization.sums import Node, Statistics, cut_blocks, merge_nodes

__all__ = [
    "ProcessShardPool",
    "all_sum_",
    "broadcast_from_rank0",
    "in_parallel",
    "is_main",
    "join_processes",
    "local_rank",
    "local_world_size",
    "process_span",
    "rank",
    "shard_spans",
    "world_size",
]

T = TypeVar("T")


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def _started() -> int:
    """Return the number of processes that ``torchrun`` started, joined or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes() -> None:
    """Join the process group of ``torchrun``, unless that has been done.

    The group stays until the program ends, however many fits it serves: the store of ``torchrun``
    outlives a group, so a second group would find the addresses of the first, where no process
    listens any more.
    """
    if _started() == 1 or not dist.is_available() or dist.is_initialized():
        return
    if torch.cuda.is_available() and dist.is_nccl_available():
        dist.init_process_group("cpu:gloo,cuda:nccl")
        atexit.register(_leave)  # NCCL warns when a program ends without this
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


def local_world_size() -> int:
    """Return the number of processes of this group on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _started() > 1 else 1


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if _ready() else 1


def is_main() -> bool:
    """Whether this process (rank 0) writes files and prints."""
    return rank() == 0


def all_sum_(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank0(value: T, device: torch.device) -> T:
    """Return the ``value`` of rank 0 in every process.

    Used for decisions that end a run: different machines may round an evaluation differently, and
    a process that stops alone leaves the others waiting.

    Args:
        value: the value of this process; anything that can be pickled.
        device: where the model lies.
    """
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


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


def shard_spans(rows: int, shards: int) -> list[tuple[int, int]]:
    """Cut ``rows`` between blocks: ``(first row, past the last)`` of each shard."""
    blocks = -(-rows // BLOCK_ROWS)
    return [
        (min(first * BLOCK_ROWS, rows), min(last * BLOCK_ROWS, rows))
        for first, last in cut_blocks(blocks, shards)
    ]


def process_span(rows: int) -> tuple[int, int]:
    """Return the rows of this process's shard."""
    return shard_spans(rows, world_size())[rank()]


class ProcessShardPool:
    """The shards of all processes; made by each of them with its own.

    Args:
        shard: this process's rows, those of `process_span`.
        rows: all rows.

    Attributes:
        sent: method -> bytes of arrays that this process has given to the others.
    """

    def __init__(self, shard: Shard, rows: int) -> None:
        self.shard = shard
        self.spans: Sequence[tuple[int, int]] = shard_spans(rows, world_size())
        self.sent: dict[str, int] = {}

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call the method where it is called for; return all answers in every process."""
        call = arguments.get(rank())
        answer = None if call is None else getattr(self.shard, method)(*call)
        answers = self._gather(method, answer)
        return {place: answers[place] for place in arguments}

    def call_all(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call the method in every process; return all nodes, added up in block order."""
        return merge_nodes(self._gather(method, getattr(self.shard, method)(*arguments)))

    def _gather(self, method: str, answer: Any) -> list[Any]:
        self.sent[method] = self.sent.get(method, 0) + payload_bytes(answer)
        answers: list[Any] = [None] * world_size()
        dist.all_gather_object(answers, answer)
        return answers
