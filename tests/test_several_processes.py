"""torchrun, Ray Train and killed drivers: the real programs, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from distributed_cases import many_rows, write_folder
from semid.quantization.kmeans import KMeansOptions

pytestmark = pytest.mark.slow  # every process imports torch anew

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
NETWORK = {
    "codebook_size": 16,
    "network": {"hidden": [32], "latent": 8, "pretrain_epochs": 1},
    "training": {"epochs": 2, "batch_size": 128, "precision": "fp32"},
    "ema_decay": 0.8,
    "revive_below": 0.8,
}

SCRIPT = """
import hashlib, json, os, sys
import numpy as np
import semid
from semid.quantization.kmeans import KMeansOptions

folder, rank, world = sys.argv[1], os.environ["RANK"], os.environ["WORLD_SIZE"]
x, small = np.load(folder + "/x.npy"), np.load(folder + "/small.npy")
found = {}
for name, options in json.load(open(folder + "/fits.json")).items():
    options["kmeans"] = KMeansOptions(**options["kmeans"])
    tokenizer = getattr(semid, options.pop("kind", "RQKMeans"))(threads=1, **options).fit(x)
    found[name] = [tokenizer.weights_fingerprint, tokenizer.report.details]
for name in ("rqkmeans", "rqpvae"):
    codes = semid.load(f"{folder}/{name}").encode(small).codes
    found["codes of " + name] = hashlib.sha256(codes.tobytes()).hexdigest()
network = json.load(open(folder + "/network.json"))
if world == "2":
    found["network"] = semid.RQPVAE(**network, threads=1).fit(small).weights_fingerprint
json.dump(found, open(f"{folder}/found{world}_{rank}.json", "w"))
"""

FITS = {
    "plain": {"levels": 2, "codebook_size": 6, "kmeans": {"max_iter": 2}},
    "centered": {"levels": 1, "codebook_size": 5, "center": True, "kmeans": {"max_iter": 1}},
    "sample": {
        "levels": 2,
        "codebook_size": 6,
        "kmeans": {"max_iter": 1, "sample_per_code": 500},
    },
    "rotated": {
        "kind": "OPQ",
        "n_codebooks": 3,
        "codebook_size": 6,
        "center": True,
        "rotation_iter": 1,
        "kmeans": {"max_iter": 1},
    },
    "mixture": {
        "kind": "RQGMM",
        "levels": 2,
        "codebook_size": 6,
        "max_em_iter": 2,
        "kmeans": {"max_iter": 1},
    },
}


def environment(**more: str) -> dict[str, str]:
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **one, **LOOPBACK, **more}


def torchrun(ranks: int, *arguments: str) -> list[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return [sys.executable, *launch, *arguments]


def test_torchrun_and_ray_train_end_with_one_machines_bits(tmp_path, clustered):
    import hashlib

    rows = many_rows()
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "small.npy", clustered)
    (tmp_path / "fits.json").write_text(json.dumps(FITS), encoding="utf8")
    (tmp_path / "network.json").write_text(json.dumps(NETWORK), encoding="utf8")
    (tmp_path / "fit.py").write_text(SCRIPT, encoding="utf8")
    expected: dict[str, object] = {}
    for name, options in FITS.items():
        chosen = {**options, "kmeans": KMeansOptions(**options["kmeans"])}
        kind = getattr(semid, chosen.pop("kind", "RQKMeans"))
        tokenizer = kind(threads=1, **chosen).fit(rows)
        expected[name] = [tokenizer.weights_fingerprint, tokenizer.report.details]
    for kind in (semid.RQKMeans(codebook_size=16), semid.RQPVAE(**NETWORK)):
        kind.fit(clustered).save(tmp_path / kind.kind)
        codes = kind.encode(clustered).codes
        expected["codes of " + kind.kind] = hashlib.sha256(codes.tobytes()).hexdigest()
    for ranks in (1, 2):
        finished = subprocess.run(
            torchrun(ranks, str(tmp_path / "fit.py"), str(tmp_path)),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=900,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        for rank in range(ranks):
            text = (tmp_path / f"found{ranks}_{rank}.json").read_text(encoding="utf8")
            found = json.loads(text)
            network = found.pop("network", None)
            assert found == json.loads(json.dumps(expected))
    # The loop is one: two processes of Ray Train end with the weights of two of torchrun.
    pytest.importorskip("ray")
    (tmp_path / "network.toml").write_text(
        'tokenizer = "rqpvae"\ncodebook_size = 16\nema_decay = 0.8\nrevive_below = 0.8\n'
        "[network]\nhidden = [32]\nlatent = 8\npretrain_epochs = 1\n"
        '[training]\nepochs = 2\nbatch_size = 128\nprecision = "fp32"\n',
        encoding="utf8",
    )
    done = subprocess.run(
        semid_command(
            *("fit", tmp_path / "small.npy", "--recipe", tmp_path / "network.toml"),
            *("-o", tmp_path / "trained", "--engine", "ray", "--workers", 2, "-q"),
        ),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert semid.load(tmp_path / "trained").weights_fingerprint == network
    assert not (tmp_path / "trained.partial").exists()


def semid_command(*arguments: object) -> list[str]:
    start = "from semid.cli import main; main()"
    return [sys.executable, "-c", start, *[str(argument) for argument in arguments]]


def wait_until(ready, process: subprocess.Popen[bytes]) -> None:
    for _ in range(120_000):
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"the run ended by itself: {process.stderr.read().decode()[-3000:]}")
        if ready():
            return
        time.sleep(0.005)
    pytest.fail("the run did not get there")


def kill_when(ready, command: list[str], *, victim=None) -> None:
    """Start a program, wait, kill it (or the process ``victim`` names) and wait for its end."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_until(ready, process)
    os.kill(process.pid if victim is None else victim(process), signal.SIGKILL)
    process.communicate(timeout=300)


