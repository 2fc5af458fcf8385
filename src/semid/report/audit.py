"""A report from codes alone, for ids that any program made, beside controls without meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from semid.catalogue.matching import item_counts
from semid.codes import SemanticIds
from semid.data.columns import is_list
from semid.data.ids import ItemIds
from semid.data.interactions import read_interactions
from semid.data.tables import open_table
from semid.diagnostics.discrete import discrete_retrieval
from semid.diagnostics.pairs import Estimate, ItemPairs
from semid.diagnostics.popularity import PopularityHealth, popularity_health
from semid.documents import escaped, html_table
from semid.errors import InputError, UsageError
from semid.health import Verdict, bucket_keys, collisions, usage, verdict
from semid.report.behavior import behavior_pairs, choose_cutoffs
from semid.report.figure import count, interval, number, share
from semid.report.pages import grouped_findings, render, table
from semid.report.results import Document
from semid.results import Result
from semid.seeds import numpy_generator

CATEGORY_COLUMNS = ("categories", "category")

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PrefixDepth(Result):
    """The prefixes of one length."""

    depth: int  # codes of a prefix, from 1
    prefixes: int  # different prefixes
    children: float  # mean number of them under a prefix that is one code shorter
    largest: int  # items under the fullest
    alone: float  # share of the items that share their prefix with no other


@dataclass(frozen=True)
class Alignment(Result):
    """How prefixes of one length relate to consecutive items of users."""

    codes: str  # ``ids``, or the name of a control
    depth: int  # codes compared, from 1
    sharing: float  # share of the pairs of consecutive items with equal codes up to the depth
    chance: float  # the same for two different items drawn at random
    cutoff: int  # K of ``hit_rate``
    hit_rate: Estimate  # HR@K of retrieval by these codes, a mean over all orders of ties

    @property
    def lift(self) -> float | None:
        """``sharing / chance``; None where no two items share a prefix."""
        return self.sharing / self.chance if self.chance else None


@dataclass(frozen=True, kw_only=True)
class Audit(Document):
    """The results of `audit`.

    Attributes:
        source: where the ids come from.
        items: number of items.
        codebook_sizes: codes per level: the largest in use plus 1 where the model is unknown.
        hierarchical: whether codes are compared by prefix, or by the number of equal ones.
        verdict: usage, collisions and findings. There are no errors without embeddings.
        prefixes: structure by depth.
        popularity: collisions by popularity, or None without interactions.
        alignment: of the ids and of the controls, by depth; empty without ordered interactions.
        pairs: pairs of consecutive items behind ``alignment``.
        notes: what the reader must know, in sentences.
    """

    writers: ClassVar[dict[str, Callable[[Any], str]]] = {}

    source: str
    items: int
    codebook_sizes: tuple[int, ...]
    hierarchical: bool
    verdict: Verdict
    prefixes: tuple[PrefixDepth, ...]
    popularity: PopularityHealth | None = None
    alignment: tuple[Alignment, ...] = ()
    pairs: int = 0
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Name the source, the size and the verdict."""
        return f"Audit({self.source}, {self.items:,} items, verdict={self.verdict.level!r})"

    def summary(self) -> str:
        """Return the main figures as text for a terminal."""
        lines = [self.verdict.summary()]
        for each in self.prefixes:
            lines.append(
                f"  depth {each.depth}: {each.prefixes:,} prefixes, {each.children:.1f} per "
                f"parent, largest {each.largest:,} items, {each.alone:.1%} of items alone"
            )
        for row in self.alignment:
            lift = "" if row.lift is None else f", {row.lift:.1f} times chance"
            lines.append(
                f"  {row.codes}, depth {row.depth}: {row.sharing:.2%} of consecutive items share "
                f"it{lift}; HR@{row.cutoff} {interval(row.hit_rate)}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def audit(
    ids: SemanticIds,
    *,
    interactions: Any = None,
    items: Any = None,
    category_column: str | None = None,
    source: str = "ids",
    seed: int = 0,
    replicates: int = 1000,
) -> Audit:
    """Measure ids without their model: usage, collisions, prefixes, and agreement with behavior.

    Two controls stand beside the ids. ``random`` gives the same codes to other items, so it has
    their usage and no meaning. ``category`` has the category of an item as its first codes, one
    per level of the category, and random codes behind.

    Args:
        ids: Semantic IDs, for example of `semid.import_ids`.
        interactions: the log, as `semid.read_interactions` reads it; its test users give pairs.
        items: table of the items with a category, for the control.
        category_column: its column; None takes ``categories`` or ``category``.
        source: what the ids are called in the report.
        seed: seed of controls, ties and intervals.
        replicates: bootstrap draws of users for the intervals.

    Cost: sorts of the items per depth; no search.
    """
    if category_column is not None and items is None:
        raise UsageError("--category-column (category_column=) names a column of --items (items=)")
    if items is not None and interactions is None:
        raise UsageError(
            "--items (items=) is for the control by category, which --interactions (interactions=) "
            "measures; give both or neither"
        )
    if not len(ids):
        raise InputError("there are no ids to audit; give a file with at least one item")
    codes = ids.codes.astype(np.int64)
    notes: list[str] = []
    popularity, alignment, pairs = None, [], None
    if interactions is not None:
        log = read_interactions(interactions, rating_column="")
        counts = item_counts(log, ids.items).astype(np.int64)
        if counts.any():
            popularity = popularity_health(codes, counts)
        pairs, _, notes = behavior_pairs(log, ids.items)
    if pairs is not None:
        cutoffs, more = choose_cutoffs(None, len(ids))
        notes += more
        order = numpy_generator(seed, "audit").permutation(len(ids))
        variants = {"ids": codes, "random": codes[order]}
        if items is not None:
            paths = category_paths(items, ids.items, category_column, notes)
            variants["category"] = category_codes(paths, codes[order])
        for name, variant in variants.items():
            options = {"seed": seed, "replicates": replicates}
            hierarchical = ids.info.hierarchical
            alignment += _align(name, variant, pairs, cutoffs, hierarchical, options)
    return Audit(
        source=source,
        items=len(ids),
        codebook_sizes=ids.info.codebook_sizes,
        hierarchical=ids.info.hierarchical,
        verdict=verdict(usage(codes, ids.info.codebook_sizes), collisions(codes)),
        prefixes=tuple(prefix_structure(codes)),
        popularity=popularity,
        alignment=tuple(alignment),
        pairs=0 if pairs is None else len(pairs.queries),
        notes=tuple(notes),
    )


