"""The search on a CUDA device: bfloat16 products, the bound, canonical keys, all on the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.quantization.engine.canonical import INNER, L2
from semid.quantization.engine.rows import FAR
from semid.quantization.engine.search import Found
from semid.quantization.engine.table import Table, check_rows, padded
from semid.quantization.engine.vector import LANES

__all__ = ["DeviceTable", "canonical_keys", "device_table", "search_device"]

ROWS = 4096
"""Queries a block: float32 scores of 4,096 entries take 64 MB."""
SCORES = 2**26
"""Scores a block at most, whatever the number of entries."""
PAIRS = 2**18
"""Pairs re-scored at once: their differences take 0.5 GB at 256 columns of float64."""


class DeviceTable(NamedTuple):
    """A table's copies on one device.

    Attributes:
        rows: ``(entries, width)`` float32 as given.
        norms: ``(entries,)`` float64 lengths.
        centre: ``(width,)`` float64.
        rounded: ``(entries, width)`` bfloat16 scaled rows.
        offsets: ``(entries,)`` float32.
        residual: largest norm of what rounding took from a row.
    """

    rows: Tensor
    norms: Tensor
    centre: Tensor
    rounded: Tensor
    offsets: Tensor
    residual: float


def device_table(table: Table, device: torch.device) -> DeviceTable:
    """Return ``table``'s copies on ``device``, made at their first use."""
    known: dict[torch.device, DeviceTable] = table.on_devices
    found = known.get(device)
    if found is None:
        scaled = torch.from_numpy(table.scaled[: len(table)])
        rounded = scaled.to(torch.bfloat16)
        lost = (scaled.double() - rounded.double()).norm(dim=1).max()
        found = known[device] = DeviceTable(
            torch.from_numpy(table.rows).to(device),
            torch.from_numpy(table.norms).to(device),
            torch.from_numpy(table.centre).to(device).double(),
            rounded.to(device),
            torch.from_numpy(table.offsets[: len(table)]).to(device),
            float(lost) * (1 + 2.0**-20) + table.radius * 2.0**-22 + 2.0**-60,
        )
    return found


def _ordered_sum(terms: Tensor) -> Tensor:
    """Sum ``(pairs, width)`` float64 in the canonical order of `vector` (bit for bit)."""
    lanes = terms.view(len(terms), -1, LANES)
    total = torch.zeros_like(lanes[:, 0])
    for block in range(lanes.shape[1]):
        total = total + lanes[:, block]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def canonical_keys(
    metric: int, x: Tensor, x_norms: Tensor, rows: Tensor, row_norms: Tensor
) -> Tensor:
    """Compute the keys of pairs with the CPU kernel's operations in the CPU kernel's order.

    Products and sums are separate operations, so nothing is contracted and the bits agree.

    Args:
        metric: a metric of `canonical`.
        x: ``(pairs, width)`` float32 queries, width a multiple of `LANES`.
        x_norms: ``(pairs,)`` float64 lengths, used by the cosine.
        rows: ``(pairs, width)`` float32 entries.
        row_norms: ``(pairs,)`` float64.

    Returns:
        ``(pairs,)`` float64.
    """
    if metric == L2:
        difference = x.double() - rows.double()
        return _ordered_sum(difference * difference)
    product = _ordered_sum(x.double() * rows.double())
    if metric == INNER:
        return -product
    scale = x_norms * row_norms
    return torch.where(scale > 0, -(product / scale), torch.zeros_like(product))


def _root(values: Tensor) -> Tensor:
    """Correctly rounded square roots: CUDA's are, torch's on the CPU may be off by one bit."""
    return values.sqrt() if values.is_cuda else torch.from_numpy(np.sqrt(values.numpy()))


def _bound(table: Table, ready: DeviceTable, length: Tensor, residual: Tensor) -> Tensor:
    """Bound each row's score error, as `State.set_bound`, for bfloat16 results."""
    reach = table.radius + ready.residual
    product = (length + residual) * reach
    width = table.rows.shape[1]
    bound = residual * table.radius + (length + residual) * ready.residual
    # The product is rounded to bfloat16, and a split sum may be combined in bfloat16 too.
    bound = bound + 2.0**-6 * product + (width + 32) * 2.0**-23 * (product + reach * reach)
    rounding = (length + table.radius) ** 2 if table.metric == L2 else length * table.reach
    total: Tensor = bound + (width + 64) * 2.0**-52 * rounding + 2.0**-60
    return total


