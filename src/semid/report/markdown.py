"""The report as Markdown: the verdict and a table a figure."""

from __future__ import annotations

from collections.abc import Sequence

from semid.markdown import escaped
from semid.report.diagnosis import Diagnosis
from semid.report.figure import Figure
from semid.report.figures import report_figures
from semid.report.numbers import count
from semid.report.prose import SECTIONS, key_figures, verdict_words

__all__ = ["figure_markdown", "report_markdown", "table"]


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
    """Return a diagnosis as Markdown."""
    word, meaning = verdict_words(diagnosis.verdict)
    parts = [
        f"# {escaped(str(diagnosis.model['name']))} on {count(diagnosis.data['items'])} items\n",
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
            [
                count(bucket["items"]),
                " ".join(map(str, bucket["codes"])),
                "; ".join(str(e["title"] or e["id"]) for e in bucket["examples"][:3]),
            ]
            for bucket in diagnosis.buckets[:10]
        ]
        parts += ["## Fullest buckets\n", table(["Items", "Id", "For example"], rows)]
    parts += ["## Protocol\n", *(f"- {escaped(note)}.\n" for note in diagnosis.notes)]
    parts += [
        f"- {key.replace('_', ' ')}: {escaped(str(value))}\n"
        for key, value in diagnosis.protocol.items()
    ]
    return "\n".join(parts)
