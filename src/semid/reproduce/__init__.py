"""The papers' tables and figures from recipes: runs, a ledger of results, claims and pages."""

from __future__ import annotations

from semid.tokenizers.factory import TOKENIZERS

PAPERS = ("drq", "moc", "behavior", "retrieval", "predict")

METHODS = ("none", "random", "shuffled", "widened", "me", "moc", *sorted(set(TOKENIZERS)))
"""``none`` has no codes; ``random``, ``shuffled`` (MoC's codes given to other items) and
``widened`` (a wider item id) are controls; ``me`` is one VQ-VAE code with many embeddings; ``moc``
the codes of `MoCVAE`; the others are tokenizers by name, with a table per level."""
GRID_METHODS = ("none", "ids", *METHODS[1:])  # ``ids`` are Semantic IDs that are given
