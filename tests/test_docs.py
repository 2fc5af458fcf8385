"""README and docs tell the truth: their Python and their commands run, in order, page by page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from semid.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the semid commands of a shell block; `$ ` marks them where output is shown."""
    lines = text.replace("\\\n", " ").splitlines()
    shown = [line.removeprefix("$ ") for line in lines]
    return [
        shlex.split(line, comments=True)[1:]
        for raw, line in zip(lines, shown, strict=True)
        if line.startswith("semid ") and (raw.startswith("$ ") or "$ " not in text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path, monkeypatch):
    """Blocks marked `no-run` are shown only (installation, other people's files)."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = 0
    for language, marks, body in FENCE.findall(page.read_text(encoding="utf8")):
        if "no-run" in marks:
            continue
        if language == "python":
            exec(compile(body, str(page), "exec"), names)
            ran += 1
        elif language in ("bash", "console"):
            for arguments in commands(body):
                with pytest.raises(SystemExit) as caught:
                    main([*arguments, "--quiet"])
                assert caught.value.code in (0, None), f"{page.name}: semid {arguments}"
                ran += 1
    assert ran, f"{page.name} shows nothing that runs"


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
