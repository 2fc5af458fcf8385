"""Tokenizers with given codebooks and small catalogues whose faults are planted."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from semid.quantization.residual import ResidualCodes
from semid.tokenizers.base import Tokenizer


class FixedResidual(Tokenizer):
    """A residual tokenizer with the codebooks it is given; numpy only, so it is its own oracle."""

    kind: ClassVar[str] = "fixed-residual"
    hierarchical: ClassVar[bool] = True
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "sum"

    def __new__(cls, *books: np.ndarray) -> FixedResidual:
        return object.__new__(cls)  # codebooks are positional, so arguments are not checked by name

    def __init__(self, *books: np.ndarray) -> None:
        self.books = tuple(np.asarray(book, dtype=np.float32) for book in books)
        super().__init__(validation_fraction=0.0)
        self._dim = self.books[0].shape[1]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(len(book) for book in self.books)

    def _fit(self, context: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _nearest(self, rows: np.ndarray, book: np.ndarray) -> np.ndarray:
        return ((rows[:, None] - book[None]) ** 2).sum(2).argmin(1)

    def _encode_block(self, x: np.ndarray, beam_width: int) -> ResidualCodes:
        left, codes = x, []
        for book in self.books:
            codes.append(self._nearest(left, book))
            left = left - book[codes[-1]]
        return ResidualCodes(np.stack(codes, 1), np.linalg.norm(left, axis=1).astype(np.float32))

    def _decode_codes(self, codes: np.ndarray) -> np.ndarray:
        return sum(book[codes[:, i]] for i, book in enumerate(self.books)).astype(np.float32)

    def _quantize_codes(self, codes: np.ndarray) -> np.ndarray:
        return self._decode_codes(codes)

    def _latent_block(self, x: np.ndarray) -> np.ndarray:
        return x

    def _codebooks(self) -> tuple[np.ndarray, ...]:
        return self.books

    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"codebooks.{i}": book for i, book in enumerate(self.books)}

    def _set_tensors(self, tensors: Any) -> None:
        raise NotImplementedError


class FixedParallel(FixedResidual):
    """Parallel codebooks that all quantize the row itself; it is decoded as their mean."""

    kind: ClassVar[str] = "fixed-parallel"
    hierarchical: ClassVar[bool] = False
    combine: ClassVar[Literal["sum", "mean", "concat"]] = "mean"

    def _encode_block(self, x: np.ndarray, beam_width: int) -> ResidualCodes:
        codes = np.stack([self._nearest(x, book) for book in self.books], 1)
        norms = np.linalg.norm(x - self._decode_codes(codes), axis=1)
        return ResidualCodes(codes, norms.astype(np.float32))

    def _decode_codes(self, codes: np.ndarray) -> np.ndarray:
        total = sum(book[codes[:, i]] for i, book in enumerate(self.books))
        return (total / len(self.books)).astype(np.float32)


def blobs(
    items: int = 600, groups: int = 8, dim: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows around well separated centers, the centers, and small offsets around zero."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(groups, dim)).astype(np.float32) * 3
    offsets = rng.normal(size=(groups, dim)).astype(np.float32) * 0.5
    x = centers[np.arange(items) % groups] + offsets[np.arange(items) // groups % groups]
    return (x + rng.normal(size=x.shape) * 0.1).astype(np.float32), centers, offsets


def healthy(**options: Any) -> tuple[np.ndarray, FixedResidual]:
    """Return rows and a tokenizer that fits them, with many more ids than rows."""
    x, centers, offsets = blobs(**options)
    rng = np.random.default_rng(1)
    fine = rng.normal(size=(32, x.shape[1])).astype(np.float32) * 0.4
    return x + fine[rng.integers(0, 32, len(x))], FixedResidual(centers, offsets, fine)


def titles(items: int, *, hostile: bool = False) -> pa.Table:
    """Return a table of items with titles; hostile ones try to break out of the page."""
    names = [f"Thing {i} of kind {'abcdefgh'[i % 8] * 3}" for i in range(items)]
    if hostile:
        names[0] = "</script><script>window.broken = 1</script>"
        names[1] = '"><img src=x onerror="window.broken = 1">'
        names[2] = "<!-- <script> \u2028 line \u2029 {{ 7 * 7 }}"
    return pa.table({"item_id": [f"item-{i}" for i in range(items)], "title": names})


def logs(items: int, users: int = 400, seed: int = 0) -> pa.Table:
    """Return ordered interactions in which items of one group (row modulo 8) follow each other."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 8, users)
    rows = rng.integers(0, items // 8, (users, 5)) * 8 + groups[:, None]
    return pa.table(
        {
            "user_id": [f"user-{u}" for u in range(users) for _ in range(5)],
            "item_id": [f"item-{i}" for i in rows.ravel()],
            "position": list(range(5)) * users,
        }
    )
