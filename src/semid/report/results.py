"""Results of `diagnose` and `compare` as typed data, which can be written as JSON or a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from semid.diagnostics.auc import PairAucs
from semid.diagnostics.discrete import DiscreteRetrieval
from semid.diagnostics.flips import FlipRates, MarginProxy
from semid.diagnostics.overlap import LevelOverlap
from semid.diagnostics.pairs import Estimate, PairCounts
from semid.diagnostics.popularity import PopularityHealth
from semid.diagnostics.retrieval import ItemRetrieval
from semid.diagnostics.spaces import Geometry
from semid.errors import UsageError
from semid.health import LevelUsage, Verdict
from semid.output import MARKDOWN_MARK, atomic_file, check_output
from semid.results import Result


class Document(Result):
    """A result that can be written as a file."""

    # Suffix -> function from the result to text. `semid.report.pages` registers pages here, so
    # that the data know nothing of them.
    writers: ClassVar[dict[str, Callable[[Any], str]]]

    def to_json(self) -> str:
        """Return `to_dict` as JSON text; never NaN or infinity, which JSON does not know."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Return the main tables as Markdown."""
        return self.writers[".md"](self)

    def to_html(self) -> str:
        """Return one HTML page that needs no network."""
        return self.writers[".html"](self)

    def _repr_html_(self) -> str:
        """Show the main figures in a notebook."""
        return self.writers["notebook"](self)

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the result in the format that the suffix names; return the path."""
        target, suffix = Path(path), Path(path).suffix.lower()
        writers = {".html": self.to_html, ".json": self.to_json, ".md": self.to_markdown}
        if suffix not in writers:
            raise UsageError(
                f"output '{target}' ends in '{target.suffix}'; end it in one of "
                f"{', '.join(writers)}"
            )
        check_output(target, overwrite=overwrite)
        text = writers[suffix]()
        if suffix == ".md":
            text += f"\n{MARKDOWN_MARK}\n"
        with atomic_file(target, overwrite=overwrite) as work:
            work.write_text(text, encoding="utf8")
        return target


@dataclass(frozen=True)
class ModelInfo(Result):
    """The tokenizer: kind, sizes, settings and fingerprints; ``latent`` is the codebooks' width."""

    kind: str
    name: str
    levels: int
    codebook_sizes: tuple[int, ...]
    hierarchical: bool
    dim: int
    latent: int
    beam_width: int
    settings: Mapping[str, Any]
    codebook_fingerprint: str
    weights_fingerprint: str


@dataclass(frozen=True)
class DataInfo(Result):
    """The embeddings: number of items, width, and where they were read from."""

    items: int
    dim: int
    label: str


@dataclass(frozen=True)
class Protocol(Result):
    """How the figures were measured: seed, samples, noise and splits; from which log, and when."""

    omit_none: ClassVar[tuple[str, ...]] = ("interactions", "date")

    seed: int
    explorer_items: int
    explorer_noise: float
    held_out: str
    behavior: str
    geometry_items: int
    flip_items: int
    interactions: str | None = None  # what the log is called, in the user's words
    date: str | None = None  # day of the measurement (UTC), or that of SOURCE_DATE_EPOCH


@dataclass(frozen=True)
class Curve(Result):
    """Shares by rank, the largest first; ranks start at 1 and are thinned out."""

    rank: tuple[int, ...]
    share: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RankedUsage(LevelUsage):
    """Usage of a level with the share of the items that each code holds."""

    rank_frequency: Curve


@dataclass(frozen=True, kw_only=True)
class SpaceGeometry(Geometry):
    """Geometry of a space with each eigenvalue's share of the variance."""

    spectrum: Curve


@dataclass(frozen=True)
class Spaces(Result):
    """Geometry of the input, the latent space and the reconstruction, on the same ``rows``."""

    omit_none: ClassVar[tuple[str, ...]] = ("effective_rank",)

    rows: int
    items: int
    spaces: tuple[SpaceGeometry, ...]
    effective_rank: Estimate | None = None  # of the reconstruction, with its interval over rows


