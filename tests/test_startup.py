"""Processes import torch and numba only where they use them; numpy's search finds the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from semid.cli.app import _COMMANDS
from semid.lazy import LazyModule
from semid.quantization.engine import plain
from semid.quantization.nearest import assign

HEAVY = ("torch", "numba", "scipy", "pandas", "sklearn", "plotly")


def run(code: str, *arguments: str, folder: Path) -> dict:
    """Run code in a fresh process; return its last line as JSON and the heavy modules imported."""
    footer = f"print(json.dumps([result, [m for m in {HEAVY} if m in sys.modules]]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\n{footer}", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, imported = json.loads(done.stdout.splitlines()[-1])
    return {"result": result, "imported": imported, "stderr": done.stderr}


COMMAND = """
from semid.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    result = end.code or 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with embeddings, a model and its ids."""
    folder = tmp_path_factory.mktemp("startup")
    x = np.random.default_rng(3).normal(size=(4200, 130)).astype(np.float32)
    np.save(folder / "x.npy", x)
    model = semid.RQKMeans(levels=3, codebook_size=16, normalize=True, center=True).fit(x)
    model.save(folder / "model")
    model.encode(x).write(folder / "ids.parquet")
    log = pa.table({"user_id": ["a", "b"], "item_id": ["1", "2"], "timestamp": [1, 2]})
    pq.write_table(log, folder / "log.parquet")
    pairs = pa.table({"item_id": ["1", "2", "5"], "related_item_id": ["2", "3", "9"]})
    pq.write_table(pairs, folder / "pairs.parquet")
    return folder


def test_encode_needs_neither_torch_nor_numba(folder: Path) -> None:
    done = run(COMMAND, "encode", "model", "x.npy", "-o", "again.parquet", "--quiet", folder=folder)
    assert done["result"] == 0
    assert done["imported"] == []
    # The answers are those of the kernels, in this process.
    ids = semid.SemanticIds.read(folder / "again.parquet")
    expected = semid.SemanticIds.read(folder / "ids.parquet")
    np.testing.assert_array_equal(ids.codes, expected.codes)
    np.testing.assert_array_equal(ids.residual_norms, expected.residual_norms)


def test_a_new_bundle_needs_neither(folder: Path) -> None:
    done = run(COMMAND, "compact", "ids.parquet", "-o", "bundle", folder=folder)
    assert done["result"] == 0
    assert not {"torch", "numba"} & set(done["imported"])


def test_looking_at_a_model_and_ids_needs_neither(folder: Path) -> None:
    code = """
