"""Analysis of code embeddings: their information about labels, and the directions they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from semid.errors import InputError, UsageError
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.kmeans import KMeansOptions, kmeans
from semid.recommenders.ranking.metrics import apply_in_batches
from semid.recommenders.ranking.network import RankingNetwork
from semid.recommenders.ranking.schema import Inputs, RankingRows
from semid.results import Result
from semid.seeds import numpy_generator

CLUSTERS = (10, 20, 50, 100, 200)
"""Numbers of clusters in MoC fig. 1b; 100 is its default."""

SHUFFLES = 5
"""Random orders of the labels that the level of chance is a mean over."""

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def code_embeddings(network: RankingNetwork, rows: RankingRows, *, fused: bool = False) -> Array:
    """Return embeddings of the code fields ``(rows, fields, width)``, if ``fused`` after fusion."""
    # Fields of history and item id are left out.
    places = [n for n, name in enumerate(network.field_names) if name.startswith("code:")]
    if not places:
        raise UsageError("this model has no code fields; train it with ids=")
    if fused and network.fusion is None:
        raise UsageError("this model has no fusion; train it with fusion=True")

    def embed(inputs: Inputs) -> Tensor:
        e = network.embed(inputs)
        return (network.fusion(e) if fused and network.fusion is not None else e)[:, places]

    return np.concatenate(apply_in_batches(network, rows, embed))


@dataclass(frozen=True)
class Discriminability(Result):
    """Mutual information of a grouping of rows with the labels."""

    # what is grouped: ``flattened``, ``level i`` (one embedding), ``code i`` (the code itself, no
    # clustering)
    name: str
    clusters: int  # number of groups that occur
    nmi: float  # normalized mutual information (arithmetic mean of the entropies)
    ami: float  # mutual information adjusted for chance
    shuffled_nmi: float  # mean NMI with shuffled labels, the chance level for these group sizes


def discriminability(
    groups: npt.NDArray[np.int64],
    labels: npt.NDArray[Any],
    *,
    name: str,
    seed: int = 0,
) -> Discriminability:
    """Return the mutual information of groups ``(rows,)`` with labels ``(rows,)``.

    Source: MoC definition 3.1; the adjustment and the baseline, a mean over random orders of the
    labels, are ours, since the information of clusters about clicks is tiny.
    """
    # Labels in random order keep the sizes of both groupings and lose every relation.
    binary = (labels > 0.5).astype(np.int64)
    generator = numpy_generator(seed, "shuffled labels", name)
    chance = [
        normalized_mutual_information(groups, generator.permutation(binary))
        for _ in range(SHUFFLES)
    ]
    return Discriminability(
        name=name,
        clusters=len(np.unique(groups)),
        nmi=normalized_mutual_information(groups, binary),
        ami=adjusted_mutual_information(groups, binary),
        shuffled_nmi=float(np.mean(chance)),
    )


def _clustered(x: Array, clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """Cluster rows by K-means over the distinct ones, weighted by their frequency."""
    # Codes give few distinct embeddings: to cluster one of each, weighted, has the objective of all
    # rows for much less work. Distinct rows are numbered by their bytes.
    rows = np.ascontiguousarray(x, np.float32)
    numbers: dict[bytes, int] = {}
    group = np.fromiter((numbers.setdefault(row.tobytes(), len(numbers)) for row in rows), np.int64)
    _, first, counts = np.unique(group, return_index=True, return_counts=True)
    result = kmeans(
        ArrayBlocks(rows[first]),
        min(clusters, len(first)),
        seed=seed,
        options=KMeansOptions(max_iter=15),
        weights=counts.astype(np.float64),
        threads=1,
    )
    return result.labels[group]


def singular_values(e: Array) -> Floats:
    """Return the singular values, largest first, of ``(rows, fields * width)``, not centered.

    Values below 1e-8 of the largest are noise. Source: MoC definition 3.2.
    """
    # The Gram matrix is small; its eigenvalues are the squared singular values.
    flat = e.reshape(len(e), -1).astype(np.float64)
    values = np.linalg.eigvalsh(flat.T @ flat)[::-1]
    roots: Floats = np.sqrt(np.clip(values, 0.0, None))
    return roots


def correlation(e: Array) -> Floats:
    """Return the correlation of every two fields ``(fields, fields)``.

    ``sum_s <e_i - mean, e_j - mean> / sqrt(sum |e_i - mean|^2 sum |e_j - mean|^2)`` over embeddings
    ``(rows, fields, width)``; unlike `linear_cka` it depends on the basis of each table.

    Source: MoC eq. 9.
    """
    centered = e.astype(np.float64) - e.mean(axis=0, dtype=np.float64)
    return _cosines(np.einsum("nid,njd->ij", centered, centered))


def linear_cka(e: Array) -> Floats:
    """Return the linear centered kernel alignment of every two fields ``(fields, fields)``.

    Invariant to rotations and scales of each field, 1 for fields that carry the same geometry.

    Source: Kornblith et al., ICML 2019.
    """
    # Linear CKA is |X_i' X_j|^2 over the norms |X_i' X_i| |X_j' X_j|: a cosine of such products.
    centered = e.astype(np.float64) - e.mean(axis=0, dtype=np.float64)
    fields = centered.shape[1]
    cross = np.empty((fields, fields))
    for i in range(fields):
        for j in range(i, fields):
            cross[i, j] = cross[j, i] = float(np.square(centered[:, i].T @ centered[:, j]).sum())
    return _cosines(cross)


def _cosines(products: Floats) -> Floats:
    """Divide inner products by the norms on their diagonal."""
    norms = np.sqrt(np.diag(products))
    norms = np.where(norms > 0, norms, 1.0)
    cosines: Floats = products / norms[:, None] / norms[None, :]
    return cosines


@dataclass(frozen=True)
class CodeAnalysis(Result):
    """MoC's metrics of a trained model's semantic embeddings, on one part."""

    rows: int  # number of rows
    fields: tuple[str, ...]  # names of the code fields
    sweep: tuple[Discriminability, ...]  # the flattened embedding at every number of clusters
    # the first field's embedding at every number of clusters (fig. 1c)
    first: tuple[Discriminability, ...]
    levels: tuple[Discriminability, ...]  # each field's embedding alone (fig. 3)
    codes: tuple[Discriminability, ...]  # the codes themselves (fig. 3)
    singular_values: Floats  # singular values of the embeddings side by side, largest first
    correlation: Floats  # correlation of every two fields, eq. 9
    cka: Floats  # linear CKA of every two fields
    fused: bool  # whether the embeddings are those after fusion


def analyze_codes(
    network: RankingNetwork,
    rows: RankingRows,
    *,
    clusters: Sequence[int] = CLUSTERS,
    default: int = 100,
    fused: bool = False,
    seed: int = 0,
) -> CodeAnalysis:
    """Compute MoC's metrics of the semantic embeddings.

    Args:
        network: network trained with codes.
        rows: rows of a part; the test part in the paper's figures.
        clusters: numbers of clusters of the sweep.
        default: number of clusters for each level alone.
        fused: use the embeddings after fusion.
        seed: seed of K-means and the shuffles.

    Raises:
        UsageError: the network has no code fields.
        InputError: fewer than two rows.

    Cost: one K-means per number of clusters and field.
    """
    if len(rows) < 2:
        raise InputError(f"{len(rows)} rows cannot be analyzed; give at least 2")
    # Embeddings once, before or after fusion; the codes themselves come from the joined table.
    labels = rows.label.cpu().numpy()
    e = code_embeddings(network, rows, fused=fused)
    flat = e.reshape(len(e), -1)
    table = network.index.code_rows.cpu().numpy()[rows.item.cpu().numpy().astype(np.int64)]
    fields = tuple(name for name in network.field_names if name.startswith("code:"))

    def measured(groups: Ints, name: str) -> Discriminability:
        return discriminability(groups, labels, name=name, seed=seed)

    return CodeAnalysis(
        rows=len(rows),
        fields=fields,
        sweep=tuple(measured(_clustered(flat, n, seed), "flattened") for n in clusters),
        first=tuple(measured(_clustered(e[:, 0], n, seed), "level 1") for n in clusters),
        levels=tuple(
            measured(_clustered(e[:, place], default, seed), f"level {place + 1}")
            for place in range(e.shape[1])
        ),
        codes=tuple(measured(codes, f"code {n + 1}") for n, codes in enumerate(table.T)),
        singular_values=singular_values(e),
        correlation=correlation(e),
        cka=linear_cka(e),
        fused=fused,
    )


def contingency(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Ints:
    """Count the rows of every pair of groups, ``(groups of a, groups of b)``."""
    # A pair of groups is one integer, so that one bincount counts all cells.
    rows = np.unique(a, return_inverse=True)[1]
    cells = np.unique(b, return_inverse=True)[1]
    columns = int(cells.max()) + 1
    flat = np.bincount(rows * columns + cells, minlength=(int(rows.max()) + 1) * columns)
    return flat.reshape(-1, columns)


def _entropy(counts: Ints) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(table: Ints) -> float:
    """Return the mutual information of a contingency table, in nats."""
    total = table.sum()
    rows, columns = table.sum(1), table.sum(0)
    # Empty cells add nothing: p log p tends to 0.
    i, j = np.nonzero(table)
    joint = table[i, j] / total
    value = (joint * np.log(joint * total * total / (rows[i] * columns[j]))).sum()
    return max(float(value), 0.0)


def normalized_mutual_information(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return ``MI / mean(H(a), H(b))`` of two groupings ``(rows,)``; 1 if both have one group."""
    table = contingency(a, b)
    mean = 0.5 * (_entropy(table.sum(1)) + _entropy(table.sum(0)))
    return 1.0 if mean == 0 else mutual_information(table) / mean