def prefix_structure(codes: npt.NDArray[Any]) -> list[PrefixDepth]:
    """Return the number and the sizes of the prefixes ``(items, levels)`` by depth."""
    rows, parents = [], 1
    for depth in range(1, codes.shape[1] + 1):
        sizes = np.unique(bucket_keys(codes[:, :depth]), return_counts=True)[1]
        alone = float((sizes == 1).sum() / len(codes))
        rows.append(PrefixDepth(depth, len(sizes), len(sizes) / parents, int(sizes.max()), alone))
        parents = len(sizes)
    return rows


def _align(
    name: str,
    codes: Codes,
    pairs: ItemPairs,
    cutoffs: tuple[int, ...],
    hierarchical: bool,
    options: Mapping[str, Any],
) -> list[Alignment]:
    cutoff = cutoffs[0]
    retrieval = discrete_retrieval(
        codes, pairs, hierarchical=hierarchical, cutoffs=(cutoff,), **options
    )
    rows = []
    for depth in range(1, codes.shape[1] + 1):
        keys = bucket_keys(codes[:, :depth])
        sizes = np.unique(keys, return_counts=True)[1]
        # Two different items at random are in a group of n items with n (n - 1) / N (N - 1).
        chance = float((sizes * (sizes - 1)).sum() / (len(codes) * (len(codes) - 1)))
        sharing = float((keys[pairs.queries] == keys[pairs.targets]).mean())
        hit_rate = retrieval.expected[depth - 1].rates[cutoff]
        rows.append(Alignment(name, depth, sharing, chance, cutoff, hit_rate))
    return rows


def category_codes(paths: list[tuple[str, ...]], codes: Codes) -> Codes:
    """Return codes ``(items, levels)`` whose first levels number the categories of each item.

    Level d numbers the category of level d. Behind the deepest category stand ``codes``; one that
    ends earlier is repeated.
    """
    result = codes.copy()
    deepest = min(max(map(len, paths), default=0), codes.shape[1])
    for level in range(deepest):
        names: dict[tuple[str, ...], int] = {}
        result[:, level] = [names.setdefault(path[: level + 1], len(names)) for path in paths]
    return result


