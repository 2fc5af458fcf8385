"""Reports and comparisons as HTML pages and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, NamedTuple

from markupsafe import Markup

from semid.documents import escaped, html_table
from semid.health import Finding, Verdict
from semid.report.compare import VERDICTS, VIEWS
from semid.report.figure import DECLARATIONS, WRITERS, Figure, count, number, share, spoken
from semid.report.figures import SENSES, comparison_figures, level_name, report_figures
from semid.report.results import Bucket, Comparison, Diagnosis

SECTIONS = tuple(
    (key, texts["title"], texts["introduction"]) for key, texts in DECLARATIONS["sections"].items()
)


# HTML ----------------------------------------------------------------------------------------


def embed_json(value: Any) -> Markup:
    """Return JSON that is safe inside a ``<script>`` element."""
    # Item texts are somebody else's: no text may end the element or begin a comment; the two line
    # separators trip old scripts.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; text is escaped unless it is markup of the package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("semid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**WRITERS, "spoken": spoken}

    def inline(name: str) -> Markup:
        source, _, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
        return Markup(source)

    return environment.get_template(template).render(
        inline=inline,
        embed_json=embed_json,
        plotly=Markup(get_plotlyjs()),
        semid_version=version("semid"),
        measured_on=measured_on,
        **values,
    )


def report_page(diagnosis: Diagnosis) -> str:
    """Return the report of one tokenizer as an HTML page."""
    figures = report_figures(diagnosis)
    sections = [
        (key, title, intro, [figure for figure in figures if figure.section == key])
        for key, title, intro in SECTIONS
    ]
    return render(
        "report.html.j2",
        d=diagnosis,
        data_name=data_name(diagnosis),
        verdict_words=verdict_words(diagnosis.verdict),
        findings=grouped_findings(diagnosis.verdict.findings),
        key_figures=key_figures(diagnosis),
        sections=[section for section in sections if section[3]],
        plots=[figure.to_plot() for figure in figures if figure.traces],
        level_names=[level_name(diagnosis, level) for level in range(diagnosis.model.levels)],
        protocol=_protocol_rows(diagnosis),
    )


def comparison_page(c: Comparison) -> str:
    """Return the comparison as an HTML page."""
    figures, first = comparison_figures(c), next(iter(c.diagnoses.values()))
    return render(
        "compare.html.j2",
        c=c,
        data=first.data,
        data_name=data_name(first),
        protocol=first.protocol.to_dict(),
        views=view_rows(c),
        buckets=fullest_buckets(c),
        verdicts={name: VERDICTS[d.verdict.level][0] for name, d in c.diagnoses.items()},
        figures=figures,
        plots=[figure.to_plot() for figure in figures if figure.traces],
    )


# Markdown ------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [
        [escaped(c) for c in columns],
        [":--", *["--:"] * (len(columns) - 1)],
        *([escaped(c) for c in r] for r in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def figure_markdown(figure: Figure) -> str:
    """Return a figure as heading, table, caption and definition."""
    body = table(figure.columns, figure.rows) if figure.rows else ""
    return f"### {figure.title}\n\n{body}\n{figure.caption}\n\n*{figure.definition}*\n"


def report_markdown(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as Markdown: the verdict, and a table per figure."""
    word, meaning = verdict_words(diagnosis.verdict)
    parts = [
        f"# {escaped(f'{diagnosis.model.name} on {data_name(diagnosis)}')}\n",
        f"{count(diagnosis.data.items)} items, {measured_on(diagnosis)}.\n",
        f"**{word}.** {meaning}\n",
    ]
    parts += [
        f"- **{f.severity}**: {escaped(f.what)}. {escaped(f.why)}. Try {escaped(f.advice)}.\n"
        for f in diagnosis.verdict.findings
    ]
    parts.append(table(["", "", ""], [list(row) for row in key_figures(diagnosis)]))
    figures = report_figures(diagnosis)
    for key, title, _ in SECTIONS:
        drawn = [figure_markdown(figure) for figure in figures if figure.section == key]
        if drawn:
            parts += [f"## {title}\n", *drawn]
    if diagnosis.buckets:
        rows = [
            [count(bucket.items), " ".join(map(str, bucket.codes)), _examples(bucket)]
            for bucket in diagnosis.buckets[:10]
        ]
        parts += ["## Fullest buckets\n", table(["Items", "Id", "For example"], rows)]
    parts += ["## Protocol\n", *(f"- {escaped(note)}.\n" for note in diagnosis.notes)]
    parts += [
        f"- {key.replace('_', ' ')}: {escaped(str(value))}\n"
        for key, value in diagnosis.protocol.to_dict().items()
    ]
    return "\n".join(parts)


def _cell_text(value: str, ends: str | None, rank: int | None) -> str:
    remarks = [*([ends] if ends else []), *([f"rank {rank}"] if rank else [])]
    return f"{value} ({', '.join(remarks)})" if remarks else value


def comparison_markdown(c: Comparison) -> str:
    """Return the comparison as Markdown."""
    first = next(iter(c.diagnoses.values()))
    parts = [
        f"# {len(c.names)} models on {escaped(data_name(first))}\n",
        f"{count(first.data.items)} items, {measured_on(first)}.\n",
    ]
    parts += [f"- {escaped(finding)}.\n" for finding in c.findings]
    for title, rows in view_rows(c):
        body = [
            [
                f"{row.name} ({row.sense})",
                *(_cell_text(*cell) for cell in row.cells),
            ]
            for row in rows
        ]
        parts += [f"## {title}\n", table(["", *c.names], body)]
    parts += ["## Trade-offs\n", *(figure_markdown(figure) for figure in comparison_figures(c))]
    if buckets := fullest_buckets(c):
        parts += ["## Fullest buckets\n", table(["Model", "Items", "For example"], buckets)]
    parts += ["## Notes\n", *(f"- {escaped(note)}.\n" for note in c.notes)]
    return "\n".join(parts)