import semid
model = semid.load("model")
ids = semid.SemanticIds.read("ids.parquet")
rows = model.decode(ids.codes[:5])
index = semid.PrefixIndex.build(ids)
result = [list(rows.shape), model.settings["levels"], len(index.next_codes())]
"""
    done = run(code, folder=folder)
    assert done["result"] == [[5, 130], 3, 16]
    assert set(done["imported"]) <= {"pandas"}, "pyarrow imports pandas, where it is installed"


def test_a_report_needs_no_torch(folder: Path) -> None:
    command = "report model x.npy --relations pairs.parquet -o report.json --quiet"
    done = run(COMMAND, *command.split(), folder=folder)
    assert done["result"] == 0, done["stderr"]
    assert "torch" not in done["imported"]
    report = json.loads((folder / "report.json").read_text())
    assert {"overlap", "flips", "geometry", "relations"} <= report.keys()
    assert report["relations"]["related"]["aucs"]


# Every command with a path that is not there and with a value that it does not take.
REFUSED = {
    "advise nowhere.npy": "does not exist",
    "advise x.npy --interactions nowhere.parquet": "does not exist",
    "advise x.npy --sample 3": "--sample",
    "audit nowhere.parquet -o a.html": "does not exist",
    "audit ids.parquet --interactions nowhere.parquet": "does not exist",
    "audit ids.parquet --seed no": "--seed",
    "check nowhere.parquet ids.parquet": "does not exist",
    "check ids.parquet ids.parquet --interactions log.parquet --ties how": "--ties",
    "compact nowhere -o out": "does not exist",
    "compact ids.parquet -o model": "exists",
    "compare model nowhere x.npy -o c.html": "does not exist",
    "compare model model x.npy -o c.html": "twice",
    "compare model nowhere x.npy -o c.html --threads 0": "--threads",
    "demo -o model": "exists",
    "demo -o out --levels 0": "--levels",
    "drift nowhere x.npy x.npy": "does not exist",
    "drift model x.npy nowhere.npy": "does not exist",
    "drift model x.npy x.npy --threads 0": "--threads",
    "embed nowhere.parquet --model m -o out.parquet": "does not exist",
    "embed log.parquet --model m -o out.parquet --batch-size 0": "--batch-size",
    "encode nowhere x.npy -o out.parquet": "does not exist",
    "encode model nowhere.npy -o out.parquet": "does not exist",
    "encode model x.npy -o ids.parquet": "exists",
    "encode model x.npy -o out.parquet --beam-width 0": "--beam-width",
    "encode model x.npy -o out.parquet --catalogue nowhere.parquet": "does not exist",
    "export nowhere.parquet --to lcrec -o e.json": "does not exist",
    "export ids.parquet --to what -o e.json": "--to",
    "fit nowhere.npy -o out": "does not exist",
    "fit x.npy -o model": "exists",
    "fit x.npy -o out --levels 0": "levels=0",
    "fit x.npy -o out --codebok-size 3": "--codebook-size",
    "fit x.npy -o out --tokenizer what": "what",
    "fit x.npy -o out --recipe nowhere.toml": "nowhere.toml",
    "fit nowhere.npy -o out --tokenizer rqvae": "does not exist",
    "fit log.parquet -o out --tokenizer rqvae --epochs 3": "embedding",
    "fit x.npy -o out --tokenizer rqvae --epochs 0": "epochs=0",
    "fit x.npy -o out --tokenizer rqvae --set training.epoch=3": "did you mean 'training.epochs'",
    "fit x.npy -o out --tokenizer rqvae --max-iter 3": "no option of rqvae",
    "fit x.npy -o out --tokenizer barq": "--interactions or --pairs",
    "fit x.npy -o out --tokenizer barq --pairs pairs.parquet --check-behavior": "--check-behavior",
    "fit x.npy -o out --tokenizer drqvae --contrastive-weight 0.1": "--interactions or --pairs",
    "fit x.npy -o out --tokenizer rqvae --precision half": "precision='half'",
    "fit x.npy -o out --tokenizer rqvae --levels 0": "levels=0: give 1 to 256",
    "fit x.npy -o out --tokenizer opq --codebook-size 1": "codebook_size=1: give 2 to",
    "fit x.npy -o out --tokenizer rqvae --clip-norm 0": "clip_norm=0.0: give a number above 0",
    "fit x.npy -o out --tokenizer fsq --patience 0": "patience=0: give at least 1, or None",
    "fit x.npy -o out --tokenizer drqvae --sample-per-code 0": "sample_per_code=0",
    "fit x.npy -o out --tokenizer rqvae --pairs pairs.parquet": "learns from embeddings alone",
    "fit x.npy -o out --tokenizer drqvae --uniformity-weight 0.5": "--uniformity-weight 0 (",
    "fit x.npy -o out --tokenizer drqvae --temperature 0.5": "--contrastive-weight is 0",
    "fit x.npy -o out --tokenizer opq --full-pass": "give --sample-per-code",
    "import nowhere.parquet -o out.parquet": "does not exist",
    "import nowhere.faiss --from faiss -o out": "does not exist",
    "import ids.parquet --from what -o out.parquet": "--from",
    "prepare amazon nowhere.json.gz -o out": "does not exist",
    "prepare what log.parquet -o out": "RELEASE",
    "rank nowhere.parquet -o out": "does not exist",
    "rank log.parquet -o out --ids nowhere.parquet": "does not exist",
    "rank log.parquet -o out --user-column who": "--user-column",
    "rank log.parquet -o out --batch-size 0": "batch_size=0",
    "rank log.parquet -o out --label rating>=4 --user-column who": "--user-column",
    "rank log.parquet -o out --label rating>=4 --model dcnv2 --items nowhere.csv": "does not exist",
    "rank log.parquet -o out --fractions 0.5,0.1": "--fractions",
    "rank-grid log.parquet -o out --methods none --fractions 0.5,0.1": "--fractions",
    "rank log.parquet -o out --model what": "--model",
    "rank log.parquet -o out --hidden wide": "--hidden",
    "rank log.parquet -o out --device what": "--device",
    "rank log.parquet -o out --no-baseline": "--no-baseline",
    "rank log.parquet -o model": "exists",
    "rank-grid nowhere.parquet -o out --methods none": "does not exist",
    "rank-grid log.parquet -o out --methods ids --ids nowhere.parquet": "does not exist",
    "rank-grid log.parquet -o out --methods what": "--methods",
    "rank-grid log.parquet -o out --methods moc": "--embeddings",
    "rank-grid log.parquet -o out --methods none --scales 2": "--scales",
    "rank-grid log.parquet -o out --methods none --models what": "--models",
    "rank-grid log.parquet -o out --methods none --seeds 0": "--seeds",
    "recommend nowhere -o r.parquet": "does not exist",
    "recommend model -o r.parquet": "semid retrieve",
    "recommend model -o r.parquet --within-ids what": "--within-ids",
    "refine nowhere x.npy -o out": "does not exist",
    "refine model x.npy -o out --beam-width 0": "beam_width=0",
    "refresh nowhere x.npy --catalogue ids.parquet -o out": "does not exist",
    "refresh model x.npy --catalogue nowhere.parquet -o out": "does not exist",
    "refresh model x.npy --catalogue ids.parquet -o out --max-churn 3": "max_churn=3",
    "report model nowhere.npy -o r.html": "does not exist",
    "report nowhere x.npy -o r.html": "does not exist",
    "report model x.npy -o r.html --interactions nowhere.parquet": "does not exist",
    "report model x.npy -o r.html --threads 0": "--threads",
    "reproduce what": "PAPER",
    "reproduce drq --data nowhere": "does not exist",
    "reproduce moc --recipe nowhere.toml": "nowhere.toml",
    "reproduce predict --from nowhere": "does not exist",
    "reproduce retrieval --processes 0": "--processes",
    "retrieve log.parquet --ids nowhere.parquet -o out": "does not exist",
    "retrieve log.parquet --ids ids.parquet -o out --item-column what": "--item-column",
    "retrieve log.parquet --ids ids.parquet -o out --epochs 0": "epochs=0",
    "retrieve log.parquet --model popularity -o out --epochs 3": "--epochs",
    "retrieve log.parquet --model sasrec -o out --set options.beams=3": "--beams",
    "retrieve log.parquet --ids ids.parquet -o out --model composed,what": "--model",
    "retrieve log.parquet --ids ids.parquet -o out --device what": "--device",
    "serve nowhere --model model": "nowhere",
    "serve ids.parquet --model nowhere": "does not exist",
    "serve ids.parquet --model model --port 99999": "--port",
    "unique nowhere.parquet -o u.parquet": "does not exist",
    "unique ids.parquet -o u.parquet --method what": "--method",
}


def test_every_command_is_refused_a_path_and_a_value() -> None:
    """A new command comes with both in `REFUSED`."""
    listed = {name: 0 for name, _, _ in _COMMANDS}
    for command in REFUSED:
        listed[command.split()[0]] += 1
    assert [name for name, count in listed.items() if count < 2] == []


ALL = """
import contextlib, io
from semid.cli import main
result = {}
for command in json.loads(sys.argv[1]):
    before, stream = set(sys.modules), io.StringIO()
    with contextlib.redirect_stderr(stream):
        try:
            main(command.split())
        except SystemExit as end:
            code = end.code
    added = [m for m in HEAVY if m in sys.modules and m not in before]
    result[command] = [code, stream.getvalue(), added]