def rank_of(process: subprocess.Popen[bytes]) -> int:
    """Return the process id of the second rank that torchrun started."""
    ranks = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == process.pid:
                ranks.append(int(entry.name))
    return max(ranks)


@pytest.mark.parametrize("engine", ["torchrun", "ray"])
def test_a_fit_killed_in_the_middle_is_continued(engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    items = write_folder(tmp_path / "items", many_rows(), row_group=30_000)
    options = ["--levels", 2, "--codebook-size", 6, "--max-iter", 12, "--tol", 0, "-q"]
    target = tmp_path / "killed"
    arguments = ["fit", items, *options, "-o", target]
    if engine == "ray":
        command = semid_command(*arguments, "--engine", "ray", "--workers", 2)
    else:
        start = tmp_path / "semid_main.py"
        start.write_text("from semid.cli import main\nmain()\n", encoding="utf8")
        command = torchrun(2, str(start), *[str(argument) for argument in arguments])
    state = tmp_path / "killed.partial" / "state.safetensors"
    seen: set[int] = set()

    def saved() -> bool:
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        return len(seen) > 3

    kill_when(saved, command, victim=rank_of if engine == "torchrun" else None)
    assert state.exists()
    assert not target.exists()
    subprocess.run([*command, "--resume"], env=environment(), check=True, timeout=600)
    assert run("fit", items, *options, "-o", tmp_path / "whole") == 0
    killed, whole = semid.load(target), semid.load(tmp_path / "whole")
    assert killed.weights_fingerprint == whole.weights_fingerprint
    assert killed.report.details == whole.report.details
    assert not state.parent.exists()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_encode_whose_driver_is_killed_is_continued(engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    rows = np.tile(many_rows(), (10, 1))
    items = write_folder(tmp_path / "items", rows, row_group=300_000, files=8, ids=False)
    tokenizer = semid.RQKMeans(levels=3, codebook_size=64, kmeans={"max_iter": 1})
    tokenizer.fit(rows[:5000]).save(tmp_path / "model")
    target = tmp_path / "ids"
    share = ["--engine", "ray", "--workers", 1] if engine == "ray" else ["--processes", 1]
    arguments = ["encode", tmp_path / "model", items, "-o", target, "-q", *share]
    parts = tmp_path / "ids.partial"
    # A part counts once its signature is there, which stays behind when parts are published.
    kill_when(lambda: len(list(parts.glob("*.parquet.json"))) >= 2, semid_command(*arguments))
    finished = [file.with_suffix("") for file in parts.glob("*.parquet.json")]
    left = {file.name: file.stat().st_mtime_ns for file in finished}
    assert not target.exists()
    resumed = subprocess.run(
        semid_command(*arguments, "--resume"),
        env=environment(),
        check=True,
        timeout=600,
        capture_output=True,
        text=True,
    )
    # What the first run had written was not written again.
    assert f"of {len(rows):,} items" in resumed.stdout
    for name, written in left.items():
        assert (target / name).stat().st_mtime_ns == written
    assert pq.read_table(target).equals(tokenizer.encode(items).to_arrow())


@pytest.mark.filterwarnings("ignore")
def test_a_ray_dataset_is_encoded(tmp_path, clustered):
    ray = pytest.importorskip("ray")
    from semid.distributed.arrow import encode_dataset
    from semid.distributed.ray_workers import RayOptions
    from semid.errors import UsageError

    items = write_folder(tmp_path / "items", clustered)
    tokenizer = semid.RQKMeans(levels=2, codebook_size=16).fit(clustered)
    tokenizer.save(tmp_path / "model")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
    try:
        data = ray.data.read_parquet(str(items))
        with pytest.raises(UsageError, match="leave 1 for the tasks that read"):
            encode_dataset(data, tmp_path / "model", options=RayOptions(workers=2))
        done = encode_dataset(data, tmp_path / "model", options=RayOptions(workers=1))
        found = sorted(done.take_all(), key=lambda row: row["item_id"])
    finally:
        ray.shutdown()
    expected = sorted(tokenizer.encode(items).to_arrow().to_pylist(), key=lambda r: r["item_id"])
    assert [list(row["codes"]) for row in found] == [row["codes"] for row in expected]
    assert [row["item_id"] for row in found] == [row["item_id"] for row in expected]
