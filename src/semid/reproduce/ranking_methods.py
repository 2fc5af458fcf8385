"""The ways of giving items codes that a grid compares, and the tokenizers they need."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semid.codes import CodesInfo, SemanticIds, code_dtype
from semid.data.ids import ItemIds
from semid.data.source import EmbeddingSource
from semid.errors import IdsError, UsageError, check_choice
from semid.progress import Progress
from semid.recommenders.ranking.data import RankingData
from semid.recommenders.ranking.features import CodeFeatures
from semid.tokenizers.factory import TOKENIZERS, make_tokenizer

__all__ = ["METHODS", "Coded", "Tokenizers"]

logger = logging.getLogger(__name__)

_PARALLEL = ("mocvae", "vqvae")
_FITTED = {"me": "vqvae", "moc": "mocvae", "shuffled": "mocvae"}

METHODS = ("none", "random", "shuffled", "widened", "me", "moc", *sorted(set(TOKENIZERS)))
"""``none`` has no codes; ``random``, ``shuffled`` (MoC's codes dealt to other items) and
``widened`` (a wider item id) are controls; ``me`` is one VQ-VAE code with many embeddings; ``moc``
the codes of `MoCVAE`; others are tokenizers by name, a table a level."""


@dataclass(frozen=True)
class Coded:
    """What one method gives a run.

    Attributes:
        ids: codes of the items, or None.
        features: how they are used, or None.
    """

    ids: SemanticIds | None
    features: CodeFeatures | None


@dataclass
class Tokenizers:
    """Fits each tokenizer once, on training items alone, and keeps it on disk.

    Args:
        folder: where tokenizers are saved and found again.
        source: embeddings of the items.
        data: says which items train.
        codebook_size: codewords a level.
        seed: of the tokenizers and of random codes.
        options: further arguments of the tokenizers, as a recipe has them.
    """

    folder: Path
    source: EmbeddingSource
    data: RankingData
    codebook_size: int = 256
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[tuple[str, int], SemanticIds] = field(default_factory=dict)

    def method(self, name: str, scale: int, *, progress: Progress) -> Coded:
        """Return the codes and features of a method.

        Args:
            name: one of `METHODS`.
            scale: M: codes an item, or embeddings of its one code.
            progress: told about a fit.

        Raises:
            UsageError: an unknown method.
            IdsError: no training item has an embedding.
        """
        check_choice("--methods", name, METHODS)
        if name == "none":
            return Coded(None, None)
        if name in ("random", "widened"):
            ids = self._blank(scale)
            return Coded(ids, CodeFeatures(mode="parallel", control=name, seed=self.seed))
        kind = _FITTED.get(name, name)
        if name == "me":
            ids = self._fitted(kind, 1, progress)
            return Coded(ids, CodeFeatures(mode="multi", scale=scale))
        ids = self._fitted(kind, scale, progress)
        mode = "parallel" if kind in _PARALLEL else "levels"
        control = "shuffled" if name == "shuffled" else "none"
        return Coded(ids, CodeFeatures(mode=mode, control=control, seed=self.seed))

    def _blank(self, scale: int) -> SemanticIds:
        """Return codes that say nothing but their shape."""
        items = self.data.schema.items.ids
        sizes = (self.codebook_size,) * scale
        info = CodesInfo(
            tokenizer="none",
            codebook_sizes=sizes,
            hierarchical=False,
            codebook_fingerprint="0" * 64,
            weights_fingerprint="0" * 64,
        )
        codes = np.zeros((len(items), scale), dtype=code_dtype(sizes))
        return SemanticIds(items, codes, np.zeros(len(items), np.float32), info)

    def _fitted(self, kind: str, scale: int, progress: Progress) -> SemanticIds:
        if (kind, scale) not in self._known:
            self._known[kind, scale] = self._fit(kind, scale, progress)
        return self._known[kind, scale]

    def _fit(self, kind: str, scale: int, progress: Progress) -> SemanticIds:
        folder = self.folder / f"{kind}-{scale}x"
        file = self.folder / f"{kind}-{scale}x.parquet"
        if file.exists():
            return SemanticIds.read(file)
        single = {"vqvae": 1}.get(kind)
        if single is not None and scale != single:
            raise UsageError("vqvae has one code an item: take it at --scales 1, or me or moc")
        values: dict[str, Any] = {"codebook_size": self.codebook_size, "seed": self.seed}
        if single is None:
            values["levels"] = scale
        tokenizer = make_tokenizer(kind, {**values, **self.options})
        tokenizer.fit(
            self.source.subset(self._train_rows()),
            interactions=self.data.training_log if tokenizer.needs_behavior else None,
            progress=progress,
        )
        tokenizer.save(folder, overwrite=True)
        ids = tokenizer.encode(self.source, progress=progress)
        ids.write(file)
        return ids

    def _train_rows(self) -> np.ndarray:
        items: ItemIds = self.data.schema.items.ids
        trained = items.take(np.flatnonzero(self.data.train_items))
        rows = self.source.ids.index_of(trained.strings())
        known = np.sort(rows[rows >= 0])
        if not len(known):
            raise IdsError(
                f"none of the {len(trained)} training items has an embedding: they are called like "
                f"{trained.example}, the embeddings' like {self.source.ids.example}; check --items"
            )
        return known
