"""The page of a reproduction: made from the rows of a ledger and nothing else."""

from __future__ import annotations

import json
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
from semid.reproduce.behavior import BEHAVIOR
from semid.reproduce.claims import ClaimResult, Row, Rows, evaluate
from semid.reproduce.drq import DRQ
from semid.reproduce.intervals import Difference
from semid.reproduce.ledger import cell_key, rounded
from semid.reproduce.moc import MOC
from semid.reproduce.predict import PREDICT
from semid.reproduce.retrieval import RETRIEVAL

PAPERS = {"drq": DRQ, "moc": MOC, "behavior": BEHAVIOR, "retrieval": RETRIEVAL, "predict": PREDICT}
READING = (
    "A claim says one thing or several. Each is judged by one 95 % interval, Student's over the "
    "data sets: a data set gives one value, the mean over seeds, ranking models and fusion, since "
    "these share its split and its tokenizers. 'Holds': all intervals of the claim lie above 0. "
    "'Contradicted': one lies below 0 at Bonferroni's level for their number. So at most one false "
    "claim in forty is said to hold, and one true one in forty to be contradicted, whatever the "
    "number of comparisons. 'Does not show' is no proof of the contrary: four data sets show large "
    "and steady effects alone. 'Incomplete': runs that its words cover are missing; the figures "
    "are of what has run."
)


@dataclass(frozen=True)
class Page:
    """A page, as data."""

    paper: str
    title: str
    subtitle: str  # how many runs, over which data, how long, on which machines
    warning: str  # why it must not be quoted, or empty
    caveats: tuple[str, ...]  # what limits the comparison with the paper
    results: tuple[ClaimResult, ...]
    summary: tuple[Figure, ...]  # tables that belong to the findings
    sections: tuple[tuple[str, str, str, list[Figure]], ...]
    protocol: tuple[str, ...]
    not_run: tuple[str, ...]  # what of the recipe has no result, one line per cell
    picture: str = ""  # SVG that belongs to the findings, or empty
    reading: str = READING
    claim_columns = ("claim", "where", "verdict", "estimate or intervals", "comparisons run")

    @property
    def claim_rows(self) -> list[list[str]]:
        """One row per claim."""
        return [
            [
                j.claim.sentence + ("" if j.claim.equal_terms else " (not on equal terms)"),
                j.claim.where,
                j.verdict,
                j.evidence,
                f"{sum(c.complete for c in j.comparisons)} of {len(j.comparisons)}",
            ]
            for j in self.results
        ]

    @property
    def tally(self) -> str:
        """How many claims have which verdict."""
        counts = Counter(j.verdict for j in self.results)
        words = [f"{n} {verdict}" for verdict, n in counts.most_common()]
        return f"{len(self.results)} claims: {', '.join(words)}."

    def to_markdown(self) -> str:
        """Return the findings as Markdown: verdicts, and what limits them."""
        tables, intervals = f"{self.paper}-tables.md", f"{self.paper}.json"
        parts = [f"# {self.title}\n", f"{self.subtitle}\n"]
        if self.warning:
            parts.append(f"**Not to be quoted.** {self.warning}\n")
        parts.append(
            f"[Tables and protocol]({tables}). "
            f"[Tests, notes and every interval]({intervals}) (JSON).\n"
        )
        parts += ["## Claims\n", f"{self.tally}\n", table(self.claim_columns, self.claim_rows)]
        parts.append(f"{self.reading}\n")
        if self.picture:
            parts.append(f"![{self.title}]({self.paper}.svg)\n")
        parts += [figure_markdown(figure).replace("### ", "## ", 1) for figure in self.summary]
        if self.caveats:
            parts += ["## What limits these results\n", _bullets(self.caveats)]
        return "\n".join(parts)

    def tables_markdown(self) -> str:
        """Return the tables, the protocol and what has not run as Markdown."""
        parts = [f"# Tables: {self.title}\n", f"{self.subtitle} [Findings]({self.paper}.md).\n"]
        if self.warning:
            parts.append(f"**Not to be quoted.** {self.warning}\n")
        for _, title, intro, figures in self.sections:
            parts += [f"## {title}\n", f"{intro}\n"]
            parts += [figure_markdown(figure) for figure in figures] or ["Not run.\n"]
        parts += ["## Protocol\n", _bullets(self.protocol)]
        parts += ["## Not run\n", _bullets(self.not_run) or "Everything in the recipe has run.\n"]
        return "\n".join(parts)

    def to_json(self) -> str:
        """Return every claim with its test, statements and comparisons as JSON."""
        claims = [
            {
                "id": j.claim.id,
                "where": j.claim.where,
                "claim": j.claim.sentence,
                "test": j.claim.test,
                "note": j.claim.note,
                "equal_terms": j.claim.equal_terms,
                "verdict": j.verdict,
                "statements": [
                    {
                        "statement": one.name,
                        "confidence": one.confidence,
                        "over_data_sets": _interval(one.estimate()),
                        "comparisons": [
                            {"name": c.name, "missing_runs": c.missing, **_interval(c.difference)}
                            for c in one.comparisons
                        ],
                    }
                    for one in j.statements
                ],
            }
            for j in self.results
        ]
        document: dict[str, Any] = {
            "made_by": MARKDOWN_MARK,
            "paper": self.paper,
            "title": self.title,
            "warning": self.warning,
            "reading": self.reading,
            "claims": [],
        }
        # A line for each claim: a change of one is a change of one line.
        lines = [json.dumps(each, ensure_ascii=False, allow_nan=False) for each in rounded(claims)]
        head = json.dumps(document, indent=1, ensure_ascii=False).removesuffix("]\n}")
        return head + "\n" + ",\n".join(lines) + "\n]}"

    def to_html(self) -> str:
        """Return the page as HTML that needs no network."""
        plots = [f.to_plot() for _, _, _, figures in self.sections for f in figures if f.traces]
        return render("reproduce.html.j2", p=self, plots=plots)


