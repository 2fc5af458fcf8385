"""Outputs: nothing of a user's is replaced, two runs never mix, and a kill loses nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rank_cases
import semid
from cli_cases import run
from semid import output, runs
from semid.catalogue import bundle as bundle_module
from semid.catalogue.bundle import CatalogueBundle
from semid.codes import SemanticIds
from semid.distributed import encode_folder as encoding_run
from semid.distributed.encode_folder import EncodeWorker, LocalOptions, encode_folder
from semid.errors import ArtefactError, OutputBusyError, OutputExistsError, SemidError, UsageError
from semid.filesystems import Folder
from semid.output import atomic_file, atomic_folder, check_output, claim_output
from semid.tokenizers.encoding import PartFolder, encode_to_parquet

ROWS = 300


@pytest.fixture
def place(tmp_path, clustered, monkeypatch) -> Path:
    """A folder with everything that commands read."""
    monkeypatch.chdir(tmp_path)
    x = clustered[:ROWS]
    np.save("x.npy", x)
    flat = pa.array(x.reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    Path("parts").mkdir()
    for start in (0, 100, 200):
        table = pa.table(
            {"item_id": np.arange(start, start + 100), "embedding": vectors[start : start + 100]}
        )
        pq.write_table(table, f"parts/p{start}.parquet")
    model = semid.RQKMeans(levels=2, codebook_size=8, seed=0).fit(x)
    model.save("model")
    model.encode(x).write("ids.parquet")
    pq.write_table(rank_cases.log_table(), "log.parquet")
    pq.write_table(rank_cases.item_table(), "items.parquet")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".semid"
    }


COMMANDS = {
    "fit": "fit x.npy --levels 2 --codebook-size 8 -q -o",
    "encode": "encode model x.npy -q -o",
    "encode shared": "encode model parts --processes 1 -q -o",
    "encode catalogue": "encode model x.npy --catalogue ids.parquet -q -o",
    "report": "report model x.npy -q -o",
    "compare": "compare model model2 x.npy -q -o",
    "refine": "refine model x.npy --rounds 1 -q -o",
    "refresh": "refresh model x.npy --catalogue ids.parquet -q -o",
    "unique": "unique ids.parquet -q -o",
    "unique folder": "unique idsfolder -q -o",
    "drift": "drift model x.npy x.npy -q -o",
    "rank": "rank log.parquet --hidden 4 --epochs 1 -q -o",
    "rank analysis": "rank log.parquet --ids ids.parquet --hidden 4 --epochs 1 -q -o r --analyze",
    "grid": "rank-grid log.parquet --items items.parquet --embeddings x.npy -q -o",
    "export": "export ids.parquet --to lcrec -o",
    "export folder": "export ids.parquet --to openonerec -o",
    "import": "import lcrec.json --from lcrec -o",
    "prepare": "prepare movielens ml -o",
    "demo": "demo --items 1000 -q -o",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_overwrite_spares_what_semid_did_not_write(place, command, capsys):
    mine = place / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf8")
    (place / "notes.html").write_text("<p>mine</p>", encoding="utf8")
    pq.write_table(pa.table({"a": [1]}), place / "mine.parquet")
    before = contents(place)
    for target in ("mine", "notes.html", "mine.parquet", ".", ""):
        assert run(*COMMANDS[command].split(), target, "--overwrite") == 2, target
        assert "output" in capsys.readouterr().err
    assert contents(place) == before


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("fit x.npy --codebook-size 8", "x.npy"),
        ("fit parts --codebook-size 8", "parts"),
        ("fit parts/p0.parquet --codebook-size 8", "parts"),
        ("fit parts --codebook-size 8", "parts/model"),
        ("fit parts/*.parquet --codebook-size 8", "parts/p0.parquet"),
        ("fit x.npy --ids items.parquet:item_id --codebook-size 8", "items.parquet"),
        ("encode model x.npy", "model"),
        ("encode model x.npy", "link/../x.npy"),
        ("encode model parts --processes 1", "parts"),
        ("refine model x.npy", "model"),
        ("report model x.npy --interactions log.parquet", "log.parquet"),
        ("rank log.parquet", "log.parquet"),
        ("unique ids.parquet", "ids.parquet"),
        ("refresh model x.npy --catalogue ids.parquet", "ids.parquet"),
        ("export ids.parquet --to grid", "ids.parquet"),
    ],
)
def test_an_output_that_is_an_input(place, command, target, capsys):
    (place / "link").symlink_to(place / "parts")
    before = contents(place)
    quiet = [] if "export" in command else ["-q"]
    assert run(*command.split(), *quiet, "-o", target, "--overwrite") == 2
    error = capsys.readouterr().err
    assert "the input" in error or "symbolic link" in error
    assert contents(place) == before


def test_links_are_not_outputs(place, capsys):
    (place / "dangling").symlink_to(place / "nowhere")
    (place / "linked").symlink_to(place / "model")
    for target in ("dangling", "linked"):
        for more in ([], ["--overwrite"]):
            assert run("fit", "x.npy", "-o", target, "-q", *more) == 2
            assert "symbolic link" in capsys.readouterr().err
    assert semid.load(place / "model").levels == 2


def test_a_place_where_nothing_can_be_written(place, capsys):
    assert run("fit", "x.npy", "-o", "x.npy/model", "-q") == 2
    assert "is not a folder" in capsys.readouterr().err


def test_own_outputs_are_replaced(place):
    """Whatever a command wrote, the same command replaces with --overwrite."""
    semid.RQKMeans(levels=1, codebook_size=4).fit(np.load("x.npy")).save("model2")
    for command, target in (
        ("fit x.npy --levels 1 --codebook-size 4 -q", "out"),
        ("encode model x.npy -q", "out.parquet"),
        ("encode model parts --processes 1 -q", "outs"),
        ("compare model model2 x.npy -q", "out.md"),
        ("report model x.npy -q", "out.html"),
        ("report model x.npy -q", "out.json"),
        ("export ids.parquet --to lcrec", "lcrec.json"),
        ("export ids.parquet --to grid", "grid.pt"),
        ("export ids.parquet --to openonerec", "open"),
        ("unique outs -q", "unique"),
        ("drift model x.npy x.npy -q", "drift.json"),
    ):
        arguments = [*command.split(), "-o", target]
        assert run(*arguments) == 0, command
        first = contents(place)
        assert run(*arguments) == 2, command
        assert contents(place) == first
        assert run(*arguments, "--overwrite") == 0, command
        assert set(contents(place)) == set(first)


def test_a_file_of_the_users_own_in_a_model_folder(place, capsys):
    (place / "model" / "notes.txt").write_text("mine", encoding="utf8")
    assert run("fit", "x.npy", "--codebook-size", "8", "-o", "model", "-q", "--overwrite") == 2
    assert "notes.txt" in capsys.readouterr().err
    assert (place / "model" / "notes.txt").read_text(encoding="utf8") == "mine"


def test_an_output_that_a_user_changed(place):
    run("export", "ids.parquet", "--to", "lcrec", "-o", "a.json")
    Path("a.json").write_text('{"0": ["mine"]}', encoding="utf8")
    with pytest.raises(OutputExistsError, match="not written by semid"):
        check_output("a.json", overwrite=True)
    with atomic_folder("b") as folder:
        (folder / "table").write_text("ours", encoding="utf8")
    Path("b/table").write_text("changed", encoding="utf8")
    with pytest.raises(OutputExistsError, match="'table', which semid did not write"):
        check_output("b", overwrite=True)


def test_artefacts_without_a_marker_are_recognized(place):
    (place / "model" / ".semid").unlink()
    check_output("model", overwrite=True)
    (place / "model" / "more.bin").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match=r"more\.bin"):
        check_output("model", overwrite=True)


def test_the_state_folder_may_be_a_users_own(place, capsys):
    Path("new.partial").mkdir()
    Path("new.partial/thesis.txt").write_text("mine", encoding="utf8")
    for command in (
        "fit x.npy --codebook-size 8",
        "encode model x.npy",
        "encode model parts --processes 1",
        "rank log.parquet --hidden 4 --epochs 1",
    ):
        for more in ([], ["--resume"]):
            assert run(*command.split(), "-q", "-o", "new", *more) == 2, command
            assert "thesis.txt" in capsys.readouterr().err
    assert Path("new.partial/thesis.txt").read_text(encoding="utf8") == "mine"
    Path("other.partial").symlink_to("new.partial")
    assert run("fit", "x.npy", "--codebook-size", "8", "-q", "-o", "other") == 2


HOLD = """
import sys, time
from semid.output import claim_output
with claim_output(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "command",
    [
        "fit x.npy --codebook-size 8",
        "encode model x.npy",
        "encode model parts --processes 1",
        "refine model x.npy",
        "refresh model x.npy --catalogue ids.parquet",
        "rank log.parquet --hidden 4 --epochs 1",
    ],
)
def test_the_second_run_gets_one_sentence(place, command, capsys):
    with subprocess.Popen([sys.executable, "-c", HOLD, "new"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = contents(place)
        assert run(*command.split(), "-q", "-o", "new") == 2
        error = capsys.readouterr().err
        assert f"process {holder.pid}" in error
        assert len(error.strip().splitlines()) == 1
        assert contents(place) == before
        holder.kill()
    assert run(*command.split(), "-q", "-o", "new") == 0  # the lock ended with its process
    assert not list(place.glob(".new*lock"))


def test_another_thread_is_another_run(tmp_path):
    errors = []

    def second() -> None:
        try:
            with claim_output(tmp_path / "a"):
                pass
        except OutputBusyError as error:
            errors.append(error)

    with claim_output(tmp_path / "a"), claim_output(tmp_path / "a"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1
    with claim_output(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_remote_output_is_held_too(monkeypatch):
    monkeypatch.setattr(runs, "_CLAIM_RENEWAL", 0.05)
    folder = Folder("memory://bucket")
    with claim_output("memory://bucket/ids"):
        (claim,) = folder.names(hidden=True)
        first = json.loads(folder.read(claim) or b"")
        time.sleep(0.3)
        assert json.loads(folder.read(claim) or b"")["time"] > first["time"]
    assert folder.names(hidden=True) == []
    # A live claim of another machine refuses, one that is silent for long does not.
    # Whose clock is ahead does not matter, nor whether this machine has such a process.
    other = {"host": socket.gethostname(), "pid": 2**22 + 1, "time": time.time() + 30}
    folder.write(".ids.claim-aa", json.dumps(other).encode())
    with (
        pytest.raises(OutputBusyError, match="process 4194305"),
        claim_output("memory://bucket/ids"),
    ):
        pass
    assert folder.names(hidden=True) == [".ids.claim-aa"]
    folder.write(".ids.claim-aa", json.dumps({**other, "time": time.time() - 121}).encode())
    with claim_output("memory://bucket/ids"):
        pass
    assert folder.names(hidden=True) == []


def test_nothing_of_a_uri_is_made_on_this_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claim_output("memory://top-level"):
        assert [name[:17] for name in Folder("memory://").names(hidden=True)] == [
            ".top-level.claim-"
        ]
    with pytest.raises(UsageError, match="whole file system"), claim_output("s3://bucket"):
        pass
    for write in (atomic_file, atomic_folder):
        with pytest.raises(UsageError, match="disk only"), write("memory://bucket/output"):
            pass
    with atomic_file(f"file://{tmp_path}/here.txt") as file:
        file.write_text("x", encoding="utf8")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".here.txt.semid", "here.txt"]


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf8")
    (tmp_path / ".new.lock").symlink_to(victim)
    with pytest.raises(OutputExistsError, match="symbolic link"), claim_output(tmp_path / "new"):
        pass
    assert victim.read_text(encoding="utf8") == "precious"


def test_temporary_names_differ(tmp_path):
    names = set()
    for _ in range(3):
        with atomic_file(tmp_path / "a", overwrite=True) as file:
            names.add(file.name)
            file.write_text("x", encoding="utf8")
    assert len(names) == 3
    assert all(str(os.getpid()) not in name for name in names)


class KilledError(BaseException):
    """Stands for the end of the process: nothing is cleaned up in the test's stead."""


@pytest.mark.parametrize("step", range(3))
def test_a_kill_while_a_folder_is_replaced(tmp_path, monkeypatch, step):
    """Where there are two renames, one model is there wherever a kill falls."""
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "version").write_text("old", encoding="utf8")
    monkeypatch.setattr(output, "_exchange", lambda new, target: False)
    rename, remove, count = Path.rename, output.remove_path, iter(range(10))

    def dies(self, to):
        if self.parent == tmp_path and next(count) == step:
            raise KilledError
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", dies)
    monkeypatch.setattr(output, "remove_path", lambda path: None)  # a kill cleans nothing up
    with (
        pytest.raises(KilledError) if step < 2 else pytest.MonkeyPatch.context(),
        atomic_folder(target, overwrite=True) as folder,
    ):
        (folder / "version").write_text("new", encoding="utf8")
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(output, "remove_path", remove)
    with claim_output(target, overwrite=True):  # the next run
        pass
    assert (target / "version").read_text(encoding="utf8") == ("old" if step < 2 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_are_exchanged_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not output._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange two folders in one step")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()


def test_leftovers_of_killed_runs_are_removed(place):
    for name in (".ids2.parquet.0123456789abcdef.tmp", ".ids2.parquet.lock"):
        (place / name).write_bytes(b"left")
    (place / ".mine.tmp").write_bytes(b"mine")
    assert run("encode", "model", "x.npy", "-q", "-o", "ids2.parquet") == 0
    assert sorted(p.name for p in place.glob(".*")) == [".mine.tmp"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_follow_the_umask(place, mask):
    before = os.umask(mask)
    try:
        semid.RQKMeans(levels=1, codebook_size=4).fit(np.load("x.npy")).save("new")
        SemanticIds.read("ids.parquet").write("new.parquet")
    finally:
        os.umask(before)
    for file in [*Path("new").iterdir(), Path("new.parquet")]:
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file


LIMITED = """
import resource, sys
from semid.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "command",
    [
        "fit x.npy --codebook-size 64 -q -o model",
        "rank log.parquet --epochs 1 -q -o model",
        "export ids.parquet --to grid -o model",
        "encode model x.npy -q -o ids.parquet",
    ],
)
def test_a_full_disk(place, command):
    """A limit on the size of files fails as a full disk does, whichever library writes."""
    target = command.split()[-1]
    before = contents(place / target) if (place / target).is_dir() else None
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *command.split(), "--overwrite"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    if "export" in command:
        return
    assert "no space left" in ended.stderr, ended.stderr
    if before is not None:
        assert contents(place / target) == before


def test_a_resume_sees_every_changed_row(place, monkeypatch, clustered):
    """Rows that changed since they were encoded are encoded again, wherever they lie."""
    monkeypatch.setattr("semid.tokenizers.encoding.BLOCK_ROWS", 20)
    monkeypatch.setattr("semid.tokenizers.base.BLOCK_ROWS", 20)
    model = semid.load("model")
    x = clustered[:ROWS].copy()
    write, count = pq.write_table, iter(range(100))

    def dies(*arguments, **options):
        if next(count) == 3:
            raise KilledError
        write(*arguments, **options)

    monkeypatch.setattr("semid.filesystems.pq.write_table", dies)
    with pytest.raises(KilledError):
        encode_to_parquet(model, x, "new.parquet")
    monkeypatch.setattr("semid.filesystems.pq.write_table", write)
    with pytest.raises(OutputExistsError, match="--resume"):
        encode_to_parquet(model, x, "new.parquet")
    x[101] = -x[101]  # in the second of three finished parts, which alone is encoded again
    assert encode_to_parquet(model, x, "new.parquet", resume=True) == ROWS - 160
    assert np.array_equal(SemanticIds.read("new.parquet").codes, model.encode(x).codes)


def test_a_resume_after_the_last_part(place, monkeypatch, clustered):
    """A kill after all parts are written and before they are joined loses nothing."""
    model = semid.load("model")
    publish = PartFolder.publish
    monkeypatch.setattr(PartFolder, "publish", lambda *a, **k: (_ for _ in ()).throw(KilledError))
    with pytest.raises(KilledError):
        encode_to_parquet(model, clustered[:ROWS], "new.parquet")
    monkeypatch.setattr(PartFolder, "publish", publish)
    assert encode_to_parquet(model, clustered[:ROWS], "new.parquet", resume=True) == 0
    expected = model.encode(clustered[:ROWS]).codes
    assert np.array_equal(SemanticIds.read("new.parquet").codes, expected)
    assert not Path("new.parquet.partial").exists()


@pytest.fixture
def inline(monkeypatch) -> None:
    """Workers run in this process."""

    def results(self, units, workers):
        encoder = EncodeWorker(self.job, threads=1)
        return map(encoder.encode, units)

    monkeypatch.setattr(encoding_run._LocalRun, "results", results)


def test_a_resumed_folder_sees_every_changed_row(place, inline, monkeypatch):
    publish = PartFolder.publish
    monkeypatch.setattr(PartFolder, "publish", lambda *a, **k: (_ for _ in ()).throw(KilledError))
    one = LocalOptions(processes=1)
    with pytest.raises(KilledError):
        encode_folder("model", "parts", "new", engine=one)
    monkeypatch.setattr(PartFolder, "publish", publish)
    file = Path("parts/p100.parquet")
    table = pq.read_table(file)
    values = table["embedding"].combine_chunks().flatten().to_numpy().copy()
    values[-24:] *= -1  # the last of a hundred rows; sizes and row groups stay the same
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), 24)
    pq.write_table(table.set_column(1, "embedding", vectors), file)
    done = encode_folder("model", "parts", "new", engine=one, resume=True)
    assert done.encoded == 100
    codes = SemanticIds.read("new").codes
    assert np.array_equal(codes, semid.load("model").encode("parts").codes)


def test_parts_of_another_run_are_not_joined(place, inline, monkeypatch):
    """A part that another run put in the place of ours is noticed before the output appears."""
    publish = PartFolder.publish

    def meddle(self, output, parts, schema, **options):
        name = parts[0].name
        table = pq.read_table(f"new.partial/{name}")
        other = {**table.schema.metadata}
        other[b"semid"] = other[b"semid"].replace(b'"beam_width": 1', b'"beam_width": 2')
        assert other != table.schema.metadata
        pq.write_table(table.replace_schema_metadata(other), f"new.partial/{name}")
        publish(self, output, parts, schema, **options)

    monkeypatch.setattr(PartFolder, "publish", meddle)
    with pytest.raises(ArtefactError, match="not the part that this run wrote"):
        encode_folder("model", "parts", "new", engine=LocalOptions(processes=1))
    assert not Path("new").exists()


@pytest.mark.parametrize("change", ["log", "items"])
def test_a_resumed_ranker_sees_changed_data(place, change, monkeypatch):
    """The key of a run covers the training rows of a stream and the attributes of items."""
    from semid.recommenders.ranking.builder import RankingDataConfig
    from semid.recommenders.ranking.stream import RankingStream
    from semid.recommenders.ranking.training import data_digest

    def opened() -> RankingStream:
        options = RankingDataConfig(label="label>=1")
        return RankingStream.open("log.parquet", items="items.parquet", config=options)

    log = pq.read_table("log.parquet")
    labels = np.arange(len(log)) % 2
    pq.write_table(log.append_column("label", pa.array(labels)), "log.parquet")
    data = opened()
    before = data_digest(data)
    assert data_digest(opened()) == before
    if change == "log":  # two training labels change places: every count stays what it was
        log = pq.read_table("log.parquet")
        train = np.flatnonzero(data.log.batch(log).parts == 0)
        one, other = (train[labels[train] == label][0] for label in (1, 0))
        labels[one], labels[other] = 0, 1
        at = log.column_names.index("label")
        pq.write_table(log.set_column(at, "label", pa.array(labels)), "log.parquet")
    else:
        items = pq.read_table("items.parquet")
        brands = items["brand"].to_pylist()
        brands[0], brands[1] = brands[1], brands[0]
        at = items.column_names.index("brand")
        pq.write_table(items.set_column(at, "brand", pa.array(brands)), "items.parquet")
    assert data_digest(opened()) != before


def test_a_bundle_loses_the_leftovers_of_killed_writers(place):
    ids = SemanticIds.read("ids.parquet")
    bundle = CatalogueBundle.create("pub", ids.take(np.arange(100)))
    orphan = Path("pub/parts/part-000002-0123456789ab.parquet")
    orphan.write_bytes(b"half")
    Path("pub/parts/.part-000002-0123456789ab.parquet.0123456789abcdef.tmp").write_bytes(b"half")
    Path("pub/.manifest-000002.json.0123456789abcdef.tmp").write_bytes(b"half")
    assert bundle.append(ids.take(np.arange(200))) == 2
    assert len(list(Path("pub/parts").iterdir())) == 2
    assert sorted(p.name for p in Path("pub").iterdir()) == [
        "manifest-000001.json",
        "manifest-000002.json",
        "parts",
    ]
    assert len(bundle.read(2)) == 200


def test_a_bundle_appears_whole(place, monkeypatch):
    """A kill while a bundle is begun leaves nothing that the same call would trip over."""
    ids = SemanticIds.read("ids.parquet")
    write = bundle_module._write_manifest
    monkeypatch.setattr(
        bundle_module, "_write_manifest", lambda *a: (_ for _ in ()).throw(KilledError)
    )
    monkeypatch.setattr(bundle_module, "remove_path", lambda path: None)
    with pytest.raises(KilledError):
        CatalogueBundle.create("pub", ids)
    assert not Path("pub").exists()
    monkeypatch.setattr(bundle_module, "_write_manifest", write)
    assert len(CatalogueBundle.create("pub", ids).read()) == ROWS
    assert not list(place.glob(".pub*"))


def test_the_name_of_a_recipe_is_no_input(place):
    check_output(place / "rqvae", inputs=["rqvae", "no-such-file.parquet:item_id"])
    (place / "no-such-file.parquet").touch()
    with pytest.raises(UsageError, match="is the input"):
        check_output(
            place / "no-such-file.parquet", overwrite=True, inputs=["no-such-file.parquet:item_id"]
        )


def test_ids_with_a_column_of_the_users_own(place):
    table = pq.read_table("ids.parquet").append_column("price", pa.array(np.arange(ROWS)))
    pq.write_table(table, "mine.parquet")  # keeps the schema's metadata
    with pytest.raises(OutputExistsError, match="not written by semid"):
        check_output("mine.parquet", overwrite=True)
    check_output("ids.parquet", overwrite=True)


def test_novelty_beside_the_output(place, capsys):
    arguments = ["encode", "model", "x.npy", "--catalogue", "ids.parquet", "-q"]
    assert run(*arguments, "-o", "a.parquet", "--novelty", "a.parquet") == 2
    assert "--novelty" in capsys.readouterr().err


def test_errors_are_errors_of_semid():
    assert issubclass(OutputBusyError, OutputExistsError)
    assert OutputBusyError.exit_code == 2
    assert issubclass(UsageError, SemidError)
