"""Gaussian mixtures by expectation maximization over blocks, and their hard assignments.

Covariances are diagonal or spherical. Posteriors of a chunk of rows are products of the rows and
their squares with the components' precisions. Sums over the chunks of a block are added in row
order and blocks along one fixed tree, so threads, memory and shards change no bit.
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
CHUNK = 1024
"""Rows whose posteriors are held at once: 32 MB per thread at 4096 components."""
CHUNKS_AT_ONCE = 8
"""Chunks whose sums are held before they are added."""
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


@dataclass
class MixtureState:
    """Progress of a fit; enough to continue it to the same result."""

    mixture: Mixture
    # Mean log-likelihood per row, before each iteration's update.
    history: list[float] = field(default_factory=list)


@dataclass
class _Sums:
    """Sums of posteriors over rows, and of rows and their squares weighted by them."""

    counts: Doubles  # (components,)
    first: Doubles  # (components, dim)
    second: Doubles  # (components, dim)
    likelihood: float = 0.0
    mass: float = 0.0

    def add_(self, other: _Sums) -> None:
        self.counts += other.counts
        self.first += other.first
        self.second += other.second
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

    Cost: per iteration four products of ``items x components x dim`` in float64.
    """
    rows = as_sharded(blocks, weights=weights, threads=threads)
    run = state or MixtureState(start)
    while len(run.history) < max_iter and not _has_converged(run.history, tol):
        sums: _Sums = rows.sum(_expectation, run.mixture)
        run.mixture = _maximization(sums, run.mixture, floor)
        run.history.append(sums.likelihood / sums.mass)
        if on_iteration is not None:
            on_iteration(run)
    return run


def _has_converged(history: Sequence[float], tol: float) -> bool:
    return len(history) > 1 and history[-1] - history[-2] < tol


def _expectation(shard: Shard, mixture: Mixture) -> list[Node[_Sums]]:
    """Return the sums of a shard's rows under the posteriors of a mixture."""
    linear, precisions, offset = (torch.from_numpy(each) for each in mixture.terms())
    # (2 dim, components): one product with [x, x^2] gives all scores but for the offset.
    transposed = torch.cat([linear, -0.5 * precisions], dim=1).T.contiguous()
    dim = linear.shape[1]
    constant = -0.5 * dim * np.log(2 * np.pi)

    def work(chunk: tuple[Array, Doubles | None]) -> _Sums:
        x = torch.from_numpy(chunk[0]).double()
        both = torch.cat([x, x.square()], dim=1)
        scores = torch.addmm(offset, both, transposed)
        # Posteriors p(k | x) = exp(s_k - logsumexp s), in the log domain: densities underflow.
        evidence = torch.logsumexp(scores, dim=1)
        posteriors = torch.exp(scores - evidence[:, None])
        mass, likelihood = float(len(x)), evidence + constant
        if chunk[1] is not None:
            weight = torch.from_numpy(chunk[1])
            posteriors *= weight[:, None]
            mass, likelihood = float(weight.sum()), likelihood * weight
        # (components, 2 dim): the weighted sums of rows and, beside them, of their squares.
        moments = (posteriors.T @ both).numpy()
        counts = posteriors.sum(0).numpy()
        return _Sums(counts, moments[:, :dim], moments[:, dim:], float(likelihood.sum()), mass)

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


def _maximization(sums: _Sums, before: Mixture, floor: float) -> Mixture:
    """Return the mixture of largest likelihood given the posteriors, with the floor added."""
    counts = sums.counts
    alive = counts >= LEAST_COUNT
    divisor = np.where(alive, counts, 1.0)[:, None]
    means = sums.first / divisor
    # E[x^2] - E[x]^2 may come out slightly negative by rounding.
    variances = np.maximum(sums.second / divisor - means**2, 0.0)
    if before.variances.shape[1] == 1:
        variances = variances.mean(axis=1, keepdims=True)
    # A component without rows keeps a small weight, whose logarithm is finite.
    shares = np.maximum(counts, LEAST_COUNT)
    return Mixture(
        np.where(alive[:, None], means, before.means).astype(np.float32),
        np.where(alive[:, None], variances + floor, before.variances).astype(np.float32),
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
    sums = as_sharded(blocks, weights=weights, threads=threads).sum(_hard_sums, centroids)
    count, dim = centroids.shape
    columns = dim if covariance == "diagonal" else 1
    # A component without rows stays on its centroid, with the floor as variance.
    empty = Mixture(
        centroids,
        np.full((count, columns), floor, dtype=np.float32),
        np.zeros(count, dtype=np.float32),
    )
    return _maximization(sums, empty, floor)


def _hard_sums(shard: Shard, centroids: Array) -> list[Node[_Sums]]:
    """Return the sums of a shard's rows, each under its nearest centroid."""
    codebook, (count, dim) = index_codebook(centroids), centroids.shape
    tree: TreeSum[_Sums] = TreeSum()
    for number, span, block in shard.numbered_blocks():
        nearest = torch.from_numpy(assign(block, codebook, threads=shard.threads)[0])
        x, mass = torch.from_numpy(block).double(), torch.ones(len(block), dtype=torch.float64)
        if shard.weights is not None:
            mass = torch.from_numpy(shard.weights[span])
        moments = torch.zeros(count, 2 * dim, dtype=torch.float64)
        moments.index_add_(0, nearest, torch.cat([x, x.square()], dim=1) * mass[:, None])
        counts = torch.zeros(count, dtype=torch.float64).index_add_(0, nearest, mass).numpy()
        tree.add(number, _Sums(counts, moments[:, :dim].numpy(), moments[:, dim:].numpy()))
    return tree.nodes


class HardAssignment:
    """Finds the component of highest posterior of rows, exactly and each row by itself.

    ``log p(x, k)`` is an inner product of ``[x, x^2, 1]`` with a vector of the component, so the
    search for the largest inner product finds it. Rows and components are shifted to the middle of
    the means, so that squares keep the digits that tell components apart, and divided by one power
    of two near the components' spread, so that squares of float32 numbers stay in range.
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
            precisions = precisions[:, :1]  # of |x|^2
        # A vector that all components have in common changes no comparison.
        table = np.concatenate([linear, -0.5 * precisions, offset[:, None]], axis=1)
        table -= table.mean(axis=0)
        self.index: IndexedDatabase = index_database(
            torch.from_numpy(table.astype(np.float32)), metric="ip"
        )

    def __call__(self, x: Array, *, threads: int | None = None) -> npt.NDArray[np.int64]:
        """Return the components ``(n,)`` of rows ``(n, dim)``; ties go to the lowest."""
        x = (x - self.shift) / self.scale
        squares = x * x
        if self.is_spherical:
            squares = np.einsum("nd,nd->n", x, x, dtype=np.float64)[:, None].astype(np.float32)
        lifted = np.concatenate([x, squares, np.ones((len(x), 1), np.float32)], axis=1)
        best = top_k(torch.from_numpy(lifted), self.index, 1, metric="ip", threads=threads)
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
