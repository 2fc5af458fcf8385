"""Fit and encode from and to other file systems."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from distributed_cases import write_folder
from semid.data.items import load_ids
from semid.errors import UsageError
from semid.filesystems import Folder, list_files, resolve


@pytest.fixture(scope="module")
def folder(clustered, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("remote") / "items", clustered)


def send(folder: Path, uri: str) -> str:
    target = Folder(uri)
    for file in folder.iterdir():
        target.write(file.name, file.read_bytes())
    target.write("_SUCCESS", b"")
    return uri


def check_whole_way(base: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Fit and encode with every path elsewhere; nothing differs from the same on this disk."""
    monkeypatch.chdir(tmp_path)
    items = send(folder, f"{base}/items")
    options = ["--levels", "2", "--codebook-size", "16", "-q"]
    assert run("fit", items, "-o", f"{base}/model", *options) == 0
    here = semid.RQKMeans(levels=2, codebook_size=16).fit(folder)
    there = semid.load(f"{base}/model")
    assert there.weights_fingerprint == here.weights_fingerprint
    assert list(tmp_path.iterdir()) == []  # the state of the run is gone
    assert run("fit", items, "-o", f"{base}/model", *options) == 2
    expected = here.encode(folder).to_arrow()
    assert semid.open_embeddings(f"{items}/part-[01].parquet").describe()["files"] == 2
    if not base.startswith("memory"):  # other processes do not see this one's memory
        for output in (f"{base}/ids", f"{base}/ids.parquet"):
            assert run("encode", f"{base}/model", items, "-o", output, "--processes", 1, "-q") == 0
            system, inner = resolve(output)
            assert pq.read_table(inner, filesystem=system).equals(expected)
            assert run("encode", f"{base}/model", items, "-o", output, "-q") == 2
    assert run("encode", f"{base}/model", items, "-o", tmp_path / "ids.parquet", "-q") == 0
    assert pq.read_table(tmp_path / "ids.parquet").equals(expected)


