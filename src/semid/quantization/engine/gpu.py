"""The search on a CUDA device: screening products, the bound, canonical keys, all there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semid.errors import brief
from semid.quantization.engine.plain import INNER, L2, LANES, check_rows
from semid.quantization.engine.search import SearchResult
from semid.quantization.engine.table import MAX_TABLE_RADII, VectorTable

logger = logging.getLogger(__name__)

SCORES = 2**27
"""Scores per block: 0.5 GB of float32, enough work for a launch to cost nothing beside it."""
PAIRS = 2**18
"""Pairs re-scored at once: their differences take 0.5 GB at 256 columns of float64."""
ROUTES = ("fused", "mixed", "float32")
"""Triton kernels, torch's bfloat16 products with float32 sums, torch's float32 products."""
TIMED_ROWS = 4096
"""Queries that routes are timed with; fewer take the usual one."""
PIECES = 8
"""Columns behind the bfloat16 rows that hold an offset in three pieces; eight keep rows aligned."""

_fastest: dict[tuple[torch.device, int, int, int], str] = {}


class DeviceTable(NamedTuple):
    """A table's copies on one device."""

    rows: Tensor  # (entries, width) float32 as given
    norms: Tensor  # (entries,) float64 lengths
    center: Tensor  # (width,) float64
    scaled: Tensor  # (entries, width) float32 scaled rows
    offsets: Tensor  # (entries,) float32, minus what is to be subtracted from products
    # (entries, width + PIECES) bfloat16 scaled rows, then the offset in pieces: with ones beside a
    # query the product is the score.
    rounded: Tensor
    residual: float  # largest norm of a row's rounding error in bfloat16
    half: Tensor  # (entries, width) float16 scaled rows
    half_residual: float  # the same for float16
    factor: Tensor  # float64, what centered queries are multiplied with


def device_table(table: VectorTable, device: torch.device) -> DeviceTable:
    """Return ``table``'s copies on ``device``, made at their first use."""
    copies: dict[torch.device, DeviceTable] = table.on_devices
    if device not in copies:
        scaled = torch.from_numpy(table.scaled[: len(table)])
        offsets = -torch.from_numpy(table.offsets[: len(table)])
        rounded = scaled.to(torch.bfloat16)
        half = scaled.to(torch.float16)
        lost, half_lost = (
            float((scaled.double() - each.double()).norm(dim=1).max()) * (1 + 2.0**-20)
            for each in (rounded, half)
        )
        pieces, remainder = rounded.new_zeros(len(table), PIECES), offsets.clone()
        for piece in range(3):  # three times 8 bits are a float32's 24
            pieces[:, piece] = remainder.to(torch.bfloat16)
            remainder -= pieces[:, piece].float()
        copies[device] = DeviceTable(
            torch.from_numpy(table.rows).to(device),
            torch.from_numpy(table.norms).to(device),
            torch.from_numpy(table.center).to(device).double(),
            scaled.to(device),
            offsets.to(device),
            torch.cat([rounded, pieces], 1).to(device),
            lost,
            half.to(device),
            half_lost,
            torch.tensor(2.0**-table.exponent, dtype=torch.float64, device=device),
        )
    return copies[device]


def _ordered_sum(terms: Tensor) -> Tensor:
    """Sum ``(pairs, width)`` float64 in the canonical order of `vector` (bit for bit)."""
    lanes = terms.view(len(terms), -1, LANES)
    total = torch.zeros_like(lanes[:, 0])
    for block in range(lanes.shape[1]):
        total = total + lanes[:, block]
    # Then lanes 8, 4, 2 and 1 apart.
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


