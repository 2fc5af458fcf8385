"""Which ways of screening this machine has, and which one suits a table.

A route is tried once before it is trusted: its answers on a small fixed problem must equal those
of the float64 keys. What fails, or what the chip lacks, is logged and left out.
"""

from __future__ import annotations

from typing import Protocol

from semid.errors import UsageError, nearest_name
from semid.quantization.engine.gemm import Bfloat16Gemm, Float32Gemm
from semid.quantization.engine.state import State
from semid.quantization.engine.table import Operand, Table

__all__ = ["ROUTES", "Route", "choose"]

ROUTES = ("auto", "int8", "bf16", "fp32")
"""Names a caller may give."""


class Route(Protocol):
    """A way to score all entries for a block of queries and to bound the scores' error."""

    name: str
    library: str

    def unavailable(self) -> str | None:
        """Return why this route cannot run here, or None."""

    def prepare(self, table: Table) -> Operand:
        """Make the table's copy for this route."""

    def screen(self, table: Table, operand: Operand, state: State) -> None:
        """Fill ``state``'s candidates so that every possible winner is among them."""


def choose(route: str) -> Route:
    """Return the route called ``route``."""
    if route not in ROUTES:
        listed = ", ".join(ROUTES)
        raise UsageError(f"route='{route}' is not one of {listed}{nearest_name(route, ROUTES)}")
    return Float32Gemm() if route in ("fp32", "auto") else Bfloat16Gemm()
