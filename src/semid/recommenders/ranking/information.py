"""Mutual information of two groupings, exact and adjusted for chance, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "adjusted_mutual_information",
    "contingency",
    "expected_mutual_information",
    "mutual_information",
    "normalized_mutual_information",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def contingency(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Ints:
    """Count the rows of every pair of groups, ``(groups of a, groups of b)``."""
    left = np.unique(a, return_inverse=True)[1]
    right = np.unique(b, return_inverse=True)[1]
    columns = int(right.max()) + 1
    flat = np.bincount(left * columns + right, minlength=(int(left.max()) + 1) * columns)
    return flat.reshape(-1, columns)


def _entropy(counts: Ints) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def mutual_information(table: Ints) -> float:
    """Return the mutual information of a contingency table, in nats."""
    total = table.sum()
    rows, columns = table.sum(1), table.sum(0)
    i, j = np.nonzero(table)
    joint = table[i, j] / total
    value = (joint * np.log(joint * total * total / (rows[i] * columns[j]))).sum()
    return max(float(value), 0.0)


def normalized_mutual_information(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return ``MI / mean(H(a), H(b))`` of two groupings ``(rows,)``; 1 if both have one group."""
    table = contingency(a, b)
    mean = 0.5 * (_entropy(table.sum(1)) + _entropy(table.sum(0)))
    return 1.0 if mean == 0 else mutual_information(table) / mean


def _log_factorials(top: int) -> Floats:
    found: Floats = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, top + 1)))])
    return found


def expected_mutual_information(rows: Ints, columns: Ints) -> float:
    """Return the mean mutual information of groupings with these sizes, put together at random.

    Args:
        rows: ``(r,)`` sizes of one grouping's groups.
        columns: ``(c,)`` of the other's, with the same sum n.

    Cost: ``sum of min(rows) over columns``, about c n for few columns; one array of n logarithms.

    Source: Vinh, Epps and Bailey, JMLR 2010, eq. 24a (hypergeometric model).
    """
    total = int(rows.sum())
    logs = _log_factorials(total)
    # Equal sizes give equal terms: clusters of a K-means have few different ones.
    row_sizes, row_counts = np.unique(rows, return_counts=True)
    column_sizes, column_counts = np.unique(columns, return_counts=True)
    expected = 0.0
    for a, times_a in zip(row_sizes.tolist(), row_counts.tolist(), strict=True):
        for b, times_b in zip(column_sizes.tolist(), column_counts.tolist(), strict=True):
            n = np.arange(max(1, a + b - total), min(a, b) + 1)
            if not len(n):
                continue
            weight = (
                logs[a]
                + logs[b]
                + logs[total - a]
                + logs[total - b]
                - logs[total]
                - logs[n]
                - logs[a - n]
                - logs[b - n]
                - logs[total - a - b + n]
            )
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
    if abs(top) < np.finfo(np.float64).eps:
        top = np.finfo(np.float64).eps if top >= 0 else -np.finfo(np.float64).eps
    return (mutual_information(table) - expected) / top
