"""A paper as data: its file names claims, tables and printed values; code adds what needs code."""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import resources
from typing import Any

from semid.report.figure import Figure
from semid.reproduce.claims import (
    Claim,
    Contrast,
    Family,
    Metric,
    Rows,
    Statements,
    inside,
    metric,
)


@dataclass(frozen=True)
class Paper:
    """The claims and tables of one paper, from ``papers/<name>.toml``."""

    name: str
    # The selection of rows that the name of a cell stands for.
    cell: Callable[[str], Mapping[str, Any]]
    # What the file's words and lists refer to, from the rows at hand.
    facts: Callable[[Rows], Mapping[str, Any]]
    # Metrics that are more than a path into a row.
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    # Comparisons of a claim, lines, columns and charts of a table, whole figures.
    code: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @cached_property
    def file(self) -> dict[str, Any]:
        """The paper's file."""
        path = resources.files("semid") / "reproduce" / "papers" / f"{self.name}.toml"
        return tomllib.loads(path.read_text(encoding="utf8"))

    def metric(self, name: str | float) -> Metric:
        """Return a metric by its name or path; a number stands for itself."""
        if not isinstance(name, str):
            value = float(name)
            return lambda row: value
        return self.metrics.get(name) or metric(self.file.get("metrics", {}).get(name, name))

    def claims(self, rows: Rows) -> list[Claim]:
        """Return every claim of the paper."""
        facts = self.facts(rows)
        claims = []
        for one in self.file["claims"]:
            families = [f for entry in one["compare"] for f in self._families(entry, facts)]
            # These sentences refer to the rows at hand; other keys of the file are fields as is.
            texts = {
                key: one.get(key, "").format_map(facts) for key in ("sentence", "test", "note")
            }
            others = {key: value for key, value in one.items() if key != "compare"}
            claims.append(Claim(**{**others, **texts, "families": families}))
        return claims

    def _families(self, entry: Any, facts: Mapping[str, Any]) -> Iterator[Family | Statements]:
        """Yield the statements of an entry of ``compare``, one for each value of ``each``.

        ``a`` is the cell that should be higher. ``b`` is another cell, a list of them or "others",
        a statement each; without it, ``than`` is another metric of the same cell. ``metric`` may be
        a list too. An entry without a metric is about the AUC. A statement is the mean over all
        ranking models, and over the values of ``average``.
        """
        if "function" in entry:
            arguments = {key: value for key, value in entry.items() if key != "function"}
            yield partial(self.code[entry["function"]], **arguments)
            return
        apart, means = (
            next(iter(entry.get(key, {"": [""]}).items())) for key in ("each", "average")
        )
        for value in self._several(apart[1], facts, entry.get("b")):
            words = {**facts, apart[0]: value}
            models = [words["model"]] if "model" in words else facts.get("models", [""])
            if "metric" in entry:  # of embeddings, which are analyzed of one model
                models = [""]
            elif "models" in entry:
                models = facts[entry["models"]]
            a = entry["a"].format_map({**words, means[0]: ""})
            for name in self._several(entry.get("metric", "auc"), {}, None):
                for b in self._several(entry.get("b", entry["a"]), facts, a):
                    contrasts = [
                        self._contrast(entry, {**words, means[0]: one}, b, name, model)
                        for one in self._several(means[1], facts, None)
                        for model in models
                    ]
                    title = contrasts[0].name
                    if "model" in words:
                        title = f"{words['model']}: {title}"
                    digits = entry.get("digits", 4)
                    yield Family(title, tuple(contrasts), entry.get("margin"), digits)

    def _several(self, names: Any, facts: Mapping[str, Any], but: str | None) -> list[Any]:
        """Return a list as it is, the list that a name stands for, or the name alone."""
        if isinstance(names, list):
            return names
        if names == "others":
            return [one for one in facts["others"] if one != but]
        return list(facts[names]) if names in facts else [names]

    def _contrast(
        self, entry: Mapping[str, Any], words: Mapping[str, Any], b: str, name: str, model: str
    ) -> Contrast:
        a, b = entry["a"].format_map(words), b.format_map(words)
        # Embeddings are analyzed of one ranking model; its claims select that one.
        shared = words.get("analyzed", {}) if "metric" in entry else {}
        default = "{metric}, {a} - {b}" if "metric" in entry else "{a} - {b}"
        return Contrast(
            entry.get("name", default).format_map({**words, "a": a, "b": b, "metric": name}),
            self.metric(name),
            {**shared, **self.cell(a)},
            {**shared, **self.cell(b)},
            self.metric(entry["than"]) if "than" in entry else None,
            model,
        )

    def sections(self, rows: Rows) -> list[tuple[str, str, str, list[Figure]]]:
        """Return id, title, introduction and figures of every section of the page."""
        sections = []
        for section in self.file["sections"]:
            figures: list[tuple[int, Figure | None]] = []
            for one in section["tables"]:
                if "function" in one:
                    keys = ("id", "title", "caption", "definition", "columns")
                    texts = {key: one[key] for key in keys}
                    table = self.code[one["function"]](rows)
                    whole = Figure(section=section["id"], rows=table, **texts)
                    figures.append((0, whole if table else None))
                    continue
                per = one.get("per", "data")  # or one table per variant
                names = filter(None, rows.names(per, **one.get("where", {})))
                # All tables of a data set side by side, or one table of all data sets.
                by_data = section.get("by_data", False)
                figures += [
                    (
                        rows.names("data").index(name) if by_data else 0,
                        self._figure(one, section["id"], rows, per, name),
                    )
                    for name in names
                ]
            figures.sort(key=lambda pair: pair[0])
            shown = [figure for _, figure in figures if figure is not None]
            sections.append((section["id"], section["title"], section["intro"], shown))
        return sections

    def _figure(
        self, one: Mapping[str, Any], section: str, rows: Rows, per: str, name: str
    ) -> Figure | None:
        """Return a table, and its curves, of one data set; None where no line has a number."""
        part = Rows(rows.where(**one.get("where", {}), **{per: name}))
        lines = list(self.code[one["lines"]](part))
        columns = list(self._columns(one, part))
        # The paper's own values by line follow ours where the columns agree.
        printed = self.file.get("printed", {}).get(one["id"], {})
        table: list[list[str]] = []
        for line in lines:  # a line without one number is left out
            cells = [column.cell(part, line) for column in columns]
            if all(cell in ("-", "") for cell in cells):
                continue
            table.append([line.label, *cells])
            values = printed.get(line.label, ())
            if len(values) == len(columns) - 1:  # all but the number of seeds
                numbers = [f"{value:g}" if value != "" else "" for value in values]
                table.append([f"paper: {line.label}", "", *numbers])
        if not table:
            return None
        caption = one.get("caption", self.file.get("caption", ""))
        return Figure(
            f"{one['id']}-{''.join(c if c.isalnum() else '-' for c in name)}",
            section,
            f"{one['title']}, {name}",
            # ``{key}`` stands for a value of the first row.
            caption.format_map(part.rows[0]),
            one["definition"].format_map(part.rows[0]),
            list(self.code[one["chart"]](part, lines)) if "chart" in one else (),
            one.get("layout", {}),
            ["", *(column.name for column in columns)],
            table,
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


# Lines, columns and cells of tables ------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    label: str  # first cell
    # Selection of the rows that its columns read, and the path to the part of a row.
    where: Mapping[str, Any] = field(default_factory=dict)
    at: tuple[Any, ...] = ()
    # Selection of the rows that differences are taken to.
    against: Mapping[str, Any] = field(default_factory=dict)

    def values(self, rows: Rows, metric: Metric, **more: Any) -> list[float]:
        """Return a metric of the line's part of the rows, one value per seed."""
        read = inside(self.at, metric) if self.at else metric
        return rows.values(read, **{**self.where, **more})


Lines = Callable[[Rows], Iterable[Line]]
Cell = Callable[[Rows, Line], str]


@dataclass(frozen=True)
class Column:
    """One column of a table: its head, and what writes the cell of a line."""

    name: str
    cell: Cell


def average(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Write mean and standard deviation; one value alone; a dash for none."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{average(values):.{digits}f}{deviation}"


def mean_and_deviation(metric: Metric, digits: int = 4) -> Cell:
    """Return cells with the mean over seeds and the standard deviation."""
    return lambda rows, line: spread(line.values(rows, metric), digits)


def mean(metric: Metric, form: str) -> Cell:
    """Return cells with the mean over seeds in a format."""

    def write(rows: Rows, line: Line) -> str:
        values = line.values(rows, metric)
        return f"{average(values):{form}}" if values else "-"

    return write


def count_seeds(metric: Metric) -> Cell:
    """Return cells with the number of seeds that have a metric."""
    return lambda rows, line: str(len(line.values(rows, metric)))


def difference(metric: Metric, **more: Any) -> Cell:
    """Return cells with the paired difference of a line's rows to those it stands against."""

    def write(rows: Rows, line: Line) -> str:
        result = rows.difference(metric, {**line.where, **more}, {**line.against, **more})
        return "-" if result is None else str(result)

    return write
