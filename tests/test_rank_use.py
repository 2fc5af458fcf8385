"""A trained model in use: saved and loaded, unknown rows, new items, graphs."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest
import torch

import semid
from rank_cases import SMALL, codes, data, item_table, log_table
from semid.errors import ArtefactError, FingerprintError, InputError, OutputExistsError, UsageError
from semid.exports.ranking_graph import input_names, write_onnx, write_torch_export
from semid.recommenders.ranking.features import CodeFeatures
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.training import train_ranker

ONE = {"epochs": 1, "batch_size": 512, "precision": "fp32"}


def trained(model="deepfm", *, mode="levels", **options):
    return train_ranker(
        data(**options),
        ids=codes(skip=2),
        features=CodeFeatures(mode=mode),
        config=RankerConfig(model=model, width=4, options=SMALL, fusion=True, fusion_rank=2),
        training=ONE,
    )


@pytest.fixture(scope="module")
def ranker():
    return trained(categorical=("device",), dense=("price",), history=3, cold_items=0.1)


def test_saved_and_loaded_scores_the_same(ranker, tmp_path, caplog):
    table = log_table().slice(0, 50)
    ranker.save(tmp_path / "m")
    again = semid.load(tmp_path / "m")
    caplog.set_level(logging.CRITICAL)
    assert np.array_equal(ranker.predict(table).logit, again.predict(table).logit)
    assert again.report == ranker.report
    assert again.codebook_fingerprint == "a" * 64
    assert again.features == ranker.features
    assert ranker.report["protocol"] in (tmp_path / "m" / "README.md").read_text()
    with pytest.raises(OutputExistsError):
        ranker.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtefactError, match="cut short"):
        semid.load(tmp_path / "m")


def test_predict_agrees_with_the_rows_of_the_test_part(ranker):
    found = data(categorical=("device",), dense=("price",), history=3, cold_items=0.1)
    rows = found.parts["train"]
    one = rows.batch(torch.arange(1))[0]
    table = log_table()
    user, item = one.user[0], one.item[0]
    names = ranker.schema.users.strings(), ranker.schema.items.strings()
    key = (names[0][user - 1], names[1][item - 1])
    raw = next(r for r in table.to_pylist() if (r["user_id"], r["item_id"]) == key)
    past = [names[1][i - 1] for i in one.history[0].tolist() if i][::-1]
    scored = ranker.predict(
        {**{k: [raw[k]] for k in ("user_id", "item_id", "device", "price")}, "history": [past]}
    )
    with torch.no_grad():
        expected = ranker.network.logits(one)
    assert scored.logit == pytest.approx(expected.numpy(), abs=1e-5)
    assert scored.probability == pytest.approx(torch.sigmoid(expected).numpy(), abs=1e-5)


def test_unknown_users_and_items_are_counted_and_said(ranker, caplog):
    frame = {
        "user_id": ["u1", "nobody", "u2"],
        "item_id": ["i5", "i6", "nothing"],
        "device": ["web", "watch", None],
        "price": [10.0, 11.0, 9.0],
    }
    with caplog.at_level(logging.WARNING):
        found = ranker.predict(frame)
    assert len(found) == 3
    assert np.isfinite(found.probability).all()
    assert found.unknown["user"] == 1
    assert found.unknown["item"] == 1
    assert found.unknown["device"] == 2
    assert found.unknown["codes"] >= 1
    assert "1 by user" in caplog.text


def test_rank_orders_by_predict(ranker, caplog):
    caplog.set_level(logging.CRITICAL)
    context = {"device": "web", "price": 10.0}
    wanted = ["i9", "i3", "i20", "i4", "i40"]
    found = ranker.rank("u3", wanted, context=context)
    scores = ranker.predict(
        {"user_id": ["u3"] * 5, "item_id": wanted, "device": ["web"] * 5, "price": [10.0] * 5}
    )
    assert found.items == [wanted[n] for n in np.argsort(-scores.logit, kind="stable")]
    assert (np.diff(found.probability) <= 0).all()
    assert ranker.rank("u3", wanted, k=2, context=context).items == found.items[:2]
    assert len(ranker.rank("u3", context=context).items) == len(ranker.schema.items) - 1


def test_bad_rows_are_refused(ranker):
    good = {"user_id": ["u1"], "item_id": ["i5"], "device": ["web"], "price": [10.0]}
    with pytest.raises(UsageError, match="price"):
        ranker.predict({k: v for k, v in good.items() if k != "price"})
    with pytest.raises(InputError, match=r"(?s)'device'.*'price'.*NaN"):
        ranker.predict({**good, "device": [1.5], "price": [float("nan")]})
    with pytest.raises(InputError, match="'item_id' of"):
        ranker.predict({**good, "item_id": [1.5]})
    with pytest.raises(InputError, match="lists of item ids"):
        ranker.predict({**good, "history": [3]})


@pytest.mark.parametrize("mode", ["levels", "prefix"])
def test_new_items_come_in_by_their_codes(mode, caplog):
    caplog.set_level(logging.CRITICAL)
    ranker = trained(mode=mode)
    ids = codes(items=50)
    twin = np.array(ids.codes)
    twin[48] = twin[9]  # a new item with the codes of an old one
    ids = semid.SemanticIds(ids.items, twin, ids.residual_norms, ids.info)
    items = item_table(50)
    grown = ranker.with_items(items, ids=ids)
    assert len(grown.schema.items) == 51
    pairs = {"user_id": ["u1", "u2"], "item_id": ["i7", "i30"]}
    assert np.array_equal(ranker.predict(pairs).logit, grown.predict(pairs).logit)
    assert grown.predict({"user_id": ["u1"], "item_id": ["i48"]}).unknown == {
        "user": 0,
        "item": 0,
        "item_id": 1,
        "codes": 0,
    }
    assert np.array_equal(grown.codes.rows[49], grown.codes.rows[10])
    with pytest.raises(FingerprintError, match="another codebook"):
        ranker.with_items(items, ids=codes(items=50, fingerprint="c" * 64))
    with pytest.raises(UsageError, match="knows all"):
        ranker.with_items(item_table())


def sample(schema, rows):
    generator = torch.Generator().manual_seed(0)

    def draw(top, *shape):
        return torch.randint(0, top, shape, generator=generator)

    made = {
        "user": draw(len(schema.users), rows),
        "item": draw(len(schema.items), rows),
        "context": draw(3, rows, len(schema.context)),
        "dense": torch.randn(rows, len(schema.dense), generator=generator),
        "history": draw(len(schema.items), rows, schema.history),
    }
    return [made[name] for name in input_names(schema)]


def expected_scores(ranker, given):
    from semid.exports.ranking_graph import RankingGraph

    with torch.no_grad():
        return RankingGraph(ranker)(*given)


def test_the_exported_graph_scores_the_same(ranker, tmp_path):
    write_torch_export(tmp_path / "m.pt2", ranker=ranker)
    graph = torch.export.load(tmp_path / "m.pt2").module()
    for rows in (1, 5, 64):
        given = sample(ranker.schema, rows)
        assert torch.allclose(graph(*given), expected_scores(ranker, given), atol=1e-6)
    with pytest.raises(OutputExistsError):
        write_torch_export(tmp_path / "m.pt2", ranker=ranker)


def check_onnx(ranker, path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_onnx(path, ranker=ranker)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 5, 64):
        given = sample(ranker.schema, rows)
        fed = {n: t.numpy() for n, t in zip(input_names(ranker.schema), given, strict=True)}
        (found,) = session.run(["probability"], fed)
        assert found == pytest.approx(expected_scores(ranker, given).numpy(), abs=1e-5)


@pytest.mark.slow
def test_onnx_with_context_and_history(ranker, tmp_path):
    check_onnx(ranker, tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepfm", "deepim", "autoint", "dcnv2"])
def test_onnx_of_every_model(model, tmp_path):
    check_onnx(trained(model), tmp_path / "m.onnx")


def test_models_without_codes(tmp_path):
    ranker = train_ranker(data(), config=RankerConfig(width=4, options=SMALL), training=ONE)
    ranker.save(tmp_path / "m")
    again = semid.load(tmp_path / "m")
    frame = pa.table({"user_id": ["u1"], "item_id": ["i1"]})
    assert np.array_equal(again.predict(frame).logit, ranker.predict(frame).logit)
    assert again.codebook_fingerprint is None
    with pytest.raises(UsageError, match="trained without codes"):
        again.check_codes(codes())
    with pytest.raises(UsageError, match="give ids="):
        train_ranker(data(), features={"mode": "levels"}, training=ONE)
