"""The search on a CUDA device: screening products, the bound, canonical keys, all there."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.quantization.engine.keys import INNER, L2
from semid.quantization.engine.search import Found
from semid.quantization.engine.table import MAX_TABLE_RADII, Table, check_rows
from semid.quantization.engine.vector import LANES

SCORES = 2**27
"""Scores a block: 0.5 GB of float32, enough work for a launch to cost nothing beside it."""
PAIRS = 2**18
"""Pairs re-scored at once: their differences take 0.5 GB at 256 columns of float64."""
PIECES = 8
"""Columns behind the bfloat16 rows that hold an offset in three pieces; eight keep rows aligned."""


class DeviceTable(NamedTuple):
    """A table's copies on one device.

    Attributes:
        rows: ``(entries, width)`` float32 as given.
        norms: ``(entries,)`` float64 lengths.
        center: ``(width,)`` float64.
        scaled: ``(entries, width)`` float32 scaled rows.
        offsets: ``(entries,)`` float32, minus what is to be subtracted from products.
        rounded: ``(entries, width + PIECES)`` bfloat16 scaled rows, then the offset in pieces: with
            ones beside a query the product is the score.
        residual: largest norm of what bfloat16 took from a row.
    """

    rows: Tensor
    norms: Tensor
    center: Tensor
    scaled: Tensor
    offsets: Tensor
    rounded: Tensor
    residual: float


def device_table(table: Table, device: torch.device) -> DeviceTable:
    """Return ``table``'s copies on ``device``, made at their first use."""
    known: dict[torch.device, DeviceTable] = table.on_devices
    found = known.get(device)
    if found is None:
        scaled = torch.from_numpy(table.scaled[: len(table)])
        offsets = -torch.from_numpy(table.offsets[: len(table)])
        rounded = scaled.to(torch.bfloat16)
        lost = (scaled.double() - rounded.double()).norm(dim=1).max()
        pieces, left = rounded.new_zeros(len(table), PIECES), offsets.clone()
        for piece in range(3):  # three times 8 bits are a float32's 24
            pieces[:, piece] = left.to(torch.bfloat16)
            left -= pieces[:, piece].float()
        found = known[device] = DeviceTable(
            torch.from_numpy(table.rows).to(device),
            torch.from_numpy(table.norms).to(device),
            torch.from_numpy(table.center).to(device).double(),
            scaled.to(device),
            offsets.to(device),
            torch.cat([rounded, pieces], 1).to(device),
            float(lost) * (1 + 2.0**-20),
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
    metric: int, x: Tensor, x_norms: Tensor | None, rows: Tensor, row_norms: Tensor
) -> Tensor:
    """Compute the keys ``(pairs,)`` of pairs with the CPU kernel's operations in its order.

    Products and sums are separate operations, so nothing is contracted and the bits agree. ``x``
    and ``rows`` ``(pairs, width)`` float32, width a multiple of `LANES`; ``x_norms`` (needed by the
    cosine alone) and ``row_norms`` ``(pairs,)`` float64.
    """
    if metric == L2:
        difference = x.double() - rows.double()
        return _ordered_sum(difference * difference)
    product = _ordered_sum(x.double() * rows.double())
    if metric == INNER:
        return -product
    assert x_norms is not None
    scale = x_norms * row_norms
    return torch.where(scale > 0, -(product / scale), torch.zeros_like(product))


def _root(values: Tensor) -> Tensor:
    """Correctly rounded square roots: CUDA's are, torch's on the CPU may be off by one bit."""
    return values.sqrt() if values.is_cuda else torch.from_numpy(np.sqrt(values.numpy()))


