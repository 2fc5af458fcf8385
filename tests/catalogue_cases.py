"""Small tokenizers and catalogues for the tests of what comes after encoding."""

from __future__ import annotations

import numpy as np

import semid
from semid.tokenizers.base import Tokenizer


def drawn_tokenizer(
    *, dim: int = 6, sizes: tuple[int, ...] = (4, 8), seed: int = 0, scale: float = 0.4
) -> semid.RQKMeans:
    """A residual tokenizer whose codebooks are drawn, not fitted: quick, and as good for this."""
    generator = np.random.default_rng(seed)
    tokenizer = semid.RQKMeans(levels=len(sizes), codebook_size=sizes, threads=1)
    tokenizer._set_tensors(
        {
            f"codebooks.{level}": (scale**level * generator.normal(size=(size, dim))).astype("f4")
            for level, size in enumerate(sizes)
        }
    )
    tokenizer._dim = dim
    return tokenizer


class Parallel(semid.RQKMeans):
    """Codebooks that all quantize the same vector and are averaged, as in Mixture-of-Codes."""

    hierarchical = False

    def _encode_block(self, x, beam_width):
        from semid.quantization.residual import ResidualCodes

        codes = np.stack([_nearest(x, book) for book in self.codebooks], axis=1)
        left = x - self._quantize_codes(codes)
        return ResidualCodes(codes, np.linalg.norm(left, axis=1).astype(np.float32))

    def _quantize_codes(self, codes):
        words = [book[codes[:, level]] for level, book in enumerate(self.codebooks)]
        return np.mean(words, axis=0).astype(np.float32)


def parallel_tokenizer(*, dim: int = 6, sizes: tuple[int, ...] = (4, 8)) -> Tokenizer:
    drawn = drawn_tokenizer(dim=dim, sizes=sizes, scale=1.0)
    tokenizer = Parallel(levels=len(sizes), codebook_size=sizes, threads=1)
    tokenizer._set_tensors(drawn._tensors())
    tokenizer._dim = dim
    return tokenizer


def _nearest(x, book):
    return ((x[:, None, :] - book[None]) ** 2).sum(-1).argmin(1)


def rows(items: int = 60, *, dim: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(items, dim)).astype(np.float32)
