"""Joint refinement of a fitted tokenizer's codebooks."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, UsageError
from semid.progress import Progress, QuietProgress
from semid.quantization.blocks import PreprocessedBlocks, in_memory
from semid.quantization.nearest import index_codebook
from semid.quantization.refine import RefineOptions, refine_residual
from semid.seeds import child_seed
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer
from semid.tokenizers.context import item_weights, scan, train_weights
from semid.tokenizers.neural.quantized import LatentBlocks
from semid.tokenizers.neural.tokenizer import NeuralTokenizer
from semid.tokenizers.rqkmeans import RQKMeans

__all__ = ["refine"]

Refinable = TypeVar("Refinable", RQKMeans, NeuralTokenizer)
MEMORY = 1 << 30


def refine(
    tokenizer: Refinable,
    source: Any,
    *,
    ids: Any = None,
    weights: npt.ArrayLike | None = None,
    options: RefineOptions | None = None,
    progress: Progress | None = None,
) -> Refinable:
    """Fit all codebooks of a residual tokenizer again together, in its latent space.

    Beam encoding and ridge least squares take turns (`semid.quantization.refine`). The encoder and
    the decoder stay; codes change, so the result has another codebook fingerprint, and it encodes
    with the beam it was refined with.

    Args:
        tokenizer: fitted, with residual levels; it is left as it is.
        source: the embeddings it was fitted on: anything `semid.open_embeddings` reads. The items
            that the fit held out choose the ridge and the end.
        ids: item ids for a source that has none.
        weights: ``(items,)`` non-negative item weights, those of the fit if it had some. The items
            held out count alike.
        options: rounds, beam, ridges.
        progress: told about every round; silent by default.

    Returns:
        A refined copy; ``report.details["refine"]`` says what each round brought.

    Raises:
        NotFittedError: before `fit`.
        UsageError: for a tokenizer with parallel codebooks, or weights that are no weights.
        EmbeddingError: for rows of another width.

    Cost: a round encodes the items once with the beam, and the held-out items once a ridge.
    """
    began = time.monotonic()
    options, steps = options or RefineOptions(), progress or QuietProgress()
    opened = _opened(tokenizer, source, ids)
    held = held_out_mask(opened.ids, tokenizer.validation_fraction, salt=HELD_OUT_SALT)
    mass = train_weights(item_weights(weights, len(opened)), ~held)
    width = tokenizer.codebooks[0].shape[1]

    def latents(rows: np.ndarray) -> Any:
        view = LatentBlocks(opened.subset(rows), tokenizer._latent_block, width)
        return in_memory(view, limit_bytes=MEMORY)

    seen = scan(opened, ~held, steps)
    steps.start("refine", total=options.most_rounds)
    books, rounds = refine_residual(
        latents(~held),
        tokenizer.codebooks,
        judged=latents(held) if held.any() else None,
        groups=tokenizer._parts(opened.dim) if isinstance(tokenizer, NeuralTokenizer) else None,
        options=options,
        weights=mass,
        seed=child_seed(tokenizer.seed, "refine"),
        threads=tokenizer.threads,
        on_round=lambda one: steps.step(1, error=one.error, ridge=one.ridge),
    )
    made = copy.copy(tokenizer)
    made.beam_width = options.beam_width
    made._prepared = tuple(index_codebook(torch.from_numpy(book)) for book in books)
    before = {} if tokenizer.report is None else tokenizer.report.details
    details = {**before, "refine": [asdict(one) for one in rounds]}
    if isinstance(made, NeuralTokenizer):
        train, judged = (
            PreprocessedBlocks(opened.subset(rows), made._preprocess) for rows in (~held, held)
        )
        details |= made._follow_codes(train, judged if len(judged) else None, weights=mass)
    made.report = made._judge(opened, ~held, seen, details, steps, began)
    return made


def _opened(tokenizer: Tokenizer, source: Any, ids: Any) -> EmbeddingSource:
    """Open the embeddings of a tokenizer that can be refined; see `refine` for what it raises."""
    if not tokenizer.hierarchical or not isinstance(tokenizer, RQKMeans | NeuralTokenizer):
        raise UsageError(
            f"the codebooks of {tokenizer.kind} are parallel and each takes its nearest codeword; "
            "refine a tokenizer with residual levels, such as rqkmeans"
        )
    opened = open_embeddings(source, ids=ids)
    if opened.dim != tokenizer.dim:
        raise EmbeddingError(
            f"these embeddings have width {opened.dim}, the tokenizer was fitted on width "
            f"{tokenizer.dim}; give the embeddings it was fitted on"
        )
    return opened
