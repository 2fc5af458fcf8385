"""Shared fixtures: small data whose answer is known, and the real data where it lies."""

from __future__ import annotations

import os

# The tests' matrices are tiny: torch's threads would wait for each other longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

# Without a GPU, Triton's kernels run in its interpreter, which is chosen when they are imported.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

DATA = Path(os.environ.get("SEMID_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data, or skip with the reason."""
    if not DATA.is_dir():
        pytest.skip(f"real data not found at '{DATA}'; set SEMID_DATA to its folder")
    return DATA


@pytest.fixture(scope="session")
def clustered() -> np.ndarray:
    """Rows (1200, 24) in 40 loose clusters with unequal scales: structure at two levels."""
    generator = np.random.default_rng(7)
    centers = generator.normal(size=(40, 24)) * np.linspace(3.0, 0.3, 24)
    rows = centers[generator.integers(0, 40, 1200)] + 0.3 * generator.normal(size=(1200, 24))
    return rows.astype(np.float32)


@pytest.fixture
def run(capsys):
    """Run the program with some arguments: exit code, and what it wrote to stdout and stderr."""
    from cli_cases import run

    def run_captured(*arguments: object) -> tuple[int, str, str]:
        code = run(*arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_captured