@dataclass(frozen=True)
class LevelErrors(Result):
    """Relative latent error of a level, or of all levels up to it, by group of items."""

    level: int
    errors: Mapping[str, float | None]

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """Return the level and the groups in one JSON-able dict."""
        return {"level": self.level, **self.errors}

    @classmethod
    def stored_values(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Tell the groups from the level."""
        return {
            "level": data.get("level"),
            "errors": {group: error for group, error in data.items() if group != "level"},
        }


@dataclass(frozen=True)
class ReconstructionErrors(Result):
    """Errors of ``decoder(codes)`` in the input space, and by level in the latent space."""

    omit_none: ClassVar[tuple[str, ...]] = ("held_out",)

    space: str
    mse_per_element: float
    # mean squared error between rows and reconstructions of length 1
    normalized_squared_error: float
    mean_cosine: float
    # group -> summed squared error over the summed squared distance to the mean of all rows; None
    # where all rows of the group lie at the mean. Groups are ``all`` and, where the rows are those
    # of the fit, ``training`` and ``held_out``
    relative_error: Mapping[str, float | None]
    # whether ``per_level`` is about ``prefix``es or each codebook ``alone``, in the columns of the
    # latent that it quantizes
    per_level_kind: Literal["prefix", "alone"]
    per_level: tuple[LevelErrors, ...]
    variance: float  # of the input, summed over dimensions, as ``latent_variance`` of the latent
    latent_variance: float
    held_out: Estimate | None = None  # relative error of held-out rows with its interval


@dataclass(frozen=True)
class Agreement(Result):
    """Rank correlation of measured flips with what is said to predict them; None if undefined."""

    overlap: float | None
    geometry: float | None
    margins: float | None


@dataclass(frozen=True)
class ComparedAgreement(Result):
    """Agreement at one noise ``scale`` over ``rows`` models, mean over levels."""

    scale: float
    rows: int
    overlap: float | None
    geometry: float | None
    margins: float | None


@dataclass(frozen=True)
class NoiseResponse(Result):
    """Codes that change under noise on one space, measured and by the margin proxy."""

    flips: FlipRates
    margins: MarginProxy


@dataclass(frozen=True)
class Flips(Result):
    """Codes that change under noise on the input and, where that differs, on the latent."""

    omit_none: ClassVar[tuple[str, ...]] = ("latent",)

    items: int
    latent_is_input: bool
    input: NoiseResponse
    latent: NoiseResponse | None
    agreement: Agreement

    @property
    def innermost(self) -> NoiseResponse:
        """Return the response to noise on the latent where it was measured, else on the input."""
        return self.latent or self.input


@dataclass(frozen=True)
class PairResults(Result):
    """Retrieval by embeddings and by codes, and AUCs, on one set of item pairs."""

    pairs: PairCounts
    cutoffs: tuple[int, ...]
    retrieval: ItemRetrieval
    discrete: DiscreteRetrieval
    aucs: PairAucs


@dataclass(frozen=True)
class Behavior(Result):
    """What the interactions show: counts, popularity, and results on pairs of the test users."""

    interactions: int
    users: int
    test_users: int
    unknown_interactions: int  # interactions with items outside the catalogue
    order: str | None  # the column that orders them and what decides between ties, or None
    # collisions and capacity by popularity; None without a known interaction
    popularity: PopularityHealth | None = None
    # results on consecutive items of the test users; None without an order
    measured: PairResults | None = None


@dataclass(frozen=True)
class BucketItem(Result):
    """An item of a bucket, with its title where one is known."""

    id: Any
    title: str | None


@dataclass(frozen=True)
class Bucket(Result):
    """Items that share one id: how many, of how many different inputs, and some examples."""

    codes: tuple[int, ...]
    items: int
    distinct_inputs: int
    examples: tuple[BucketItem, ...]


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Document):
    """The results of `semid.diagnose`: one tokenizer on one catalogue.

    Levels are counted from 0 in data and from 1 in text.

    Attributes:
        model: kind, settings, codebook sizes and fingerprints.
        data: number of items, width, and where the rows came from.
        protocol: how the figures were measured: seed, samples, noise, splits.
        verdict: what is wrong, why, and what to try.
        usage: how evenly each level is used, with a rank-frequency curve.
        reconstruction: errors of the whole code, and per level or prefix.
        overlap: per level, expected overlap rate and effective size over a sweep of noise.
        flips: codes that change under noise, with margin proxies; None if all items are equal.
        geometry: spectra of input, latent and reconstruction; None if all items are equal.
        behavior: retrieval, retention, AUCs and popularity, or None without interactions.
        relations: kind -> the same measures on item pairs of a second ground truth, or None.
        buckets: the fullest buckets with example items.
        notes: what the reader must know about the data, in sentences.
        explorer: code trees with their items for the page; not part of `to_dict`.
    """

    writers: ClassVar[dict[str, Callable[[Any], str]]] = {}

    model: ModelInfo
    data: DataInfo
    protocol: Protocol
    verdict: Verdict
    usage: tuple[RankedUsage, ...]
    reconstruction: ReconstructionErrors
    overlap: tuple[LevelOverlap, ...]
    flips: Flips | None = None
    geometry: Spaces | None = None
    behavior: Behavior | None = None
    relations: Mapping[str, PairResults] | None = None
    buckets: tuple[Bucket, ...] = ()
    notes: tuple[str, ...] = ()
    explorer: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """Name the model, the size and the verdict."""
        return (
            f"Diagnosis({self.model.kind}, {self.data.items:,} items, "
            f"verdict={self.verdict.level!r})"
        )

    @property
    def healthy(self) -> bool:
        """Whether no finding is a warning or worse."""
        return self.verdict.healthy


@dataclass(frozen=True)
class MetricRow(Result):
    """One metric over all models."""

    key: str  # fixed name, for programs
    view: str  # which question it answers
    name: str  # what it is called
    # which way is good, or ``neither`` where more is not better by itself
    better: Literal["lower", "higher", "neither"]
    # how it is written: ``share``, ``number`` or ``count``
    kind: Literal["share", "number", "count"]
    lead: bool  # whether it stands for its view in the trade-offs
    values: tuple[float | None, ...]  # one per model; None where it was not measured
    # one per model: 1, plus the number of models that are better by more than the 95 % interval of
    # the difference; None where unranked
    ranks: tuple[int | None, ...]
    # one per model: ends of the 95 % interval of its value; None where the value has none
    intervals: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison(Document):
    """Models side by side on one catalogue.

    Attributes:
        names: of the models.
        metrics: every metric with its ranks.
        dominated: model -> models that are at least as good in every view's lead metric and
            better in one. A model that nobody dominates is a sensible choice for somebody.
        agreement: rank correlation of the measured flips with the overlap rate, its geometry part
            and the margin proxy, over models within a level, mean over levels, at one noise.
        findings: what stands out, in sentences.
        notes: what the reader must know, in sentences.
        diagnoses: one per model.
    """

    writers: ClassVar[dict[str, Callable[[Any], str]]] = {}

    names: tuple[str, ...]
    metrics: tuple[MetricRow, ...] = field(repr=False)
    dominated: Mapping[str, tuple[str, ...]]
    agreement: ComparedAgreement
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    diagnoses: Mapping[str, Diagnosis] = field(repr=False)

    def __repr__(self) -> str:
        """Name the models and the number of metrics."""
        return f"Comparison({', '.join(self.names)}; {len(self.metrics)} metrics)"

    def metric(self, key: str) -> MetricRow:
        """Return a metric by its key."""
        rows = {row.key: row for row in self.metrics}
        if key not in rows:
            raise UsageError(f"no metric '{key}'; there are {', '.join(rows)}")
        return rows[key]

    def front(self, x: MetricRow, y: MetricRow) -> list[int]:
        """Return the models that no other beats in both metrics, by rank of the first."""
        ranks = {
            place: (rx, ry)
            for place, (rx, ry) in enumerate(zip(x.ranks, y.ranks, strict=True))
            if rx is not None and ry is not None
        }
        # Ranks instead of values: lower is better in both, whatever the metric.
        undominated = [
            (rx, ry, place)
            for place, (rx, ry) in ranks.items()
            if not any(ox <= rx and oy <= ry and (ox, oy) != (rx, ry) for ox, oy in ranks.values())
        ]
        return [place for _, _, place in sorted(undominated)]
