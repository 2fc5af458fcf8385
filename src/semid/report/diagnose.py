"""`semid.diagnose`: run the diagnostics that fit what was given, and gather the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.embeddings import open_embeddings
from semid.data.ids import ItemIds
from semid.data.interactions import read_interactions
from semid.data.items import ItemTexts, read_items
from semid.data.source import EmbeddingSource
from semid.diagnostics.geometry import sample_rows
from semid.diagnostics.overlap import LevelOverlap, overlap_levels
from semid.errors import IdsError, UsageError
from semid.progress import Progress, QuietProgress
from semid.report import behavior as behavior_parts
from semid.report.diagnosis import Diagnosis
from semid.report.errors_by_level import held_out_rows, reconstruction_figures
from semid.report.explorer import MOST_ITEMS, build_explorer, largest_buckets
from semid.report.measure import CataloguePass, measure_catalogue, rank_frequency
from semid.report.robustness import flipped_items, measure_flips, measure_geometry
from semid.tokenizers.base import HELD_OUT_SALT, Tokenizer

__all__ = ["diagnose"]

EXPLORER_NOISE = 0.2


def diagnose(
    tok: Tokenizer,
    x: Any,
    *,
    interactions: Any = None,
    ids: Any = None,
    items: Any = None,
    relations: Any = None,
    seed: int = 0,
    geometry_sample: int = 20_000,
    flip_sample: int = 5_000,
    cutoffs: Sequence[int] | None = None,
    replicates: int = 1000,
    explorer: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
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
            several kinds, ``relation``: a second truth beside behavior.
        seed: draws samples, noise, negatives, the order of ties and the bootstrap.
        geometry_sample: items whose spectra are taken.
        flip_sample: items whose flips are counted.
        cutoffs: K of the hit rates; None takes 20, 50, 100, 200, as far as the pool allows.
        replicates: bootstrap draws of users for the intervals; 0 leaves intervals out.
        explorer: gather the code tree that the page lets one walk through.
        threads: plain threads; None takes what the machine allows. Results do not depend on it.
        progress: told about every step; silent by default.

    Returns:
        A `Diagnosis`; ``.write("report.html")`` makes the page.

    Raises:
        EmbeddingError: rows of another width than the tokenizer's, or that are not finite.
        InteractionsError: interactions without a known item, or without a pair to test on.
        InputError: cutoffs beyond the pool, relations without a pair inside the catalogue.
        UsageError: something that is not a tokenizer, or options that do not fit.

    Memory: about ``30 + 6 levels`` bytes an item and a few blocks of 65,536 rows. With
    interactions or relations, which search the whole pool, also 12 bytes an item and dimension.
    """
    if not isinstance(tok, Tokenizer):
        raise UsageError(
            f"tok is a {type(tok).__name__}; give a fitted tokenizer, such as semid.load('model/')"
        )
    steps = progress or QuietProgress()
    source = open_embeddings(x, ids=ids)
    texts = _texts(items, (ids, x), source.ids)
    run = _Run(tok, source, seed, threads, replicates, steps)
    if texts is not None and texts.missing:
        run.notes.append(f"{texts.missing:,} of {len(source):,} items have no row among the texts")
    logs = None if interactions is None else read_interactions(interactions)
    pairs = {} if relations is None else run.relations(relations)
    counts = None if logs is None else behavior_parts.item_counts(logs, source.ids)
    held_out, note = held_out_rows(tok, source)
    seen = measure_catalogue(tok, source, steps, held_out=held_out)
    run.notes.append(note)
    steps.start("overlap", total=None)
    overlaps = run.overlaps(seen)
    reconstruction = reconstruction_figures(tok, seen, held_out)
    flips, geometry, sample = run.samples(seen, overlaps, geometry_sample, flip_sample)
    behavior, related = run.behavior(seen, logs, counts, pairs, cutoffs)
    steps.start("explorer", total=None)
    tree = run.explorer(seen, texts, counts) if explorer else None
    return Diagnosis(
        model=_model(tok),
        data={"items": len(source), "dim": source.dim, "label": source.label},
        protocol={**_protocol(tok, len(source), seed), **sample},
        verdict=seen.health.verdict(tok.codebooks, overlaps=overlaps),
        usage=tuple({**u.to_dict(), "rank_frequency": rank_frequency(u)} for u in seen.usage),
        reconstruction=reconstruction,
        overlap=tuple(level.to_dict() for level in overlaps),
        flips=flips,
        geometry=geometry,
        behavior=behavior,
        relations=related,
        buckets=largest_buckets(seen.codes, seen.keys, seen.hashes, source.ids, texts),
        notes=tuple(run.notes),
        explorer=tree,
    )


