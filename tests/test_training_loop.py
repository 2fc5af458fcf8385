"""The training loop on a model that has nothing to do with quantization."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import semid
from semid.errors import DivergedError, MissingExtraError, UsageError
from semid.progress import QuietProgress
from semid.training import loop
from semid.training.batches import epoch_batches, process_share, steps_per_epoch
from semid.training.checkpoint import Checkpoint, Stages, module_arrays
from semid.training.loggers import make_logger
from semid.training.loop import Evaluation, Step, train
from semid.training.options import FLOOR, TrainOptions, learning_rate, resolve_precision
from training_cases import Stop

STEPS = 6


class Regression(nn.Module):
    """A net with dropout, so that a resumed run has to draw what the other one drew."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Step:
        x, y = batch
        loss = (self.net(x).float()[:, 0] - y).square().mean()
        return Step(loss, {"error": loss.detach()})


class Task:
    def __init__(self, scores: list[tuple[float, bool]] | None = None) -> None:
        self.module: nn.Module = Regression()
        self.steps_per_epoch = STEPS
        self.scores, self.started = scores, []
        generator = np.random.default_rng(0)
        self.x = torch.from_numpy(generator.normal(size=(96, 4)).astype(np.float32))
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5, 0.0])

    def start_epoch(self, epoch: int) -> None:
        self.started.append(epoch)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[object, float]]:
        for rows in epoch_batches(96, 16, seed=3, epoch=epoch)[first:]:
            yield (self.x[rows], self.y[rows]), 1.0

    def evaluate(self, epoch: int) -> Evaluation:
        if self.scores is not None:
            score, healthy = self.scores[epoch]
            return Evaluation(score, healthy=healthy)
        return Evaluation(float((self.module.net(self.x)[:, 0] - self.y).square().mean()))


OPTIONS = TrainOptions(epochs=5, learning_rate=0.02, patience=None, precision="fp32")


def run(task: Task, options: TrainOptions = OPTIONS, **others: object):
    return train(task, options, seed=1, **{"progress": QuietProgress(), **others})


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = module_arrays(a), module_arrays(b)
    return all(np.array_equal(left[name], right[name]) for name in left)


def test_training_improves_and_repeats():
    torch.manual_seed(11)
    first = Task()
    state = torch.get_rng_state()
    result = run(first)
    assert result.best.score < 0.5 * result.first.score
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(12)
    again = Task()
    assert run(again).history == result.history
    assert equal(first.module, again.module)
    other = Task()
    train(other, OPTIONS, seed=2, progress=QuietProgress())
    assert not equal(first.module, other.module)


def test_epochs_between_two_evaluations_have_no_score(tmp_path):
    every_second = replace(OPTIONS, evaluate_every=2)
    task = Task(scores=[(0.0, True), (3.0, True), (0.0, True), (2.0, True), (4.0, True)])
    result = run(task, every_second)
    # Epochs 2 and 4, and the last: what stands at the others is never asked for.
    assert [row.get("score") for row in result.history] == [None, 3.0, None, 2.0, 4.0]
    assert (result.best_epoch, result.first.score) == (3, 3.0)
    # Patience counts epochs, and runs out at an evaluation alone.
    assert run(Task([(9.0, True)] * 5), replace(every_second, patience=2)).epochs == 4
    assert run(Task([(9.0, True)] * 5), replace(every_second, patience=1)).epochs == 4
    whole = Task()
    expected = run(whole, every_second)
    with pytest.raises(KeyboardInterrupt):
        run(Task(), every_second, store=Checkpoint(tmp_path, key="k"), progress=Stop(STEPS + 1))
    again = Task()
    result = run(again, every_second, store=Checkpoint(tmp_path, key="k", resume=True))
    assert equal(again.module, whole.module)
    assert result.history == expected.history


@pytest.mark.parametrize("after", [1, STEPS - 1, STEPS, STEPS + 2, 5 * STEPS])
def test_stopped_anywhere_and_resumed_ends_bit_equal(after, tmp_path):
    whole = Task()
    expected = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(Task(), store=Checkpoint(tmp_path, key="k"), progress=Stop(after))
    task = Task()
    result = run(task, store=Checkpoint(tmp_path, key="k", resume=True))
    assert equal(task.module, whole.module)
    assert result.history == expected.history
    assert result.best_epoch == expected.best_epoch
    assert task.started == list(range(math.ceil(after / STEPS), 5))


