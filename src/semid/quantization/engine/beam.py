"""Kernels of a beam's step: children of partial codes by products that are already there.

A partial code leaves ``r = x - sum c``, so a child's product is ``r.w = x.w - sum c.w``: one row of
products an item, and rows of a table that all items share. As in `search` the scores only say which
children can be among the best; `canonical.key` of the residual itself decides.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from semid.quantization.engine.canonical import key
from semid.quantization.engine.screen import F32, I32, I64, kth_largest, scan_many, trim_rows
from semid.quantization.engine.vector import SCAN

__all__ = ["resolve_children", "scan_children"]


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def scan_children(
    base: F32,
    halves: F32,
    products: F32,
    lines: I64,
    offsets: F32,
    margin: F32,
    top: F32,
    counts: I64,
    candidates: I32,
    kept: F32,
    k: int,
    scratch: F32,
    scores: F32,
) -> None:
    """Note every child whose score lies within ``margin`` of its item's ``k``-th best.

    Args:
        base: ``(items, columns)`` products of items and codewords, less half the codewords'
            squares; columns that hold no codeword are minus infinity.
        halves: ``(items, partials)`` half the squared residual of each partial code.
        products: ``(codes before, columns)`` products of earlier codewords with this level's.
        lines: ``(items, partials, levels before)`` rows of ``products``.
        offsets: ``(columns,)`` of no effect; `scan_many` takes one.
        margin: see `scan_many`, as all up to ``scratch``.
        top: of each item.
        counts: of each item.
        candidates: ``partial * columns + codeword``.
        kept: their scores.
        k: how many are wanted.
        scratch: ``(capacity,)``.
        scores: ``(1, columns)`` scratch.
    """
    items, partials, before = lines.shape
    columns = base.shape[1]
    lanes = np.empty(SCAN, np.float32)
    for i in range(items):
        for p in range(partials):
            half = halves[i, p]
            line = lines[i, p, 0]
            for j in range(columns):
                scores[0, j] = base[i, j] - products[line, j] - half
            for level in range(1, before):
                line = lines[i, p, level]
                for j in range(columns):
                    scores[0, j] -= products[line, j]
            if p == 0 and k <= SCAN:
                # The best of each lane are as many different children of the best partial code, so
                # that the k-th of them is a bound to start from.
                lanes[:] = scores[0, :SCAN]
                for at in range(SCAN, columns, SCAN):
                    for j in range(SCAN):
                        lanes[j] = max(lanes[j], scores[0, at + j])
                top[i] = max(top[i], kth_largest(lanes, SCAN, k))
            scan_many(
                scores, 1, columns, p * columns, offsets, margin, top, counts, candidates, kept, i,
                k, scratch,
            )  # fmt: skip
    trim_rows(items, k, margin, top, counts, candidates, kept, scratch)


@numba.njit(nogil=True, cache=True, no_cfunc_wrapper=True)
def resolve_children(
    left: F32,
    words: F32,
    columns: int,
    counts: I64,
    candidates: I32,
    parents: I64,
    labels: I64,
    distances: F32,
) -> None:
    """Sort each item's best children by distance; ties go to the better parent, the lower code.

    Args:
        left: ``(items * partials, width)`` what each partial code leaves.
        words: ``(codes, width)`` codewords.
        columns: of a partial code among the candidates.
        counts: ``(items,)`` candidates; below 0 all children are.
        candidates: see `scan_children`.
        parents: ``(items, best)`` result.
        labels: ``(items, best)`` result.
        distances: ``(items, best)`` result, infinite where an item has too few.
    """
    items, best = labels.shape
    partials = left.shape[0] // max(items, 1)
    exact = np.empty(best)
    for i in range(items):
        size = 0
        for number in range(partials * columns if counts[i] < 0 else counts[i]):
            child = number if counts[i] < 0 else candidates[i, number]
            p, code = child // columns, child % columns
            if code >= words.shape[0]:
                continue
            value = key(0, left, i * partials + p, 0.0, words, code, 0.0)
            if math.isnan(value):
                value = math.inf
            # Partial codes compare as they are kept, in float32; within one, all digits count.
            rounded = np.float32(value)
            at = size
            while at > 0:
                above = distances[i, at - 1]
                if above < rounded:
                    break
                if above == rounded:
                    parent = parents[i, at - 1]
                    if parent < p:
                        break
                    if parent == p and (
                        exact[at - 1] < value
                        or (exact[at - 1] == value and labels[i, at - 1] < code)
                    ):
                        break
                if at < best:
                    distances[i, at] = above
                    parents[i, at] = parents[i, at - 1]
                    labels[i, at] = labels[i, at - 1]
                    exact[at] = exact[at - 1]
                at -= 1
            if at < best:
                distances[i, at], parents[i, at], labels[i, at] = rounded, p, code
                exact[at] = value
                size = min(size + 1, best)
        for at in range(size, best):
            distances[i, at], parents[i, at], labels[i, at] = np.inf, 0, 0
