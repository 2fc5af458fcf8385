"""The catalogue's commands as a person meets them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalogue_cases import drawn_tokenizer, rows
from semid.catalogue.additions import add_items
from semid.catalogue.bundle import CatalogueBundle
from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.errors import OutputBusyError


def table(x, first=0):
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(first, first + len(x))],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1]),
        }
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    tokenizer, x = drawn_tokenizer(sizes=(8, 16)), rows(150)
    tokenizer.save(tmp_path / "model")
    pq.write_table(table(x[:100]), tmp_path / "items.parquet")
    pq.write_table(table(x[100:], first=100), tmp_path / "new.parquet")
    pq.write_table(table(x), tmp_path / "all.parquet")
    ids = tokenizer.encode(x[:100], ids=ItemIds([f"i{n}" for n in range(100)]))
    ids.write(tmp_path / "ids.parquet")
    return tmp_path


def test_unique(run, folder):
    out = folder / "out.parquet"
    code, said, err = run("unique", folder / "ids.parquet", "--method", "append", "-o", out)
    assert code == 0, err
    assert "100 distinct ids of 100 items" in said
    assert len(np.unique(SemanticIds.read(out).codes, axis=0)) == 100
    code, _, err = run("unique", folder / "ids.parquet", "--method", "reassign", "-o", out)
    assert code == 2
    assert "--model and --embeddings" in err
    code, _, err = run("unique", folder / "ids.parquet", "-o", out)
    assert code == 2
    assert "--overwrite" in err
    code, said, err = run(
        "unique", out, "--method", "reassign", "--model", folder / "model", "--embeddings",
        folder / "items.parquet", "-o", folder / "re.parquet", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert "quantization error" in said
    run("unique", folder / "re.parquet", "--method", "none", "-o", folder / "back.parquet")
    plain = SemanticIds.read(folder / "ids.parquet")
    assert np.array_equal(SemanticIds.read(folder / "back.parquet").codes, plain.codes)
    code, _, err = run("unique", folder / "ids.parquet", "--method", "apend", "-o", folder / "x")
    assert code == 2
    assert "did you mean 'append'" in err


def test_encode_into_a_catalogue_file_and_a_bundle(run, folder):
    run("unique", folder / "ids.parquet", "-o", folder / "unique.parquet")
    before = SemanticIds.read(folder / "unique.parquet")
    add = ("encode", folder / "model", folder / "new.parquet", "-q", "--catalogue")
    code, said, err = run(
        *add, folder / "unique.parquet", "-o", folder / "two.parquet",
        "--novelty", folder / "novelty.parquet",
    )  # fmt: skip
    assert code == 0, err
    assert "50 new items" in said
    after = SemanticIds.read(folder / "two.parquet")
    assert np.array_equal(after.codes[:100], before.codes)
    assert len(np.unique(after.codes, axis=0)) == 150
    assert len(pq.read_table(folder / "novelty.parquet")) == 50
    bundle = folder / "bundle"
    code, said, err = run(*add, folder / "unique.parquet", "-o", bundle)
    assert code == 0, err
    assert "version 2" in said
    assert np.array_equal(CatalogueBundle(bundle).read(1).codes, before.codes)
    assert np.array_equal(CatalogueBundle(bundle).read().codes, after.codes)
    code, said, _ = run(*add, bundle, "-o", bundle)
    assert code == 0
    assert "version 2" in said  # nothing new: no version
    code, _, err = run(*add, folder / "unique.parquet", "-o", bundle)
    assert code == 2
    assert "exists" in err
    code, _, err = run(*add, folder / "ids.parquet", "-o", folder / "three.parquet", "--resume")
    assert code == 2
    assert "--catalogue" in err
    drawn_tokenizer(sizes=(8, 16), seed=5).save(folder / "other")
    code, _, err = run(
        "encode", folder / "other", folder / "new.parquet", "--catalogue", bundle, "-o",
        folder / "four.parquet",
    )  # fmt: skip
    assert code == 1
    assert "another codebook" in err
    assert not (folder / "four.parquet").exists()


def test_a_new_bundle_starts_with_the_last_version_in_one_file(run, folder, monkeypatch):
    ids, old = SemanticIds.read(folder / "ids.parquet"), folder / "many"
    bundle = CatalogueBundle.create(old, ids.take(np.arange(40)))
    for count in (50, 60, 100):
        bundle.append(ids.take(np.arange(count)))
    before = {file: file.read_bytes() for file in old.rglob("*.*")}
    code, said, err = run("compact", old, "-o", folder / "one")
    assert (code, err) == (0, "")
    assert said == f"100 items: {folder / 'one'}, version 1\n"
    again = CatalogueBundle(folder / "one")
    assert [part.rows for part in again.parts()] == [100]
    assert again.read().to_arrow().equals(bundle.read().to_arrow())
    assert again.append(bundle.read()) == 1  # nothing is new: it continues the old one
    # What is there is never replaced, nor is the old bundle written to.
    for target in (folder / "one", old, old / "inside"):
        code, _, err = run("compact", old, "-o", target)
        assert (code, len(err.splitlines())) == (2, 1)
    assert {file: file.read_bytes() for file in old.rglob("*.*")} == before
    # An interruption leaves nothing behind, and a damaged version gives nothing.
    with monkeypatch.context() as patch:
        patch.setattr("semid.catalogue.bundle._write_manifest", interrupt)
        assert run("compact", old, "-o", folder / "two")[0] == 130
    (old / bundle.parts()[1].file).write_bytes(b"")
    code, _, err = run("compact", old, "-o", folder / "two")
    assert code == 1
    assert "is not what was written; copy it again" in err
    assert not list(folder.glob("*two*"))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_growing_bundle_is_held_from_reading_to_appending(run, folder, monkeypatch):
    bundle = folder / "bundle"
    CatalogueBundle.create(bundle, SemanticIds.read(folder / "ids.parquet"))
    attempts = []

    def append_elsewhere(ids):
        try:
            attempts.append(CatalogueBundle(bundle).append(ids))
        except OutputBusyError as error:
            attempts.append(error)

    def overtaken(*arguments, **options):
        done = add_items(*arguments, **options)
        other = threading.Thread(target=append_elsewhere, args=(done.ids,))
        other.start()
        other.join()
        return done

    monkeypatch.setattr("semid.catalogue.additions.add_items", overtaken)
    arguments = ("encode", folder / "model", folder / "new.parquet", "--catalogue", bundle)
    code, said, err = run(*arguments, "-q", "-o", bundle)
    assert code == 0, err
    assert len(attempts) == 1
    assert isinstance(attempts[0], OutputBusyError)
    assert "50 new items" in said
    assert "version 2" in said
    assert [part.rows for part in CatalogueBundle(bundle).parts()] == [100, 50]


def test_refresh_and_drift(run, folder):
    pq.write_table(
        pa.table(
            {"user_id": ["u", "u", "v"], "item_id": ["i1", "i2", "i120"], "position": [0, 1, 0]}
        ),
        folder / "log.parquet",
    )
    code, said, err = run(
        "refresh", folder / "model", folder / "all.parquet", "--catalogue", folder / "ids.parquet",
        "--interactions", folder / "log.parquet", "--max-churn", "0.1", "-o", folder / "next", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert "50 new" in said
    report = json.loads((folder / "next" / "refresh.json").read_text())
    assert report["churn"]["moved"] <= 10
    assert len(SemanticIds.read(folder / "next" / "ids.parquet")) == 150
    code, said, err = run(
        "drift", folder / "next" / "model", folder / "items.parquet", folder / "all.parquet",
        "-o", folder / "drift.json", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert said.startswith("drift: ")
    assert json.loads((folder / "drift.json").read_text())["shared"] == 100
    code, _, err = run(
        "refresh", folder / "model", folder / "all.parquet", "--catalogue", folder / "ids.parquet",
        "-o", folder / "next",
    )  # fmt: skip
    assert code == 2
    assert "--overwrite" in err


@pytest.mark.parametrize(
    "to", ["lcrec", "grid", "openonerec", "torcheasyrec", "huggingface", "faiss", "fuxictr"]
)
def test_export(run, folder, to):
    if to == "faiss":
        pytest.importorskip("faiss", reason="pip install faiss-cpu")
    code, said, err = run(
        "export", folder / "ids.parquet", "--to", to, "--model", folder / "model", "-o",
        folder / "out",
    )  # fmt: skip
    assert code == 0, err
    assert said.startswith(f"{to}: ")
    assert (folder / "out").exists()


def test_torch_export_needs_no_ids(run, folder):
    out = folder / "encoder.pt2"
    code, _, err = run("export", "--to", "torch-export", "--model", folder / "model", "-o", out)
    assert code == 0, err
    assert out.stat().st_size > 0


def test_import_and_refusals(run, folder):
    out = folder / "Beauty.index.json"
    run("export", folder / "ids.parquet", "--to", "lcrec", "-o", out)
    code, said, err = run(
        "import", out, "--from", "lcrec", "--ids", folder / "items.parquet", "--model",
        folder / "model", "-o", folder / "back.parquet",
    )  # fmt: skip
    assert code == 0, err
    assert "100 items" in said
    back, plain = (SemanticIds.read(folder / f"{n}.parquet") for n in ("back", "ids"))
    assert np.array_equal(back.codes, plain.codes)
    assert back.items == plain.items
    before = sorted(path.name for path in folder.iterdir())
    for arguments, status, words in (
        (("export", folder / "ids.parquet", "--to", "lcrek", "-o", folder / "x"), 2, "lcrec"),
        (("export", folder / "ids.parquet", "--to", "faiss", "-o", folder / "x"), 2, "--model"),
        (("export", "--to", "grid", "-o", folder / "x"), 2, "ids file"),
        (("export", folder / "ids.parquet", "--to", "lcrec", "-o", out), 2, "--overwrite"),
        (("export", folder / "items.parquet", "--to", "lcrec", "-o", folder / "x"), 1, "semid"),
        (("import", folder / "ids.parquet", "--from", "lcrec", "-o", folder / "x"), 1, "JSON"),
        (("import", out, "--from", "grid", "-o", folder / "x"), 1, "torch.save"),
    ):
        code, _, err = run(*arguments)
        assert code == status, arguments
        assert words in err
        assert "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("command", ["unique", "drift", "refresh", "export", "import"])
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example: semid" in out
