"""Dense layers in which every row is computed by itself, in one fixed order of sums.

A matrix library picks its kernel by the shape of the block and the number of threads, so the last
bits of a row's latent, and with them its codes, can depend on the rows beside it. Here they cannot:
each output is ``bias + x_0 w_0 + x_1 w_1 + ...``, added in this order by fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt

from semid.quantization.threads import map_blocks

__all__ = ["Layer", "dense", "perceptron"]

Array = npt.NDArray[np.float32]
Layer = tuple[Array, Array]
"""Weights ``(in, out)`` and bias ``(out,)``."""

BLOCK = 256
"""Rows a block: a block's widest activations stay in the second-level cache."""


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _dense(x: Array, weight: Array, bias: Array, relu: bool, out: Array) -> None:
    inputs, width = weight.shape
    whole = inputs - inputs % 4
    for i in range(len(x)):
        row = out[i]
        row[:] = bias
        for k in range(0, whole, 4):
            a, b, c, d = x[i, k], x[i, k + 1], x[i, k + 2], x[i, k + 3]
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            for j in range(width):
                total = row[j] + a * w0[j]
                total = total + b * w1[j]
                total = total + c * w2[j]
                row[j] = total + d * w3[j]
        for k in range(whole, inputs):
            a, w0 = x[i, k], weight[k]
            for j in range(width):
                row[j] = row[j] + a * w0[j]
        if relu:
            for j in range(width):
                row[j] = max(row[j], np.float32(0))


def dense(x: Array, layer: Layer, *, relu: bool) -> Array:
    """Apply one layer to rows ``(n, in)`` and return ``(n, out)`` float32."""
    weight, bias = layer
    out = np.empty((len(x), weight.shape[1]), dtype=np.float32)
    _dense(np.ascontiguousarray(x, dtype=np.float32), weight, bias, relu, out)
    return out


def perceptron(x: Array, layers: Sequence[Layer], *, threads: int | None = None) -> Array:
    """Apply dense layers with ReLU between them.

    Args:
        x: ``(n, in)`` float32.
        layers: weights and bias of each layer; there is no ReLU after the last.
        threads: plain threads over blocks of rows; it changes no bit.

    Returns:
        ``(n, out)`` float32. Each row depends on that row alone, in any chunking.
    """
    out = np.empty((len(x), layers[-1][0].shape[1]), dtype=np.float32)

    def work(start: int) -> None:
        block = x[start : start + BLOCK]
        for number, layer in enumerate(layers):
            block = dense(block, layer, relu=number < len(layers) - 1)
        out[start : start + BLOCK] = block

    starts = range(0, len(x), BLOCK)
    map_blocks(work, starts, threads=1 if len(starts) < 8 else threads)
    return out
