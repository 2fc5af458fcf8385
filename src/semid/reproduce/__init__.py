"""The papers' tables and figures from recipes: runs, a ledger of results, claims and pages."""

from __future__ import annotations

from collections.abc import Sequence

from semid.errors import UsageError
from semid.tokenizers.factory import TOKENIZERS

PAPERS = ("drq", "moc", "behavior", "retrieval", "predict")

METHODS = ("none", "random", "shuffled", "widened", "me", "moc", *sorted(set(TOKENIZERS)))
"""``none`` has no codes; ``random``, ``shuffled`` (MoC's codes given to other items) and
``widened`` (a wider item id) are controls; ``me`` is one VQ-VAE code with many embeddings; ``moc``
the codes of `MoCVAE`; the others are tokenizers by name, with a table per level."""
GRID_METHODS = ("none", "ids", *METHODS[1:])  # ``ids`` are Semantic IDs that are given


def check_grid_inputs(methods: Sequence[str], *, ids: bool, embeddings: bool) -> None:
    """Refuse methods that lack what they need, and ids that no method uses."""
    fitted = [method for method in methods if method not in ("none", "ids")]
    if fitted and not embeddings:
        raise UsageError(f"methods {', '.join(fitted)} need --embeddings (embeddings=)")
    if "ids" in methods and not ids:
        raise UsageError("--methods ids compares your own ids: give --ids (ids=)")
    if ids and "ids" not in methods:
        raise UsageError("--ids (ids=) would not be used: add ids to --methods")
