"""The card of an artefact: its ``README.md``, written with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from semid.health import NEAR, threshold_table

__all__ = ["card"]


def card(kind: str, config: Mapping[str, Any]) -> str:
    """Return Markdown that says what the model is, how it was made and whether it is healthy.

    Args:
        kind: kind of the tokenizer.
        config: what ``config.json`` will hold.
    """
    sizes = config["codebook_sizes"]
    lines = [
        f"# Semantic ID tokenizer: {kind}",
        "",
        f"{len(sizes)} codes an item from codebooks of {', '.join(map(str, sizes))} codewords, "
        f"for embeddings of width {config['dim']}.",
        "",
        "```python",
        "import semid",
        'tokenizer = semid.load("path/to/this/folder")',
        "ids = tokenizer.encode(embeddings)",
        "```",
        "",
        "| setting | value |",
        "|---|---|",
        *[f"| `{name}` | `{value}` |" for name, value in config["settings"].items()],
        f"| codebook fingerprint | `{config['codebook_fingerprint']}` |",
        "",
    ]
    report = config["fit_report"]
    if report is not None:
        lines += [
            "## Fit",
            "",
            f"{report['items']:,} items, {report['trained_items']:,} trained on, "
            f"{report['held_out_items']:,} held out, {report['seconds']:,.1f} seconds.",
            "",
            "```text",
            report["summary"],
            "```",
            "",
            "Relative error: `sum |x - x_hat|^2 / sum |x - mean|^2` over the rows named, with the "
            "mean of all rows. The verdict is the worst finding's; notes do not change it. A note "
            f"also says where a figure comes within a factor of {NEAR:g} of a warning.",
            "",
            *threshold_table(),
            "",
        ]
    return "\n".join(lines)