@dataclass
class _Run:
    """The parts of one diagnosis, and what its reader must be told."""

    tok: Tokenizer
    source: EmbeddingSource
    seed: int
    threads: int | None
    replicates: int
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def relations(self, given: Any) -> dict[str, Any]:
        """Read the pairs of a second truth."""
        found, notes = behavior_parts.relations(given, self.source.ids)
        self.notes += notes
        return found

    def overlaps(self, seen: CataloguePass) -> tuple[LevelOverlap, ...]:
        """Sweep the overlap of every level; nothing where all latents are equal."""
        std = float(np.sqrt(seen.latent.variances.mean()))
        if std <= 0:
            return ()
        return overlap_levels(self.tok.codebooks, seen.usage, latent_std=std, threads=self.threads)

    def samples(
        self,
        seen: CataloguePass,
        overlaps: tuple[LevelOverlap, ...],
        geometry_sample: int,
        flip_sample: int,
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any]]:
        """Measure flips and geometry on random subsets; say how large these were."""
        items = seen.items
        chosen = sample_rows(items, geometry_sample, seed=self.seed)
        facts = {"geometry_items": len(chosen), "flip_items": min(flip_sample, items)}
        input_std = float(np.sqrt(seen.health.inputs.variances.mean()))
        latent_std = float(np.sqrt(seen.latent.variances.mean()))
        if input_std <= 0 or latent_std <= 0:
            self.notes.append("All items are equal, so there is no noise scale and no geometry")
            return None, None, facts
        self.progress.start("geometry", total=None)
        rows = self.source.rows(chosen)
        decoded = self.tok.decode(seen.codes[chosen])
        spaces = {"input": rows, "latent": self.tok.latent(rows), "decoder(codes)": decoded}
        shape = measure_geometry(spaces, items=items, seed=self.seed)
        self.progress.start("flips", total=None)
        part = sample_rows(len(chosen), flip_sample, seed=self.seed)
        flips, notes = measure_flips(
            self.tok,
            rows[part],
            overlaps,
            input_std=input_std,
            latent_std=latent_std,
            seed=self.seed,
            threads=self.threads,
        )
        self.notes += notes
        return flips, shape, facts

    def behavior(
        self,
        seen: CataloguePass,
        logs: Any,
        counts: npt.NDArray[np.int64] | None,
        kinds: dict[str, Any],
        cutoffs: Sequence[int] | None,
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Measure what needs pairs of items, from the test users and from given relations."""
        pairs, found = None, None
        if logs is not None and counts is not None:
            pairs, facts, notes = behavior_parts.behavior_pairs(logs, self.source.ids)
            self.notes += notes
            found = {
                **facts,
                "popularity": behavior_parts.popularity(seen.codes, counts),
                "measured": None,
            }
        if pairs is None and not kinds:
            return found, None
        ks, notes = behavior_parts.choose_cutoffs(cutoffs, seen.items)
        self.notes += notes
        pool = self._pool(seen)
        options: dict[str, Any] = {
            "cutoffs": ks,
            "seed": self.seed,
            "replicates": self.replicates,
            "threads": self.threads,
        }
        if pairs is not None and found is not None:
            self.progress.start("behavior", total=None)
            found["measured"] = behavior_parts.measure_pairs(pairs, pool, **options)
        related = {}
        for kind, given in kinds.items():
            self.progress.start(f"relation {kind}", total=None)
            related[kind] = behavior_parts.measure_pairs(given, pool, **options)
        return found, related or None

    def _pool(self, seen: CataloguePass) -> behavior_parts.Pool:
        original = np.empty((seen.items, self.source.dim), dtype=np.float32)
        decoded = np.empty_like(original)
        for start, block in self.source.blocks(copy=False):
            span = slice(start, start + len(block))
            original[span] = block
            decoded[span] = self.tok.decode(seen.codes[span])
        return behavior_parts.Pool(
            seen.codes,
            self.tok.codebooks,
            {"original": original, "decoder(codes)": decoded},
            hierarchical=self.tok.hierarchical,
        )

    def explorer(
        self,
        seen: CataloguePass,
        texts: ItemTexts | None,
        counts: npt.NDArray[np.int64] | None,
    ) -> dict[str, Any]:
        """Gather the code tree and what it is colored by."""
        spread = float(seen.health.inputs.variances.sum())
        values: dict[str, Any] = {}
        if spread > 0:
            values["error"] = seen.errors / spread
            if seen.items <= MOST_ITEMS:
                values["flips"] = flipped_items(
                    self.tok,
                    self.source.rows(np.arange(seen.items)),
                    seen.codes,
                    std=float(np.sqrt(seen.health.inputs.variances.mean())),
                    scale=EXPLORER_NOISE,
                    seed=self.seed,
                )
        if counts is not None:
            values["interactions"] = counts
        return build_explorer(
            seen.codes,
            self.source.ids,
            texts,
            self.tok.codebooks,
            hierarchical=self.tok.hierarchical,
            values=values,
            item_spread=2.0 * seen.latent.variance,
            seed=self.seed,
        )


def _texts(items: Any, others: tuple[Any, ...], ids: ItemIds) -> ItemTexts | None:
    """Read titles from the table named for them, else from one that happens to have some."""
    if items is not None:
        return read_items(items, ids=ids)
    for candidate in others:
        if candidate is None or (
            isinstance(candidate, str | Path) and Path(candidate).suffix.lower() == ".npy"
        ):
            continue
        try:
            return read_items(candidate, ids=ids)
        except (UsageError, IdsError):  # given for something else, and without titles
            continue
    return None


def _model(tok: Tokenizer) -> dict[str, Any]:
    return {
        "kind": tok.kind,
        "name": type(tok).__name__,
        "levels": tok.levels,
        "codebook_sizes": list(tok.codebook_sizes),
        "hierarchical": tok.hierarchical,
        "dim": tok.dim,
        "latent": int(tok.codebooks[0].shape[1]),
        "beam_width": tok.beam_width,
        "settings": tok.settings,
        "codebook_fingerprint": tok.codebook_fingerprint,
        "weights_fingerprint": tok.weights_fingerprint,
    }


def _protocol(tok: Tokenizer, items: int, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "explorer_items": min(items, MOST_ITEMS),
        "explorer_noise": EXPLORER_NOISE,
        "held_out": f"fraction {tok.validation_fraction:g} of the items, by a hash of their id "
        f"(salt '{HELD_OUT_SALT}')",
        "behavior": "consecutive items of the test users (a tenth, by a hash of their id); no "
        "jump over items outside the catalogue; popularity counts all users",
    }
