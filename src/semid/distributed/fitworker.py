"""What one worker does in a fit that no machine could do alone; it knows no engine.

A worker looks at a share of the row groups (held-out items, spread, copies), then holds a shard of
the training rows (`semid.quantization.shard`), and in the end judges the codes of the row groups it
looked at.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.ids import held_out_mask
from semid.distributed.units import Catalogue, Unit
from semid.health import CollisionCounter, Collisions, row_hashes
from semid.quantization.blocks import BLOCK_ROWS
from semid.quantization.shard import Shard
from semid.quantization.tree import Node, merge_nodes
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer
from semid.tokenizers.fitreport import HealthCounter
from semid.tokenizers.making import make_tokenizer

__all__ = ["FitWorker", "Look", "describe_tokenizer", "revive_tokenizer"]


@dataclass(frozen=True)
class Look:
    """What a worker saw in its row groups.

    Attributes:
        train: training rows of each unit.
        sums: ``(dim,)`` float64 sum of all rows.
        few: the smallest hashes of different rows, at most as many as there are codewords.
        digests: one digest a unit of its rows and of who is held out.
    """

    train: list[int]
    sums: npt.NDArray[np.float64]
    few: npt.NDArray[np.uint64]
    digests: list[str]


class FitWorker:
    """One worker's state.

    Args:
        catalogue: the embeddings.
        units: the units it looks at and judges, one after another.
        held_out: share of the items held out.
        codes: codewords of the largest level.
        threads: plain threads.
        memory_bytes: its training rows are held as float32 up to this size.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        units: Sequence[Unit],
        *,
        held_out: float,
        codes: int,
        threads: int,
        memory_bytes: int,
    ) -> None:
        self.catalogue, self.units = catalogue, list(units)
        self.held_out, self.codes = held_out, codes
        self.threads, self.memory_bytes = threads, memory_bytes
        self.shard: Shard | None = None
        self._hashes: npt.NDArray[np.uint64] | None = None
        self._collisions: CollisionCounter | None = None

    def look(self) -> Look:
        """Read the units once.

        Raises:
            EmbeddingError: rows hold null, NaN or inf.
            IdsError: ids repeat within the units.
        """
        train, digests, hashes = [], [], [np.empty(0, np.uint64)]
        sums: npt.NDArray[np.float64] | float = 0.0
        for unit in self.units:
            source = self.catalogue.source([unit])
            kept = ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)
            digest = hashlib.sha256(np.packbits(kept).tobytes())
            for _, block in source.blocks():
                sums = sums + block.sum(axis=0, dtype=np.float64)
                found = row_hashes(block)
                digest.update(found.tobytes())
                hashes.append(found)
            train.append(int(kept.sum()))
            digests.append(digest.hexdigest())
        self._hashes = np.concatenate(hashes)
        few = np.unique(self._hashes)[: self.codes]
        return Look(train, np.asarray(sums), few, digests)

    def load(self, units: Sequence[Unit], skip: int, first_row: int, rows: int) -> int:
        """Take a shard of the training rows.

        Args:
            units: where they lie.
            skip: training rows of these units that belong to the shard before.
            first_row: number of its first row among all training rows.
            rows: rows of the shard.

        Returns:
            The number of rows.
        """
        if rows == 0:
            units = self.units[:1] or self.catalogue.units()[:1]
        source = self.catalogue.source(units)
        kept = np.flatnonzero(~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT))
        self.shard = Shard(
            source.subset(kept[skip : skip + rows]),
            first_row=-(-first_row // BLOCK_ROWS) * BLOCK_ROWS if rows == 0 else first_row,
            threads=self.threads,
            memory_bytes=self.memory_bytes,
        )
        return len(self.shard)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the shard."""
        return getattr(self.shard, method)(*arguments)

    def merge(self, left: list[Node[Any]], right: list[Node[Any]]) -> list[Node[Any]]:
        """Add up the nodes of two neighbors; what comes from elsewhere is not written to."""
        return merge_nodes([copy.deepcopy(left), right])

    def judge(self, model: Mapping[str, Any], mean: npt.NDArray[np.float64]) -> HealthCounter:
        """Encode and decode the units' rows, and count.

        Args:
            model: what `describe_tokenizer` gave.
            mean: ``(dim,)`` mean of all rows.
        """
        tokenizer = revive_tokenizer(model)
        tokenizer.threads = self.threads  # type: ignore[attr-defined]
        counter = HealthCounter(tokenizer.codebook_sizes, mean)
        done = 0
        for unit in self.units:
            source = self.catalogue.source([unit])
            kept = ~held_out_mask(source.ids, self.held_out, salt=HELD_OUT_SALT)
            for block in tokenizer.encode_blocks(source):
                span = slice(block.start, block.start + len(block.x))
                known = None if self._hashes is None else self._hashes[done : done + len(block.x)]
                counter.update(
                    block.codes,
                    block.x,
                    tokenizer._decode_codes(block.codes),
                    latent=tokenizer._latent_block(block.x),
                    train=kept[span],
                    row_hashes=row_hashes(block.x) if known is None else known,
                )
                done += len(block.x)
        # The ids themselves stay here: they are shared out by `split` and counted in parts.
        self._collisions = counter.take_collisions()
        return counter

    def split(self, parts: int) -> list[CollisionCounter]:
        """Share out the ids it judged, equal ones into one part."""
        if self._collisions is None:
            return [CollisionCounter([2]) for _ in range(parts)]
        return self._collisions.split(parts)

    def count(self, *parts: CollisionCounter) -> Collisions | None:
        """Count one part of the ids, brought together from all workers; None if it is empty."""
        whole = copy.deepcopy(parts[0])
        for part in parts[1:]:
            whole.merge(part)
        return whole.result() if len(whole) else None


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a fitted tokenizer as plain data, for a worker that cannot read its folder yet."""
    return {
        "kind": tokenizer.kind,
        "settings": tokenizer.settings,
        "dim": tokenizer.dim,
        "tensors": tokenizer._tensors(),
    }


def revive_tokenizer(model: Mapping[str, Any]) -> Tokenizer:
    """Make a tokenizer of what `describe_tokenizer` gave."""
    tokenizer = make_tokenizer(model["kind"], dict(model["settings"]))
    tokenizer._set_tensors({name: np.array(value) for name, value in model["tensors"].items()})
    tokenizer._dim = int(model["dim"])
    return tokenizer
