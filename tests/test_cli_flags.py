"""Flags come from option fields: the file of them is current, and help and --set work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from semid.cli.flags import FILE, known_flags, write_flags
from semid.cli.models import _BEHAVIOR
from semid.tokenizers.factory import TOKENIZERS


def test_the_file_of_flags_is_current(tmp_path):
    write_flags(tmp_path / "flags.json")
    made = (tmp_path / "flags.json").read_text(encoding="utf8")
    assert made == FILE.read_text(encoding="utf8"), "option fields changed: run `make flags`"


def test_which_tokenizers_learn_from_behavior_is_known_without_them():
    kinds = {kind: TOKENIZERS.load(kind) for kind in TOKENIZERS.targets}
    learning = {k: each for k, each in kinds.items() if isinstance(each.behavior_weights, tuple)}
    known = {
        kind: {name: getattr(each(), name) for name in each.behavior_weights}
        for kind, each in learning.items()
        if each.behavior_weights
    }
    assert known == _BEHAVIOR


def test_flags_have_names_and_sentences_of_their_own():
    for command in ("fit", "rank", "rank-grid"):
        flags = [flag for flag in known_flags(command) if flag.name]
        assert len({flag.name for flag in flags}) == len(flags)
        assert len({flag.key for flag in flags}) == len(flags)
        for flag in flags:
            assert flag.help[0].isalnum()
            assert flag.help.endswith(".")


@pytest.mark.parametrize(
    ("kind", "present", "absent"),
    [
        ("rqkmeans", ["--max-iter", "--n-init", "--levels"], ["--epochs", "--rule"]),
        ("barq", ["--behavior-weight", "--epochs", "objective.temperature"], ["--rule"]),
        ("vqvae", ["--rule", "--hidden"], ["--max-iter", "--projection"]),
    ],
)
def test_help_of_a_tokenizer_shows_what_applies(run, monkeypatch, kind, present, absent):
    monkeypatch.setenv("COLUMNS", "80")
    code, shown, _ = run("fit", "--tokenizer", kind, "--help")
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 80
    words = set(shown.replace(",", " ").split())
    assert set(present) <= words
    assert not set(absent) & words


def test_help_fits_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (("--help",), ("fit", "--help"), ("rank", "--help"), ("encode", "--help")):
        code, shown, _ = run(*arguments)
        assert code == 0
        assert max(map(len, shown.splitlines())) <= 80
    assert "K-means:" in run("fit", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "nonsense=3"), "nonsense"),
        (("--set", "kmeans.max_itr=3"), "did you mean 'kmeans.max_iter'"),
        (("--set", "kmeans.max_iter"), "give KEY=VALUE"),
        (("--set", "kmeans.max_iter=many"), "max_iter='many'"),
        (("--set", "kmeans.max_iter=3", "--max-iter", "4"), "give one of them"),
        (("--tokenizer", "rqvae", "--hidden", "8,x"), "--hidden '8,x'"),
        (("--tokenizer", "rqvae", "--set", "network.hidden=[0]"), "hidden"),
    ],
)
def test_what_set_cannot_set_is_refused(run, arguments, message, tmp_path):
    call = ("fit", "nowhere.npy", "-o", str(tmp_path / "model"), *arguments)
    code, _, err = run(*call)
    assert code == 2, err
    assert message in err
    assert len(err.splitlines()) == 1


def test_help_and_refusals_of_flags_import_no_torch():
    script = (
        "import sys\nfrom semid.cli import main\n"
        "for call in (['fit', '--help'], ['rank', '--help'], ['fit', 'x', '--nonsense']):\n"
        "    try:\n        main(call)\n    except SystemExit:\n        pass\n"
        "assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
