"""Gaussian mixtures by expectation maximization over blocks, and their hard assignments.

Covariances are diagonal or spherical. Posteriors of a chunk of rows are products of the rows and
their squares with the components' precisions, in float32 around the middle of the components;
sums over chunks are in float64. Sums over the chunks of a block are added in row order and blocks
along one fixed tree, so threads, memory and shards change no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from semid.lazy import torch
from semid.quantization.blocks import Blocks, Node, TreeSum
from semid.quantization.nearest import (
    IndexedDatabase,
    assign,
    index_codebook,
    index_database,
    top_k,
)
from semid.quantization.sharding import Shard, ShardedMatrix, as_sharded
from semid.quantization.threads import map_blocks

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

COVARIANCES = ("diagonal", "spherical")
CHUNK = 2048
"""Rows whose posteriors are held at once: 32 MB per thread at 4096 components."""
CHUNKS_AT_ONCE = 4
"""Chunks whose sums are held before they are added."""
LEAST_POSTERIOR = 1e-9
"""Posteriors below this change no digit of a float32 mean: a row is left out of such components."""
SPARSE = 16
"""A product with the posteriors leaves out what is below that, if at most one in so many is not."""
LEAST_COUNT = 1e-6
"""A component with fewer rows than this in all keeps its parameters: there is nothing to fit."""


@dataclass(frozen=True)
class Mixture:
    """Components of a mixture.

    Attributes:
        means: ``(components, dim)`` float32.
        variances: ``(components, dim)`` float32, or ``(components, 1)`` if spherical.
        log_weights: ``(components,)`` float32, logarithms of the prior probabilities.
    """

    means: Array
    variances: Array
    log_weights: Array

    def terms(self) -> tuple[Doubles, Doubles, Doubles]:
        """Return ``a``, ``b`` and ``c`` of ``log p(x, k) = a_k.x - b_k.x^2 / 2 + c_k``.

        The constant ``-dim log(2 pi) / 2`` is left out.

        Shapes: ``a`` and ``b`` (components, dim), ``c`` (components,).
        """
        means = self.means.astype(np.float64)
        precisions = np.broadcast_to(1.0 / self.variances.astype(np.float64), means.shape).copy()
        # What the expanded square (x - m)^2 and the determinant of S leave without x.
        offset = 0.5 * np.log(precisions).sum(1) - 0.5 * (means**2 * precisions).sum(1)
        return means * precisions, precisions, offset + self.log_weights.astype(np.float64)


class _Frame:
    """A mixture around the middle of its means, in units near its spread.

    ``log p(x, k)`` is an inner product of ``[y, y^2, 1]`` with a row of ``table``, but for what all
    components have in common: ``common``. The shift keeps the digits of squares that tell
    components apart, and the division, by a power of two, keeps squares of float32 numbers in
    range. What is common is left out of the table for the same reason; it changes no posterior.
    """

    def __init__(self, mixture: Mixture) -> None:
        spread = float(np.sqrt(mixture.variances.mean(dtype=np.float64)))
        # Division by a power of two is exact, and so is the shift of what lies far from 0.
        self.scale = np.float32(2.0 ** np.round(np.log2(spread)))
        self.shift = mixture.means.mean(axis=0, dtype=np.float64).astype(np.float32)
        means = (mixture.means - self.shift) / self.scale
        scaled = Mixture(means, mixture.variances / self.scale**2, mixture.log_weights)
        linear, precisions, offset = scaled.terms()
        self.is_spherical = mixture.variances.shape[1] == 1
        if self.is_spherical:
            precisions = precisions[:, :1]  # of |y|^2
        table = np.concatenate([linear, -0.5 * precisions, offset[:, None]], axis=1)
        self.common: Doubles = table.mean(axis=0)
        self.table: Array = (table - self.common).astype(np.float32)

    def lift(self, x: Array) -> Array:
        """Return ``[y, y^2, 1]`` of rows; for spherical covariances ``[y, |y|^2, 1]``."""
        y = (x - self.shift) / self.scale
        squares = y * y
        if self.is_spherical:
            squares = np.einsum("nd,nd->n", y, y, dtype=np.float64)[:, None].astype(np.float32)
        return np.concatenate([y, squares, np.ones((len(y), 1), np.float32)], axis=1)


@dataclass
class MixtureState:
    """Progress of a fit; enough to continue it to the same result."""

    mixture: Mixture
    # Mean log-likelihood per row, before each iteration's update.
    history: list[float] = field(default_factory=list)


@dataclass
class _Sums:
    """Sums of posteriors times lifted rows, and of the log-likelihood and the rows' weights."""

    moments: Doubles  # (components, columns of a lifted row)
    likelihood: float = 0.0
    mass: float = 0.0

    def add_(self, other: _Sums) -> None:
        self.moments += other.moments
        self.likelihood += other.likelihood
        self.mass += other.mass