"""


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, list[Any]]:
    """Exit code, message and modules imported of each command, all run in one process."""
    code = f"HEAVY = {HEAVY}\n{ALL}"
    return run(code, json.dumps(list(REFUSED)), folder=folder)["result"]


@pytest.mark.parametrize("command", REFUSED)
def test_refusing_needs_neither(refused: dict[str, list[Any]], command: str) -> None:
    code, message, imported = refused[command]
    assert code
    assert REFUSED[command] in message
    assert set(imported) <= {"pandas"}, "pyarrow imports pandas, where it is installed"


def test_kernels_are_counted_as_they_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    code = """
from semid.lazy import compiling
from semid.tokenizers.context import compile_kernels
class Counter:
    total = done = 0
    def start(self, task, *, total=None):
        self.total = total
    def step(self, done=1, **fields):
        self.done += done
progress, later = Counter(), Counter()
compile_kernels(progress, {"product", "lists", "dense", "tables"})
import numpy as np
import semid
x = np.random.default_rng(0).normal(size=(1500, 24)).astype(np.float32)
with compiling(later.step):
    for model in (
        semid.PQ(n_codebooks=2, codebook_size=64),
        semid.OPQ(n_codebooks=2, codebook_size=64, rotation_iter=1),
        semid.RQGMM(levels=2, codebook_size=16),
        semid.RQKMeans(codebook_size=64, train_with_beam=True, beam_width=2),
    ):
        model.fit(x)
    semid.refine(model, x, options=semid.RefineOptions(rounds=1, annealing_rounds=1))
