"""The words of the report that do not depend on its figures, and the choice of key figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semid.health import Finding, Verdict
from semid.report.diagnosis import Diagnosis
from semid.report.numbers import count, number, share

__all__ = ["SECTIONS", "VERDICTS", "grouped_findings", "key_figures", "verdict_words"]

VERDICTS = {
    "healthy": ("Healthy", "Nothing here speaks against using these codes."),
    "warning": ("Worth a look", "These codes can be used, but something below costs quality."),
    "unhealthy": ("Unhealthy", "Do not use these codes before the first finding is repaired."),
}


def verdict_words(verdict: Verdict) -> tuple[str, str]:
    """Return the verdict in a word and in a sentence; notes are pointed to."""
    word, sentence = VERDICTS[verdict.level]
    if verdict.healthy and verdict.findings:
        sentence = "No warning. The notes below say what may matter to your use."
    return word, sentence


# id, title, introduction
SECTIONS = (
    (
        "codes",
        "Codes",
        "Are the codebooks used, do items keep ids of their own, and what of the embedding is left "
        "in the codes?",
    ),
    (
        "robustness",
        "Robustness",
        "Does an item keep its id when its embedding changes a little?",
    ),
    (
        "geometry",
        "Geometry",
        "How many directions of the embedding space survive into the codes?",
    ),
    (
        "behavior",
        "Behavior",
        "Do the codes know which items people take together?",
    ),
    (
        "relations",
        "Known relations",
        "The same questions, asked of item pairs that were given as a second truth.",
    ),
)


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
    collisions = d.verdict.collisions
    errors = d.reconstruction["relative_error"]
    held_out = errors.get("held_out")
    worst = min(d.usage, key=lambda u: u["perplexity"] / min(u["codebook_size"], u["items"]))
    return [
        ("Items", count(collisions.items), f"{count(collisions.unique_ids)} different ids"),
        (
            "Collision rate",
            share(collisions.collision_rate),
            "1 - unique/N",
        ),
        (
            "Items not alone",
            share(collisions.colliding_item_rate),
            f"fullest bucket: {count(collisions.largest_bucket)}",
        ),
        (
            "Least even level",
            f"{number(worst['perplexity'])}",
            f"perplexity of {count(worst['codebook_size'])}, level {worst['level'] + 1}",
        ),
        (
            "Relative error",
            number(held_out if held_out is not None else errors["all"]),
            "held-out items" if held_out is not None else "all items",
        ),
    ]
