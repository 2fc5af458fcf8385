"""K-means over the processes that ``torchrun`` started: each holds a shard, all know all answers.

Every process runs the same program. A question to the shards is answered by the process that holds
them and the answers are gathered, in the order of the processes, into all of them; sums are added
up in the order of `semid.quantization.sums`. So all processes end with the same centroids, those
of a single one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import distributed as dist

from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.sharding import Shard, payload_bytes
from semid.quantization.sums import Node, Statistics, cut_blocks, merge_nodes
from semid.training.distributed import rank, world_size

__all__ = ["ProcessShardPool", "own_span", "shard_spans"]


def shard_spans(rows: int, shards: int) -> list[tuple[int, int]]:
    """Cut ``rows`` between blocks: ``(first row, past the last)`` of each shard."""
    blocks = -(-rows // BLOCK_ROWS)
    return [
        (min(first * BLOCK_ROWS, rows), min(last * BLOCK_ROWS, rows))
        for first, last in cut_blocks(blocks, shards)
    ]


def own_span(rows: int) -> tuple[int, int]:
    """Return the rows of this process's shard."""
    return shard_spans(rows, world_size())[rank()]


class ProcessShardPool:
    """The shards of all processes; made by each of them with its own.

    Args:
        shard: this process's rows, those of `own_span`.
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
        own = arguments.get(rank())
        answer = None if own is None else getattr(self.shard, method)(*own)
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