result = [progress.done, progress.total, later.done]
"""
    done, total, later = run(code, folder=tmp_path)["result"]
    assert 5 <= done == total
    assert later == 0, "no kernel of a fit is compiled without being counted"
    assert run(code, folder=tmp_path)["result"] == [0, total, 0]  # they come from the cache


KEPT_NOWHERE = """
import numpy as np
from semid.diagnostics.auc import pair_cosines
from semid.quantization.engine import table
rows = np.eye(3, dtype=np.float32)
result = pair_cosines(rows, np.array([0, 1]), np.array([0, 2])).tolist()
"""


def test_kernels_are_compiled_where_no_folder_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(semid.__file__).parent
    shutil.copytree(package, tmp_path / "semid", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {each.parent for each in (tmp_path / "semid").rglob("*.py")}:
        (folder / "__pycache__").write_text("a file is no folder, not even for root")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/no")
    done = run(KEPT_NOWHERE, folder=tmp_path)
    assert done["result"] == [1.0, 0.0]
    assert done["stderr"].count("NUMBA_CACHE_DIR") == 1
    assert not list(tmp_path.glob("semid-kernels-*")), "the temporary folder is removed"


def pairs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and codewords on which rounding, ties or extreme numbers matter."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=(700, 37)).astype(np.float32)
    book = generator.normal(size=(90, 37)).astype(np.float32)
    if name == "ties":
        x, book = np.rint(x), np.rint(book)
        book[40:] = book[:50]
    elif name == "far":
        x, book = x + np.float32(3e4), book + np.float32(3e4)
    elif name == "huge":
        x, book = x * np.float32(1e37), book * np.float32(1e37)
    elif name == "tiny":
        x, book = x * np.float32(1e-42), book * np.float32(1e-42)
    elif name == "not finite":
        x[::3, 5], x[1::3, 7], x[2::3, :2] = np.nan, np.inf, (np.inf, -np.inf)
    elif name == "one":
        book = book[:1]
    return x, book


@pytest.mark.parametrize("name", ["plain", "ties", "far", "huge", "tiny", "not finite", "one"])
def test_numpy_finds_what_kernels_find(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, book = pairs(name)
    monkeypatch.setattr(plain, "WORK", 0)  # `assign` takes the kernels
    labels, distances = assign(x, book)
    found, keys = plain.nearest_plain(x, book)
    np.testing.assert_array_equal(found, labels)
    with np.errstate(over="ignore"):  # squares beyond float32
        np.testing.assert_array_equal(keys.astype(np.float32), distances)


def test_numpy_finds_nothing_for_no_rows() -> None:
    found, keys = plain.nearest_plain(np.empty((0, 5), np.float32), np.ones((3, 5), np.float32))
    assert found.shape == keys.shape == (0,)


def test_much_work_goes_to_kernels() -> None:
    code = """
from semid.quantization.engine import plain
result = [plain.suits_plain(plain.WORK // 2) for _ in range(3)]
"""
    assert run(code, folder=Path.cwd())["result"] == [True, True, False]


def test_kernels_do_not_import_torch_for_little_work() -> None:
    code = """
import numpy as np
from semid.quantization.engine import plain, search
from semid.quantization.nearest import assign
plain.WORK = 0
x = np.random.default_rng(0).normal(size=(5000, 80)).astype(np.float32)
assign(x, x[:300])
before = "torch" in sys.modules
fused = [each for each in search.working_routes(with_torch=False) if not each.uses_torch]
result = [before, len(fused), len(search.working_routes())]
"""
    before, fused, routes = run(code, folder=Path.cwd())["result"]
    # A chip without a route of its own multiplies with torch.
    assert before == (fused == 0)
    assert routes > fused


def test_a_module_that_another_thread_has_begun_to_import_is_waited_for(tmp_path, monkeypatch):
    slow = "import time\ntime.sleep(0.5)\nvalue = 1\n"
    (tmp_path / "slow_to_import.py").write_text(slow, encoding="utf8")
    monkeypatch.syspath_prepend(tmp_path)
    module = LazyModule("slow_to_import")
    with ThreadPoolExecutor(1) as pool:
        value = pool.submit(lambda: module.value)
        while "slow_to_import" not in sys.modules:
            time.sleep(0.001)
        assert module.value == value.result() == 1