def _bound(table: Table, length: Tensor, residual: Tensor, lost: float, products: float) -> Tensor:
    """Bound each row's score error, as `State.set_bound`.

    ``length`` ``(n,)`` of the centered queries; ``residual`` ``(n,)`` norms of what rounding took
    from them, ``lost`` at most from an entry; ``products`` error of a product and a sum of the
    route, relative to the vectors' lengths.
    """
    lost = lost + table.radius * 2.0**-22 + 2.0**-60
    reach = table.radius + lost
    product = (length + residual) * reach
    width = table.rows.shape[1]
    bound = residual * table.radius + (length + residual) * lost
    bound = bound + (width + 32) * products * (product + reach * reach)
    rounding = (length + table.radius) ** 2 if table.metric == L2 else length * table.reach
    total: Tensor = bound + (width + 64) * 2.0**-52 * rounding + 2.0**-60
    return total


def _centered(x: Tensor, table: Table, ready: DeviceTable) -> Tensor:
    """Center and scale queries in float64; see `rows.center_queries`."""
    if table.metric == L2:
        return (x.double() - ready.center) * 2.0**-table.exponent
    largest = x.abs().amax(dim=1, keepdim=True).double()
    usable = (largest > 0) & torch.isfinite(largest)
    power = torch.frexp(torch.where(usable, largest, 1.0)).exponent
    return x.double() * torch.ldexp(torch.ones_like(largest), -power)


def _bfloat16_scores(y64: Tensor, ready: DeviceTable) -> tuple[Tensor, Tensor, float, float]:
    """Return scores, the queries' and the entries' rounding, and the error of products.

    bfloat16 factors and float32 sums: matrix units may cut what they align, hence 2^-21 and not
    2^-23.
    """
    rounded = y64.to(torch.float32).to(torch.bfloat16)
    residual = (y64 - rounded.double()).norm(dim=1) * (1 + 2.0**-20) + 2.0**-60
    left = torch.nn.functional.pad(rounded, (0, PIECES), value=1.0)
    if left.is_cuda:
        scores = torch.mm(left, ready.rounded.T, out_dtype=torch.float32)
    else:
        scores = left.float() @ ready.rounded.T.float()
    return scores, residual, ready.residual, 2.0**-21


def _float32_scores(y64: Tensor, ready: DeviceTable) -> tuple[Tensor, Tensor, float, float]:
    """The same in float32 throughout: slower, and so exact that few entries beyond k are left."""
    y = y64.to(torch.float32)
    residual = (y64 - y.double()).norm(dim=1) * (1 + 2.0**-20) + 2.0**-60
    loose = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        scores = torch.addmm(ready.offsets, y, ready.scaled.T)
    finally:
        torch.set_float32_matmul_precision(loose)
    return scores, residual, 0.0, 2.0**-23


def _keys(table: Table, ready: DeviceTable, x: Tensor, row: Tensor, entry: Tensor) -> Tensor:
    """Return the canonical keys of pairs, infinite where a query is not finite."""
    norms = None
    if table.metric not in (L2, INNER):
        norms = _root(_ordered_sum(x.double() * x.double()))
    parts = [
        canonical_keys(
            table.metric, x[r], None if norms is None else norms[r], ready.rows[e], ready.norms[e]
        )
        for r, e in zip(torch.split(row, PAIRS), torch.split(entry, PAIRS), strict=True)
    ]
    keys = torch.cat(parts) if parts else x.new_empty(0, dtype=torch.float64)
    return torch.where(torch.isnan(keys), torch.inf, keys)


