"""The page of a reproduction: made from the rows of a ledger and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semid.documents import escaped
from semid.errors import InputError
from semid.output import MARKDOWN_MARK, atomic_file
from semid.report.figure import Figure
from semid.report.pages import figure_markdown, render, table
from semid.reproduce.claims import ClaimResult, Row, Rows, evaluate
from semid.reproduce.drq import DRQ
from semid.reproduce.ledger import cell_key
from semid.reproduce.moc import MOC
from semid.reproduce.retrieval import RETRIEVAL

PAPERS = {"drq": DRQ, "moc": MOC, "retrieval": RETRIEVAL}
READING = (
    "'Holds': the paired intervals over seeds say so in every comparison, or, where the claim is "
    "about most, in more than half of them with none against. 'Opposite': more than half say the "
    "contrary and none agrees. 'Does not show' is no proof of the contrary: too few seeds or too "
    "small an effect look like it. Intervals are 95 %, so one comparison in twenty leaves out 0 by "
    "chance. Only what has run is counted."
)


@dataclass(frozen=True)
class Page:
    """A page, as data."""

    title: str
    subtitle: str  # how many runs, over which data
    warning: str  # why it must not be quoted, or empty
    results: tuple[ClaimResult, ...]
    sections: tuple[tuple[str, str, str, list[Figure]], ...]
    protocol: tuple[str, ...]
    not_run: tuple[str, ...]  # what of the recipe has no result, one line per cell
    reading: str = READING
    claim_columns = ("claim", "where", "verdict", "in favor", "against", "open", "not run")

    @property
    def claim_rows(self) -> list[list[str]]:
        """One row per claim."""
        return [
            [j.claim.sentence, j.claim.where, j.verdict, *map(str, j.counts.values())]
            for j in self.results
        ]

    def to_markdown(self) -> str:
        """Return the page as Markdown."""
        parts = [f"# {self.title}\n", f"{self.subtitle}\n"]
        if self.warning:
            parts.append(f"**Not to be quoted.** {self.warning}\n")
        parts += ["## Claims\n", f"{self.reading}\n", table(self.claim_columns, self.claim_rows)]
        for j in self.results:
            claim = j.claim
            terms = "" if claim.equal_terms else " Not on equal terms."
            parts.append(f"### {escaped(claim.sentence)}\n")
            parts.append(f"**{j.verdict}** ({claim.where}). Test: {escaped(claim.test)}.{terms}\n")
            parts += [f"{escaped(claim.note)}\n"] if claim.note else []
            parts.append(_bullets(j.lines))
        for _, title, intro, figures in self.sections:
            parts += [f"## {title}\n", f"{intro}\n"]
            parts += [figure_markdown(figure) for figure in figures] or ["Not run.\n"]
        parts += ["## Protocol\n", _bullets(self.protocol)]
        parts += ["## Not run\n", _bullets(self.not_run) or "Everything in the recipe has run.\n"]
        return "\n".join(parts)

    def to_html(self) -> str:
        """Return the page as HTML that needs no network."""
        plots = [f.to_plot() for _, _, _, figures in self.sections for f in figures if f.traces]
        return render("reproduce.html.j2", p=self, plots=plots)


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {escaped(line)}\n" for line in lines)


def current(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Return the rows of the settings that ran last, by data set, and how many were left out."""
    # Rows of other settings cannot be compared with them; of several rows of one cell and seed the
    # last counts. The DRQ paper's variants share their settings with the main rows.
    latest = {_protocol_key(row): row["settings"] for row in rows}
    current = {cell_key(r): r for r in rows if latest[_protocol_key(r)] == r["settings"]}
    return list(current.values()), len(rows) - len(current)


def _protocol_key(row: Row) -> tuple[Any, ...]:
    return row["data"], row.get("variant", ""), row.get("run", "")


def make_page(
    paper: str,
    rows: Sequence[Row],
    *,
    missing: Sequence[str] = (),
    absent: Mapping[str, str] | None = None,
    publish: bool = False,
) -> Page:
    """Judge the claims and lay out the tables."""
    # Toy runs and rows of another paper must never reach a page of results.
    quick = sum(bool(r.get("quick")) for r in rows)
    foreign = {str(r.get("paper")) for r in rows} - {paper}
    if foreign:
        raise InputError(f"rows of {', '.join(sorted(foreign))} among those of {paper}")
    if quick and publish:
        raise InputError(
            f"{quick} of {len(rows)} rows come from --quick, whose numbers decide nothing; "
            "only full runs go into the documentation"
        )
    if 0 < quick < len(rows):
        raise InputError(
            f"{quick} rows of --quick are mixed with {len(rows) - quick} full ones; "
            "give them another --output"
        )
    latest, dropped = current(rows)
    ledger = Rows(latest)
    sets = ", ".join(map(str, ledger.names("data"))) or "no data set yet"
    data = PAPERS[paper]
    return Page(
        title=data.file["title"],
        subtitle=f"{len(latest)} runs on {sets}.",
        warning="These are runs of --quick, a toy on a made-up catalogue that shows that the "
        "machinery works. They decide no claim."
        if quick
        else "",
        results=tuple(evaluate(data.claims, ledger)),
        sections=tuple(data.sections(ledger)),
        protocol=tuple(_protocol(latest, dropped)),
        not_run=(*(f"{what}: {why}" for what, why in (absent or {}).items()), *_folded(missing)),
    )


def _protocol(rows: Sequence[Row], dropped: int) -> list[str]:
    """Say under which protocol, by which code and on which machine the rows came to be."""
    if not rows:
        return ["Nothing has run yet"]

    def versions(row: Row) -> str:
        return ", ".join(f"{k} {v}" for k, v in (row.get("versions") or {}).items())

    def machine(row: Row) -> str:
        parts = row.get("machine") or {}
        gpu = f"{parts['gpu']}, " if parts.get("gpu") else ""
        return f"{gpu}{parts.get('chip')}, {row.get('threads')} threads"

    # Each fact is said once with the number of runs it is true of, the most frequent first.
    facts: list[tuple[int | None, Callable[[Row], str]]] = [
        (24, lambda r: f"{r['data']}: {r.get('protocol')}"),
        (None, lambda r: f"Commit {r.get('commit')}{' with changes' if r.get('dirty') else ''}"),
        (None, lambda r: f"Versions: {versions(r)}"),
        (None, lambda r: f"Machine: {machine(r)}"),
    ]
    lines = [
        f"{text} ({count} runs)"
        for most, write in facts
        for text, count in Counter(map(write, rows)).most_common(most)
    ]
    if dropped:
        lines.append(f"{dropped} rows of earlier settings or repeated runs are left out")
    return lines


def _folded(titles: Sequence[str]) -> list[str]:
    """Fold the seeds of one cell into a line."""
    seeds: dict[str, list[str]] = {}
    for title in titles:
        name, _, seed = title.rpartition(", seed ")
        seeds.setdefault(name, []).append(seed)
    return [
        f"{name}, {'seed' if len(s) == 1 else 'seeds'} {', '.join(s)}" for name, s in seeds.items()
    ]


def write_page(page: Page, folder: Path, name: str) -> list[Path]:
    """Write ``name.md`` and ``name.html``, replacing those that are there."""
    written = []
    markdown = f"{page.to_markdown()}\n{MARKDOWN_MARK}\n"
    for suffix, text in ((".md", markdown), (".html", page.to_html())):
        target = folder / f"{name}{suffix}"
        with atomic_file(target, overwrite=True) as work:
            work.write_text(text, encoding="utf8")
        written.append(target)
    return written
