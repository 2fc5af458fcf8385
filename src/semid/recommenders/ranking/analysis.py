"""Whether codes helped: what their embeddings know of labels, and how many directions they use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from semid.errors import InputError, UsageError
from semid.quantization.blocks import ArrayBlocks
from semid.quantization.kmeans import KMeansOptions, kmeans
from semid.recommenders.ranking.information import (
    adjusted_mutual_information,
    normalized_mutual_information,
)
from semid.recommenders.ranking.network import RankingNetwork
from semid.recommenders.ranking.rows import RankingRows
from semid.seeds import numpy_generator

__all__ = [
    "CLUSTERS",
    "CodeAnalysis",
    "Discriminability",
    "analyze_codes",
    "code_embeddings",
    "correlation",
    "discriminability",
    "linear_cka",
    "singular_values",
]

CLUSTERS = (10, 20, 50, 100, 200)
"""Cluster numbers of the sweep of MoC fig. 1b; 100 is its default."""

Array = npt.NDArray[np.float32]


def code_embeddings(
    network: RankingNetwork, rows: RankingRows, *, fused: bool = False, batch_size: int = 65_536
) -> Array:
    """Return the embeddings of the code fields ``(rows, fields, width)``.

    Args:
        network: trained with codes.
        rows: of any part.
        fused: after MoC fusion, as the model proper sees them, instead of before.
        batch_size: rows at a time.

    Raises:
        UsageError: the network has no code fields, or no fusion where ``fused`` asks for it.
    """
    places = [n for n, name in enumerate(network.field_names) if name.startswith("code:")]
    if not places:
        raise UsageError("this model has no code fields; train it with ids=")
    if fused and network.fusion is None:
        raise UsageError("this model has no fusion; train it with fusion=True")
    parts = []
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            at = torch.arange(start, min(start + batch_size, len(rows)), device=rows.label.device)
            e = network.embed(rows.batch(at)[0].to(device))
            if fused and network.fusion is not None:
                e = network.fusion(e)
            parts.append(e[:, places].cpu().numpy())
    network.train(was_training)
    return np.concatenate(parts)


@dataclass(frozen=True)
class Discriminability:
    """What a grouping of rows knows of the labels.

    Attributes:
        name: what was grouped: ``flattened``, ``level i`` (one embedding), ``code i`` (the code
            itself, no clustering).
        clusters: groups asked for; for codes those that occur.
        nmi: normalized mutual information (arithmetic mean of the entropies).
        ami: the same adjusted for chance.
        shuffled_nmi: mean NMI with shuffled labels: what a grouping of these sizes gets by chance.
    """

    name: str
    clusters: int
    nmi: float
    ami: float
    shuffled_nmi: float


def discriminability(
    groups: npt.NDArray[np.int64],
    labels: npt.NDArray[Any],
    *,
    name: str,
    shuffles: int = 5,
    seed: int = 0,
) -> Discriminability:
    """Compare a grouping with the labels.

    Args:
        groups: ``(rows,)`` group of each row.
        labels: ``(rows,)`` 0 or 1.
        name: what was grouped.
        shuffles: draws of the baseline.
        seed: of the draws.

    Source: MoC definition 3.1; the adjustment and the baseline are ours, since the information of
    clusters about clicks is tiny.
    """
    binary = (labels > 0.5).astype(np.int64)
    generator = numpy_generator(seed, "shuffled labels", name)
    chance = [
        normalized_mutual_information(groups, generator.permutation(binary))
        for _ in range(shuffles)
    ]
    return Discriminability(
        name=name,
        clusters=len(np.unique(groups)),
        nmi=normalized_mutual_information(groups, binary),
        ami=adjusted_mutual_information(groups, binary),
        shuffled_nmi=float(np.mean(chance)) if chance else math.nan,
    )


def _clustered(x: Array, clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """Cluster rows by K-means over the distinct ones, each as heavy as it is frequent.

    The objective is that of all rows. Codes give few distinct embeddings, so this is much less
    work, and the number of clusters is never above what there is to tell apart.
    """
    rows = np.ascontiguousarray(x, np.float32)
    numbers: dict[bytes, int] = {}
    group = np.fromiter((numbers.setdefault(row.tobytes(), len(numbers)) for row in rows), np.int64)
    _, first, counts = np.unique(group, return_index=True, return_counts=True)
    found = kmeans(
        ArrayBlocks(rows[first]),
        min(clusters, len(first)),
        seed=seed,
        options=KMeansOptions(max_iter=15),
        weights=counts.astype(np.float64),
        threads=1,
    )
    return found.labels[group]


def singular_values(e: Array) -> npt.NDArray[np.float64]:
    """Return the singular values, largest first, of embeddings laid side by side.

    Args:
        e: ``(rows, fields, width)``; the matrix is ``(rows, fields * width)``, not centered.

    Source: MoC definition 3.2. By the Gram matrix in float64: values below 1e-8 of the largest
    are noise.
    """
    flat = e.reshape(len(e), -1).astype(np.float64)
    values = np.linalg.eigvalsh(flat.T @ flat)[::-1]
    found: npt.NDArray[np.float64] = np.sqrt(np.clip(values, 0.0, None))
    return found


def correlation(e: Array) -> npt.NDArray[np.float64]:
    """Return the correlation of every two fields ``(fields, fields)``.

    ``sum_s <e_i - mean, e_j - mean> / sqrt(sum |e_i - mean|^2 sum |e_j - mean|^2)``; it depends on
    the basis that each table happens to have, `linear_cka` does not.

    Args:
        e: ``(rows, fields, width)``.

    Source: MoC eq. 9.
    """
    centered = e.astype(np.float64) - e.mean(axis=0, dtype=np.float64)
    inner = np.einsum("nid,njd->ij", centered, centered)
    norms = np.sqrt(np.diag(inner))
    safe = np.where(norms > 0, norms, 1.0)
    found: npt.NDArray[np.float64] = inner / safe[:, None] / safe[None, :]
    return found


def linear_cka(e: Array) -> npt.NDArray[np.float64]:
    """Return the linear centered kernel alignment of every two fields ``(fields, fields)``.

    Invariant to rotations and scales of each field, 1 for fields that carry the same geometry.

    Args:
        e: ``(rows, fields, width)``.

    Source: Kornblith et al., ICML 2019.
    """
    centered = e.astype(np.float64) - e.mean(axis=0, dtype=np.float64)
    fields = centered.shape[1]
    cross = np.empty((fields, fields))
    for i in range(fields):
        for j in range(i, fields):
            cross[i, j] = cross[j, i] = float(np.square(centered[:, i].T @ centered[:, j]).sum())
    norms = np.sqrt(np.diag(cross))
    safe = np.where(norms > 0, norms, 1.0)
    return cross / safe[:, None] / safe[None, :]


@dataclass(frozen=True)
class CodeAnalysis:
    """MoC's metrics of a trained model's semantic embeddings, on one part.

    Attributes:
        rows: rows looked at.
        fields: names of the code fields.
        sweep: the flattened embedding at every cluster number.
        first: the first field's embedding at every cluster number (fig. 1c).
        levels: each field's embedding alone (fig. 3).
        codes: the codes themselves (fig. 3).
        singular_values: of the embeddings side by side, largest first.
        correlation: of every two fields, eq. 9.
        cka: linear CKA of every two fields.
        fused: whether the embeddings were taken after fusion.
    """

    rows: int
    fields: tuple[str, ...]
    sweep: tuple[Discriminability, ...]
    first: tuple[Discriminability, ...]
    levels: tuple[Discriminability, ...]
    codes: tuple[Discriminability, ...]
    singular_values: npt.NDArray[np.float64]
    correlation: npt.NDArray[np.float64]
    cka: npt.NDArray[np.float64]
    fused: bool

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        found = asdict(self)
        for name in ("singular_values", "correlation", "cka"):
            found[name] = getattr(self, name).tolist()
        return found


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
        network: trained with codes.
        rows: the part to look at; the test part in the paper's figures.
        clusters: cluster numbers of the sweep.
        default: cluster number for each level alone.
        fused: embeddings after fusion.
        seed: of K-means and the shuffles.

    Raises:
        UsageError: the network has no code fields.
        InputError: fewer than two rows.

    Cost: a K-means a cluster number and field.
    """
    if len(rows) < 2:
        raise InputError(f"{len(rows)} rows cannot be analyzed; give at least 2")
    labels = rows.label.cpu().numpy()
    e = code_embeddings(network, rows, fused=fused)
    flat = e.reshape(len(e), -1)
    table = network.index.code_rows.cpu().numpy()[rows.item.cpu().numpy().astype(np.int64)]
    fields = tuple(name for name in network.field_names if name.startswith("code:"))

    def judged(x: Array, count: int, name: str) -> Discriminability:
        return discriminability(_clustered(x, count, seed), labels, name=name, seed=seed)

    return CodeAnalysis(
        rows=len(rows),
        fields=fields,
        sweep=tuple(judged(flat, count, "flattened") for count in clusters),
        first=tuple(judged(e[:, 0], count, "level 1") for count in clusters),
        levels=tuple(
            judged(e[:, place], default, f"level {place + 1}") for place in range(e.shape[1])
        ),
        codes=tuple(
            discriminability(table[:, slot], labels, name=f"code {slot + 1}", seed=seed)
            for slot in range(table.shape[1])
        ),
        singular_values=singular_values(e),
        correlation=correlation(e),
        cka=linear_cka(e),
        fused=fused,
    )
