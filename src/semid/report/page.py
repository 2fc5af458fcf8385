"""The HTML page: one file, everything inlined, nothing fetched."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from semid.report.diagnosis import Diagnosis
from semid.report.figure import level_name
from semid.report.figures import report_figures
from semid.report.numbers import count, number, share, spoken
from semid.report.prose import SECTIONS, grouped_findings, key_figures, verdict_words

__all__ = ["embed_json", "render", "report_page"]


def embed_json(value: Any) -> Markup:
    """Return JSON that is safe inside a ``<script>`` element.

    Item texts are somebody else's: ``<``, ``>`` and ``&`` become escapes, so no text can end the
    element or begin a comment, and the two line separators that old scripts trip over as well.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; text is escaped unless it is markup of the package."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("semid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "number": number, "share": share, "spoken": spoken}

    def inline(name: str) -> Markup:
        source, _, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
        return Markup(source)

    return environment.get_template(template).render(
        inline=inline,
        embed_json=embed_json,
        plotly=Markup(get_plotlyjs()),
        semid_version=version("semid"),
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
        verdict_words=verdict_words(diagnosis.verdict),
        findings=grouped_findings(diagnosis.verdict.findings),
        key_figures=key_figures(diagnosis),
        sections=[section for section in sections if section[3]],
        plots=[figure.to_plot() for figure in figures if figure.traces],
        level_names=[level_name(diagnosis, level) for level in range(diagnosis.model["levels"])],
        protocol=_protocol_rows(diagnosis),
    )


def _protocol_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """List settings and protocol as rows of a table."""
    settings = {f"setting {key}": value for key, value in diagnosis.model["settings"].items()}
    facts = {
        "tokenizer": diagnosis.model["name"],
        "embeddings": diagnosis.data["label"],
        "codebook fingerprint": diagnosis.model["codebook_fingerprint"],
        **settings,
        **diagnosis.protocol,
    }
    return [
        (
            key.replace("_", " "),
            spoken(value) if not isinstance(value, dict | list) else json.dumps(value),
        )
        for key, value in facts.items()
    ]
