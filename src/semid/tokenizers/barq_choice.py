"""How much behavior BARQ blends in: hits of users that no fit uses, and what they cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.diagnostics.discrete import discrete_ranks
from semid.diagnostics.pairs import cluster_sums, item_pairs
from semid.diagnostics.retrieval import neighbor_ranks
from semid.quantization.blocks import ArrayBlocks, Blocks
from semid.quantization.least_squares import squared_errors
from semid.quantization.nearest import index_codebook
from semid.quantization.residual import dequantize
from semid.seeds import numpy_generator
from semid.tokenizers.barq_space import code_targets, encode_rows
from semid.tokenizers.behavior import PairSource
from semid.training.distributed import is_main

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]

CUTOFF = 50
"""Nearest items among which the second item of a pair is a hit; at most a tenth of all."""

EVIDENCE_PAIRS = 16_384
"""Pairs drawn at most, of which repetitions are dropped."""

POOL_ROWS = 65_536
"""Items at most that are searched: those of the pairs, and others at random."""

FEWEST_QUERIES = 30
"""Fewer first items are no evidence."""

HALVINGS = (2, 1, 0)
"""The weights tried are the heaviest one halved so often."""

LEFT_OUT = (
    "behavior is left out: it does not pay on {pairs:,} pairs of users kept for selection. Their "
    "second item is among the {cutoff} nearest of the first for {none[hits]:.1%} without behavior, "
    "for {best[hits]:.1%} with weight {best[weight]:g} (95 % of the difference: {best[low]:+.1%} "
    "to {best[high]:+.1%}), at a content error of {none[error]:.3f} and {best[error]:.3f}; codes "
    "are fitted to the embeddings alone. Give more interactions, or --no-check-behavior "
    "(check_behavior=False)"
)

NO_PAIRS = (
    "behavior is left out: users kept for selection have no two different known items in a row to "
    "judge it by; give more interactions, or --no-check-behavior (check_behavior=False)"
)


@dataclass(frozen=True)
class Trial:
    """What codes before refinement give with one weight of behavior."""

    weight: float
    hits: float  # share of pairs, the mean over reading codes and reading their vectors
    error: float  # of held-out content, relative to its variance
    low: float = 0.0  # 95 % interval of the gain in hits over no behavior
    high: float = 0.0

    @property
    def score(self) -> float:
        """Hits times the share of held-out variance that codes explain.

        It rises where hits gain a larger share than that variance loses.
        """
        return self.hits * max(1.0 - self.error, 0.0)


class WeightSearch:
    """Tries weights from light to heavy, as long as each has a higher score than no behavior.

    The first trial is that without behavior. Others are eligible if their gain in hits over it is
    above 0 with its 95 % interval. Cost of a trial: two searches of the pairs' first items among at
    most `POOL_ROWS` items.
    """

    def __init__(
        self, source: PairSource, rows: int, *, seed: int, threads: int | None = None
    ) -> None:
        generator = numpy_generator(seed, "evidence")
        # Draws are with replacement: four times as many find nearly all pairs of a small log. A
        # pair that many users have is one observation.
        drawn = source.draw(min(4 * source.count, EVIDENCE_PAIRS), generator)
        pairs = np.unique(np.stack(drawn), axis=1)
        items = np.unique(pairs)
        others = generator.choice(rows, min(rows, POOL_ROWS), replace=False)
        missing = others[~np.isin(others, items)][: max(POOL_ROWS - len(items), 0)]
        self._pool: npt.NDArray[np.int64] = np.sort(np.concatenate([items, missing]))
        self._pairs = item_pairs(*np.searchsorted(self._pool, pairs), pool=len(self._pool))
        self._threads = threads
        self._cutoff = min(CUTOFF, max(1, len(self._pool) // 10))
        self._hits: list[npt.NDArray[np.float64]] = []
        self.trials: list[Trial] = []

    def add(
        self, weight: float, books: Sequence[Array], space: Blocks, judged: Blocks, *, content: int
    ) -> bool:
        """Measure codebooks of the blend ``space``; return whether to try a heavier weight.

        ``judged`` are the blended rows whose error is the price, of the first ``content`` columns.
        """
        k, pairs, threads = self._cutoff, self._pairs, self._threads
        index = [index_codebook(book) for book in books]
        codes = encode_rows(ArrayBlocks(space.rows(self._pool)), index, threads=threads)
        vectors = dequantize(codes, books)
        near = neighbor_ranks(vectors, pairs, depth=k, threads=threads) < k
        equal = discrete_ranks(codes, pairs, hierarchical=True, threads=threads).expected_hits(k)
        hits = 0.5 * (near + equal)
        targets = code_targets(
            judged, encode_rows(judged, index, threads=threads), lambda x: x[:, :content]
        )
        loss, spread = squared_errors(targets, [book[:, :content] for book in books], content)
        error = loss / spread if spread else 0.0
        self._hits.append(hits)
        gains = hits - self._hits[0]
        # The normal interval of a mean over clusters: pairs of one first item rise and fall
        # together. Fewer of them than it needs exclude no difference of two shares.
        sums = cluster_sums(pairs.users, gains[:, None] - gains.mean())
        half = 1.96 * float(np.sqrt(np.square(sums).sum())) / len(gains)
        if len(sums) < FEWEST_QUERIES:
            half = 1.0
        mean = float(gains.mean())
        trial = Trial(weight, float(hits.mean()), error, mean - half, mean + half)
        self.trials.append(trial)
        return len(self.trials) == 1 or trial.score > self.trials[0].score

    def choose(self) -> dict[str, Any]:
        """Return the figures, with the eligible ``weight`` of highest score; warn if it is 0."""
        none, *others = self.trials
        best = none
        for trial in others:
            if trial.low > 0 and trial.score > best.score:
                best = trial
        if best is none and is_main():
            closest = asdict(max(others, key=lambda trial: trial.score))
            figures = {"cutoff": self._cutoff, "none": asdict(none), "best": closest}
            logger.warning(LEFT_OUT.format(pairs=len(self._pairs), **figures))
        record = {"weight": best.weight, "pairs": len(self._pairs), "cutoff": self._cutoff}
        return record | {"trials": [asdict(each) for each in self.trials]}


def without_pairs() -> dict[str, Any]:
    """Return the figures of a log that has no pairs to choose by, and warn."""
    if is_main():
        logger.warning(NO_PAIRS)
    return {"weight": 0.0}
