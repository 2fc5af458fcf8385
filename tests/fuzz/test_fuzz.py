"""A few hundred fuzz cases, always the same; ``make fuzz`` runs twenty thousand."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import Bench, make_bench
from fuzzing import FAILURES, run_case
from generators import GENERATORS

CASES = {"report": 2, "resume": 6, "flags": 40, "overwrite": 25, "recipe": 15}


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The files and models that the cases start from."""
    return make_bench(tmp_path_factory.mktemp("fuzz") / "bench")


@pytest.mark.parametrize("generator", GENERATORS)
def test_fuzz(generator: str, bench: Bench, tmp_path: Path) -> None:
    names = [f"{generator}:0:{number}" for number in range(CASES.get(generator, 20))]
    outcomes = [run_case(GENERATORS, name, bench, tmp_path, seconds=60) for name in names]
    bad = [o for o in outcomes if o.verdict in FAILURES]
    lines = [f"{o.verdict}: {o.kind} | python tests/fuzz {o.name} | {o.text:.120}" for o in bad]
    assert not bad, "\n".join(lines)
