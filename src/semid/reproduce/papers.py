"""A paper as data: its file names claims, tables and printed values; code adds what needs code."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from typing import Any

from semid.report.figure import Figure
from semid.reproduce.claims import Claim, Contrast, Family, Metric, Rows, constant, metric
from semid.reproduce.tables import Cell, Column, Table, count_seeds, mean, mean_and_deviation


@dataclass(frozen=True)
class Paper:
    """The claims and tables of one paper.

    Attributes:
        name: name of the file, ``papers/<name>.toml``.
        cell: gives the selection of rows that the name of a cell stands for.
        facts: gives what the file's words and lists refer to, from the rows at hand.
        metrics: metrics that are more than a path into a row.
        code: functions that the file refers to: comparisons of a claim, lines, columns and charts
            of a table, whole figures.
    """

    name: str
    cell: Callable[[str], Mapping[str, Any]]
    facts: Callable[[Rows], Mapping[str, Any]]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    code: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @cached_property
    def file(self) -> dict[str, Any]:
        """The paper's file."""
        path = resources.files("semid") / "reproduce" / "papers" / f"{self.name}.toml"
        return tomllib.loads(path.read_text(encoding="utf8"))

    def metric(self, name: str | float) -> Metric:
        """Return a metric by its name or path; a number stands for itself."""
        if not isinstance(name, str):
            return constant(float(name))
        return self.metrics.get(name) or metric(self.file.get("metrics", {}).get(name, name))

    def claims(self, rows: Rows) -> list[Claim]:
        """Return every claim of the paper."""
        facts = self.facts(rows)
        return [
            Claim(
                id=one["id"],
                where=one["where"],
                sentence=one["sentence"].format_map(facts),
                test=one["test"].format_map(facts),
                families=[f for entry in one["compare"] for f in self._families(entry, facts)],
                rule=one.get("rule", "all"),
                equal_terms=one.get("equal_terms", True),
                note=one.get("note", "").format_map(facts),
                data=one.get("data", ()),
            )
            for one in self.file["claims"]
        ]

    def _families(self, entry: Any, facts: Mapping[str, Any]) -> Iterator[Family]:
        """Yield the comparisons of an entry of ``compare``: one family for each value of ``each``.

        ``a`` is the cell that should be higher. ``b`` is another cell, a list of them or "others";
        without it, ``than`` is another metric of the same cell. An entry without a metric is about
        the AUC of every ranking model. A list of entries is one family.
        """
        if isinstance(entry, list):
            families = [family for one in entry for family in self._families(one, facts)]
            yield [c for family in families if not callable(family) for c in family]
            return
        if "function" in entry:
            yield self.code[entry["function"]]
            return
        variable, values = next(iter(entry.get("each", {"": [""]}).items()))
        for value in self._several(values, facts, entry.get("b")):
            words = {**facts, variable: value}
            a = entry["a"].format_map(words)
            yield [
                self._contrast(entry, words, a, b.format_map(words), name, model)
                for name in self._several(entry.get("metric", "auc"), {}, None)
                for b in self._several(entry.get("b", entry["a"]), facts, a)
                for model in ([""] if "metric" in entry else facts[entry.get("models", "models")])
            ]

    def _several(self, names: Any, facts: Mapping[str, Any], but: str | None) -> list[Any]:
        """Return a list as it is, the list that a name stands for, or the name alone."""
        if isinstance(names, list):
            return names
        if names == "others":
            return [one for one in facts["others"] if one != but]
        return list(facts[names]) if names in facts else [names]

    def _contrast(
        self,
        entry: Mapping[str, Any],
        words: Mapping[str, Any],
        a: str,
        b: str,
        name: str,
        model: str,
    ) -> Contrast:
        shared = words.get("analyzed", {}) if "metric" in entry else {}
        default = "{metric}, {a} - {b}" if "metric" in entry else "{a} - {b}"
        return Contrast(
            entry.get("name", default).format_map({**words, "a": a, "b": b, "metric": name}),
            self.metric(name),
            {**shared, **self.cell(a)},
            {**shared, **self.cell(b)},
            self.metric(entry["than"]) if "than" in entry else None,
            entry.get("margin"),
            model,
            entry.get("digits", 4),
        )

    def sections(self, rows: Rows) -> list[tuple[str, str, str, list[Figure]]]:
        """Return id, title, introduction and figures of every section of the page."""
        sections = []
        for section in self.file["sections"]:
            figures: list[tuple[int, Figure | None]] = []
            for one in section["tables"]:
                if "function" in one:
                    figures.append((0, self.code[one["function"]](rows)))
                    continue
                table = self._table(one)
                names = [name for name in rows.names(table.per, **table.where) if name]
                # All tables of a data set side by side, or one table of all data sets.
                by_data = section.get("by_data", False)
                figures += [
                    (rows.names("data").index(name) if by_data else 0, figure)
                    for name in names
                    for figure in [table.render(rows, section["id"], name)]
                ]
            figures.sort(key=lambda pair: pair[0])
            shown = [figure for _, figure in figures if figure is not None]
            sections.append((section["id"], section["title"], section["intro"], shown))
        return sections

    def _table(self, one: Mapping[str, Any]) -> Table:
        """Return a table from its entry in the file."""
        return Table(
            id=one["id"],
            title=one["title"],
            caption=one.get("caption", self.file.get("caption", "")),
            definition=one["definition"],
            lines=self.code[one["lines"]],
            columns=lambda rows: list(self._columns(one, rows)),
            where=one.get("where", {}),
            per=one.get("per", "data"),
            printed=self.file.get("printed", {}).get(one["id"], {}),
            chart=self.code[one["chart"]] if "chart" in one else None,
            layout=one.get("layout", {}),
        )

    def _columns(self, one: Mapping[str, Any], rows: Rows) -> Iterator[Column]:
        """Yield the columns of a table; those with ``{}`` once per value of the list ``each``.

        A column is the name of a function, or name and metric with the number of decimals (mean
        and deviation), with a format (mean), or alone (number of seeds).
        """
        values = self.facts(rows)[one["each"]] if "each" in one else [{}]
        for number, value in enumerate(values or [None]):
            for entry in one["columns"]:
                if isinstance(entry, str):
                    yield from self.code[entry](rows) if number == 0 else ()
                elif value is not None:
                    name, path = (part.format_map(value) for part in entry[:2])
                    yield Column(name, self._cell(self.metric(path), *entry[2:]))

    def _cell(self, read: Metric, form: int | str | None = None) -> Cell:
        if form is None:
            return count_seeds(read)
        return mean(read, form) if isinstance(form, str) else mean_and_deviation(read, form)