def fit_mixture(
    blocks: Blocks | ShardedMatrix,
    start: Mixture,
    *,
    floor: float,
    max_iter: int,
    tol: float,
    weights: Doubles | None = None,
    threads: int | None = None,
    state: MixtureState | None = None,
    on_iteration: Callable[[MixtureState], None] | None = None,
) -> MixtureState:
    """Fit a mixture by expectation maximization (Dempster et al. 1977).

    Args:
        blocks: ``(items, dim)`` finite rows; or a `ShardedMatrix`, which has its own weights and
            threads.
        start: where to begin; its variances say whether covariances are diagonal or spherical.
        floor: added to every variance, in squared units of the rows (> 0): a component on a single
            row, or on rows that agree in a column, keeps a density that can be evaluated.
        max_iter: maximum number of iterations.
        tol: stop when the mean log-likelihood per row rises by less.
        weights: ``(items,)`` non-negative weights.
        threads: number of CPU threads.
        state: continue from here.
        on_iteration: called after every iteration.

    Cost: per iteration two products of ``items x components x dim`` in float32, and two more where
    rows belong to many components at once.
    """
    rows = as_sharded(blocks, weights=weights, threads=threads)
    run = state or MixtureState(start)
    while len(run.history) < max_iter and not _has_converged(run.history, tol):
        frame = _Frame(run.mixture)
        sums: _Sums = rows.sum(_expectation, frame)
        run.mixture = _maximization(sums, run.mixture, frame, floor)
        run.history.append(sums.likelihood / sums.mass)
        if on_iteration is not None:
            on_iteration(run)
    return run


def _has_converged(history: Sequence[float], tol: float) -> bool:
    return len(history) > 1 and history[-1] - history[-2] < tol


def _expectation(shard: Shard, frame: _Frame) -> list[Node[_Sums]]:
    """Return the sums of a shard's rows under the posteriors of a mixture."""
    table = torch.from_numpy(frame.table).T.contiguous()  # (columns of a lifted row, components)
    dim = len(frame.shift)
    # The density of a row is that of its scaled form divided by the scale in every column.
    constant = -dim * (0.5 * np.log(2 * np.pi) + np.log(float(frame.scale)))

    def work(chunk: tuple[Array, Doubles | None]) -> _Sums:
        x, weights = chunk
        lifted = frame.lift(x)
        rows = torch.from_numpy(lifted)
        scores = rows @ table
        posteriors = torch.softmax(scores, dim=1)
        # The largest posterior is exp(its score - log sum exp of all).
        evidence = (scores.amax(1).double() - posteriors.amax(1).double().log()).numpy()
        likelihood = evidence + lifted @ frame.common + constant
        mass = np.ones(len(x)) if weights is None else weights
        if weights is not None:  # of the rows: small ones make no posterior next to nothing
            rows = rows * torch.from_numpy(weights.astype(np.float32))[:, None]
        moments = _products(posteriors, rows).double().numpy()
        return _Sums(moments, float(likelihood @ mass), float(mass.sum()))

    tree: TreeSum[_Sums] = TreeSum()
    for number, span, block in shard.numbered_blocks():
        weights = None if shard.weights is None else shard.weights[span]
        chunks = [
            (block[first : first + CHUNK], None if weights is None else weights[first:][:CHUNK])
            for first in range(0, len(block), CHUNK)
        ]
        total: _Sums | None = None
        for first in range(0, len(chunks), CHUNKS_AT_ONCE):
            at_once = chunks[first : first + CHUNKS_AT_ONCE]
            for sums in map_blocks(work, at_once, threads=shard.threads):
                if total is None:
                    total = sums
                else:
                    total.add_(sums)
        assert total is not None
        tree.add(number, total)
    return tree.nodes