def test_a_signal_lets_the_step_end(tmp_path):
    import signal

    class Signal(QuietProgress):
        def step(self, done: int = 1, **fields: object) -> None:
            if fields:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Task(), store=Checkpoint(tmp_path, key="k"), progress=Signal())
    assert signal.getsignal(signal.SIGINT) is before
    _, record = Checkpoint(tmp_path, key="k", resume=True).state
    assert record["step"] == 1


def test_the_best_healthy_epoch_is_returned():
    scores = [(5.0, True), (1.0, False), (3.0, True), (4.0, True), (float("nan"), True)]
    assert run(Task(scores)).best_epoch == 2
    unhealthy = [(5.0, False), (1.0, False), (3.0, False), (4.0, False), (9.0, False)]
    assert run(Task(unhealthy)).best_epoch == 1
    best = Evaluation(0.9, higher_is_better=True)
    assert best.rank() > Evaluation(0.8, higher_is_better=True).rank()


def test_the_best_weights_are_put_back():
    scores = [(1.0, True), (2.0, True), (3.0, True), (4.0, True), (5.0, True)]
    task = Task(scores)
    run(task)
    short = Task(scores)
    stopped = False
    try:
        run(short, progress=Stop(STEPS))
    except KeyboardInterrupt:
        stopped = True
    assert stopped
    assert equal(task.module, short.module)


def test_patience_stops():
    scores = [(1.0, True), (2.0, True), (3.0, True), (0.5, True), (0.4, True)]
    options = TrainOptions(epochs=5, patience=2, precision="fp32")
    result = run(Task(scores), options)
    assert result.epochs == 3
    assert result.stopped_early
    assert result.best_epoch == 0
    waiting = [(float("inf"), True)] * 3 + [(0.5, True), (0.4, True)]
    assert run(Task(waiting), options).best_epoch == 4


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_divergence_stops_with_advice_and_keeps_the_last_good_state(rate, tmp_path):
    task = Task()
    options = TrainOptions(
        epochs=5, learning_rate=rate, schedule="constant", clip_norm=None, precision="fp32"
    )
    with pytest.raises(DivergedError, match=r"lower --learning-rate.*last good state"):
        run(task, options, store=Checkpoint(tmp_path, key="k"))
    arrays, _ = Checkpoint(tmp_path, key="k", resume=True).state
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_stages_continue_where_they_were(tmp_path):
    stages = Stages(Checkpoint(tmp_path, key="k"))
    stages.stage("one").save({"a": np.arange(3)}, {"at": 1})
    again = Stages(Checkpoint(tmp_path, key="k", resume=True))
    assert again.finished("one") is None
    assert again.stage("two").state is None
    arrays, record = again.stage("one").state
    assert arrays["a"].tolist() == [0, 1, 2]
    assert record == {"at": 1}
    again.finish("one", {"w": np.ones(2)}, {"score": 3})
    again.stage("two").save({"b": np.zeros(1)}, {"at": 5})
    last = Stages(Checkpoint(tmp_path, key="k", resume=True))
    arrays, record = last.finished("one")
    assert arrays["w"].tolist() == [1, 1]
    assert record == {"score": 3}
    assert last.stage("two").state[1] == {"at": 5}


def test_every_row_once_an_epoch_and_shares_that_add_up():
    batches = epoch_batches(103, 10, seed=0, epoch=4)
    assert len(batches) == steps_per_epoch(103, 10)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    assert {len(batch) for batch in batches} <= {10, 11}
    assert [b.tolist() for b in epoch_batches(103, 10, seed=0, epoch=4)] == [
        b.tolist() for b in batches
    ]
    values = np.random.default_rng(0).normal(size=103)
    for batch in batches:
        parts = [process_share(batch, rank=rank, world=3) for rank in range(3)]
        assert np.concatenate([rows for rows, _ in parts]).tolist() == batch.tolist()
        mean = np.mean([values[rows].mean() * weight for rows, weight in parts])
        assert mean == pytest.approx(values[batch].mean())
    weights = np.array([1.0, 3.0])
    drawn = np.concatenate(
        [np.concatenate(epoch_batches(2, 2, seed=0, epoch=e, weights=weights)) for e in range(2000)]
    )
    assert drawn.mean() == pytest.approx(0.75, abs=0.03)