def _centred(x: Tensor, table: Table, ready: DeviceTable) -> Tensor:
    """Centre and scale queries in float64; see `rows.centre_queries`."""
    if table.metric == L2:
        return (x.double() - ready.centre) * 2.0**-table.exponent
    largest = x.abs().amax(dim=1, keepdim=True).double()
    usable = (largest > 0) & torch.isfinite(largest)
    power = torch.frexp(torch.where(usable, largest, 1.0)).exponent
    return x.double() * torch.ldexp(torch.ones_like(largest), -power)


def _block(
    x: Tensor, table: Table, ready: DeviceTable, k: int, wanted: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Search for one block of padded float32 queries; see `search_device`."""
    y64 = _centred(x, table, ready)
    length = y64.norm(dim=1)
    usable = length <= FAR  # false for NaN
    y64 = torch.where(usable[:, None], y64, 0.0)
    length = torch.where(usable, length, 0.0)
    rounded = y64.to(torch.float32).to(torch.bfloat16)
    residual = (y64 - rounded.double()).norm(dim=1) * (1 + 2.0**-20) + 2.0**-60
    bound = _bound(table, ready, length, residual)
    scores = (rounded @ ready.rounded.T).float() - ready.offsets
    best = scores.topk(wanted, dim=1).values[:, -1] if wanted > 1 else scores.amax(dim=1)
    slack = 2.0**-21 * (length * table.radius + 1.0)
    threshold = best.double() - 2.0 * bound * (1.0 + 2.0**-20) - slack
    keep = (scores.double() >= threshold[:, None]) | ~usable[:, None]
    if exclude is not None:
        out = exclude >= 0
        keep[torch.nonzero(out)[:, 0], exclude[out]] = False
    row, entry = torch.nonzero(keep, as_tuple=True)  # by row, then by entry: ties stay in order
    norms = _root(_ordered_sum(x.double() * x.double()))
    keys = torch.cat(
        [
            canonical_keys(table.metric, x[r], norms[r], ready.rows[e], ready.norms[e])
            for r, e in zip(torch.split(row, PAIRS), torch.split(entry, PAIRS), strict=True)
        ]
    )
    keys = torch.where(torch.isnan(keys), torch.inf, keys)
    # Two stable sorts order the pairs by row, then key, then entry.
    order = torch.sort(keys, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    counts = torch.bincount(row, minlength=len(x))
    first = counts.cumsum(0) - counts
    chosen = order[first[:, None] + torch.arange(k, device=x.device)]
    return entry[chosen], keys[chosen], len(row)


def search_device(
    queries: Tensor, table: Table, *, k: int = 1, exclude: npt.NDArray[np.int64] | None = None,
    name: str = "x",
) -> Found:  # fmt: skip
    """`search.search` on the device that holds ``queries``; the same labels and keys.

    Args:
        queries: ``(queries, dim)`` float32, float16 or bfloat16 on any device.
        table: what to search.
        k: entries wanted.
        exclude: ``(queries,)`` entry to leave out for each query, -1 for none.
        name: the queries' argument name for messages.

    Returns:
        Labels and keys (on the CPU), and the number of pairs measured.
    """
    check_rows(queries, name=name)
    device, width = queries.device, table.rows.shape[1]
    ready = device_table(table, device)
    wanted = min(len(table), k if exclude is None else k + 1)
    limit = max(1, min(ROWS, SCORES // padded(len(table), LANES)))
    labels, keys, measured = [], [], 0
    for start in range(0, len(queries), limit):
        x = queries[start : start + limit].detach().to(torch.float32)
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        out = (
            None if exclude is None else torch.from_numpy(exclude[start : start + limit]).to(device)
        )
        found, ranked, pairs = _block(x, table, ready, k, wanted, out)
        labels.append(found.cpu())
        keys.append(ranked.cpu())
        measured += pairs
    if not labels:
        return Found(np.empty((0, k), np.int64), np.empty((0, k)), 0)
    return Found(table.original[torch.cat(labels).numpy()], torch.cat(keys).numpy(), measured)
