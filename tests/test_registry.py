"""Registries: lazily imported names, and what other packages add by entry points."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import semid
from semid.errors import UsageError
from semid.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on the path with an installed package that has entry points."""
    (tmp_path / "outside.py").write_text("class Thing:\n    size = 3\n")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    points = (
        "[semid.things]\nthing = outside:Thing\nbroken = outside:Nothing\nours = outside:Thing\n"
    )
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("outside", None)


def test_names_come_from_the_table_and_from_entry_points(package):
    things = Registry("semid.things", {"ours": "pathlib:Path", "object": 5})
    assert things.names() == list(things) == ["broken", "object", "ours", "thing"]
    assert things.load("thing").size == 3
    assert things["ours"] is Path  # an entry point cannot take a name of semid
    assert things["object"] == 5
    assert "thing" in things
    assert "other" not in things
    with pytest.raises(UsageError, match=r"--thing='thin' is not one of .*did you mean 'thing'"):
        things.load("thin", flag="--thing")
    with pytest.raises(UsageError, match=r"broken = outside:Nothing.*install its package again"):
        things.load("broken")


def test_every_public_name_exists_and_has_a_docstring():
    assert {"compare", "export", "import_ids", "drift", "refresh", "add_items"} <= set(
        semid.__all__
    )
    assert {"CatalogueBundle", "Tokenizer", "Diagnosis"} <= set(semid.__all__)
    for name in semid.__all__:
        assert getattr(semid, name).__doc__, name
    assert set(semid.__all__) <= set(dir(semid))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = semid.nonsense