def test_file_uris(folder, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    check_whole_way(f"file://{tmp_path}/store", folder, work, monkeypatch)


def test_ids_and_interactions_behind_a_uri(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = send(folder, "memory://semid-ids/items")
    ids = load_ids(folder)
    assert load_ids(items) == ids
    assert load_ids(f"{items}/*.parquet:item_id") == ids
    log = pa.table({"user_id": ["u", "u"], "item_id": ["a", "b"], "position": [0, 1]})
    Folder("memory://semid-ids/log").write_table("log.parquet", log)
    assert len(semid.read_interactions("memory://semid-ids/log")) == 2
    assert list(tmp_path.iterdir()) == []
    Folder("memory://semid-ids").remove()


def test_a_file_system_in_memory(folder, tmp_path, monkeypatch):
    check_whole_way("memory://semid-test", folder, tmp_path, monkeypatch)
    Folder("memory://semid-test").remove()


@pytest.fixture
def s3(monkeypatch) -> Iterator[str]:
    """Start a real S3 server on the loopback device and make a bucket in it."""
    server_of = pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    request = urllib.request.Request(f"{endpoint}/shop", method="PUT")
    with urllib.request.urlopen(request) as made:
        assert made.status == 200
    yield "s3://shop"
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_real_s3_server(folder, tmp_path, monkeypatch, s3, capsys):
    check_whole_way(f"{s3}/catalogue", folder, tmp_path, monkeypatch)
    items, model = f"{s3}/catalogue/items", f"{s3}/catalogue/model"
    assert run("report", model, items, "-o", f"{s3}/report.json", "-q") == 0
    assert Folder(s3).exists_file("report.json")
    # A bucket that is not there is named before any work.
    capsys.readouterr()
    for words in (
        ("fit", items, "-o", "s3://nobody/model"),
        ("encode", model, items, "-o", "s3://nobody/ids.parquet"),
        ("report", model, items, "-o", "s3://nobody/report.json"),
    ):
        assert run(*words, "-q") == 2
        assert "'s3://nobody/" in (said := capsys.readouterr().err)
        assert "bucket or folder exists" in said
        assert "allow_bucket_creation" not in said
    assert run("encode", f"{s3}/none", items, "-o", "others.parquet", "-q") == 2
    assert f"'{s3}/none' does not exist" in capsys.readouterr().err


# Every command and every path of it; {b} is the file system, {e} embeddings and {t} a log here.
CALLS = {
    "fit": "{e} --ids {b}/cat/items.parquet -o {b}/model --levels 2 --codebook-size 16",
    "encode": "{b}/model {e} --ids {b}/cat/items.parquet -o {ids}",
    "report": "{b}/model {e} --ids {b}/cat/items.parquet -o {b}/report.json",
    "refine": "{b}/model {e} --ids {b}/cat/items.parquet -o {b}/refined",
    "compare": "{b}/model {b}/refined {e} --ids {b}/cat/items.parquet -o {b}/compare.json",
    "unique": "{b}/ids.parquet --method reassign --model {b}/model --embeddings {e} --ids {b}/cat/"
    "items.parquet -o {b}/unique.parquet",
    "drift": "{b}/model {e} {e} --ids {b}/cat/items.parquet -o {b}/drift.json",
    "refresh": "{b}/model {e} --ids {b}/cat/items.parquet -o {b}/refreshed "
    "--catalogue {here}/bundle",
    "compact": "{b}/ids.parquet -o {b}/bundle",
    "rank": "{b}/cat/interactions.parquet --items {b}/cat/items.parquet --ids {b}/unique.parquet "
    "--epochs 1 -o {b}/ranker --analyze {b}/codes.json",
    "retrieve": "{b}/cat/interactions.parquet --ids {b}/unique.parquet --epochs 1 --width 8 "
    "--items {b}/cat/items.parquet --report {b}/retrieve.html -o {b}/retriever",
    "recommend": "{b}/retriever --histories {b}/cat/interactions.parquet -o {b}/best.parquet",
    "audit": "{b}/unique.parquet -o {b}/audit.html",
    "check": "{b}/ids.parquet {b}/ids.parquet --thresholds {b}/limits.toml",
    "export": "{b}/unique.parquet --to lcrec --model {b}/model -o {b}/lcrec.json",
    "import": "{b}/lcrec.json --from lcrec --model {b}/model -o {b}/back.parquet",
    "demo": "--items 300 -o {b}/demo",
    "advise": "{e} --ids {b}/cat/items.parquet",
    "embed": "{b}/cat/items.parquet --model encoder -o {b}/x.parquet",
    "prepare": "{b}/reviews -o {b}/prepared",
}
STAYS = {
    "serve": "{b}/bundle --model {b}/model",
    "rank-grid": "{b}/cat/interactions.parquet --embeddings {e} --ids {b}/ids.parquet "
    "--methods none,ids -o {b}/grid",
    "reproduce": "drq --quick --output {b}/results",
}


def test_every_command_reads_and_writes_uris(tmp_path, monkeypatch, capsys):
    from semid.cli.app import _COMMANDS

    assert {name for name, _, _ in _COMMANDS} == {*CALLS, *STAYS}
    base = "memory://semid-commands"
    files = semid.SyntheticCatalogue(items=300, users=60, seed=0).write(tmp_path / "cat")
    for file in (tmp_path / "cat").iterdir():
        Folder(f"{base}/cat").write(file.name, file.read_bytes())
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    names = {"b": base, "e": files.embeddings, "ids": tmp_path / "ids.parquet", "here": tmp_path}
    for command, text in CALLS.items():
        if command in ("advise", "demo", "embed", "prepare"):  # long, or of files of others
            continue
        if command == "refresh":
            ids = semid.SemanticIds.read(tmp_path / "ids.parquet")
            semid.CatalogueBundle.create(tmp_path / "bundle", ids)
        assert run(command, *text.format(**names).split()) == 0
        assert list(work.iterdir()) == [], command
        if command == "encode":
            Folder(base).write("ids.parquet", (tmp_path / "ids.parquet").read_bytes())
            Folder(base).write("limits.toml", b"churn = 0.1")
    shown = capsys.readouterr()
    # Nobody is told of the places on this machine.
    assert f"report: {base}/report.json" in shown.out
    assert ".semid-" not in shown.out + shown.err
    # What was written there is what would have been written here.
    local = tmp_path / "unique.parquet"
    given = CALLS["unique"].format(**names).replace(f"{base}/unique.parquet", str(local))
    assert run("unique", *given.split(), "-q") == 0
    assert Folder(base).read("unique.parquet") == local.read_bytes()
    assert semid.load(f"{base}/retriever").recommend([], k=3).items
    assert sorted(Folder(f"{base}/bundle").names())[0] == "manifest-000001.json"
    back = pq.read_table(resolve(f"{base}/back.parquet")[1], filesystem=resolve(base)[0])
    assert back["codes"].equals(pq.read_table(local)["codes"])
    # An output that is there is refused, replaced if asked for, and never by what is no semid's.
    again = CALLS["export"].format(**names).split()
    assert run("export", *again) == 2
    assert run("export", *again, "--overwrite") == 0
    Folder(base).write("mine.json", b"{}")
    given = [word.replace("lcrec.json", "mine.json") for word in again]
    assert run("export", *given, "--overwrite") == 2
    assert Folder(base).read("mine.json") == b"{}"
    for command, text in STAYS.items():
        assert run(command, *text.format(**names).split()) == 2
        assert "give a path on this machine" in capsys.readouterr().err
    assert run("report", f"{base}/none", files.embeddings, "-o", f"{base}/r.json", "-q") == 2
    assert f"'{base}/none' does not exist" in capsys.readouterr().err
    assert list(work.iterdir()) == []
    Folder(base).remove()


def test_a_run_that_was_stopped_continues_towards_a_uri(tmp_path, monkeypatch):
    from semid.cli.staging import place, release

    monkeypatch.chdir(tmp_path)
    base = "memory://semid-stopped"
    files = semid.SyntheticCatalogue(items=100, users=60, seed=0).write(tmp_path / "cat")
    given = [files.interactions, "--model", "sasrec", "--epochs", "2", "--width", "8"]
    assert run("retrieve", *given, "-o", tmp_path / "whole", "-q") == 0
    place_here = place(f"{base}/retriever")
    release()
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    from semid.recommenders.retrieval.training import RetrievalTask

    evaluate = RetrievalTask.evaluate
    monkeypatch.setattr(RetrievalTask, "evaluate", stop)
    assert run("retrieve", *given, "-o", f"{base}/retriever", "-q") == 130
    monkeypatch.setattr(RetrievalTask, "evaluate", evaluate)
    assert place_here.with_name("retriever.partial").exists()
    assert run("retrieve", *given, "-o", f"{base}/retriever", "--resume", "-q") == 0
    one, two = semid.load(tmp_path / "whole"), semid.load(f"{base}/retriever")
    for name, weight in one.network.state_dict().items():
        assert weight.equal(two.network.state_dict()[name])
    assert not place_here.parent.exists()
    Folder(base).remove()


def test_what_cannot_be_opened_is_explained(tmp_path):
    with pytest.raises(UsageError, match=r"'memory://nothing/here' does not exist"):
        list_files("memory://nothing/here")
    with pytest.raises(UsageError, match="cannot be opened"):
        semid.open_embeddings("nosuchscheme://bucket/items")
    with pytest.raises(UsageError, match="must lie on this machine"):
        semid.open_embeddings("memory://bucket/x.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no files"):
        list_files(f"file://{tmp_path}/empty")


def test_a_stream_that_fails_leaves_nothing(tmp_path):
    folder = Folder(tmp_path / "out")
    with pytest.raises(RuntimeError), folder.stream("a.parquet") as sink:
        sink.write(b"half")
        raise RuntimeError
    assert folder.names() == []
    assert list((tmp_path / "out").iterdir()) == []
