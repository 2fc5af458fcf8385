"""README and docs tell the truth: their Python and their commands run, in order, page by page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from semid.cli import main
from semid.cli.app import app

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
    """Blocks marked `{ .no-run }` are only shown (installation, other people's files)."""
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_pages_show(page: Path):
    """Blocks that do not run name no option that has gone; the site can render their fences."""
    known = get_command(app)
    for language, marks, body in FENCE.findall(page.read_text(encoding="utf8")):
        assert re.fullmatch(r"( \{.*\})?", marks), f"{page.name}: {language}{marks}"
        for name, *arguments in commands(body) if language in ("bash", "console") else ():
            if name in known.commands:
                options = {
                    o for p in known.commands[name].params for o in p.opts + p.secondary_opts
                }
                flags = {a.partition("=")[0] for a in arguments if a.startswith("-")}
                missing = flags - options - {"--help", "--debug"}
                assert not missing, f"{page.name}: semid {name} has no {missing}"
            else:
                assert name.startswith("-"), f"{page.name}: no command {name}"


def test_api_pages_have_every_public_name_once():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    entries = [
        entry
        for page in pages
        for entry in re.findall(r"^::: (\S+)", page.read_text(encoding="utf8"), re.MULTILINE)
    ]
    public = re.findall(r" as (\w+)$", (ROOT / "src/semid/__init__.pyi").read_text(), re.MULTILINE)
    assert set(public) <= {entry.rpartition(".")[2] for entry in entries}
    assert len(entries) == len(set(entries))


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_version_is_the_same_everywhere():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf8")
    dated = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert f"\nversion: {version}\n" in citation
    assert f"\n## [{version}] - {dated[0]}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


def test_pictures_are_small():
    pictures = sorted((ROOT / "docs/images").glob("*.png"))
    assert [p.name for p in pictures] == ["explorer.png", "report.png"]
    assert all(p.stat().st_size < 150_000 for p in pictures)
