"""Joint refinement of a fitted tokenizer's codebooks."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, TypeVar

import numpy.typing as npt

from semid.data.embeddings import open_embeddings
from semid.data.ids import held_out_mask
from semid.errors import UsageError
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.quantization.blocks import Blocks, in_memory, map_rows
from semid.quantization.refine import RefineOptions, refine_residual
from semid.seeds import child_seed
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.context import compile_kernels, item_weights, scan, train_weights
from semid.tokenizers.stored import HELD_OUT_SALT

Refinable = TypeVar("Refinable", bound=Tokenizer)


@with_progress
def refine(
    tokenizer: Refinable,
    source: Any,
    *,
    ids: Any = None,
    weights: npt.ArrayLike | None = None,
    options: RefineOptions | None = None,
    progress: ProgressArgument = None,
) -> Refinable:
    """Fit all codebooks of a residual tokenizer again together, in its latent space.

    Beam encoding and ridge least squares take turns (`semid.quantization.refine`). The encoder and
    the decoder stay; codes change, so the result has another codebook fingerprint, and it encodes
    with the beam it was refined with.

    Args:
        tokenizer: fitted tokenizer with residual levels; it does not change.
        source: the embeddings it was fitted on: anything `semid.open_embeddings` reads. The items
            that the fit held out choose the ridge and the end.
        ids: item ids for a source that has none.
        weights: ``(items,)`` non-negative item weights of the fit; held-out items count alike.
        options: rounds, beam, ridges.
        progress: callback that receives progress events.

    Returns:
        A refined copy; ``report.details["refine"]`` says what each round brought.

    Raises:
        NotFittedError: before `fit`.
        UsageError: for a tokenizer with parallel codebooks, or weights that are no weights.
        EmbeddingError: for rows of another width.

    Cost: a round encodes the items once with the beam, and the held-out items once per ridge.
    """
    started = time.monotonic()
    options, progress = options or RefineOptions(), progress or QuietProgress()
    if not tokenizer.hierarchical or tokenizer.combine != "sum":
        raise UsageError(
            f"the codebooks of {tokenizer.kind} are parallel and each takes its nearest codeword; "
            "refine a tokenizer with residual levels, such as rqkmeans"
        )
    if not tokenizer.encodes_nearest:
        raise UsageError(
            f"{tokenizer.kind} does not take nearest codewords, which refinement fits; refine a "
            "tokenizer such as rqkmeans"
        )
    opened = open_embeddings(source, ids=ids)
    tokenizer._check_width(opened)
    compile_kernels(progress, tokenizer._kernels() | {"tables"})
    # The items that the fit held out are not trained on here either: they choose ridge and end.
    held_out = held_out_mask(opened.ids, tokenizer.validation_fraction, salt=HELD_OUT_SALT)
    train, validation = opened.subset(~held_out), opened.subset(held_out)
    train_mass = train_weights(item_weights(weights, len(opened)), ~held_out)
    width = tokenizer.latent_dim

    def latents(rows: Blocks) -> Blocks:
        # The encoder does not change, so every row is encoded once and not in each round.
        return in_memory(map_rows(rows, tokenizer._latent_block, width))

    scanned = scan(opened, ~held_out, progress)
    progress.start("refine", total=options.most_rounds)
    books, rounds = refine_residual(
        latents(train),
        tokenizer.codebooks,
        held_out=latents(validation) if len(validation) else None,
        groups=tokenizer._refined_parts(opened.dim),
        options=options,
        weights=train_mass,
        seed=child_seed(tokenizer.seed, "refine"),
        threads=tokenizer.threads,
        on_round=lambda done: progress.step(1, error=done.error, ridge=done.ridge),
    )
    # The new codebooks in a copy, then what depends on codes, then a report of the whole.
    refined = tokenizer.replace_tensors({f"codebooks.{i}": book for i, book in enumerate(books)})
    # The codewords were fitted to the codes that this beam finds, so it belongs to the model.
    refined.beam_width = options.beam_width
    details = {} if tokenizer.report is None else dict(tokenizer.report.details)
    details["refine"] = [asdict(each) for each in rounds]
    details |= refined._refit_decoder(
        train, validation if len(validation) else None, weights=train_mass
    )
    refined.report = refined._evaluate(opened, ~held_out, scanned, details, progress, started)
    return refined
