"""The notebooks of the documentation have been executed, and run again as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"\d[\d,.]*")


def printed(notebook: Any) -> list[str]:
    """Return what each code cell prints."""
    return [
        "".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed_and_small(path):
    assert path.stat().st_size < 40_000
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "make notebooks"
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_again_to_the_same_output(path, tmp_path):
    """Networks differ between CPUs, so their numbers are masked; those of K-means are not."""
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    before = printed(notebook)
    client.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": tmp_path}}
    ).execute()
    after = printed(notebook)
    if path.stem != "first-ids":
        before, after = ([NUMBER.sub("#", text) for text in texts] for texts in (before, after))
    assert after == before
    assert not list(tmp_path.iterdir()), "notebooks write to a temporary folder"


def test_the_site_has_every_notebook():
    site = (Path(__file__).parents[1] / "mkdocs.yml").read_text(encoding="utf8")
    assert NOTEBOOKS
    assert all(f"notebooks/{path.stem}.md" in site for path in NOTEBOOKS)
