"""The README of a saved ranking model, written by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from semid.markdown import code_span, escaped

__all__ = ["card"]


def card(config: Mapping[str, Any]) -> str:
    """Return Markdown: what it is, how it was measured, how to use it."""
    report, schema = config["report"], config["schema"]
    architecture = config["architecture"]
    fusion = " with Mixture-of-Codes fusion" if architecture["fusion"] else ""
    columns = [*schema["attributes"], *schema["context"], *schema["dense"]]
    fields = ["user", "item", *map(escaped, columns)]
    lines = [
        f"# {architecture['model']}{fusion}",
        "",
        f"A ranking model by semid over {', '.join(fields)}"
        + (f" and the codes of {config['codes_info']['tokenizer']}." if config["codes"] else "."),
        "",
    ]
    if "protocol" in report:
        lines += [
            f"Protocol: {code_span(report['protocol'])}",
            "",
            "| rows | AUC | popularity alone | log loss | AUC by user | calibration error |",
            "|---|---|---|---|---|---|",
        ]
        for part in ("validation", "test", "cold"):
            if part in report:
                lines.append(_line(part, report[part]))
        for name, figures in report.get("slices", {}).items():
            lines.append(_line(f"test, {name} items", figures))
        lines.append("")
    lines += [
        "```python",
        "import semid",
        "",
        "ranker = semid.load(path_of_this_folder)",
        f"ranker.predict({{{schema['user_column']!r}: [...], {schema['item_column']!r}: [...]}})",
        "ranker.rank(user, candidates, k=10)",
        "```",
        "",
    ]
    if config["codebook_fingerprint"]:
        lines += [f"Codebook: `{config['codebook_fingerprint']}`", ""]
    return "\n".join(lines)


def _line(name: str, figures: Mapping[str, Any]) -> str:
    shown = (
        "auc",
        "popularity_auc",
        "log_loss",
        "user_auc",
        "calibration_error",
    )
    cells = ["-" if figures[key] is None else f"{figures[key]:.4f}" for key in shown]
    return f"| {name} ({figures['rows']:,}) | " + " | ".join(cells) + " |"
