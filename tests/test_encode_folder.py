"""Encoding folders with several processes: the same file, whoever encodes which row group."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from distributed_cases import rows_array, write_folder
from semid.distributed import encode_folder as encoding_run
from semid.distributed.encode_folder import (
    EncodeJob,
    EncodeWorker,
    LocalOptions,
    encode_folder,
    encode_key,
)
from semid.distributed.units import Catalogue
from semid.errors import (
    ArtefactError,
    EmbeddingError,
    IdsError,
    InputError,
    OutputExistsError,
    UsageError,
)
from semid.filesystems import Folder
from semid.tokenizers.encoding import PartFolder
from semid.tokenizers.factory import make_tokenizer

ONE = LocalOptions(processes=1)
SOURCE = Path(semid.__file__).parents[1]


@pytest.fixture(scope="module")
def model(clustered, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    semid.RQKMeans(levels=2, codebook_size=16).fit(clustered).save(path)
    return path


@pytest.fixture
def folder(clustered, tmp_path) -> Path:
    return write_folder(tmp_path / "items", clustered)


class Inline:
    """A pool that works in this process: what a unit does, without the price of a start."""

    def __init__(self, workers, *, mp_context, initializer, initargs):
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *ended):
        return None

    def submit(self, work, *given):
        from concurrent.futures import Future

        future: Future[object] = Future()
        try:
            future.set_result(work(*given))
        except Exception as error:  # noqa: BLE001 - as a pool does
            future.set_exception(error)
        return future


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(encoding_run, "ProcessPoolExecutor", Inline)


def same_as_local(model: Path, source: Path, output: Path) -> None:
    """Check table and metadata against what one process writes in one go."""
    expected = semid.load(model).encode(source)
    assert pq.read_table(output).equals(expected.to_arrow())
    file = output if output.is_file() else sorted(output.glob("*.parquet"))[0]
    assert pq.read_schema(file).equals(expected.to_arrow().schema, check_metadata=True)


def test_two_processes_write_what_one_writes(model, folder, tmp_path):
    done = encode_folder(
        model, folder, tmp_path / "ids", engine=LocalOptions(processes=2), unit_rows=200
    )
    assert done.rows == done.encoded == sum(done.by_process.values()) == 1200
    assert os.getpid() not in done.by_process
    same_as_local(model, folder, tmp_path / "ids")
    assert not (tmp_path / "ids.partial").exists()


@pytest.mark.parametrize("unit_rows", [1, 150, 10_000])
@pytest.mark.parametrize("output", ["ids", "ids.parquet"])
def test_units_change_nothing(model, folder, tmp_path, inline, unit_rows, output):
    encode_folder(model, folder, tmp_path / output, engine=ONE, unit_rows=unit_rows)
    same_as_local(model, folder, tmp_path / output)
    files = (
        [tmp_path / output] if output.endswith("t") else list((tmp_path / "ids").glob("*.parquet"))
    )
    units = {1: 13, 150: 7, 10_000: 3}[unit_rows]
    assert len(files) == (1 if output.endswith("t") else units)


def test_row_numbers_go_on_from_file_to_file(model, clustered, tmp_path, inline):
    source = write_folder(tmp_path / "items", clustered, ids=False)
    encode_folder(model, source, tmp_path / "ids", engine=ONE, unit_rows=150)
    same_as_local(model, source, tmp_path / "ids")
    assert pq.read_table(tmp_path / "ids")["item_id"].to_pylist() == list(range(1200))


SMALL = {"hidden": [16], "latent": 8, "pretrain_epochs": 0}
TOKENIZERS = {
    "rqpvae": lambda: semid.RQPVAE(
        levels=2, codebook_size=8, network=SMALL, training={"epochs": 1, "batch_size": 256}
    ),
    "opq": lambda: semid.OPQ(n_codebooks=5, codebook_size=8, rotation_iter=2),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_tokenizers_encode_the_same_in_units(kind, clustered, folder, tmp_path, inline):
    TOKENIZERS[kind]().fit(clustered).save(tmp_path / kind)
    encode_folder(tmp_path / kind, folder, tmp_path / "ids", engine=ONE, unit_rows=150)
    assert len(list((tmp_path / "ids").glob("*.parquet"))) == 7
    same_as_local(tmp_path / kind, folder, tmp_path / "ids")


class KilledError(Exception):
    pass


def test_a_driver_that_was_killed_goes_on(model, folder, tmp_path, inline, monkeypatch):
    encoded: list[str] = []
    real = EncodeWorker.encode

    def dies(self, unit):
        if len(encoded) == 3:
            raise KilledError
        encoded.append(unit.name)
        return real(self, unit)

    monkeypatch.setattr(EncodeWorker, "encode", dies)
    with pytest.raises(KilledError):
        encode_folder(model, folder, tmp_path / "ids", engine=ONE, unit_rows=150)
    assert not (tmp_path / "ids").exists()
    # A write that the kill cut short leaves a hidden file, which is no part.
    (tmp_path / "ids.partial" / ".part-000002-000000.parquet.1.tmp").write_bytes(b"half")
    with pytest.raises(OutputExistsError, match="--resume"):
        encode_folder(model, folder, tmp_path / "ids", engine=ONE, unit_rows=150)
    before = list(encoded)
    monkeypatch.setattr(
        EncodeWorker, "encode", lambda s, u: (encoded.append(u.name), real(s, u))[1]
    )
    done = encode_folder(model, folder, tmp_path / "ids", engine=ONE, unit_rows=150, resume=True)
    assert set(before) <= set(encoded[3:])  # read again, but not encoded again
    assert 0 < done.encoded < done.rows == 1200
    same_as_local(model, folder, tmp_path / "ids")


def test_units_have_the_width_and_the_id_type_of_all_files(model, clustered, tmp_path, inline):
    rows = clustered.tolist()
    # The first unit begins with rows of another width, and has them alone.
    for row in range(100):
        rows[row] = [] if row % 2 else rows[row][:3]
    ids = pa.array([f"i{row}" for row in range(len(rows))])
    folder = tmp_path / "items"
    folder.mkdir()
    for number, (a, b) in enumerate([(0, 100), (100, 700), (700, 1200)]):
        names = ids[a:b].dictionary_encode() if number == 1 else ids[a:b]
        column = pa.array(rows[a:b], pa.list_(pa.float32()))
        table = pa.table({"item_id": names, "embedding": column})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=300)
    catalogue = Catalogue.open(folder)
    assert catalogue.dim == clustered.shape[1]
    assert catalogue.id_type == pa.large_string()
    for unit in catalogue.units(rows=1):
        source = catalogue.source([unit])
        assert (source.dim, source.ids.to_arrow().type) == (catalogue.dim, pa.large_string())
    encode_folder(model, folder, tmp_path / "ids", engine=ONE, on_invalid="skip")
    written = semid.SemanticIds.read(tmp_path / "ids")
    tokenizer = semid.load(model)
    expected = tokenizer.encode(semid.open_embeddings(folder, on_invalid="skip"))
    assert written.items == expected.items
    np.testing.assert_array_equal(written.codes, expected.codes)
    with pytest.raises(EmbeddingError, match="100 rows with another width than 24"):
        encode_folder(model, folder, tmp_path / "other", engine=ONE)


def test_a_resume_with_another_model_is_refused(model, folder, clustered, tmp_path, inline):
    info = semid.load(model).codes_info()
    catalogue = Catalogue.open(folder)
    parts = PartFolder(tmp_path / "ids.partial", info, encode_key(info, catalogue))
    parts.begin(resume=False)
    other = tmp_path / "other"
    semid.RQKMeans(levels=2, codebook_size=16, seed=9).fit(clustered).save(other)
    with pytest.raises(ArtefactError, match="another model"):
        encode_folder(other, folder, tmp_path / "ids", engine=ONE, resume=True)
    job = EncodeJob(other, catalogue, tmp_path / "ids.partial", info, "key")
    with pytest.raises(ArtefactError, match="has changed"):
        EncodeWorker(job)


def kills_itself_once(unit):
    """Encode a unit; the first process to come by ends as the out-of-memory killer ends one."""
    marker = Path(os.environ["SEMID_TEST_MARKER"])
    if unit.groups[0] > 0 and not marker.exists():
        marker.write_text("killed", encoding="utf8")
        os.kill(os.getpid(), signal.SIGKILL)
    assert encoding_run._WORKER is not None
    return encoding_run._WORKER.encode(unit)


def test_a_killed_process_costs_no_row(model, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMID_TEST_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{SOURCE}")
    monkeypatch.setattr(encoding_run, "_encode", kills_itself_once)
    done = encode_folder(model, folder, tmp_path / "ids", engine=ONE, unit_rows=150)
    assert (tmp_path / "marker").exists()
    assert done.lost == 1
    assert done.rows == 1200
    same_as_local(model, folder, tmp_path / "ids")


def test_processes_that_end_again_and_again_end_the_run(model, folder, tmp_path, monkeypatch):
    class Broken(Inline):
        def submit(self, work, *given):
            raise encoding_run.BrokenProcessPool("ended")

    monkeypatch.setattr(encoding_run, "ProcessPoolExecutor", Broken)
    with pytest.raises(InputError, match=r"4 times, 3 units are left.*--resume"):
        encode_folder(model, folder, tmp_path / "ids", engine=ONE)


def test_repeated_ids_are_found_among_units(model, clustered, tmp_path, inline):
    names = [f"i{row}" for row in range(1200)]
    names[-1] = "i0"
    source = write_folder(tmp_path / "items", clustered, names=names)
    with pytest.raises(IdsError, match="1 item ids stand in more than one place"):
        encode_folder(model, source, tmp_path / "ids", engine=ONE, unit_rows=150)


def test_bad_rows_are_refused_or_skipped(model, clustered, tmp_path, inline):
    bad = clustered.copy()
    bad[[5, 700]] = np.nan
    source = write_folder(tmp_path / "items", bad)
    with pytest.raises(EmbeddingError, match="NaN"):
        encode_folder(model, source, tmp_path / "ids", engine=ONE, unit_rows=150)
    assert not (tmp_path / "ids.partial").exists()
    done = encode_folder(
        model, source, tmp_path / "ids", engine=ONE, unit_rows=150, on_invalid="skip"
    )
    assert done.rows == 1198
    kept = semid.open_embeddings(source, on_invalid="skip")
    assert pq.read_table(tmp_path / "ids").equals(semid.load(model).encode(kept).to_arrow())
    with pytest.raises(UsageError, match="neither"):
        encode_folder(model, source, tmp_path / "x", engine=ONE, on_invalid="drop")


def test_the_estimate_explains_the_choice(model, folder, tmp_path, inline):
    said: list[str] = []
    done = encode_folder(model, folder, tmp_path / "ids", engine=ONE, announce=said.append)
    assert done.estimate is not None
    assert said == [done.estimate.sentence]
    assert "1,200 rows" in said[0]
    assert "--engine ray pays when more machines share the work" in said[0]
    assert done.estimate.seconds("ray", 1) > done.estimate.seconds("local", 1)
    assert done.estimate.seconds("ray", 64) < done.estimate.seconds("ray", 1)


def test_what_cannot_be_shared_is_refused(model, clustered, folder, tmp_path):
    np.save(tmp_path / "x.npy", clustered)
    with pytest.raises(UsageError, match=r"is an \.npy"):
        encode_folder(model, tmp_path / "x.npy", tmp_path / "ids")
    pq.write_table(
        pa.table({"embedding": rows_array(clustered[:5]), "item_id": [1, 2, 3, 4, 5]}),
        folder / "part-9.parquet",
    )
    with pytest.raises(UsageError, match="several types"):
        encode_folder(model, folder, tmp_path / "ids")


def test_files_in_this_processs_memory_are_refused_to_others(model, folder):
    memory = Folder("memory://semid-units")
    memory.write("a.parquet", (folder / "part-0.parquet").read_bytes())
    with pytest.raises(UsageError, match="this process's memory"):
        encode_folder(model, "memory://semid-units", "memory://semid-ids")
    memory.remove()


def test_the_command_line_shares_a_folder_out(model, folder, tmp_path, inline, capsys):
    assert run("encode", model, folder, "-o", tmp_path / "ids", "-q") == 0
    said = capsys.readouterr()
    assert "encoded 1,200 of 1,200 items" in said.out
    assert "one worker encodes about" in said.err
    same_as_local(model, folder, tmp_path / "ids")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "spark"], "--engine='spark'"),
        (["--workers", "2"], "--workers go with --engine ray"),
        (
            ["--store-bytes", "1", "--cpus-per-worker", "2"],
            "--cpus-per-worker and --store-bytes go",
        ),
        (["--engine", "ray", "--processes", "2"], "--processes and --threads"),
        (["--processes", "2", "--ids", "x.csv"], "--catalogue and --ids"),
        (["--processes", "2", "--novelty", "n.parquet"], "--novelty would change nothing"),
    ],
)
def test_flags_that_do_not_go_together(model, folder, tmp_path, flags, message, capsys):
    assert run("encode", model, folder, "-o", tmp_path / "ids", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_of_another_package_encodes_in_processes(
    clustered, folder, tmp_path, monkeypatch
):
    """Workers find it by its entry point, as this process does."""
    package = tmp_path / "package"
    info = package / "outside_tokenizer-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "outside_tokenizer.py").write_text(
        "from semid.tokenizers.rqkmeans import RQKMeans\n"
        "class Outside(RQKMeans):\n    kind = 'outside'\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-tokenizer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[semid.tokenizers]\noutside = outside_tokenizer:Outside\n"
    )
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("PYTHONPATH", f"{package}{os.pathsep}{SOURCE}")
    make_tokenizer("outside", {"levels": 2, "codebook_size": 8}).fit(clustered).save(
        tmp_path / "outside"
    )
    done = encode_folder(tmp_path / "outside", folder, tmp_path / "ids", engine=ONE)
    assert done.rows == len(clustered)
    same_as_local(tmp_path / "outside", folder, tmp_path / "ids")