def expected_mutual_information(rows: Ints, columns: Ints) -> float:
    """Return the expected mutual information of random groupings of sizes ``(r,)`` and ``(c,)``.

    Source: Vinh, Epps and Bailey, JMLR 2010, eq. 24a (hypergeometric model).
    """
    # Costs the sum of the smaller sizes over all pairs, about c n for few columns.
    total = int(rows.sum())
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])  # of factorials
    # Equal sizes give equal terms, and clusters of a K-means have few different sizes.
    row_sizes, row_counts = np.unique(rows, return_counts=True)
    column_sizes, column_counts = np.unique(columns, return_counts=True)
    expected = 0.0
    for a, times_a in zip(row_sizes.tolist(), row_counts.tolist(), strict=True):
        for b, times_b in zip(column_sizes.tolist(), column_counts.tolist(), strict=True):
            # All overlaps n of a group of a rows with one of b rows; `weight` is the logarithm of
            # their hypergeometric probability.
            n = np.arange(max(1, a + b - total), min(a, b) + 1)
            if not len(n):
                continue
            weight = logs[a] + logs[b] + logs[total - a] + logs[total - b] - logs[total] - logs[n]
            weight = weight - logs[a - n] - logs[b - n] - logs[total - a - b + n]
            terms = n / total * np.log(total * n / (a * b)) * np.exp(weight)
            expected += times_a * times_b * float(terms.sum())
    return expected


def adjusted_mutual_information(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return ``(MI - E[MI]) / (mean(H(a), H(b)) - E[MI])``, about 0 for unrelated groupings."""
    table = contingency(a, b)
    rows, columns = table.sum(1), table.sum(0)
    if len(rows) == len(columns) == 1:
        return 1.0
    expected = expected_mutual_information(rows, columns)
    top = 0.5 * (_entropy(rows) + _entropy(columns)) - expected
    # Where nothing is left to explain, a tiny denominator keeps the sign (as scikit-learn does).
    if abs(top) < np.finfo(np.float64).eps:
        top = np.finfo(np.float64).eps if top >= 0 else -np.finfo(np.float64).eps
    return (mutual_information(table) - expected) / top