def category_paths(
    items: Any, ids: ItemIds, column: str | None, notes: list[str]
) -> list[tuple[str, ...]]:
    """Return the categories of each item from coarse to fine; none for items without a row."""
    opened = open_table(items, what="items", error=InputError)
    flag = "--category-column (category_column=)"
    column = column or next((c for c in CATEGORY_COLUMNS if c in opened.names), None)
    if column is None:
        raise UsageError(
            f"{opened.label} has no column 'categories' or 'category'; name one with {flag}"
        )
    opened.require(column, flag=flag)
    opened.require("item_id", flag="the column's name in the file")
    read = opened.read(["item_id", column], text=["item_id"])
    rows = ItemIds(read["item_id"]).index_of(ids.strings())
    values = read[column]
    if not is_list(values.type):
        values = values.cast(pa.large_string())
    listed = values.to_pylist()
    paths: list[tuple[str, ...]] = []
    for row in rows.tolist():
        value = listed[row] if row >= 0 else None
        parts = value if isinstance(value, list) else [] if value is None else value.split(" > ")
        paths.append(tuple(map(str, parts)))
    missing = sum(not path for path in paths)
    if missing:
        notes.append(f"{missing:,} of {len(ids):,} items have no category; they count as one more")
    return paths


# Pages ---------------------------------------------------------------------------------------


def _tables(a: Audit) -> dict[str, tuple[str, list[str], list[list[str]]]]:
    """Return title, introduction, columns and rows of the tables."""
    tables = {
        "Levels": (
            "How evenly is each level used? The size is the largest code plus 1 where the model is "
            "unknown.",
            ["level", "codes", "perplexity", "dead codes", "largest code"],
            [
                [
                    *(str(u.level + 1), count(u.codebook_size), number(u.perplexity)),
                    *(count(u.dead), share(u.largest_share)),
                ]
                for u in a.verdict.usage
            ],
        ),
        "Prefixes": (
            "How do prefixes branch? Items alone share their prefix with no other item.",
            ["depth", "prefixes", "per parent", "largest, items", "items alone"],
            [
                [
                    *(str(p.depth), count(p.prefixes), number(p.children)),
                    *(count(p.largest), share(p.alone)),
                ]
                for p in a.prefixes
            ],
        ),
    }
    if a.alignment:
        tables["Agreement with behavior"] = (
            f"Do consecutive items of test users ({a.pairs:,} pairs) share codes? The control "
            "'random' has the same codes on other items; 'category' has the category as its first "
            "codes. Lift is the share over chance.",
            ["codes, depth", "pairs that share", "chance", "lift", f"HR@{a.alignment[0].cutoff}"],
            [
                [
                    *(f"{r.codes}, {r.depth}", share(r.sharing), share(r.chance)),
                    *(number(r.lift), interval(r.hit_rate)),
                ]
                for r in a.alignment
            ],
        )
    if a.popularity is not None:
        tables["Popularity"] = (
            "Do popular and rare items share their ids?",
            ["items", "number", "interactions", "collision rate", "in shared ids"],
            [
                [
                    *(s.name, count(s.items), share(s.interaction_share)),
                    *(share(s.collision_rate), share(s.colliding_item_rate)),
                ]
                for s in a.popularity.segments
            ],
        )
    return tables


def audit_markdown(a: Audit) -> str:
    """Return the audit as Markdown."""
    parts = [
        f"# Audit: {escaped(a.source)}",
        "",
        f"{a.items:,} items. Verdict: {a.verdict.level}.",
        "",
    ]
    parts += [f"- {f.severity}: {f.what}. {f.why}. Try: {f.advice}." for f in a.verdict.findings]
    for title, (intro, columns, rows) in _tables(a).items():
        parts += ["", f"## {title}", "", intro, "", table(columns, rows)]
    return "\n".join([*parts, *(f"{escaped(note)}." for note in a.notes)]) + "\n"


def audit_page(a: Audit) -> str:
    """Return the audit as an HTML page."""
    findings = grouped_findings(a.verdict.findings)
    return render("audit.html.j2", a=a, tables=_tables(a), findings=findings, plots=[])


def audit_table(a: Audit) -> str:
    """Return the audit as a notebook shows it."""
    return html_table(repr(a), [row for _, _, rows in _tables(a).values() for row in rows])


Audit.writers |= {".html": audit_page, ".md": audit_markdown, "notebook": audit_table}
