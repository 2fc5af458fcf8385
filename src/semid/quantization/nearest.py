"""Exact nearest codeword: the kernel under K-means, encoding and retrieval.

Screening in low precision finds every codeword that can be the nearest, a float64 distance in a
fixed order of sums decides (see ``engine/README.md``). The answer is therefore the same on every
chip and route, for any block size and number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from semid.errors import UsageError, check_choice
from semid.quantization.engine.canonical import L2
from semid.quantization.engine.gpu import search_device
from semid.quantization.engine.routes import ROUTES, choose, working_routes
from semid.quantization.engine.search import search
from semid.quantization.engine.table import Table, check_rows
from semid.quantization.threads import resolve_threads

__all__ = ["Nearest", "PreparedCodebook", "nearest", "nearest_m", "prepare", "prepare_kernels"]


class Nearest(NamedTuple):
    """Result of `nearest` and `nearest_m`.

    Attributes:
        labels: int64 codeword indices, ``(items,)`` or ``(items, m)`` nearest first.
        distances: float32 squared Euclidean distances, same shape.
    """

    labels: Tensor
    distances: Tensor


def prepare_kernels() -> None:
    """Compile, or fetch from the cache, and test the kernels of this machine's routes.

    Searching does so by itself; this is for programs that want to say why the first search on a
    machine takes half a minute of a core longer. Free of cost from the second call on.
    """
    working_routes()


class PreparedCodebook:
    """A codebook with everything the search needs, made once and shared by threads.

    Args:
        codebook: ``(codes, dim)`` float32, float16 or bfloat16, finite. It is copied.

    Attributes:
        codewords: ``(codes, dim)`` float32 copy of the codebook; do not write to it.

    Raises:
        UsageError: wrong dtype or shape, or no codewords.
        EmbeddingError: NaN or infinite values.
    """

    def __init__(self, codebook: Tensor) -> None:
        check_rows(codebook, name="codebook")
        self.codewords = codebook.detach().to(torch.float32, copy=True).contiguous()
        self.table = Table(self.codewords.cpu(), metric=L2, unique=True)
        self._full: Table | None = None

    def __len__(self) -> int:
        return len(self.codewords)

    def full_table(self) -> Table:
        """Return the table with exact duplicates in it, which `nearest_m` must list."""
        if len(self.table) == len(self.codewords):
            return self.table
        if self._full is None:
            self._full = Table(self.codewords.cpu(), metric=L2, unique=False)
        return self._full


def prepare(codebook: Tensor) -> PreparedCodebook:
    """Prepare a codebook so that repeated blocks do not pay for it again.

    Args:
        codebook: ``(codes, dim)`` float32, float16 or bfloat16, finite. It is copied.

    Returns:
        An object to give to `nearest` in place of the codebook.

    Raises:
        UsageError: wrong dtype or shape, or no codewords.
        EmbeddingError: NaN or infinite values.
    """
    return PreparedCodebook(codebook)


def _prepared(x: Tensor, codebook: Tensor | PreparedCodebook) -> PreparedCodebook:
    check_rows(x, name="x")
    ready = codebook if isinstance(codebook, PreparedCodebook) else prepare(codebook)
    if x.shape[1] != ready.codewords.shape[1]:
        raise UsageError(
            f"x has {x.shape[1]} columns and the codebook {ready.codewords.shape[1]}; "
            "give both the same width"
        )
    return ready


def nearest(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    threads: int | None = None,
    route: str = "auto",
) -> Nearest:
    """Find the codeword nearest to each row in squared Euclidean distance.

    Args:
        x: ``(items, dim)`` float32, float16 or bfloat16, on the CPU or a CUDA device (searched
            there in bfloat16 whatever ``route`` says; the result stays there). A row that is not
            finite gets label 0 and a distance that is not finite; refuse such rows before.
        codebook: ``(codes, dim)``, or what `prepare` made of it.
        threads: plain threads over blocks of rows; None uses all this process may use.
        route: how to screen, ``"int8"``, ``"int16"``, ``"bf16"`` or ``"fp32"``; ``"auto"``
            tries those this chip has on a few rows and takes the fastest. It changes the time,
            never the result.

    Returns:
        Labels ``(items,)`` (ties to the lowest index) and distances ``(items,)``.

    Raises:
        UsageError: widths, dtypes or an argument that do not fit.
        EmbeddingError: the codebook is not finite.

    Time grows with items x codes x dim; memory with the block of rows, not with ``items``.
    """
    ready = _prepared(x, codebook)
    found = _search(x, ready.table, 1, threads, route)
    return Nearest(found.labels[:, 0], found.distances[:, 0])


def _search(
    x: Tensor,
    table: Table,
    k: int,
    threads: int | None,
    route: str,
    within: Tensor | None = None,
) -> Nearest:
    check_choice("route", route, ROUTES)
    resolve_threads(threads)
    if x.is_cuda:
        found = search_device(x, table, k=k)
    else:
        far = None if within is None else within.double().numpy()
        found = search(x, table, choose(route, x, table, k=k), k=k, within=far, threads=threads)
    labels, keys = torch.from_numpy(found.labels), torch.from_numpy(found.keys)
    return Nearest(labels.to(x.device), keys.to(torch.float32).to(x.device))


def nearest_m(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    m: int,
    *,
    within: Tensor | None = None,
    threads: int | None = None,
    route: str = "auto",
) -> Nearest:
    """Find the ``m`` nearest codewords of each row, nearest first.

    Args:
        x: ``(items, dim)`` float32, float16 or bfloat16.
        codebook: ``(codes, dim)``, or what `prepare` made of it.
        m: how many, 1 to the number of codewords.
        within: ``(items,)`` float32 squared distances, on the CPU: codewords that do not lie nearer
            to a row need not be measured and may be missing, as label 0 at an infinite distance.
            On a CUDA device it changes nothing.
        threads: see `nearest`.
        route: see `nearest`.

    Returns:
        Labels and distances ``(items, m)``; equal distances stand in index order.

    Raises:
        UsageError: ``m`` or the length of ``within`` out of range, or widths and dtypes that do
            not fit.
        EmbeddingError: the codebook is not finite.
    """
    ready = _prepared(x, codebook)
    if not 1 <= m <= len(ready):
        raise UsageError(f"m={m} is out of range; give 1 to {len(ready)}, the number of codewords")
    if within is not None and within.shape != (len(x),):
        raise UsageError(
            f"within has shape {tuple(within.shape)}; give one distance for each of {len(x)} rows"
        )
    return _search(x, ready.full_table(), m, threads, route, within)