def _products(posteriors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return ``posteriors.T @ rows``, sparse where most posteriors are next to nothing."""
    row, component = torch.nonzero(posteriors > LEAST_POSTERIOR, as_tuple=True)
    if len(row) * SPARSE > posteriors.numel():
        return posteriors.T @ rows
    shape = posteriors.shape[::-1]
    places = torch.stack([component, row])
    values = posteriors[row, component]
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False) @ rows


def _maximization(sums: _Sums, before: Mixture, frame: _Frame, floor: float) -> Mixture:
    """Return the mixture of largest likelihood given the posteriors, with the floor added."""
    dim = before.means.shape[1]
    # Sums of [y, y^2, 1], or of [y, |y|^2, 1] if spherical.
    counts = sums.moments[:, -1]
    alive = counts >= LEAST_COUNT
    first, second = np.split(sums.moments[:, :-1] / np.where(alive, counts, 1.0)[:, None], [dim], 1)
    # E[y^2] - E[y]^2 may come out slightly negative by rounding.
    if frame.is_spherical:
        variances = (second - (first**2).sum(axis=1, keepdims=True)) / dim
    else:
        variances = second - first**2
    variances = np.maximum(variances, 0.0) * float(frame.scale) ** 2 + floor
    means = first * float(frame.scale) + frame.shift
    # A component without rows keeps a small weight, whose logarithm is finite.
    shares = np.maximum(counts, LEAST_COUNT)
    return Mixture(
        np.where(alive[:, None], means, before.means).astype(np.float32),
        np.where(alive[:, None], variances, before.variances).astype(np.float32),
        np.log(shares / shares.sum()).astype(np.float32),
    )


def hard_start(
    blocks: Blocks | ShardedMatrix,
    centroids: Array,
    *,
    covariance: str,
    floor: float,
    weights: Doubles | None = None,
    threads: int | None = None,
) -> Mixture:
    """Return the mixture of largest likelihood given each row's nearest centroid.

    Shapes: ``blocks`` (items, dim) as for `fit_mixture`, ``centroids`` (components, dim).
    """
    count, dim = centroids.shape
    columns = dim if covariance == "diagonal" else 1
    # A component without rows stays on its centroid, with the floor as variance.
    empty = Mixture(
        centroids,
        np.full((count, columns), floor, dtype=np.float32),
        np.zeros(count, dtype=np.float32),
    )
    frame = _Frame(empty)
    sums = as_sharded(blocks, weights=weights, threads=threads).sum(_hard_sums, centroids, frame)
    return _maximization(sums, empty, frame, floor)


def _hard_sums(shard: Shard, centroids: Array, frame: _Frame) -> list[Node[_Sums]]:
    """Return the sums of a shard's rows, each under its nearest centroid."""
    codebook = index_codebook(centroids)
    tree: TreeSum[_Sums] = TreeSum()
    for number, span, block in shard.numbered_blocks():
        nearest = torch.from_numpy(assign(block, codebook, threads=shard.threads)[0])
        lifted = torch.from_numpy(frame.lift(block)).double()
        if shard.weights is not None:
            lifted *= torch.from_numpy(shard.weights[span])[:, None]
        moments = torch.zeros(len(centroids), lifted.shape[1], dtype=torch.float64)
        tree.add(number, _Sums(moments.index_add_(0, nearest, lifted).numpy()))
    return tree.nodes


class HardAssignment:
    """Finds the component of highest posterior of rows, exactly and each row by itself.

    It is the component of largest inner product with a row's lifted form, see `_Frame`.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.frame = _Frame(mixture)
        self.index: IndexedDatabase = index_database(
            torch.from_numpy(self.frame.table), metric="ip"
        )

    def __call__(self, x: Array, *, threads: int | None = None) -> npt.NDArray[np.int64]:
        """Return the components ``(n,)`` of rows ``(n, dim)``; ties go to the lowest."""
        lifted = torch.from_numpy(self.frame.lift(x))
        best = top_k(lifted, self.index, 1, metric="ip", threads=threads)
        return best.indices[:, 0].numpy()


@dataclass(frozen=True)
class MostProbable:
    """Labels the rows of a shard by the component of highest posterior."""

    mixture: Mixture

    def __call__(self, shard: Shard) -> npt.NDArray[np.int64]:
        """Return the components ``(rows,)``."""
        assignment = HardAssignment(self.mixture)
        labels = np.empty(len(shard), dtype=np.int64)
        for _, span, block in shard.numbered_blocks():
            labels[span] = assignment(block, threads=shard.threads)
        return labels