def _interval(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {"mean": None}
    low, high = difference.low, difference.high
    return {"mean": difference.mean, "low": low, "high": high, "values": difference.pairs}


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
    cells: Sequence[Row] = (),
    title: Callable[[Row], str] = str,
    absent: Mapping[str, str] | None = None,
    publish: bool = False,
) -> Page:
    """Judge the claims and lay out the tables; ``cells`` are all runs of the recipe."""
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
    done = {cell_key(row) for row in latest}
    missing = [cell for cell in cells if cell_key(cell) not in done]
    ledger = Rows(latest, missing)
    data = PAPERS[paper]
    sections = data.sections(ledger)
    return Page(
        paper=paper,
        title=data.file["title"],
        subtitle=_subtitle(ledger),
        warning="These are runs of --quick, a toy on a made-up catalogue that shows that the "
        "machinery works. They decide no claim."
        if quick
        else "",
        caveats=tuple(data.file.get("caveats", ())),
        results=tuple(evaluate(data.claims, ledger)),
        summary=tuple(f for key, _, _, figures in sections if key == "which" for f in figures),
        sections=tuple(section for section in sections if section[0] != "which"),
        protocol=tuple(_protocol(latest, dropped)),
        picture=data.code["picture"](ledger) if "picture" in data.code else "",
        not_run=(
            *(f"{what}: {why}" for what, why in (absent or {}).items()),
            *_folded([title(cell) for cell in missing]),
        ),
    )


def _subtitle(ledger: Rows) -> str:
    """Say how many runs there are, on which data, how long they took and on which machines."""
    sets = ", ".join(map(str, ledger.names("data"))) or "no data set yet"
    hours: dict[str, float] = {}
    for row in ledger.rows:
        name = _machine(row)
        hours[name] = hours.get(name, 0.0) + float(row.get("seconds") or 0.0) / 3600
    each = ", ".join(f"{time:.1f} hours on {name}" for name, time in hours.items())
    return f"{len(ledger.rows)} runs on {sets}. {each}{'.' if each else ''}".strip()


def _machine(row: Row) -> str:
    parts = row.get("machine") or {}
    return str(parts.get("gpu") or f"{row.get('threads')} threads of {parts.get('chip')}")


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
    """Fold the seeds and data sets of what has not run: ``DATA, WHAT, seed N``."""
    seeds: dict[str, list[str]] = {}
    for title in titles:
        name, _, seed = title.rpartition(", seed ")
        seeds.setdefault(name, []).append(seed)
    sets: dict[tuple[str, str], list[str]] = {}
    for name, run in seeds.items():
        data, _, what = name.partition(", ")
        word = "seed" if len(run) == 1 else "seeds"
        sets.setdefault((what, f"{word} {', '.join(run)}"), []).append(data)
    return [f"{what}, {run}: {', '.join(data)}" for (what, run), data in sets.items()]


def write_page(page: Page, folder: Path, name: str) -> list[Path]:
    """Write findings, tables, intervals and the whole as HTML, replacing those that are there."""
    texts = {
        f"{name}.md": f"{page.to_markdown()}\n{MARKDOWN_MARK}\n",
        f"{name}-tables.md": f"{page.tables_markdown()}\n{MARKDOWN_MARK}\n",
        f"{name}.json": page.to_json() + "\n",
        f"{name}.html": page.to_html(),
        **({f"{name}.svg": f"{page.picture}{MARKDOWN_MARK}\n"} if page.picture else {}),
    }
    for file, text in texts.items():
        with atomic_file(folder / file, overwrite=True) as work:
            work.write_text(text, encoding="utf8")
    return [folder / file for file in texts]
