"""A tokenizer's encoder as one module: embeddings in, codes out, ready to be traced.

A tokenizer takes part by a method ``encoder_module()`` that returns a module from rows
``(batch, dim)`` to latents ``(batch, latent)`` float32 (or a list of them, one a parallel
codebook); the nearest codewords are found here. Distances are taken in float64 and residuals
subtracted in float32, as `encode` does, so that the codes are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semid.errors import UsageError
from semid.tokenizers.base import Tokenizer

__all__ = ["CodesGraph", "HasEncoderModule", "codes_graph"]


@runtime_checkable
class HasEncoderModule(Protocol):
    """What a tokenizer gives to be exported."""

    def encoder_module(self) -> nn.Module:
        """Return the module from rows ``(batch, dim)`` to latents ``(batch, latent)``."""
        ...


class CodesGraph(nn.Module):
    """Rows to codes: an encoder, then nearest codewords level by level or side by side.

    Args:
        encoder: rows ``(batch, dim)`` to latents.
        codebooks: ``(codes, latent)`` float32, one a level.
        hierarchical: residual levels; parallel ones otherwise.
        beam_width: partial codes kept a row, for residual levels.
    """

    def __init__(
        self,
        encoder: nn.Module,
        codebooks: Sequence[npt.NDArray[np.float32]],
        *,
        hierarchical: bool,
        beam_width: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.levels = len(codebooks)
        self.hierarchical = hierarchical
        self.beam_width = beam_width
        for level, book in enumerate(codebooks):
            words = torch.from_numpy(np.array(book, dtype=np.float32))
            self.register_buffer(f"book_{level}", words)
            self.register_buffer(f"squares_{level}", words.double().square().sum(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return codes ``(batch, levels)`` int64 of rows ``(batch, dim)`` float32."""
        latent = self.encoder(x)
        if not self.hierarchical:
            spaces = latent if isinstance(latent, list | tuple) else [latent] * self.levels
            nearest = [self._distances(z, level).argmin(1) for level, z in enumerate(spaces)]
            return torch.stack(nearest, dim=1)
        if self.beam_width > 1:
            return self._beam(latent)
        codes = []
        for level in range(self.levels):
            code = self._distances(latent, level).argmin(1)
            codes.append(code)
            latent = latent - self._book(level)[code]
        return torch.stack(codes, dim=1)

    def _book(self, level: int) -> Tensor:
        return self.get_buffer(f"book_{level}")

    def _distances(self, rows: Tensor, level: int) -> Tensor:
        """Squared distances ``(batch, codes)`` without ``|row|^2``, in float64."""
        product = rows.double() @ self._book(level).double().T
        return self.get_buffer(f"squares_{level}") - 2.0 * product

    def _beam(self, latent: Tensor) -> Tensor:
        """Keep the partial codes with the smallest residuals after every level."""
        residual = latent[:, None, :]
        codes: Tensor | None = None
        for level in range(self.levels):
            kept = residual.shape[1]
            book = self._book(level)
            flat = residual.reshape(-1, residual.shape[2])
            own = flat.double().square().sum(dim=1, keepdim=True)
            total = (self._distances(flat, level) + own).reshape(-1, kept * len(book))
            best = total.topk(min(self.beam_width, kept * len(book)), dim=1, largest=False).indices
            parent, code = best // len(book), best % len(book)
            width = residual.shape[2]
            chosen = torch.gather(residual, 1, parent[:, :, None].expand(-1, -1, width))
            residual = chosen - book[code]
            before = None
            if codes is not None:
                before = torch.gather(codes, 1, parent[:, :, None].expand(-1, -1, level))
            codes = code[:, :, None] if before is None else torch.cat([before, code[:, :, None]], 2)
        assert codes is not None
        return codes[:, 0]


def codes_graph(tokenizer: Tokenizer) -> CodesGraph:
    """Return a tokenizer's encoder as a module that can be traced.

    Raises:
        NotFittedError: before `fit`.
        UsageError: if the tokenizer offers no graph.
    """
    books = tokenizer.codebooks
    if not isinstance(tokenizer, HasEncoderModule):
        raise UsageError(
            f"{tokenizer.kind} gives no encoder graph; give it a method encoder_module(), or "
            "export another tokenizer"
        )
    graph = CodesGraph(
        tokenizer.encoder_module(),
        books,
        hierarchical=tokenizer.hierarchical,
        beam_width=tokenizer.beam_width,
    )
    return graph.eval()
