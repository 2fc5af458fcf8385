"""The seam of K-means: all rows, wherever their shards stand.

A `Team` carries calls to the shards (`semid.quantization.shard.Shard`) and brings the answers back
in their order: in this process (`LocalTeam`), in the processes of ``torchrun``, in actors of an
engine. `Rows` asks what K-means wants to know, adds up the answers in an order that does not
depend on the number of shards, and knows neither processes nor engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from semid.quantization.blocks import BLOCK_ROWS, Blocks, Preprocess
from semid.quantization.shard import Shard
from semid.quantization.statistics import Statistics
from semid.quantization.tree import Node, TreeSum, merge_nodes

__all__ = ["LocalTeam", "Rows", "Team", "as_rows", "payload_bytes"]

Array = npt.NDArray[np.float32]


class Team(Protocol):
    """Shards and a way to call them.

    Attributes:
        spans: ``(first row, past the last)`` of each shard, in order, cut between blocks.
    """

    spans: Sequence[tuple[int, int]]

    def ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a `Shard` method on the shards named; return their answers."""
        ...

    def add(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call a method that answers in nodes on every shard; return all nodes, merged."""
        ...


class LocalTeam:
    """One shard in this process."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.spans: Sequence[tuple[int, int]] = [(0, len(shard))]

    def ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call the method."""
        return {place: getattr(self.shard, method)(*given) for place, given in arguments.items()}

    def add(self, method: str, *arguments: Any) -> list[Node[Statistics]]:
        """Call the method."""
        return merge_nodes([getattr(self.shard, method)(*arguments)])


class Rows:
    """All rows that are clustered.

    Args:
        team: where they lie.
        dim: width of a row.
        weights: ``(items,)`` weights, which the shards know too; None counts rows once.
    """

    def __init__(
        self, team: Team, *, dim: int, weights: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.team = team
        self.dim = dim
        self.weights = weights
        self._lasts = np.array([last for _, last in team.spans], dtype=np.int64)

    def __len__(self) -> int:
        """Count the rows."""
        return int(self._lasts[-1])

    def _everyone(self, method: str, *arguments: Any) -> list[Any]:
        places = range(len(self.team.spans))
        found = self.team.ask(method, dict.fromkeys(places, arguments))
        return [found[place] for place in places]

    def _owners(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._lasts, rows, side="right")

    def _scattered(self, method: str, numbers: npt.NDArray[np.int64]) -> list[tuple[Any, Any]]:
        """Ask each shard about its own rows; return places in ``numbers`` and answers."""
        owners = self._owners(numbers)
        places = {int(owner): np.flatnonzero(owners == owner) for owner in np.unique(owners)}
        found = self.team.ask(method, {o: (numbers[at],) for o, at in places.items()})
        return [(places[owner], found[owner]) for owner in places]

    def rows(self, numbers: npt.NDArray[np.int64]) -> Array:
        """Return the rows at ``numbers`` ``(n, dim)``, in that order."""
        result = np.empty((len(numbers), self.dim), dtype=np.float32)
        for start in range(0, len(numbers), BLOCK_ROWS):  # a sample is never held twice
            wanted = numbers[start : start + BLOCK_ROWS]
            for at, part in self._scattered("rows", wanted):
                result[start + at] = part
        return result

    def mean(self) -> npt.NDArray[np.float64]:
        """Return the mean row ``(dim,)``."""
        tree: TreeSum[Statistics] = TreeSum()
        tree.nodes = self.team.add("moments")
        total = tree.total()
        mean: npt.NDArray[np.float64] = total.sums[0] / total.counts[0]
        return mean

    def prepare(self, preprocess: Preprocess) -> None:
        """See every row through ``preprocess`` from now on."""
        self._everyone("prepare", preprocess)

    def restart(self) -> None:
        """Forget all levels."""
        self._everyone("restart")

    def descend(self, codebook: Array, labels: npt.NDArray[np.int64] | None = None) -> None:
        """Replace all rows by what ``codebook`` leaves of them, see `Shard.descend`."""
        if labels is None or not len(labels):
            self._everyone("descend", codebook)
            return
        spans = enumerate(self.team.spans)
        self.team.ask("descend", {i: (codebook, labels[a:b]) for i, (a, b) in spans})

    def assign(self, centroids: Array) -> Statistics:
        """Give every row its nearest centroid; return the sums over all rows."""
        tree: TreeSum[Statistics] = TreeSum()
        tree.nodes = self.team.add("assign", centroids)
        return tree.total()

    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels of the last pass, or none at all where they lie in other processes."""
        team = self.team
        return team.shard.labels if isinstance(team, LocalTeam) else np.empty(0, np.int64)

    def farthest(self, count: int) -> npt.NDArray[np.int64]:
        """Return up to ``count`` rows with the largest loss in the last pass, largest first."""
        found = self._everyone("farthest", count)
        numbers = np.concatenate([rows for rows, _ in found])
        loss = np.concatenate([losses for _, losses in found])
        return numbers[np.lexsort((numbers, -loss))][:count]

    def start_seeding(self) -> npt.NDArray[np.float64]:
        """Forget all centers; return the mass of each block ``(blocks,)``."""
        return np.concatenate(self._everyone("start_seeding"))

    def lower(self, fresh: Array) -> npt.NDArray[np.float64]:
        """Add centers; return the mass of each block ``(blocks,)``."""
        return np.concatenate(self._everyone("lower", fresh))

    def draw(
        self, masses: npt.NDArray[np.float64], size: int, generator: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Draw row numbers independently, in proportion to their mass."""
        total = np.cumsum(masses)
        targets = generator.random(size) * total[-1]
        chosen = np.minimum(np.searchsorted(total, targets, side="right"), len(total) - 1)
        inside = targets - (total[chosen] - masses[chosen])
        asked: dict[int, tuple[dict[int, list[float]]]] = {}
        for block in np.unique(chosen).tolist():
            owner = int(self._owners(np.array([block * BLOCK_ROWS]))[0])
            asked.setdefault(owner, ({},))[0][block] = inside[chosen == block].tolist()
        drawn = np.empty(size, dtype=np.int64)
        for found in self.team.ask("pick", asked).values():
            for block, rows in found.items():
                drawn[chosen == block] = rows
        return drawn

    def closest(self, numbers: npt.NDArray[np.int64]) -> Array:
        """Return squared distances ``(n,)`` to the nearest center so far."""
        result = np.empty(len(numbers), dtype=np.float32)
        for at, part in self._scattered("closest", numbers):
            result[at] = part
        return result


def as_rows(
    blocks: Blocks | Rows,
    *,
    weights: npt.NDArray[np.float64] | None = None,
    threads: int | None = None,
    memory_bytes: int = 0,
) -> Rows:
    """Return rows of this process as `Rows`; what is `Rows` already passes through.

    Args:
        blocks: ``(items, dim)`` rows.
        weights: ``(items,)`` weights.
        threads: plain threads.
        memory_bytes: rows are held as float32 up to this size.
    """
    if isinstance(blocks, Rows):
        return blocks
    shard = Shard(blocks, weights=weights, threads=threads, memory_bytes=memory_bytes)
    return Rows(LocalTeam(shard), dim=blocks.dim, weights=weights)


def payload_bytes(value: Any) -> int:
    """Count the bytes of all arrays in a question or an answer: what has to travel."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, Node):
        return payload_bytes(value.value)
    if isinstance(value, Statistics):
        return payload_bytes((value.sums, value.counts)) + 8
    if isinstance(value, Mapping):
        return sum(payload_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(payload_bytes(part) for part in value)
    return 8 if isinstance(value, float | int) else 0