def test_schedules():
    common = {"total": 100, "peak": 2.0, "warmup": 0.1}
    rates = [learning_rate(step, schedule="cosine", **common) for step in range(100)]
    rising = [2.0 * step / 11 for step in range(1, 11)]
    assert rates[:10] == pytest.approx(rising)
    assert max(rates) == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 * FLOOR, rel=0.1)
    assert rates[55] == pytest.approx(2.0 * (FLOOR + (1 - FLOOR) / 2))
    constant = [learning_rate(step, schedule="constant", **common) for step in range(100)]
    assert constant == pytest.approx([*rising, *[2.0] * 90])


def test_options_out_of_range_name_all_problems():
    with pytest.raises(UsageError, match=r"epochs=0.*learning_rate=-1.*schedule='linear'"):
        TrainOptions(epochs=0, learning_rate=-1, schedule="linear")


def test_bfloat16_is_asked_for_or_found():
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if has else "fp32")
    result = run(Task(), TrainOptions(epochs=5, learning_rate=0.02, precision="bf16"))
    assert result.precision == "bf16"
    assert result.best.score < 0.6 * result.first.score


def test_loggers(tmp_path, monkeypatch):
    log = make_logger(f"jsonl:{tmp_path / 'a' / 'log.jsonl'}")
    run(Task(), log=log)
    log.close()
    first, *lines = map(json.loads, (tmp_path / "a" / "log.jsonl").read_text().splitlines())
    assert first == {"parameters": {}}
    assert [line["step"] for line in lines] == [STEPS * n for n in range(1, 6)]
    assert lines[-1]["score"] < lines[0]["score"]
    for text in ("jsonl", "tensorboard:", "papyrus:x"):
        with pytest.raises(UsageError, match="tensorboard:FOLDER"):
            make_logger(text)
    for text, package in (
        ("tensorboard:x", "tensorboard"),
        ("mlflow", "mlflow"),
        ("wandb", "wandb"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"semid\[{package}\]"):
            make_logger(text)


def test_tensorboard_files_hold_the_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra semid[tensorboard] is not installed")
    log = make_logger(f"tensorboard:{tmp_path}")
    log.log({"score": 0.5}, step=3)
    log.close()
    assert list(tmp_path.glob("events*"))


class Recorder(types.ModuleType):
    """A stand-in for a tracker's package: every call, by its path, with its arguments."""

    def __init__(self, name: str, calls: list, **values: object) -> None:
        super().__init__(name)
        self.calls = calls
        vars(self).update(values)

    def __getattr__(self, name: str) -> Recorder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(f"{self.__name__}.{name}", self.calls, id="run7")

    def __call__(self, *args: object, **kwargs: object) -> Recorder:
        self.calls.append((self.__name__, args, kwargs))
        return Recorder(f"{self.__name__}()", self.calls, id="run7")


def record_run(text, model, *, fails=False):
    with make_logger(text) as log:
        log.parameters = {"seed": 3, "training": {"epochs": 2}}
        log.log({"recall@10": 0.5}, step=4)
        if fails:
            raise KeyboardInterrupt
        log.finish("healthy", {"recall@10": 0.75, "missing": None}, model)


def test_mlflow_gets_parameters_verdict_and_model(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "mlflow", Recorder("m", calls, active_run=lambda: None))
    record_run("mlflow:try", tmp_path)
    assert calls == [
        ("m.start_run", (), {"run_name": "try"}),
        ("m.log_params", ({"seed": "3", "training.epochs": "2"},), {}),
        ("m.log_metrics", ({"recall_at_10": 0.5},), {"step": 4}),
        ("m.log_metrics", ({"recall_at_10": 0.75},), {"step": 4}),
        ("m.set_tag", ("verdict", "healthy"), {}),
        ("m.log_artifacts", (str(tmp_path),), {"artifact_path": "model"}),
        ("m.end_run", ("FINISHED",), {}),
    ]
    with pytest.raises(KeyboardInterrupt):
        record_run("mlflow", tmp_path, fails=True)
    assert calls[-1] == ("m.end_run", ("FAILED",), {})
    # A run that somebody else has begun stays open; a model that is elsewhere is no artifact.
    monkeypatch.setitem(sys.modules, "mlflow", Recorder("m", calls, active_run=lambda: 1))
    del calls[:]
    record_run("mlflow", "s3://bucket/model")
    assert {name for name, _, _ in calls} == {"m.log_params", "m.log_metrics", "m.set_tag"}


def test_wandb_gets_parameters_verdict_and_model(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", Recorder("w", calls))
    record_run("wandb:try", tmp_path)
    names = [name for name, _, _ in calls]
    assert names == [
        "w.init",
        "w.init().config.update",
        "w.init().log",
        "w.init().log",
        "w.init().summary.update",
        "w.Artifact",
        "w.Artifact().add_dir",
        "w.init().log_artifact",
        "w.init().finish",
    ]
    arguments = dict(zip(names, calls, strict=True))
    assert arguments["w.init().log"][1:] == (({"recall@10": 0.75},), {"step": 4})
    assert arguments["w.init().config.update"][1] == ({"seed": 3, "training.epochs": 2},)
    assert arguments["w.init().summary.update"][1] == ({"verdict": "healthy"},)
    assert arguments["w.Artifact().add_dir"][1] == (str(tmp_path),)
    assert arguments["w.init().finish"][2] == {"exit_code": 0}


def test_mlflow_itself_takes_the_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra semid[mlflow] is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf8")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    record_run("mlflow:try", tmp_path / "model")
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert run.data.params == {"seed": "3", "training.epochs": "2"}
    assert run.data.metrics == {"recall_at_10": 0.75}
    assert run.data.tags["verdict"] == "healthy"
    assert list((tmp_path / "mlruns").rglob("artifacts/model/config.json"))


@pytest.mark.parametrize("command", ["fit", "rank", "retrieve"])
def test_commands_log_parameters_verdict_and_model(command, tmp_path, monkeypatch):
    from semid.cli import main

    monkeypatch.chdir(tmp_path)
    semid.SyntheticCatalogue(items=400, seed=0).write("data")
    arguments = {
        "fit": ["data/embeddings.npy", "--levels", "2", "--codebook-size", "4"],
        "rank": ["data/interactions.parquet", "--epochs", "1", "--hidden", "4"],
        "retrieve": ["data/interactions.parquet", "--model", "sasrec", "--epochs", "1"],
    }[command]
    with pytest.raises(SystemExit) as done:
        main([command, *arguments, "-o", "out", "--log", "jsonl:run.jsonl", "--quiet"])
    assert done.value.code == 0
    lines = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    assert lines[0]["parameters"]["seed"] == 0
    assert lines[-1]["model"] == "out"
    expected = {"fit": "collision_rate", "rank": "test_auc", "retrieve": "test_ndcg@10"}[command]
    assert 0 <= lines[-2][expected] <= 1
    assert lines[-1]["verdict"]
    assert len(lines) == (3 if command == "fit" else 4)  # one of them an epoch


def test_thresholds_of_the_c_library_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {}
    library = types.SimpleNamespace(
        mallopt=values.__setitem__,
        malloc_trim=lambda pad: values.update(trimmed=True),
        gnu_get_libc_version=None,
    )
    monkeypatch.setattr(loop.ctypes, "CDLL", lambda name: library)
    with pytest.raises(DivergedError), loop.reused_buffers():
        assert values[loop.M_TRIM_THRESHOLD] == 2**31 - 1
        raise DivergedError("a loss")
    assert values[loop.M_TRIM_THRESHOLD] == 2**26
    assert values["trimmed"]


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    # musl has mallopt, for programs that call it, and no version of glibc.
    library = types.SimpleNamespace(
        mallopt=lambda *values: calls.append(values), malloc_trim=lambda pad: calls.append((pad,))
    )
    monkeypatch.setattr(loop.ctypes, "CDLL", lambda name: library)
    with pytest.raises(DivergedError), loop.reused_buffers():
        raise DivergedError("a loss")
    assert calls == []


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "told",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        float64_by_default,
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "float64", "meta"],
)
def test_what_the_caller_told_torch_changes_nothing(told, clustered):
    def results():
        network = semid.RQVAE(levels=2, codebook_size=8, training={"epochs": 2}).fit(clustered)
        mixture = semid.RQGMM(levels=2, codebook_size=8).fit(clustered)
        return [each.encode(clustered).codes for each in (network, mixture)]

    usual = results()
    with told():
        dtype = torch.get_default_dtype()
        other = results()
        assert torch.get_default_dtype() == dtype
    assert all(map(np.array_equal, usual, other))
