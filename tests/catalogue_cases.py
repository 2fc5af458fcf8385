"""Small tokenizers and catalogues for the tests of what comes after encoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import semid
from semid.codes import CodesInfo
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.neural.tokenizer import NeuralTokenizer


def codes_info(sizes: tuple[int, ...], **fields: Any) -> CodesInfo:
    """What ids say of a model that was never fitted."""
    fingerprints = {"codebook_fingerprint": "a" * 64, "weights_fingerprint": "b" * 64}
    about = {"tokenizer": "rqkmeans", "hierarchical": True, **fingerprints}
    return CodesInfo(codebook_sizes=sizes, **{**about, **fields})


def drawn_tokenizer(
    *, dim: int = 6, sizes: tuple[int, ...] = (4, 8), seed: int = 0, scale: float = 0.4
) -> semid.RQKMeans:
    """A residual tokenizer whose codebooks are drawn, not fitted: quick, and as good for this."""
    generator = np.random.default_rng(seed)
    tokenizer = semid.RQKMeans(levels=len(sizes), codebook_size=sizes, threads=1)
    tokenizer._dim = dim
    tokenizer._set_tensors(
        {
            f"codebooks.{level}": (scale**level * generator.normal(size=(size, dim))).astype("f4")
            for level, size in enumerate(sizes)
        }
    )
    return tokenizer


def drawn_neural(
    make: Callable[..., NeuralTokenizer], *, inputs: tuple[int, ...] = (6,), **options: Any
) -> NeuralTokenizer:
    """A tokenizer with a network whose weights and codebooks are drawn, three levels of eight."""
    generator = np.random.default_rng(2)
    network = {"hidden": (16,), "latent": 5}
    tokenizer = make(codebook_size=8, network=network, threads=1, **options)
    dim = sum(inputs)
    autoencoder = tokenizer._new_autoencoder(inputs)
    autoencoder.standardize_(np.full(dim, 0.1), 2.0 * dim)
    tensors = {f"autoencoder.{k}": v.numpy() for k, v in autoencoder.state_dict().items()}
    for level in range(3):
        scale = 0.5**level if tokenizer.hierarchical else 0.3
        tensors[f"codebooks.{level}"] = (scale * generator.normal(size=(8, 5))).astype("f4")
        if options.get("projection"):
            tensors[f"maps.{level}"] = generator.normal(size=(5, 5)).astype("f4")
    tensors["preprocess.mean"] = np.full(dim, 0.25, dtype=np.float32)
    tokenizer._dim = dim
    tokenizer._set_tensors(tensors)
    return tokenizer


class Parallel(semid.RQKMeans):
    """Codebooks that all quantize the same vector and are averaged, as in Mixture-of-Codes."""

    hierarchical = False
    combine = "mean"

    def _encode_block(self, x, beam_width):
        from semid.quantization.residual import ResidualCodes

        codes = np.stack([_nearest(x, book) for book in self.codebooks], axis=1)
        left = x - self._quantize_codes(codes)
        return ResidualCodes(codes, np.linalg.norm(left, axis=1).astype(np.float32))


def parallel_tokenizer(*, dim: int = 6, sizes: tuple[int, ...] = (4, 8)) -> Tokenizer:
    drawn = drawn_tokenizer(dim=dim, sizes=sizes, scale=1.0)
    tokenizer = Parallel(levels=len(sizes), codebook_size=sizes, threads=1)
    tokenizer._dim = dim
    tokenizer._set_tensors(drawn._tensors())
    return tokenizer


def _nearest(x, book):
    return ((x[:, None, :] - book[None]) ** 2).sum(-1).argmin(1)


def rows(items: int = 60, *, dim: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(items, dim)).astype(np.float32)
