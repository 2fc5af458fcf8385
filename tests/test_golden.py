"""Results stay what they are: every case of `golden_cases` against the committed record.

`make golden` writes the record anew and prints what changed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SOURCE_DATE_EPOCH"] = "1767225600"  # the date on pages

import numpy as np
import pytest

from golden_cases import CASES, Record, World, cpu, digest, run_case

FILE = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-3
ABSOLUTE = 1e-6
ACCEPT = "If the change is intended, accept it with: make golden"


class Golden:
    """The committed record.

    Attributes:
        cases: name -> ``exact`` and ``close`` values, and ``bits`` by kind of CPU.
    """

    def __init__(self, cases: dict[str, dict[str, Any]]) -> None:
        self.cases = cases

    @classmethod
    def read(cls) -> Golden:
        """Read the file; without one the record is empty."""
        if not FILE.exists():
            return cls({})
        document = json.loads(FILE.read_text(encoding="utf8"))
        lists = document["lists"]
        for case in document["cases"].values():
            for name, value in case["exact"].items():
                if isinstance(value, str) and value.startswith("list "):
                    case["exact"][name] = lists[value]
        return cls(document["cases"])

    def write(self) -> None:
        """Write the file; lists of keys that several cases share are written once."""
        lists: dict[str, list[Any]] = {}
        cases = json.loads(json.dumps(self.cases))
        for case in cases.values():
            for name, value in case["exact"].items():
                if isinstance(value, list) and len(value) > 8:
                    mark = f"list {digest(value)[:12]}"
                    lists[mark] = value
                    case["exact"][name] = mark
        document = {"cases": cases, "lists": lists}
        text = json.dumps(document, indent=0, sort_keys=True, ensure_ascii=False)
        FILE.write_text(text + "\n", encoding="utf8")

    def accept(self, name: str, record: Record) -> list[str]:
        """Take a case's results into the record; return what changed.

        Bits of other CPUs stay while the results are the same, and so do numbers that are
        within the tolerance: a record renewed on another CPU gains that CPU's bits only.
        """
        before = self.cases.get(name)
        lines = ["new"] if before is None else changes(before, record)
        if before is None or lines:
            bits = {record.machine: record.bits} if record.bits else {}
            current = {"exact": record.exact, "close": record.close, "bits": bits}
            self.cases[name] = json.loads(json.dumps(current))
        elif record.bits:
            before["bits"].setdefault(record.machine, record.bits)
        return lines


def changes(before: dict[str, Any], record: Record) -> list[str]:
    """Say which values of a case differ from the record."""
    lines: list[str] = []
    current = json.loads(json.dumps(record.exact))
    for name in sorted({*before["exact"], *current}):
        lines += _difference(name, before["exact"].get(name), current.get(name))
    for name in sorted({*before["close"], *record.close}):
        old, new = before["close"].get(name), record.close.get(name)
        if old is None or new is None or not _near(old, new):
            lines.append(f"{name}: {old} -> {new} (relative tolerance {TOLERANCE})")
    bits = before["bits"].get(record.machine, record.bits)
    for name in sorted({*bits, *record.bits}):
        if bits.get(name) != record.bits.get(name):
            lines.append(f"{name}: other bits than before on '{record.machine}'")
    return lines


def _near(old: float, new: float) -> bool:
    return abs(old - new) <= TOLERANCE * max(abs(old), abs(new)) + ABSOLUTE


def _difference(name: str, old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list):
        parts = [f"- {part}" for part in old if part not in new]
        parts += [f"+ {part}" for part in new if part not in old]
        return [f"{name}: {', '.join(parts) or 'another order'}"]
    return [f"{name}: {old} -> {new}"]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_record(name, golden, world, tmp_path):
    assert name in golden.cases, f"'{name}' is not in {FILE.name}. {ACCEPT}"
    lines = changes(golden.cases[name], run_case(name, world, tmp_path))
    assert not lines, f"'{name}' changed:\n  " + "\n  ".join(lines) + f"\n{ACCEPT}"


def test_a_change_is_named():
    record = Record()
    record.document("report", {"error": 0.5, "usage": [{"dead": 1, "date": "2024-01-01"}]})
    record.array("codes", np.arange(3), exact=True)
    record.array("weights", np.arange(3.0), exact=False)
    golden = Golden({})
    assert golden.accept("case", record) == ["new"]
    before = golden.cases["case"]
    assert changes(before, record) == []
    other = Record()
    other.document("report", {"error": 0.52, "usage": [{"unused": 1, "date": "2025-01-01"}]})
    other.array("codes", np.arange(4), exact=True)
    other.array("weights", np.arange(3.0) + 1e-7, exact=False)
    lines = changes(before, other)
    for part in (
        "report: error: 0.5 -> 0.52 (relative tolerance 0.001)",
        "structure of usage: - [].dead: int, + [].unused: int",
        "codes: ",
        f"weights: other bits than before on '{cpu()}'",
    ):
        assert any(part in line for line in lines), part
    other.exact, other.close = record.exact, record.close
    before["bits"] = {"another CPU": {"weights": "0"}}
    assert changes(before, other) == [], "bits of another CPU are not compared"
    assert golden.accept("case", other) == []
    assert set(before["bits"]) == {"another CPU", cpu()}


def test_the_record_has_no_case_that_is_gone(golden):
    assert set(golden.cases) <= set(CASES), ACCEPT


def main() -> None:
    """Write the record anew and print what changed."""
    golden, say = Golden.read(), lambda line: sys.stdout.write(line + "\n")
    total = 0
    for name in sorted(set(golden.cases) - set(CASES)):
        del golden.cases[name]
        say(f"{name}: removed")
    with tempfile.TemporaryDirectory() as root:
        for folder in ("world", "cases"):
            (Path(root) / folder).mkdir()
        world = World(Path(root) / "world")
        for number, name in enumerate(CASES):
            box = Path(root) / "cases" / str(number)
            box.mkdir()
            lines = golden.accept(name, run_case(name, world, box))
            total += bool(lines)
            for line in lines:
                say(f"{name}: {line}")
    golden.write()
    say(f"{len(CASES)} cases, {total} changed: {FILE}")


if __name__ == "__main__":
    main()
