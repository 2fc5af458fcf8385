"""Runs of several processes, and a run that is killed: the real program, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import semid
from semid.cli import main

pytestmark = pytest.mark.slow  # every process imports torch anew

OPTIONS = {
    "codebook_size": 16,
    "network": {"hidden": [32], "latent": 8, "pretrain_epochs": 0},
    "training": {"epochs": 3, "batch_size": 128, "precision": "fp32"},
}

SCRIPT = """
import json, os, sys
import numpy as np
import semid

folder = sys.argv[1]
options = json.load(open(folder + "/options.json"))
x = np.load(folder + "/x.npy")
pairs = np.stack([np.arange(600), np.arange(600) + 600], axis=1)
made = {
    "rqpvae": semid.RQPVAE(**options, revive_below=0.3).fit(x, checkpoint=folder + "/state"),
    "drqvae": semid.DRQVAE(
        **options, contrastive_weight=0.2, pairs_per_step=64
    ).fit(x, pairs=pairs),
    "calm": semid.RQPVAE(**options, revive_below=0).fit(x),
}
found = {
    name: [t.weights_fingerprint, t.report.validation_error] for name, t in made.items()
}
json.dump(found, open(f"{folder}/rank{os.environ['RANK']}.json", "w"))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_two_processes_end_equal_and_as_one_would(tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered)
    (tmp_path / "options.json").write_text(json.dumps(OPTIONS), encoding="utf8")
    (tmp_path / "fit.py").write_text(SCRIPT, encoding="utf8")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(tmp_path / "fit.py"), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf8")) for rank in (0, 1)
    )
    assert first == second
    assert (tmp_path / "state" / "state.safetensors").exists()
    alone = semid.RQPVAE(**OPTIONS, revive_below=0).fit(clustered)
    assert first["calm"][1] == pytest.approx(alone.report.validation_error, rel=0.02)


@pytest.mark.parametrize("kind", ["rqpvae", "drqvae"])
def test_killed_and_resumed_equals_uninterrupted(kind, tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered)
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f'tokenizer = "{kind}"\ncodebook_size = 16\n'
        "[network]\nhidden = [32]\nlatent = 8\npretrain_epochs = 1\n"
        "[training]\nepochs = 30\nbatch_size = 64\npatience = 30\ncheckpoint_seconds = 0\n",
        encoding="utf8",
    )

    def command(output: str) -> list[str]:
        target = str(tmp_path / output)
        return ["fit", str(tmp_path / "x.npy"), "--recipe", str(recipe), "-o", target, "-q"]

    process = subprocess.Popen(
        [sys.executable, "-c", "from semid.cli import main; main()", *command("killed")],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    state = tmp_path / "killed.partial" / "state.safetensors"
    wait_for(state, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed").exists()
    for arguments in ([*command("killed"), "--resume"], command("whole")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
    killed, whole = semid.load(tmp_path / "killed"), semid.load(tmp_path / "whole")
    assert killed.weights_fingerprint == whole.weights_fingerprint
    assert killed.report.details == whole.report.details
    assert not state.parent.exists()


def wait_for(state: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has saved its state a few times."""
    seen: set[int] = set()
    for _ in range(60_000):
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"the run ended by itself: {process.stderr.read().decode()[-2000:]}")
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        if len(seen) > 3:
            return
        time.sleep(0.005)
    pytest.fail("the run saved no state")