# The contents of both ------------------------------------------------------------------------


def data_name(d: Diagnosis) -> str:
    """Return file and folder of the embeddings, or their number where there is no file."""
    quoted = re.findall(r"'([^']+)'", d.data.label)
    return "/".join(PurePath(quoted[-1]).parts[-2:]) if quoted else f"{count(d.data.items)} items"


def measured_on(d: Diagnosis) -> str:
    """Return when a diagnosis was made; those of earlier versions do not say."""
    return f"measured on {d.protocol.date or 'an unknown day'}"


def verdict_words(verdict: Verdict) -> tuple[str, str]:
    """Return the verdict in a word and in a sentence."""
    word, sentence = VERDICTS[verdict.level]
    if verdict.healthy and verdict.findings:
        sentence = "No warning. The notes below say what may matter to your use."
    return word, sentence


def grouped_findings(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Join findings that differ in their figures alone, such as one fault at several levels."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for f in findings:
        group = groups.setdefault(
            (f.name, f.severity, f.advice),
            {"severity": f.severity, "whats": [], "why": f.why, "advice": f.advice},
        )
        group["whats"].append(f.what)
    return list(groups.values())


def key_figures(d: Diagnosis) -> list[tuple[str, str, str]]:
    """Return name, value and remark of the figures at the head of the page."""
    collisions, errors = d.verdict.collisions, d.reconstruction.relative_error
    held_out = errors.get("held_out")
    # The level that uses the smallest share of the codes it could use.
    worst = min(d.usage, key=lambda u: u.perplexity / min(u.codebook_size, u.items))
    return [
        ("Items", count(collisions.items), f"{count(collisions.unique_ids)} different ids"),
        ("Collision rate", share(collisions.collision_rate), "1 - unique/N"),
        (
            "Colliding items",
            share(collisions.colliding_item_rate),
            f"fullest bucket: {count(collisions.largest_bucket)}",
        ),
        (
            "Least even level",
            number(worst.perplexity),
            f"perplexity of {count(worst.codebook_size)}, level {worst.level + 1}",
        ),
        (
            "Relative error",
            number(held_out if held_out is not None else errors["all"]),
            "held-out items" if held_out is not None else "all items",
        ),
    ]


def _protocol_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """List settings and protocol as rows of a table."""
    facts = {
        "tokenizer": diagnosis.model.name,
        "embeddings": diagnosis.data.label,
        "codebook fingerprint": diagnosis.model.codebook_fingerprint,
        **{f"setting {key}": value for key, value in diagnosis.model.settings.items()},
        **diagnosis.protocol.to_dict(),
    }
    return [
        (
            key.replace("_", " "),
            spoken(value) if not isinstance(value, dict | list) else json.dumps(value),
        )
        for key, value in facts.items()
    ]


class ViewRow(NamedTuple):
    """A metric in the table of its view: value, interval and rank of each model, written out."""

    name: str
    sense: str
    cells: list[tuple[str, str | None, int | None]]


def view_rows(c: Comparison) -> list[tuple[str, list[ViewRow]]]:
    """Return title and rows of the table of each view, in the order of the metrics."""
    rows: dict[str, list[ViewRow]] = {}
    for metric in c.metrics:
        write = WRITERS[metric.kind]
        # Files of earlier versions have no intervals.
        ends = [e and f"{write(e[0])} to {write(e[1])}" for e in metric.intervals]
        cells = zip(
            map(write, metric.values), ends or [None] * len(c.names), metric.ranks, strict=True
        )
        row = ViewRow(metric.name, SENSES[metric.better], list(cells))
        rows.setdefault(metric.view, []).append(row)
    return [(VIEWS[key], in_view) for key, in_view in rows.items()]


def fullest_buckets(c: Comparison) -> list[list[str]]:
    """Return model, number of items and examples of the three fullest buckets of each model."""
    return [
        [name, count(bucket.items), _examples(bucket)]
        for name, d in c.diagnoses.items()
        for bucket in d.buckets[:3]
    ]


def _examples(bucket: Bucket) -> str:
    return "; ".join(str(item.title or item.id) for item in bucket.examples[:3])


# Notebooks -----------------------------------------------------------------------------------


def report_table(d: Diagnosis) -> str:
    """Return the key figures and the findings as a notebook shows them."""
    findings = [(finding.severity, finding.what, finding.advice) for finding in d.verdict.findings]
    return html_table(repr(d), [*key_figures(d), *findings])


def comparison_table(c: Comparison) -> str:
    """Return the metrics of all models as a notebook shows them."""
    rows = [row for _, in_view in view_rows(c) for row in in_view]
    cells = [[row.name, *(value for value, *_ in row.cells)] for row in rows]
    return html_table(repr(c), [["", *c.names], *cells])


Diagnosis.writers |= {".html": report_page, ".md": report_markdown, "notebook": report_table}
Comparison.writers |= {
    ".html": comparison_page,
    ".md": comparison_markdown,
    "notebook": comparison_table,
}
