"""What a run will cost on each engine, said before it begins, so that the choice can be judged."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semid.distributed.units import Catalogue, Unit
from semid.tokenizers.base import Tokenizer

__all__ = ["START_SECONDS", "Estimate", "estimate_encode"]

START_SECONDS = {"local": 6.0, "ray": 15.0}
"""Until the first worker works: imports and kernels, with Ray its own start besides. Measured on a
small machine (docs/scaling.md); they only weigh where a run is short."""

PROBE_ROWS = 16_384


@dataclass(frozen=True)
class Estimate:
    """How long an encode will take.

    Attributes:
        rows: rows left to encode.
        bytes: bytes of their files, by the footers.
        rows_a_second: of one worker with one thread, measured on the first rows.
        workers: workers of the run.
        engine: the engine that was chosen.
    """

    rows: int
    bytes: int
    rows_a_second: float
    workers: int
    engine: str

    def seconds(self, engine: str, workers: int) -> float:
        """Return the time on an engine."""
        return START_SECONDS[engine] + self.rows / self.rows_a_second / workers

    @property
    def sentence(self) -> str:
        """Return what a person should know, with the reason for the engine."""
        local = self.seconds("local", self.workers)
        ray = self.seconds("ray", self.workers)
        return (
            f"{self.rows:,} rows ({self.bytes / 1e9:.2f} GB): one worker encodes about "
            f"{self.rows_a_second:,.0f} rows a second; {self.workers} on this machine take about "
            f"{spell(local)}, as many on Ray {spell(ray)}. {self._reason()}"
        )

    def _reason(self) -> str:
        if self.engine == "local":
            return (
                "--engine local starts faster and passes nothing around; --engine ray pays when "
                "more machines share the work."
            )
        return "--engine ray pays when more machines share the work; on one, leave it out."


def estimate_encode(
    tokenizer: Tokenizer,
    catalogue: Catalogue,
    left: list[Unit],
    *,
    beam_width: int,
    workers: int,
    engine: str,
) -> Estimate:
    """Encode a few rows and tell from them how long all will take.

    Args:
        tokenizer: fitted; its threads are set to one meanwhile.
        catalogue: the embeddings.
        left: units left to encode, at least one.
        beam_width: of the run.
        workers: workers of the run.
        engine: ``local`` or ``ray``.
    """
    threads = getattr(tokenizer, "threads", None)
    tokenizer.threads = 1  # type: ignore[attr-defined]
    try:
        raw = next(iter(catalogue.source(left[:1])._raw_blocks(PROBE_ROWS)))
        x = np.nan_to_num(raw.values)  # rows that cannot be used are the run's business
        tokenizer._encode_block(x[:256], beam_width)  # the first call prepares kernels
        began = time.process_time()
        tokenizer._encode_block(x, beam_width)
        took = max(time.process_time() - began, 1e-6)
    finally:
        tokenizer.threads = threads  # type: ignore[attr-defined]
    rows = sum(unit.rows for unit in left)
    files = {unit.file for unit in left}
    width = sum(_size(catalogue, file) for file in files)
    return Estimate(rows, width, len(x) / took, workers, engine)


def _size(catalogue: Catalogue, file: int) -> int:
    """Return a file's size; for one that is elsewhere, what its values weigh as float32."""
    path = str(catalogue.files.paths[file])
    if "://" not in path:
        return Path(path).stat().st_size
    rows = int(np.sum(catalogue.files.row_groups[file]))
    return rows * catalogue.source(catalogue.units()[:1]).dim * 4


def spell(seconds: float) -> str:
    """Write a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
