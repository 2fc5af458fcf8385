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
from cli_cases import run

pytestmark = pytest.mark.slow  # every process imports torch anew

LOOPBACK = sys.platform == "linux"
"""Where the loopback device has a name that gloo can be given, no host name has to be looked up."""

OPTIONS = {
    "codebook_size": 16,
    "network": {"hidden": [32], "latent": 8, "pretrain_epochs": 1},
    "training": {"epochs": 3, "batch_size": 128, "precision": "fp32"},
}

RECIPE = """
tokenizer = "mocvae"
codebook_size = 16
[network]
hidden = [32]
latent = 8
pretrain_epochs = 1
[training]
epochs = 2
batch_size = 128
"""

# Several fits in one program, a stop and its resumption, and the command line: every fit is a group
# of processes of its own.
SCRIPT = """
import faulthandler, json, os, sys
import numpy as np
faulthandler.dump_traceback_later(800, exit=True)  # where a process waits, should it wait for ever
import semid
from semid.cli import main
from semid.progress import QuietProgress

folder, rank = sys.argv[1], os.environ["RANK"]
options = json.load(open(folder + "/options.json"))
x = np.load(folder + "/x.npy")
pairs = np.stack([np.arange(600), np.arange(600) + 600], axis=1)
found = {}

def note(name, tokenizer):
    details = tokenizer.report.details
    error = tokenizer.report.validation_error
    found[name] = [tokenizer.weights_fingerprint, error, details]

class Stop(QuietProgress):
    left = 12
    def step(self, done=1, **fields):
        self.left -= bool(fields)
        if self.left == 0 and rank == "1":  # one process alone is asked to stop
            raise KeyboardInterrupt

revived = dict(options, revive_below=0.8, ema_decay=0.8)
state = folder + "/state"
try:
    semid.RQPVAE(**revived).fit(x, checkpoint=state, progress=Stop())
except KeyboardInterrupt:
    found["stopped"] = True
note("resumed", semid.RQPVAE(**revived).fit(x, checkpoint=state, resume=True))
note("revived", semid.RQPVAE(**revived).fit(x))
contrastive = semid.DRQVAE(**options, contrastive_weight=0.2, pairs_per_step=64)
note("drqvae", contrastive.fit(x, pairs=pairs))
note("calm", semid.RQPVAE(**options, revive_below=0).fit(x))
try:
    main(["fit", folder + "/x.npy", "--recipe", folder + "/moc.toml", "-o", folder + "/model"])
except SystemExit as ended:
    found["exit"] = ended.code
json.dump(found, open(f"{folder}/rank{rank}.json", "w"))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    finished = subprocess.run(
        [str(word) for word in (*command, script, *arguments)],
        capture_output=True,
        text=True,
        env={**environment(), "GLOO_SOCKET_IFNAME": "lo"} if LOOPBACK else environment(),
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished


def test_two_processes_end_equal_and_as_one_would(tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered)
    (tmp_path / "options.json").write_text(json.dumps(OPTIONS), encoding="utf8")
    (tmp_path / "moc.toml").write_text(RECIPE, encoding="utf8")
    (tmp_path / "fit.py").write_text(SCRIPT, encoding="utf8")
    finished = torchrun(tmp_path / "fit.py", tmp_path)
    first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf8")) for rank in (0, 1)
    )
    assert first == second
    assert first["stopped"]
    assert first["resumed"] == first["revived"]
    revived = [epoch.get("revived_1", 0) for epoch in first["revived"][2]["training"]["history"]]
    assert max(revived) > 0
    assert (tmp_path / "state" / "state.safetensors").exists()
    alone = semid.RQPVAE(**OPTIONS, revive_below=0).fit(clustered)
    assert first["calm"][1] == pytest.approx(alone.report.validation_error, rel=0.02)
    assert not first["exit"]
    assert finished.stdout.count("fitted mocvae") == 1
    assert semid.load(tmp_path / "model").encode(clustered).codes.shape == (1200, 3)


_NETWORK = {**OPTIONS, "training": {**OPTIONS["training"], "patience": 9}}
_CONTINUOUS = {**_NETWORK, "network": {"hidden": [32], "latent": 8}}
_OBJECTIVE = {"pairs_per_step": 63, "kl_weight": 0.01, "uniformity_weight": 0.05}

KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "rqvae": ("RQVAE", _NETWORK),
    "rqpvae": ("RQPVAE", {**_NETWORK, "ema_decay": 0.8, "revive_below": 0.8}),
    "mocvae": ("MoCVAE", _NETWORK),
    "drqvae": ("DRQVAE", _CONTINUOUS),
    "drqvae-pairs": ("DRQVAE", {**_CONTINUOUS, "contrastive_weight": 0.2, "pairs_per_step": 63}),
    "drqvae-all": ("DRQVAE", {**_CONTINUOUS, "contrastive_weight": 0.2, **_OBJECTIVE}),
    "barq-plain": ("BARQ", {"codebook_size": 16, "behavior_weight": 0}),
    "barq": ("BARQ", {**_CONTINUOUS, "behavior_weight": 0.2, "objective": _OBJECTIVE}),
}
"""Tokenizers that are fitted in one process and in two. Odd numbers make shares of unequal size."""

FITTING = """
import json, os, sys
import numpy as np
import semid

