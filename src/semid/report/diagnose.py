"""`semid.diagnose`: run the diagnostics that fit the data, and gather the results."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.catalogue.matching import item_counts
from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.data.interactions import Interactions, read_interactions
from semid.data.items import ItemTexts, read_items
from semid.data.source import EmbeddingSource
from semid.diagnostics.overlap import LevelOverlap, overlap_levels
from semid.diagnostics.pairs import ItemPairs
from semid.diagnostics.popularity import popularity_health
from semid.diagnostics.spaces import sample_rows
from semid.errors import IdsError, UsageError
from semid.options import Options, option
from semid.progress import Progress, ProgressArgument, QuietProgress, with_progress
from semid.report import behavior as behavior_parts
from semid.report.explorer import MAX_ITEMS, build_explorer, largest_buckets
from semid.report.measure import (
    CataloguePass,
    flipped_items,
    held_out_rows,
    measure_catalogue,
    measure_flips,
    measure_geometry,
    rank_frequency,
    reconstruction_errors,
)
from semid.report.results import (
    Behavior,
    DataInfo,
    Diagnosis,
    Flips,
    ModelInfo,
    PairResults,
    Protocol,
    RankedUsage,
    Spaces,
)
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.stored import HELD_OUT_SALT

EXPLORER_NOISE = 0.2


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions(Options):
    """Samples, seeds and cutoffs of `diagnose`; `semid.compare` gives all models the same."""

    seed: int = option(
        0, help="Seed of samples, noise, negatives, the order of ties and the bootstrap."
    )
    geometry_sample: int = option(20_000, ge=1, help="Number of items whose spectra are measured.")
    flip_sample: int = option(5_000, ge=1, help="Number of items whose flips are counted.")
    cutoffs: tuple[int, ...] | None = option(
        None, help="K of the hit rates; by default 20, 50, 100, 200, as far as the pool allows."
    )
    replicates: int = option(
        1000, ge=0, help="Bootstrap draws of users for the intervals; 0 leaves intervals out."
    )
    threads: int | None = option(
        None, ge=1, help="Number of CPU threads, all by default; the result does not depend on it."
    )


@with_progress
def diagnose(
    tok: Tokenizer,
    x: Any,
    *,
    interactions: Any = None,
    ids: Any = None,
    items: Any = None,
    relations: Any = None,
    explorer: bool = True,
    progress: ProgressArgument = None,
    **options: Any,
) -> Diagnosis:
    """Measure whether a tokenizer's codes are good, and say what is wrong.

    Always: usage, collisions, reconstruction, overlap, flips under noise, geometry. With
    interactions: retrieval, retention and AUCs on consecutive items of the test users (a tenth, by
    a hash of their id), and popularity over all users. With relations: the same on those pairs.

    Args:
        tok: a fitted tokenizer, hierarchical or parallel.
        x: embeddings ``(items, dim)``: anything `semid.open_embeddings` reads.
        interactions: anything `semid.read_interactions` reads.
        ids: item ids for embeddings that have none.
        items: table with ``item_id`` and ``title`` or ``text``, for names in the report; None
            takes the table of ``ids``, else that of ``x``, where they have titles.
        relations: Parquet, CSV or table of pairs ``item_id``, ``related_item_id`` and, for
            several kinds, ``relation``: a second ground truth beside behavior.
        explorer: gather the code tree that the page shows.
        progress: callback that receives progress events.
        options: ``seed``, ``geometry_sample``, ``flip_sample``, ``cutoffs``, ``replicates`` and
            ``threads``, see `DiagnoseOptions`.

    Returns:
        A `Diagnosis`; ``.write("report.html")`` makes the page.

    Raises:
        EmbeddingError: rows of another width than the tokenizer's, or that are not finite.
        InteractionsError: interactions without a known item, or without a pair to test on.
        InputError: cutoffs beyond the pool, relations without a pair inside the catalogue.
        UsageError: something that is not a tokenizer, or options that do not fit.

    Memory: about ``30 + 6 levels`` bytes per item and a few blocks of 65,536 rows. With
    interactions or relations, which search the whole pool, also 12 bytes per item and dimension.
    """
    # A path instead of a model is the usual mistake.
    if not isinstance(tok, Tokenizer):
        raise UsageError(
            f"tok is a {type(tok).__name__}; give a fitted tokenizer, such as semid.load('model/')"
        )
    settings, progress = DiagnoseOptions.of(options), progress or QuietProgress()
    source = open_embeddings(x, ids=ids)
    texts = _texts(items, (ids, x), source.ids)
    notes = []
    if texts is not None and texts.missing:
        notes.append(f"{texts.missing:,} of {len(source):,} items have no row among the texts")
    # Inputs are read before the catalogue, so that faults in them show at once.
    log = None if interactions is None else read_interactions(interactions)
    pairs_by_kind: dict[str, ItemPairs] = {}
    if relations is not None:
        pairs_by_kind, relation_notes = behavior_parts.relations(relations, source.ids)
        notes += relation_notes
    counts = None if log is None else item_counts(log, source.ids).astype(np.int64)
    held_out, note = held_out_rows(tok, source)
    measured = measure_catalogue(tok, source, progress, held_out=held_out)
    run = _Run(tok, source, measured, settings, progress, [*notes, note])
    progress.start("overlap", total=None)
    overlaps: tuple[LevelOverlap, ...] = ()
    if run.latent_std > 0:  # else all latents are equal
        overlaps = overlap_levels(
            tok.codebooks, measured.usage, latent_std=run.latent_std, threads=settings.threads
        )
    # The subsets for geometry and flips are drawn once, the second from the first.
    sample = sample_rows(measured.items, settings.geometry_sample, seed=settings.seed)
    flips, geometry = run.robustness(overlaps, sample)
    behavior, related = run.behavior(log, counts, pairs_by_kind)
    progress.start("explorer", total=None)
    tree = run.explorer(texts, counts) if explorer else None
    return Diagnosis(
        model=_model_info(tok),
        data=DataInfo(len(source), source.dim, source.label),
        protocol=Protocol(
            seed=settings.seed,
            explorer_items=min(len(source), MAX_ITEMS),
            explorer_noise=EXPLORER_NOISE,
            held_out=f"fraction {tok.validation_fraction:g} of the items, by a hash of their id "
            f"(salt '{HELD_OUT_SALT}')",
            behavior="consecutive items of the test users (a tenth, by a hash of their id); no "
            "jump over items outside the catalogue; popularity counts all users",
            geometry_items=len(sample),
            flip_items=min(settings.flip_sample, measured.items),
            interactions=None if log is None else log.label,
            date=_today(),
        ),
        verdict=measured.health.verdict(tok.codebooks, overlaps=overlaps),
        usage=tuple(
            RankedUsage(**vars(u), rank_frequency=rank_frequency(u)) for u in measured.usage
        ),
        reconstruction=reconstruction_errors(
            tok, measured, held_out, seed=settings.seed, replicates=settings.replicates
        ),
        overlap=overlaps,
        flips=flips,
        geometry=geometry,
        behavior=behavior,
        relations=related,
        buckets=largest_buckets(measured.codes, measured.keys, measured.hashes, source.ids, texts),
        notes=tuple(run.notes),
        explorer=tree,
    )


@dataclass
class _Run:
    """The parts of a diagnosis after the pass over the catalogue, and the notes for its reader."""

    tok: Tokenizer
    source: EmbeddingSource
    measured: CataloguePass
    options: DiagnoseOptions
    progress: Progress
    notes: list[str]

    @property
    def input_std(self) -> float:
        """Root of the mean variance of the input per dimension."""
        return float(np.sqrt(self.measured.health.inputs.variances.mean()))

    @property
    def latent_std(self) -> float:
        """The same of the latent."""
        return float(np.sqrt(self.measured.latent.variances.mean()))

    def robustness(
        self, overlaps: tuple[LevelOverlap, ...], sample: npt.NDArray[np.int64]
    ) -> tuple[Flips | None, Spaces | None]:
        """Measure geometry on a sample of the items, and flips on a sample of these."""
        if self.input_std <= 0 or self.latent_std <= 0:
            self.notes.append("All items are equal, so there is no noise scale and no geometry")
            return None, None
        self.progress.start("geometry", total=None)
        rows = self.source.rows(sample)
        decoded = self.tok.decode(self.measured.codes[sample])
        spaces = {"input": rows, "latent": self.tok.latent(rows), "decoder(codes)": decoded}
        seed = self.options.seed
        geometry = measure_geometry(
            spaces,
            items=self.measured.items,
            seed=seed,
            replicates=self.options.replicates,
        )
        self.progress.start("flips", total=None)
        flips, notes = measure_flips(
            self.tok,
            rows[sample_rows(len(sample), self.options.flip_sample, seed=seed)],
            overlaps,
            input_std=self.input_std,
            latent_std=self.latent_std,
            seed=seed,
            threads=self.options.threads,
        )
        self.notes += notes
        return flips, geometry

    def behavior(
        self,
        log: Interactions | None,
        counts: npt.NDArray[np.int64] | None,
        relations: Mapping[str, ItemPairs],
    ) -> tuple[Behavior | None, dict[str, PairResults] | None]:
        """Measure what needs pairs of items, from the test users and from relations."""
        pairs, behavior = None, None
        if log is not None and counts is not None:
            pairs, behavior, notes = behavior_parts.behavior_pairs(log, self.source.ids)
            self.notes += notes
            if counts.any():
                popularity = popularity_health(self.measured.codes, counts)
                behavior = replace(behavior, popularity=popularity)
        # Without pairs there is nothing to retrieve; the pool, which is large, is not built.
        if pairs is None and not relations:
            return behavior, None
        ks, notes = behavior_parts.choose_cutoffs(self.options.cutoffs, self.measured.items)
        self.notes += notes
        pool = self._pool()
        names = ("seed", "replicates", "threads")
        options = {"cutoffs": ks, **{name: getattr(self.options, name) for name in names}}
        if pairs is not None and behavior is not None:
            self.progress.start("behavior", total=None)
            results = behavior_parts.measure_pairs(pairs, pool, **options)
            behavior = replace(behavior, measured=results)
        related = {}
        for kind, kind_pairs in relations.items():
            self.progress.start(f"relation {kind}", total=None)
            related[kind] = behavior_parts.measure_pairs(kind_pairs, pool, **options)
        return behavior, related or None

    def _pool(self) -> behavior_parts.Pool:
        original = np.empty((self.measured.items, self.source.dim), dtype=np.float32)
        decoded = np.empty_like(original)
        # Searching needs all items at once, as they are and as they are reconstructed.
        for start, block in self.source.blocks(copy=False):
            span = slice(start, start + len(block))
            original[span] = block
            decoded[span] = self.tok.decode(self.measured.codes[span])
        return behavior_parts.Pool(
            self.measured.codes,
            self.tok.codebooks,
            {"original": original, "decoder(codes)": decoded},
            hierarchical=self.tok.hierarchical,
        )

    def explorer(
        self,
        texts: ItemTexts | None,
        counts: npt.NDArray[np.int64] | None,
    ) -> dict[str, Any]:
        """Gather the code tree and the values it is colored by."""
        # Values to color the tree by, each averaged over the items of a prefix.
        spread = float(self.measured.health.inputs.variances.sum())
        values: dict[str, Any] = {}
        if spread > 0:
            values["error"] = self.measured.errors / spread
            if self.measured.items <= MAX_ITEMS:
                values["flips"] = flipped_items(
                    self.tok,
                    self.source.rows(np.arange(self.measured.items)),
                    self.measured.codes,
                    std=self.input_std,
                    scale=EXPLORER_NOISE,
                    seed=self.options.seed,
                )
        if counts is not None:
            values["interactions"] = counts
        return build_explorer(
            self.measured.codes,
            self.source.ids,
            texts,
            self.tok.codebooks,
            hierarchical=self.tok.hierarchical,
            values=values,
            # The mean squared distance of two items, in the columns of each codebook.
            item_spreads=[
                2.0 * float(self.measured.latent.variances[part].sum())
                for part in self.tok.latent_slices
            ],
            seed=self.options.seed,
        )


def _texts(items: Any, others: tuple[Any, ...], ids: ItemIds) -> ItemTexts | None:
    """Read titles from ``items``, else from the first of the other tables that has some."""
    if items is not None:
        return read_items(items, ids=ids)
    for candidate in others:
        if candidate is None or (
            isinstance(candidate, str | Path) and Path(candidate).suffix.lower() == ".npy"
        ):
            continue
        try:
            return read_items(candidate, ids=ids)
        except (UsageError, IdsError):  # it serves another purpose and has no titles
            continue
    return None


def _today() -> str:
    """Return the date; SOURCE_DATE_EPOCH fixes it where outputs are compared."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = float(seconds) if seconds.isdigit() else time.time()
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def _model_info(tok: Tokenizer) -> ModelInfo:
    return ModelInfo(
        kind=tok.kind,
        name=type(tok).__name__,
        levels=tok.levels,
        codebook_sizes=tuple(tok.codebook_sizes),
        hierarchical=tok.hierarchical,
        dim=tok.dim,
        latent=tok.latent_dim,
        beam_width=tok.beam_width,
        settings=tok.settings,
        codebook_fingerprint=tok.codebook_fingerprint,
        weights_fingerprint=tok.weights_fingerprint,
    )
