"""The shards of a fit on Ray's actors: calls, sums from worker to worker, and lost shards."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semid.distributed.ray_workers import RayOptions, WorkerPool
from semid.quantization.blocks import BLOCK_ROWS, Node, Statistics, TreeSum, merge_nodes
from semid.quantization.sharding import payload_bytes

_LEVELS = ("reset_levels", "subtract_codewords", "assign")

VOIDS: dict[str, tuple[str, ...]] = {
    "preprocess": _LEVELS,
    "reset_levels": _LEVELS,
    "subtract_codewords": ("assign",),
    "assign": ("assign",),
}
"""Calls that change what a shard knows -> earlier calls that need not be repeated after them when a
new worker has to be brought to where the old one was."""


class RayShardPool:
    """The shards of a fit, one per actor (`semid.quantization.sharding.ShardPool`).

    ``sent``, ``received`` and ``passed`` count bytes by method: of arrays that left this process,
    that came back to it, and of sums that went from one worker to another.
    """

    def __init__(
        self, ray: Any, make: Callable[[int], Any], options: RayOptions, *, size: int
    ) -> None:
        self.ray = ray
        self.spans: Sequence[tuple[int, int]] = []
        self.sent, self.received, self.passed = (Counter[str]() for _ in range(3))
        self._loads: list[tuple[Any, ...]] = []
        self._journal: list[tuple[str, dict[int, tuple[Any, ...]]]] = []
        self.pool = WorkerPool(ray, make, options, size=size, restore=self._restore)

    def load(self, loads: Sequence[tuple[Any, ...]], spans: Sequence[tuple[int, int]]) -> None:
        """Give every worker its shard: arguments of `FitWorker.load`, and the rows it holds."""
        self._loads = list(loads)
        self.spans = list(spans)
        self.pool.ask({place: ("load", args) for place, args in enumerate(self._loads)})

    def _restore(self, place: int) -> list[tuple[str, tuple[Any, ...]]]:
        if not self._loads:
            return []
        changes = [(method, *args[place]) for method, args in self._journal if place in args]
        return [("load", self._loads[place]), *(("call", change) for change in changes)]

    def _note(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> None:
        """Remember a call that changes what shards know, and forget those it makes void."""
        if method in VOIDS:
            # A later call of the same effect replaces earlier ones, so a restore repeats few.
            void = VOIDS[method]
            self._journal = [entry for entry in self._journal if entry[0] not in void]
            self._journal.append((method, dict(arguments)))

    def call(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a `Shard` method on the shards named; return their answers."""
        self.sent[method] += payload_bytes(arguments)
        answers = self.pool.ask({p: ("call", (method, *args)) for p, args in arguments.items()})
        self._note(method, arguments)
        self.received[method] += payload_bytes(answers)
        return answers

    def call_all(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call a method that answers in nodes on every shard, and add them up in a tree.

        Neighbors add up their nodes two by two, from worker to worker, so this process receives
        one list of nodes whatever the number of workers.
        """
        everyone = dict.fromkeys(range(self.pool.size), arguments)
        self.sent[method] += payload_bytes(everyone)
        for attempt in range(self.pool.retries + 1):
            try:
                nodes = self.pool.get(self._added(method, arguments))
                break
            except self.pool.losses as lost:
                # The calls change nothing when they are made twice: all are made again.
                for place in self.pool.ended():
                    self.pool.replace_worker(place, attempt, lost)
                if attempt == self.pool.retries:
                    raise self.pool.gave_up(f"'{method}'", attempt + 1, lost) from None
        self._note(method, everyone)
        self.received[method] += payload_bytes(nodes)
        if nodes:
            self.passed[method] += self._nodes_passed() * payload_bytes(nodes[0])
        # What lies in the object store is not to be written to.
        merged: list[Node[Statistics]] = merge_nodes([copy.deepcopy(nodes)])
        return merged

    def _added(self, method: str, arguments: tuple[Any, ...]) -> Any:
        # Large arguments go into the object store once, not to every worker.
        big = [self.ray.put(value) if payload_bytes(value) else value for value in arguments]
        # (place, reference to its nodes): neighbors are merged in pairs until one is left.
        pool = self.pool
        nodes = [(p, pool.start(p, "call", method, *big)) for p in range(pool.size)]
        while len(nodes) > 1:
            pairs = zip(nodes[::2], nodes[1::2], strict=False)
            merged = [(p, pool.start(p, "merge", a, b)) for (p, a), (_, b) in pairs]
            nodes = merged + nodes[2 * len(merged) :]
        return nodes[0][1]

    def _nodes_passed(self) -> int:
        """Count the nodes that go from worker to worker in one sum; the spans alone decide it."""
        # The tree of each worker without its sums; pairs are merged as in `_added`, and of each
        # pair the right one's nodes travel.
        trees: list[list[Node[_Nothing]]] = []
        for first, last in self.spans:
            tree: TreeSum[_Nothing] = TreeSum()
            for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)):
                tree.add(block, _Nothing())
            trees.append(tree.nodes)
        passed = 0
        while len(trees) > 1:
            passed += sum(len(nodes) for nodes in trees[1::2])
            trees = [merge_nodes(trees[i : i + 2]) for i in range(0, len(trees), 2)]
        return passed

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


class _Nothing:
    """A sum of which only the place counts."""

    def add_(self, other: _Nothing) -> None:
        """Add nothing."""