folder, rank = sys.argv[1], os.environ["RANK"]
x = np.load(folder + "/x.npy")
pairs = np.stack([np.arange(600), np.arange(600) + 600], axis=1)
weights = {}
for name, (kind, options) in json.load(open(folder + "/kinds.json")).items():
    behavior = options.get("contrastive_weight") or options.get("behavior_weight")
    tokenizer = getattr(semid, kind)(threads=1, **options)
    tokenizer.fit(x, pairs=pairs if behavior else None)
    weights[name] = tokenizer.weights_fingerprint
    if rank == "0":
        tokenizer.save(f"{folder}/{name}")
json.dump(weights, open(f"{folder}/weights{rank}.json", "w"))
"""


def test_every_network_learns_in_two_processes_as_in_one(tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered)
    (tmp_path / "kinds.json").write_text(json.dumps(KINDS), encoding="utf8")
    (tmp_path / "fit.py").write_text(FITTING, encoding="utf8")
    torchrun(tmp_path / "fit.py", tmp_path)
    # The processes end with the same bits.
    first, second = (json.loads((tmp_path / f"weights{r}.json").read_text()) for r in (0, 1))
    assert first == second
    pairs = np.stack([np.arange(600), np.arange(600) + 600], axis=1)
    for name, (kind, options) in KINDS.items():
        behavior = options.get("contrastive_weight") or options.get("behavior_weight")
        one = getattr(semid, kind)(threads=1, **options)
        one.fit(clustered, pairs=pairs if behavior else None)
        two = semid.load(tmp_path / name)
        if name == "barq-plain":  # no network: residual K-means of sums in a fixed order
            assert one.weights_fingerprint == two.weights_fingerprint
            continue
        # The same batches, draws and negatives: only the sums of gradients round differently.
        for ours, theirs in zip(one.codebooks, two.codebooks, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4, err_msg=name)
        same = (one.encode(clustered).codes == two.encode(clustered).codes).all(axis=1)
        assert same.mean() > 0.99, name
        error = one.report.validation_error
        assert error == pytest.approx(two.report.validation_error, rel=1e-4), name


@pytest.mark.parametrize("command", ["retrieve", "rank"])
def test_recommenders_train_in_two_processes_as_in_one(command, tmp_path, capsys):
    files = semid.SyntheticCatalogue(items=200, users=120, seed=0).write(tmp_path / "catalogue")
    # Dropout alone differs between processes.
    given = [command, str(files.interactions), "--epochs", "2", "--dropout", "0", "-q"]
    given += ["--model", "sasrec"] if command == "retrieve" else []
    (tmp_path / "run.py").write_text("from semid.cli import main\nmain()\n", encoding="utf8")
    finished = torchrun(tmp_path / "run.py", *given, "-o", tmp_path / "two")
    assert run(*given, "-o", tmp_path / "one") == 0
    # One process alone printed and wrote.
    assert finished.stdout.count("protocol: ") == 1
    one, two = (semid.load(tmp_path / name) for name in ("one", "two"))
    for name, weight in one.network.named_parameters():
        assert float((weight - two.network.get_parameter(name)).abs().mean()) < 1e-3, name


@pytest.mark.parametrize("kind", ["rqpvae", "drqvae"])
def test_killed_and_resumed_equals_uninterrupted(kind, tmp_path, clustered):
    np.save(tmp_path / "x.npy", clustered)
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f'tokenizer = "{kind}"\ncodebook_size = 16\n'
        "[network]\nhidden = [32]\nlatent = 8\npretrain_epochs = 1\n"
        "[training]\nepochs = 12\nbatch_size = 64\npatience = 30\ncheckpoint_seconds = 0\n",
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
        assert run(*arguments) == 0
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
