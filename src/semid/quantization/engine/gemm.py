"""Screening by torch matrix products: float32 and bfloat16, on any CPU torch runs on."""

from __future__ import annotations

import llvmlite.binding
import numpy as np
import numpy.typing as npt
import torch

from semid.quantization.engine.rows import slack
from semid.quantization.engine.screen import scan_best, scan_many
from semid.quantization.engine.state import State
from semid.quantization.engine.table import Operand, Table

__all__ = ["Bfloat16Gemm", "Float32Gemm"]

F64 = npt.NDArray[np.float64]

CHUNK = 2048  # columns a product: 256 rows of float32 scores take 2 MB
ROWS = 256
BFLOAT16 = ("amx-bf16", "avx512bf16", "bf16")
"""What LLVM calls the instructions, on x86 and Arm. Without them torch's products take a hundred
times as long as those of float32."""


def _bfloat16(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _scan(state: State, table: Table, scores: npt.NDArray[np.generic], start: int, at: int) -> None:
    rows, columns = scores.shape
    shared = (
        scores, rows, columns, at, table.offsets, state.margin, state.top, state.counts,
        state.candidates, state.kept, start,
    )  # fmt: skip
    if state.best_only:
        scan_best(*shared)
    else:
        scan_many(*shared, state.k, state.scratch)


class Float32Gemm:
    """Scores by float32 products; the route that is always there."""

    name = "fp32"
    library = "torch float32"

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        return None

    def prepare(self, table: Table) -> Operand | None:
        """Use the table's scaled rows, which carry only float32 rounding."""
        return Operand(None, table.radius * 2.0**-23 + 2.0**-60)

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates; see `engine.search`."""
        y, length, rows = state.y, state.length, state.rows
        # torch may be told to round float32 operands to bfloat16 or TF32 inside its products.
        loose = torch.get_float32_matmul_precision() != "highest"
        unit = 2.0**-8 if loose else 0.0
        state.set_bound(
            table,
            residual=length * (2.0**-23 + unit) + 2.0**-60,
            entry_residual=operand.residual + unit * table.radius,
        )
        weights = torch.from_numpy(table.scaled)
        bias = torch.from_numpy(table.offsets)
        for at in range(0, len(table.offsets), CHUNK):
            part = slice(at, min(at + CHUNK, len(table.offsets)))
            for start in range(0, rows, ROWS):
                block = torch.from_numpy(y[start : min(start + ROWS, rows)])
                scores = state.buffer("fp32", (len(block), part.stop - at), np.float32)
                torch.addmm(
                    bias[part], block, weights[part].T, beta=-1.0, out=torch.from_numpy(scores)
                )
                _scan(state, table, scores, start, at)


class Bfloat16Gemm:
    """Scores by bfloat16 products with bfloat16 results, whose rounding is in the bound."""

    name = "bf16"
    library = "torch bfloat16"

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""
        features = llvmlite.binding.get_host_cpu_features()
        if any(features.get(name, False) for name in BFLOAT16):
            return None
        return "the chip has no bfloat16 products"

    def prepare(self, table: Table) -> Operand | None:
        """Round the scaled rows to bfloat16."""
        bits, residual = table.bfloat16(32)
        return Operand(bits, residual)

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates; see `engine.search`."""
        rows = state.rows
        bits = state.buffer("bf16", (rows, operand.data.shape[1]), np.uint16)
        state.round_bfloat16(bits)
        width = operand.data.shape[1]
        state.set_bound(
            table,
            residual=slack(state.residual, state.length, width),
            entry_residual=operand.residual,
            relative=2.0**-8,
        )
        weights, y = _bfloat16(operand.data), _bfloat16(bits)
        for at in range(0, len(weights), CHUNK):
            part = weights[at : at + CHUNK].T
            for start in range(0, rows, ROWS):
                block = y[start : start + ROWS]
                scores = state.buffer("products", (len(block), part.shape[1]), np.uint16)
                torch.mm(block, part, out=_bfloat16(scores))
                _scan(state, table, scores, start, at)