def _center(x: Tensor, table: VectorTable, copies: DeviceTable) -> Tensor:
    """Center and scale queries in float64; see `table.center_queries`."""
    if table.metric == L2:
        return (x.double() - copies.center) * 2.0**-table.exponent
    largest = x.abs().amax(dim=1, keepdim=True).double()
    usable = (largest > 0) & torch.isfinite(largest)
    power = torch.frexp(torch.where(usable, largest, 1.0)).exponent
    return x.double() * torch.ldexp(torch.ones_like(largest), -power)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Let torch round no operand of a float32 product, whatever else it was told."""
    backends: Any = torch.backends
    precision, settings = None, []
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # told of one library alone, as torch can be since 2.9
        libraries = (backends.cuda.matmul, backends.mkldnn.matmul)
        settings = [(each, each.fp32_precision) for each in libraries]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for library, setting in settings:
            library.fp32_precision = setting


def _score(y64: Tensor, copies: DeviceTable, *, rough: bool) -> tuple[Tensor, Tensor, float, float]:
    """Return scores, the queries' and the entries' rounding, and the relative error of products.

    Rough scores have bfloat16 factors and float32 sums: matrix units may cut what they align,
    hence 2^-21 and not 2^-23. The others are float32 throughout: slower, and so exact that few
    entries beyond k remain.
    """
    y = y64.to(torch.float32)
    rounded = y.to(torch.bfloat16) if rough else y
    residual = (y64 - rounded.double()).norm(dim=1) * (1 + 2.0**-20) + 2.0**-60
    if rough:
        # Ones beside the query add up the pieces of the offset.
        extended = torch.nn.functional.pad(rounded, (0, PIECES), value=1.0)
        if extended.is_cuda:
            scores = torch.mm(extended, copies.rounded.T, out_dtype=torch.float32)
        else:
            scores = extended.float() @ copies.rounded.T.float()
        return scores, residual, copies.residual, 2.0**-21
    with _exact_products():
        scores = torch.addmm(copies.offsets, y, copies.scaled.T)
    return scores, residual, 0.0, 2.0**-23


def _keys(table: VectorTable, copies: DeviceTable, x: Tensor, row: Tensor, entry: Tensor) -> Tensor:
    """Return the canonical keys of pairs, infinite where a query is not finite."""
    norms = None
    if table.metric not in (L2, INNER):
        squares = _ordered_sum(x.double() * x.double())
        # CUDA's roots are correctly rounded; torch's on the CPU may be off by one bit.
        norms = squares.sqrt() if squares.is_cuda else torch.from_numpy(np.sqrt(squares.numpy()))
    parts = [
        canonical_keys(
            table.metric, x[r], None if norms is None else norms[r], copies.rows[e], copies.norms[e]
        )
        for r, e in zip(torch.split(row, PAIRS), torch.split(entry, PAIRS), strict=True)
    ]
    keys = torch.cat(parts) if parts else x.new_empty(0, dtype=torch.float64)
    return torch.where(torch.isnan(keys), torch.inf, keys)


def _best(mask: Tensor, keys: Tensor, row: Tensor, entry: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` best entries of each row of ``mask`` and their keys, ties to the lowest."""
    # Pairs come by row, then by entry; two stable sorts order them by row, key, entry.
    order = torch.sort(keys, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    counts = torch.bincount(row, minlength=len(mask))
    first = counts.cumsum(0) - counts
    best = order[first[:, None] + torch.arange(k, device=mask.device)]
    return entry[best], keys[best]


def _listed(
    x: Tensor, table: VectorTable, copies: DeviceTable, k: int, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Return the ``k`` best entries of padded float32 queries from lists of their candidates."""
    y64, length, usable = _usable(_center(x, table, copies))
    scores, residual, lost, products = _score(y64, copies, rough=False)
    margin = _margin(table, length, residual, lost, products)
    screened = min(len(table), k if exclude is None else k + 1)
    best = scores.topk(screened, dim=1).values[:, -1] if screened > 1 else scores.amax(dim=1)
    mask = (scores >= _threshold(best, margin)[:, None]) | ~usable[:, None]
    if exclude is not None:
        excluding = exclude >= 0
        mask[torch.nonzero(excluding)[:, 0], exclude[excluding]] = False
    row, entry = torch.nonzero(mask, as_tuple=True)
    keys = _keys(table, copies, x, row, entry)
    return *_best(mask, keys, row, entry, k), len(row)


def _nearest(
    x: Tensor, table: VectorTable, copies: DeviceTable, route: str
) -> tuple[Tensor, Tensor, int]:
    """Return the nearest entries: most rows have one above the threshold, and need no list."""
    if route == "fused":
        from semid.quantization.engine import fused

        half, length, residual, usable = fused.center(
            x, copies.center, copies.factor, MAX_TABLE_RADII
        )
        best, entry, second = fused.best_two(half, copies.half, copies.offsets)
        keys = fused.distances(x, copies.rows, entry)
        residual = residual * (1 + 2.0**-20) + 2.0**-60
        lost, products = copies.half_residual, 2.0**-21
    else:
        y64, length, usable = _usable(_center(x, table, copies))
        scores, residual, lost, products = _score(y64, copies, rough=route == "mixed")
        best, entry = scores.max(dim=1)
        second = scores.scatter_(1, entry[:, None], -torch.inf).amax(dim=1)
        keys = _keys(table, copies, x, torch.arange(len(x), device=x.device), entry)
    limit = _threshold(best, _margin(table, length, residual, lost, products))
    unsure = torch.nonzero((second >= limit) | ~usable)[:, 0]
    if not len(unsure):
        return entry[:, None], keys[:, None], len(x)
    entries, entry_keys, measured = _listed(x[unsure], table, copies, 1)
    entry[unsure], keys[unsure] = entries[:, 0], entry_keys[:, 0]
    return entry[:, None], keys[:, None], len(x) + measured


def _usable(y64: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centered queries and their lengths, zero where they are too long, and which are not.

    Rows too far away get no scores that mean anything: every entry is their candidate.
    """
    length = y64.norm(dim=1)
    usable = length <= MAX_TABLE_RADII  # false for NaN
    return torch.where(usable[:, None], y64, 0.0), torch.where(usable, length, 0.0), usable


def _margin(
    table: VectorTable, length: Tensor, residual: Tensor, lost: float, products: float
) -> Tensor:
    """Return how far below the best score an entry may lie and still be the nearest."""
    lost += table.radius * 2.0**-22 + 2.0**-60
    bound: Tensor = table.score_error(length, residual, lost, products=products) + 2.0**-60
    return 2.0 * bound * (1.0 + 2.0**-20) + 2.0**-21 * (length * table.radius + 1.0)


def _threshold(best: Tensor, margin: Tensor) -> Tensor:
    """Round down to float32, so that comparing scores there keeps all that it must."""
    exact = (best.double() - margin).float()
    return torch.nextafter(exact, torch.full_like(exact, -torch.inf))


def _route(x: Tensor, table: VectorTable, copies: DeviceTable) -> str:
    """Return the fastest route of `_nearest` for tables like this, timed at their first use."""
    usual = "mixed" if _mixed_products(x.device) else "float32"
    if not x.is_cuda or len(x) < TIMED_ROWS:
        return usual
    like = (x.device, table.rows.shape[1], len(table).bit_length(), table.metric)
    if like not in _fastest:
        times: dict[str, float] = {}
        for route in ROUTES:
            if (route == "fused" and table.metric != L2) or (route == "mixed" and usual != "mixed"):
                continue
            try:
                for _ in range(2):  # the first time compiles
                    torch.cuda.synchronize(x.device)
                    began = time.perf_counter()
                    labels, keys, _ = _nearest(x, table, copies, route)
                    torch.cuda.synchronize(x.device)
                    times[route] = time.perf_counter() - began
            except Exception as error:  # noqa: BLE001 - no Triton, or it cannot compile for this chip
                times.pop(route, None)
                logger.info("%s: left out on %s, %s", route, x.device, brief(error))
                continue
            if route == "fused":
                fused = (labels, keys)
            elif "fused" in times and not all(map(torch.equal, fused, (labels, keys))):
                del times["fused"]
                logger.info("fused: left out on %s, it gave a wrong answer", x.device)
        _fastest[like] = min(times, key=times.__getitem__)
        logger.info("%s: %s is the fastest of %s", x.device, _fastest[like], times)
    return _fastest[like]


def _block(
    x: Tensor, table: VectorTable, copies: DeviceTable, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Search for one block of padded float32 queries; see `search_device`."""
    if k == 1 and exclude is None and len(table) > 1:
        return _nearest(x, table, copies, _route(x, table, copies))
    return _listed(x, table, copies, k, exclude)


@cache
def _mixed_products(device: torch.device) -> bool:
    """Whether bfloat16 factors can be summed in float32 there, which older versions cannot."""
    if device.type != "cuda":
        return True  # by converting, for tests
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return bool(torch.mm(one, one, out_dtype=torch.float32).eq(16).all())
    except (RuntimeError, TypeError):
        return False


def search_device(
    queries: Tensor,
    table: VectorTable,
    *,
    k: int = 1,
    exclude: npt.NDArray[np.int64] | None = None,
    name: str = "x",
) -> SearchResult:
    """`search.search` on the device that holds ``queries``; labels and keys are the same."""
    check_rows(queries, name=name)
    device, width = queries.device, table.rows.shape[1]
    copies = device_table(table, device)
    limit = max(1, SCORES // max(len(table), 4 * width))
    results = []
    for start in range(0, len(queries), limit):
        x = queries[start : start + limit].detach().to(torch.float32)
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        excluded = None
        if exclude is not None:
            excluded = torch.from_numpy(exclude[start : start + limit]).to(device)
        results.append(_block(x, table, copies, k, excluded))
    if not results:
        return SearchResult(np.empty((0, k), np.int64), np.empty((0, k)), 0)
    entries, keys, measured = zip(*results, strict=True)
    labels = table.original[torch.cat(entries).cpu().numpy()]
    return SearchResult(labels, torch.cat(keys).cpu().numpy(), sum(measured))
