"""The result of `semid.diagnose`: figures as data, which can write themselves down."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semid.errors import UsageError
from semid.health import Verdict
from semid.output import MARKDOWN_MARK, atomic_file, check_output

__all__ = ["Diagnosis", "write_text"]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything `semid.diagnose` found about one tokenizer on one catalogue.

    Every section is JSON-able data; levels are counted from 0 in data and from 1 in text.

    Attributes:
        model: kind, settings, codebook sizes and fingerprints.
        data: items, width, where the rows came from, what is known of held-out rows.
        protocol: how each figure was measured: seeds, samples, noise, splits.
        verdict: what is wrong, why, and what to try; usage and collisions in figures.
        usage: per level: the figures of `semid.health.LevelUsage` and a rank-frequency curve.
        reconstruction: errors of the whole code, and per level or prefix.
        overlap: per level, expected overlap rate and effective size over a sweep of noise.
        flips: codes that change under noise, on the input and on the latent, with margin proxies.
        geometry: spectra of input, latent and reconstruction.
        behavior: retrieval, retention, AUCs and popularity, or None without interactions.
        relations: the same measures on item pairs given as a second truth, or None.
        buckets: the fullest buckets with example items.
        notes: what the reader must know about the data, in sentences.
        explorer: the code tree with its items for the page; no part of `to_dict`.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    protocol: Mapping[str, Any]
    verdict: Verdict
    usage: tuple[Mapping[str, Any], ...]
    reconstruction: Mapping[str, Any]
    overlap: tuple[Mapping[str, Any], ...]
    flips: Mapping[str, Any] | None = None
    geometry: Mapping[str, Any] | None = None
    behavior: Mapping[str, Any] | None = None
    relations: Mapping[str, Any] | None = None
    buckets: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    explorer: Mapping[str, Any] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Name the model, the size and the verdict."""
        return (
            f"Diagnosis({self.model['kind']}, {self.data['items']:,} items, "
            f"verdict={self.verdict.level!r})"
        )

    @property
    def healthy(self) -> bool:
        """Whether there is neither a warning nor worse."""
        return self.verdict.healthy

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict of every figure (the explorer's items are left to the page)."""
        return {
            "model": dict(self.model),
            "data": dict(self.data),
            "protocol": dict(self.protocol),
            "verdict": self.verdict.to_dict(),
            "usage": [dict(level) for level in self.usage],
            "reconstruction": dict(self.reconstruction),
            "overlap": [dict(level) for level in self.overlap],
            "flips": None if self.flips is None else dict(self.flips),
            "geometry": None if self.geometry is None else dict(self.geometry),
            "behavior": None if self.behavior is None else dict(self.behavior),
            "relations": None if self.relations is None else dict(self.relations),
            "buckets": [dict(bucket) for bucket in self.buckets],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text; never NaN or infinity, which JSON does not know."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Return the verdict and the main tables as Markdown."""
        from semid.report.markdown import report_markdown

        return report_markdown(self)

    def to_html(self) -> str:
        """Return the report as one HTML page that needs no network."""
        from semid.report.page import report_page

        return report_page(self)

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the report; the suffix decides how.

        Args:
            path: ``.html`` for the page, ``.json`` for the figures, ``.md`` for the tables.
            overwrite: replace an existing file.

        Returns:
            The path written.

        Raises:
            UsageError: another suffix.
            OutputExistsError: the file exists and ``overwrite`` is false.
        """
        makers = {".html": self.to_html, ".json": self.to_json, ".md": self.to_markdown}
        return write_text(path, makers, overwrite=overwrite)


def write_text(path: str | os.PathLike[str], makers: Mapping[str, Any], *, overwrite: bool) -> Path:
    """Write the text that the maker of this suffix gives, whole or not at all.

    Raises:
        UsageError: no maker for the suffix.
        OutputExistsError: the file exists and ``overwrite`` is false.
    """
    target = Path(path)
    if target.suffix.lower() not in makers:
        known = ", ".join(makers)
        raise UsageError(f"output '{target}' ends in '{target.suffix}'; end it in one of {known}")
    check_output(target, overwrite=overwrite)
    text = makers[target.suffix.lower()]()
    if target.suffix.lower() == ".md":
        text += f"\n{MARKDOWN_MARK}\n"
    with atomic_file(target, overwrite=overwrite) as work:
        work.write_text(text, encoding="utf8")
    return target
