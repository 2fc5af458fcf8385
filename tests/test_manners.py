"""Objects behave as Python, numpy, frames, notebooks and scikit-learn expect."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from importlib.metadata import version

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from rich.console import Console
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import semid
from semid import progress as progress_module
from semid.errors import UsageError
from semid.options import argument_types
from semid.progress import (
    JsonProgress,
    NotebookProgress,
    QuietProgress,
    RichProgress,
    with_progress,
    without_default_progress,
)
from semid.tokenizers.factory import TOKENIZERS


def by_joblib(value):
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "joblib": by_joblib,
}


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, object]:
    """One of every public object that holds state."""
    folder = tmp_path_factory.mktemp("objects")
    catalogue = semid.SyntheticCatalogue(items=1000, seed=0)
    catalogue.write(folder / "data")
    x = semid.open_embeddings(folder / "data/embeddings.npy", ids=folder / "data/items.parquet")
    model = semid.RQKMeans(levels=2, codebook_size=8, seed=0).fit(x)
    other = semid.RQKMeans(levels=2, codebook_size=8, seed=1).fit(x)
    ids = model.encode(x)
    log = semid.read_interactions(folder / "data/interactions.parquet")
    few = {"epochs": 1}
    ranking = semid.prepare_ranking_data(log)
    index = semid.PrefixIndex.build(ids)
    return {
        "tokenizer": model,
        "report": model.report,
        "embeddings": x,
        "ids": ids,
        "items": ids.items,
        "unique": semid.make_unique(ids),
        "refresh": semid.refresh(model, ids, x),
        "drift": semid.drift(model, x, x),
        "bundle": semid.CatalogueBundle.create(folder / "published", ids),
        "index": index,
        "interactions": log,
        "synthetic": catalogue,
        "diagnosis": semid.diagnose(model, x),
        "comparison": semid.compare({"one": model, "<two>": other}, x),
        "ranking data": ranking,
        "ranker": semid.train_ranker(ranking, ids=ids, training=few),
        "popularity": semid.train_retriever(log, ids=ids, model="popularity"),
        "retriever": semid.train_retriever(log, ids=ids, model="composed", training=few),
        "sampling": semid.train_retriever(
            log, model="sasrec", options={"negatives": 8}, training=few
        ),
    }


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_equal(objects, way):
    for name, value in objects.items():
        twin = COPIES[way](value)
        assert type(twin) is type(value)
        assert repr(twin) == repr(value), name
    ids, twin = objects["ids"], COPIES[way](objects["ids"])
    assert twin.items == ids.items
    assert np.array_equal(twin.codes, ids.codes)
    assert twin.info == ids.info
    index = COPIES[way](objects["index"])
    assert np.array_equal(index.items(ids.codes[3]), objects["index"].items(ids.codes[3]))
    retriever = objects["retriever"]
    users = retriever.sequences.user_ids.to_pylist()[:3]
    first, second = (
        [each.items for each in model.recommend(users=users, k=5)]
        for model in (retriever, COPIES[way](retriever))
    )
    assert first == second
    assert COPIES[way](objects["comparison"]).to_dict() == objects["comparison"].to_dict()


def test_representations_are_one_short_line(objects):
    for name, value in objects.items():
        assert "\n" not in repr(value), name
        assert "object at 0x" not in repr(value), name
    assert repr(objects["ids"]) == "SemanticIds(1,000 items, rqkmeans, 8 x 8 codewords)"


def test_notebooks_show_a_table_in_which_names_are_escaped(objects):
    for name in ("tokenizer", "ids", "diagnosis", "comparison"):
        html = objects[name]._repr_html_()
        assert html.count("<table>") == 1
    assert "&lt;two&gt;" in html
    assert "<two>" not in html
    assert "not fitted" in semid.RQKMeans()._repr_html_()


def test_ids_are_a_sequence_of_items_and_codes(objects):
    ids = objects["ids"]
    item, codes = ids[-1]
    assert item == ids.items[len(ids) - 1]
    assert np.array_equal(codes, ids.codes[-1])
    pairs = list(ids)
    assert [pair[0] for pair in pairs] == ids.items.strings().to_pylist()
    assert np.array_equal([pair[1] for pair in pairs], ids.codes)
    with pytest.raises(IndexError):
        ids[len(ids)]


def test_several_rows_of_ids_are_ids(objects):
    ids = objects["ids"]
    mask = ids.codes[:, 0] == 3
    for rows, expected in (
        (slice(2, 9, 3), [2, 5, 8]),
        ([4, 1], [4, 1]),
        ([], []),
        (mask, np.flatnonzero(mask)),
        ([-1], [len(ids) - 1]),
    ):
        part = ids[rows]
        assert np.array_equal(part.codes, ids.codes[expected])
        assert [item for item, _ in part] == [ids.items[row] for row in expected]
    for wrong in ([1, 1], [0, -len(ids)], [[1, 2]]):
        with pytest.raises(UsageError, match="rows repeat"):
            ids[wrong]


def test_ids_become_arrays_and_frames(objects):
    ids = objects["ids"]
    assert np.array_equal(np.asarray(ids), ids.codes)
    assert np.asarray(ids, dtype=np.float32).dtype == np.float32
    for frame in (ids.to_pandas(), ids.to_polars()):
        assert list(frame.columns) == ["item_id", "code_0", "code_1", "residual_norm"]
        assert list(frame["item_id"]) == ids.items.strings().to_pylist()
        assert np.array_equal(frame[["code_0", "code_1"]].to_numpy(), ids.codes)
    with pytest.raises(semid.SemidError, match="codes are not embeddings"):
        semid.RQKMeans(levels=1, codebook_size=2).fit(ids)


def test_version_is_that_of_the_package():
    assert semid.__version__ == version("semid")


# scikit-learn --------------------------------------------------------------------------------

NOT_APPLICABLE = {
    "check_do_not_raise_errors_in_init_or_set_params": "arguments are checked when they are given",
    "check_estimators_dtypes": "integers are refused: mostly they are ids or codes",
    "check_complex_data": "refused, with a sentence of semid's own",
    "check_dtype_object": "Python objects are refused, also where they hold numbers",
    "check_estimators_empty_data_messages": "refused, with a sentence of semid's own",
    "check_fit2d_1sample": "refused, with a sentence of semid's own",
    "check_n_features_in_after_fitting": "another width is refused in semid's own words",
    "check_fit2d_predict1d": "a single vector is one item",
    "check_parameters_default_constructible": "a pipeline needs its two tokenizers",
    "check_transformer_data_not_an_array": "lists are refused, with the conversion to write",
}
"""Checks of scikit-learn that cannot apply to a tokenizer, and why."""

SMALL = {
    "levels": 2,
    "n_codebooks": 1,
    "codebook_size": 2,
    "validation_fraction": 0,
    "kmeans": {"max_iter": 2},
    "network": {"hidden": (4,), "latent": 2},
    "training": {"epochs": 1},
    "rotation_iter": 1,
    "max_em_iter": 1,
}
FAST = ("rqkmeans", "pq")
OF_KIND = {
    "barq": {"behavior_weight": 0},
    "fsq": {"dimension_levels": (2,), "groups": 1, "network": {"hidden": (4,)}},
    "pipeline": {
        "encoder": {
            "tokenizer": "vqvae",
            "codebook_size": 2,
            "network": {"hidden": (4,), "latent": 2},
            "training": {"epochs": 1},
        },
        "quantizer": {"tokenizer": "rqkmeans", "levels": 1, "codebook_size": 2},
    },
}


@pytest.mark.filterwarnings("ignore:.*does not inherit from:UserWarning")
@pytest.mark.filterwarnings("ignore:.*delay parameter validation:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k not in FAST)) for k in sorted(TOKENIZERS)],
)
def test_scikit_learn_checks_pass(kind, caplog):
    caplog.set_level(logging.ERROR)
    names = argument_types(TOKENIZERS.load(kind))
    settings = {k: v for k, v in {**SMALL, **OF_KIND.get(kind, {})}.items() if k in names}
    tokenizer = TOKENIZERS.load(kind)(**settings)
    results = check_estimator(tokenizer, on_fail=None, on_skip=None)
    failed = {
        result["check_name"]: result["exception"]
        for result in results
        if result["status"] == "failed" and result["check_name"] not in NOT_APPLICABLE
    }
    assert not failed
    assert sum(result["status"] == "passed" for result in results) > 30


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 6))


def test_set_output_gives_frames(x):
    pipeline = make_pipeline(StandardScaler(), semid.RQKMeans(levels=2, codebook_size=4))
    expected = pipeline.fit_transform(x)
    frame = pd.DataFrame(x, columns=list("abcdef"), index=np.arange(200) + 7)
    coded = sklearn.base.clone(pipeline).set_output(transform="pandas").fit_transform(frame)
    assert isinstance(coded, pd.DataFrame)
    assert list(coded.columns) == ["rqkmeans0", "rqkmeans1"]
    assert list(coded.index) == list(frame.index)
    assert np.array_equal(coded, expected)
    twin = pickle.loads(pickle.dumps(pipeline.set_output(transform="polars")))
    for copied in (pipeline, twin):
        coded = copied.transform(x)
        assert isinstance(coded, pl.DataFrame)
        assert np.array_equal(coded, expected)
    with sklearn.config_context(transform_output="pandas"):
        coded = semid.RQKMeans(levels=2, codebook_size=4).fit_transform(x)
    assert isinstance(coded, pd.DataFrame)
    with pytest.raises(UsageError, match="'arrow' is not one of"):
        semid.RQKMeans().set_output(transform="arrow")


def test_frames_of_one_column_per_dimension_are_a_matrix(x):
    expected = semid.RQKMeans(levels=1, codebook_size=4).fit(x)
    for frame in (pd.DataFrame(x), pl.DataFrame(x)):
        model = semid.RQKMeans(levels=1, codebook_size=4).fit(frame)
        assert model.codebook_fingerprint == expected.codebook_fingerprint
    with pytest.raises(semid.SemidError, match="no column of float lists"):
        semid.open_embeddings(pd.DataFrame(x).assign(count=1))


# Progress ------------------------------------------------------------------------------------


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_lines_without_a_terminal_come_once_a_second(capsys, clock):
    progress = JsonProgress()
    progress.start("fit", total=50)
    for _ in range(50):
        clock.now += 0.1
        progress.step()
    progress.close()
    assert 5 <= len(capsys.readouterr().err.splitlines()) <= 6


def test_a_notebook_gets_one_line_per_task_that_lasts(capsys, clock):
    progress = NotebookProgress()
    progress.start("short", total=2)
    progress.step()
    progress.start("train", total=3)
    for loss in (0.5, 0.25):
        clock.now += 2
        progress.step(loss=loss)
    progress.close()
    text = capsys.readouterr().err
    assert "short" not in text
    assert text.count("\n") == 1
    assert text.splitlines()[-1].split() == ["train", "2/3", "4", "s", "loss", "0.25"]


def test_bars_stay_visible_at_80_columns(clock):
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    bars = RichProgress(screen, delay=99)  # drawn below, not by itself
    bars.start("train rqvae with a long name", total=1000)
    figures = {"train_loss": 0.123456, "validation_loss": 0.2345678, "learning_rate": 0.001}
    bars.step(500, epoch=12, **figures)
    with screen.capture() as captured:
        screen.print(bars._bars.get_renderable())
    bars.close()
    line = captured.get().strip("\n")
    assert "\n" not in line
    assert len(line) <= 80
    assert line.count("━") + line.count("╺") + line.count("╸") >= 10
    assert "500/1000" in line


@with_progress
def work(*, progress=None):
    return progress, inner()


@with_progress
def inner(*, progress=None):
    return progress


def test_functions_show_progress_by_themselves_once(monkeypatch):
    closed = []

    class Recorded(QuietProgress):
        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(progress_module.Console, "is_terminal", property(lambda self: True))
    monkeypatch.setattr(progress_module, "RichProgress", lambda *a, **k: Recorded())
    shown, nested = work()
    assert isinstance(shown, Recorded)
    assert closed == [shown]
    assert type(nested) is QuietProgress
    own = Recorded()
    assert work(progress=own)[0] is own
    assert len(closed) == 1
    assert type(work(progress=False)[0]) is type(work(progress=False)[1]) is QuietProgress
    with without_default_progress():
        assert type(work()[0]) is QuietProgress
    assert isinstance(inner(), Recorded)
    monkeypatch.undo()
    assert type(inner()) is QuietProgress


def test_bars_appear_after_a_second_of_work(clock):
    screen = Console(file=io.StringIO(), width=80, force_terminal=True)
    bars = RichProgress(screen, delay=1)
    bars.start("fit", total=3)
    bars.step()
    assert not bars._bars.live.is_started
    clock.now += 1.5
    bars.step()
    assert bars._bars.live.is_started
    bars.close()
    assert "fit" in screen.file.getvalue()
