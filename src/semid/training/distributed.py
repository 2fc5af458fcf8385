"""Training in the processes that ``torchrun`` started; everything is a no-op in a single one.

`join_processes` reads the environment that ``torchrun`` sets, `in_parallel` wraps a model in
`torch.nn.parallel.DistributedDataParallel`, and `ProcessShardPool` spreads K-means over them.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from semid.errors import InputError
from semid.lazy import LazyModule, is_imported, torch
from semid.quantization.blocks import BLOCK_ROWS, Node, Statistics, cut_blocks, merge_nodes
from semid.quantization.sharding import Shard, payload_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch import distributed as dist
else:
    dist = LazyModule("torch.distributed")

T = TypeVar("T")


def _ready() -> bool:
    return is_imported("torch") and dist.is_available() and dist.is_initialized()


def _from_torchrun(name: str, default: int) -> int:
    """Return a number that ``torchrun`` set, or the default if it started no other process."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get(name, default)) if started > 1 else default


def join_processes() -> None:
    """Join the process group of ``torchrun``, unless that has been done."""
    if one_process() or not dist.is_available() or dist.is_initialized():
        return
    # The group stays until the program ends, however many fits it serves: the store of ``torchrun``
    # outlives a group, so a second group would find the addresses of the first, where no process
    # listens any more.
    if torch.cuda.is_available() and dist.is_nccl_available():
        dist.init_process_group("cpu:gloo,cuda:nccl")
        # NCCL warns when a program ends with its process group.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    else:
        dist.init_process_group("gloo")


@contextlib.contextmanager
def explained_ends() -> Iterator[None]:
    """Say in a sentence that another process of this run has ended.

    The connection to it breaks, or ``torchrun`` ends this process too, whichever comes first.

    Raises:
        InputError: instead of an error of the connection, and at SIGTERM.
    """
    if one_process() or threading.current_thread() is not threading.main_thread():
        yield
        return
    advice = (
        "see what that process or torchrun printed; if there is nothing, its machine was probably "
        "out of memory. Repeat the command with --resume (resume=True)"
    )

    def stop(*signal_and_frame: Any) -> None:
        raise InputError(f"torchrun ended this process, since another one has ended: {advice}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise InputError(f"another process of this run has ended: {advice}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def rank() -> int:
    """Return the number of this process, 0 in a single one."""
    return dist.get_rank() if _ready() else _from_torchrun("RANK", 0)


def local_rank() -> int:
    """Return the number of this process on its machine, 0 in a single one."""
    return _from_torchrun("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes of this group on this machine."""
    return _from_torchrun("LOCAL_WORLD_SIZE", 1)


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if _ready() else 1


def one_process() -> bool:
    """Whether ``torchrun`` started no other process."""
    return _from_torchrun("WORLD_SIZE", 1) == 1


def is_main() -> bool:
    """Whether this process (rank 0) writes files and prints."""
    return rank() == 0


def all_sum_(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def batch_span(rows: int) -> slice:
    """Return the places of this process's rows among the ``rows`` of a whole batch."""
    edges = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(rows), world_size()))])
    return slice(int(edges[rank()]), int(edges[rank() + 1]))


def with_rows_of_others(own: Tensor, rows: int) -> Tensor:
    """Return all ``rows`` of a batch of which each process has its `batch_span`.

    Gradients reach the rows of this process alone; see `summed_gradient`.
    """
    if world_size() == 1:
        return own
    span = batch_span(rows)
    whole = own.new_zeros(rows, *own.shape[1:])
    whole[span] = own.detach()
    all_sum_(whole)  # every row is that of one process plus zeros
    return torch.cat([whole[: span.start], own, whole[span.stop :]])


def summed_gradient(loss: Tensor, weight: float) -> Tensor:
    """Return a loss of the same value in every process for the sum of its gradients.

    Gradients are averaged over processes after each loss was multiplied by the ``weight`` of the
    process's rows; those of a loss over `with_rows_of_others` have to be added instead.
    """
    if world_size() == 1:
        return loss
    return (loss.detach() + world_size() * (loss - loss.detach())) / weight


def broadcast_from_rank0(value: T, device: torch.device) -> T:
    """Return the ``value`` of rank 0 in every process, for decisions that end a run."""
    if world_size() == 1:
        return value
    # Different machines may round an evaluation differently, and a process that stops alone leaves
    # the others waiting.
    values = [value]
    dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


def in_parallel(module: nn.Module) -> nn.Module:
    """Return ``module`` with gradients averaged over all processes; itself in a single one."""
    if world_size() == 1:
        return module
    wrap = torch.nn.parallel.DistributedDataParallel
    # Buffers are what `all_sum_` made equal, so they are not sent again before every step.
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
    """The shards of all processes, each with the rows of its `process_span`."""

    def __init__(self, shard: Shard, rows: int) -> None:
        self.shard = shard
        self.spans: Sequence[tuple[int, int]] = shard_spans(rows, world_size())
        self.sent: dict[str, int] = {}  # bytes of arrays sent to the others, by method

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