def _first(keep: Tensor, keys: Tensor, row: Tensor, entry: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` best entries of each row of ``keep`` and their keys, ties to the lowest."""
    # Pairs come by row, then by entry; two stable sorts order them by row, key, entry.
    order = torch.sort(keys, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    counts = torch.bincount(row, minlength=len(keep))
    first = counts.cumsum(0) - counts
    chosen = order[first[:, None] + torch.arange(k, device=keep.device)]
    return entry[chosen], keys[chosen]


def _block(
    x: Tensor, table: Table, ready: DeviceTable, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Search for one block of padded float32 queries; see `search_device`."""
    single = k == 1 and exclude is None and len(table) > 1
    y64 = _centered(x, table, ready)
    length = y64.norm(dim=1)
    usable = length <= MAX_TABLE_RADII  # false for NaN
    y64 = torch.where(usable[:, None], y64, 0.0)
    length = torch.where(usable, length, 0.0)
    screen = _bfloat16_scores if single and _mixed_products(x.device) else _float32_scores
    scores, residual, lost, products = screen(y64, ready)
    bound = _bound(table, length, residual, lost, products)
    slack = 2.0**-21 * (length * table.radius + 1.0)
    margin = 2.0 * bound * (1.0 + 2.0**-20) + slack

    def threshold(best: Tensor) -> Tensor:
        """Round down to float32, so that comparing scores there keeps all that it must."""
        exact = (best.double() - margin).float()
        return torch.nextafter(exact, torch.full_like(exact, -torch.inf))

    if not single:
        wanted = min(len(table), k if exclude is None else k + 1)
        best = scores.topk(wanted, dim=1).values[:, -1] if wanted > 1 else scores.amax(dim=1)
        keep = (scores >= threshold(best)[:, None]) | ~usable[:, None]
        if exclude is not None:
            out = exclude >= 0
            keep[torch.nonzero(out)[:, 0], exclude[out]] = False
        row, entry = torch.nonzero(keep, as_tuple=True)
        keys = _keys(table, ready, x, row, entry)
        return *_first(keep, keys, row, entry, k), len(row)

    # The nearest alone: most rows have one entry above the threshold, which needs no list.
    best, entry = scores.max(dim=1)
    scores.scatter_(1, entry[:, None], -torch.inf)
    limit = threshold(best)
    unsure = torch.nonzero((scores.amax(dim=1) >= limit) | ~usable)[:, 0]
    keys = _keys(table, ready, x, torch.arange(len(x), device=x.device), entry)
    if len(unsure):
        some = scores[unsure].scatter_(1, entry[unsure, None], best[unsure, None])
        keep = (some >= limit[unsure, None]) | ~usable[unsure, None]
        row, other = torch.nonzero(keep, as_tuple=True)
        pairs = _keys(table, ready, x[unsure], row, other)
        chosen, found = _first(keep, pairs, row, other, 1)
        entry[unsure], keys[unsure] = chosen[:, 0], found[:, 0]
        return entry[:, None], keys[:, None], len(x) + len(row)
    return entry[:, None], keys[:, None], len(x)


@cache
def _mixed_products(device: torch.device) -> bool:
    """Say whether bfloat16 factors can be summed in float32 there, which older versions cannot."""
    if device.type != "cuda":
        return True  # by converting, for tests
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return bool(torch.mm(one, one, out_dtype=torch.float32).eq(16).all())
    except (RuntimeError, TypeError):
        return False


def search_device(
    queries: Tensor, table: Table, *, k: int = 1, exclude: npt.NDArray[np.int64] | None = None,
    name: str = "x",
) -> Found:  # fmt: skip
    """`search.search` on the device that holds ``queries``; labels and keys are the same.

    They return on the CPU, with the number of pairs measured.
    """
    check_rows(queries, name=name)
    device, width = queries.device, table.rows.shape[1]
    ready = device_table(table, device)
    limit = max(1, SCORES // max(len(table), 4 * width))
    labels, keys, measured = [], [], 0
    for start in range(0, len(queries), limit):
        x = queries[start : start + limit].detach().to(torch.float32)
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        out = (
            None if exclude is None else torch.from_numpy(exclude[start : start + limit]).to(device)
        )
        found, ranked, pairs = _block(x, table, ready, k, out)
        labels.append(found)
        keys.append(ranked)
        measured += pairs
    if not labels:
        return Found(np.empty((0, k), np.int64), np.empty((0, k)), 0)
    found, ranked = torch.cat(labels).cpu(), torch.cat(keys).cpu()
    return Found(table.original[found.numpy()], ranked.numpy(), measured)
