"""Training improves and returns the best; features, fusion and controls do what they say."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rank_cases import QUICK, SMALL, codes, data, item_table, log_table
from semid.errors import UsageError
from semid.recommenders.ranking.analysis import (
    analyze_codes,
    code_embeddings,
    correlation,
    linear_cka,
    singular_values,
)
from semid.recommenders.ranking.builder import RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data
from semid.recommenders.ranking.features import CodeFeatures, code_table
from semid.recommenders.ranking.metrics import auc, predict_logits, reliance
from semid.recommenders.ranking.network import RankerConfig, make_network
from semid.recommenders.ranking.stream import RankingStream
from semid.recommenders.ranking.training import (
    RowwiseAdamW,
    make_optimizer,
    rank_options,
    train_ranker,
)
from semid.reproduce.reconstruction_probe import probe_reconstruction
from semid.training.checkpoint import module_arrays
from training_cases import Stop

ARCHITECTURE = RankerConfig(width=4, options=SMALL)


@pytest.fixture(scope="module")
def rows():
    return data(cold_items=0.15)


@pytest.fixture(scope="module")
def coded(rows):
    return train_ranker(
        rows,
        ids=codes(),
        features=CodeFeatures(mode="levels", scale=2),
        config=replace(ARCHITECTURE, width=8, fusion=True, fusion_rank=4, unknown_rate=0.1),
        training={**QUICK, "epochs": 12, "batch_size": 128},
    )


def test_training_improves_beats_popularity_and_returns_the_best(rows, coded):
    report = coded.report
    history = [epoch["score"] for epoch in report["training"]["history"]]
    assert report["training"]["best_score"] == max(history)
    assert report["validation"]["auc"] == pytest.approx(max(history))
    assert max(history) > history[0] + 0.1
    assert report["test"]["auc"] > report["test"]["popularity_auc"] + 0.1
    assert report["protocol"].startswith(rows.protocol)


def test_best_weights_come_back_although_nothing_stopped(rows):
    found = train_ranker(
        rows, config=ARCHITECTURE, training={**QUICK, "learning_rate": 0.2, "patience": None}
    )
    history = [epoch["score"] for epoch in found.report["training"]["history"]]
    assert len(history) == QUICK["epochs"]
    labels = rows.parts["validation"].label.numpy()
    logits = predict_logits(found.network, rows.parts["validation"])
    assert auc(labels, logits) == pytest.approx(max(history))


def test_codes_carry_over_to_items_never_seen(coded):
    assert coded.report["cold"]["auc"] > 0.65
    assert coded.report["items_without_codes"] == 0


def test_fusion_and_codes_are_used(rows, coded):
    found = reliance(coded.network, rows)
    assert found["fusion_norm"] > 0
    assert found["auc"] == pytest.approx(coded.report["test"]["auc"])
    assert found["auc_without_fusion"] != found["auc"]
    assert found["auc_codes_shuffled"] < found["auc"]
    assert reliance(coded.network, rows) == found  # everything was put back


def test_the_same_seed_trains_the_same_and_fusion_begins_as_nothing(rows):
    def start(**changes):
        return make_network(rows.schema, None, replace(ARCHITECTURE, **changes), seed=5)

    a, b = start(), start()
    assert all(
        np.array_equal(x, y)
        for x, y in zip(module_arrays(a).values(), module_arrays(b).values(), strict=True)
    )
    part = rows.parts["test"]
    with_fusion = start(fusion=True)
    plain = module_arrays(with_fusion)
    kept = {n: torch.from_numpy(v) for n, v in plain.items() if not n.startswith("fusion")}
    a.load_state_dict(kept)
    assert np.array_equal(predict_logits(with_fusion, part), predict_logits(a, part))


def test_embeddings_are_those_of_each_field_alone():
    found = data(categorical=("device",), dense=("price",), history=3)
    table = code_table(codes(skip=5), found.schema.items.ids, CodeFeatures(mode="ngram"))
    network = make_network(found.schema, table, ARCHITECTURE).eval()
    tables, index, schema = network.tables, network.index, found.schema
    part = found.parts["test"]
    inputs, _ = part.batch(torch.arange(12))
    with torch.no_grad():
        e = network.embed(inputs)
    names = "user item brand device categories price history:item code:sum history:code:sum"
    assert network.field_names == names.split()
    starts = np.cumsum(
        [
            0,
            len(schema.users),
            schema.id_size,
            len(schema.attributes["brand"].vocabulary),
            len(schema.context["device"]),
        ]
    )
    base, code = tables.base.detach(), tables.codes.detach()
    offsets = np.cumsum([0, *table.sizes])
    mean, spread = schema.dense["price"]

    def mean_of(vectors):
        return torch.stack(vectors).mean(0) if vectors else torch.zeros(4)

    for row in range(12):
        item = int(inputs.item[row])
        past = [int(i) for i in inputs.history[row] if i]

        def id_of(i):
            return base[starts[1] + schema.id_rows[i]]

        def code_of(i):
            return sum(code[offsets[s] + table.rows[i, s]] for s in range(2))

        categories = [int(c) for c in schema.attributes["categories"].rows[item] if c]
        expected = [
            base[inputs.user[row]],
            id_of(item),
            base[starts[2] + schema.attributes["brand"].rows[item]],
            base[starts[3] + inputs.context[row, 0]],
            mean_of([base[starts[4] + c] for c in categories]),
            (inputs.dense[row, 0] - mean) / spread * tables.dense.detach()[0],
            mean_of([id_of(i) for i in past]),
            code_of(item),
            mean_of([code_of(i) for i in past]),
        ]
        assert torch.allclose(e[row], torch.stack(expected), atol=1e-6)
    assert index.item_rows.requires_grad is False


def test_unknown_rows_start_at_zero_and_say_nothing(rows):
    table = code_table(codes(skip=5), rows.schema.items.ids, CodeFeatures())
    network = make_network(rows.schema, table, ARCHITECTURE)
    zeros = torch.zeros(2, dtype=torch.int64)
    inputs, _ = rows.parts["test"].batch(torch.arange(2))
    unknown = inputs._replace(user=zeros, item=zeros)
    assert network.eval().embed(unknown).abs().sum() == 0


def test_codes_have_a_rate_and_a_decay_of_their_own(rows):
    table = code_table(codes(), rows.schema.items.ids, CodeFeatures())
    network = make_network(rows.schema, table, ARCHITECTURE)
    options = rank_options({"weight_decay": 0.01})
    groups = make_optimizer(network, options, CodeFeatures(rate=3.0, weight_decay=0.2)).param_groups
    assert [g.get("rate", 1.0) for g in groups] == [1.0, 3.0]
    assert [g["weight_decay"] for g in groups] == [0.01, 0.2]
    assert {id(p) for p in groups[1]["params"]} == {
        id(network.tables.codes),
        id(network.first.codes),
    }
    still = train_ranker(
        rows,
        ids=codes(),
        features={"rate": 1e-12},
        config=ARCHITECTURE,
        training={**QUICK, "epochs": 1},
        seed=3,
    )
    begin = make_network(rows.schema, still.codes, ARCHITECTURE, seed=3)
    assert torch.allclose(still.network.tables.codes, begin.tables.codes, atol=1e-9)
    assert not torch.allclose(still.network.tables.base, begin.tables.base, atol=1e-4)


def test_row_wise_adam_is_adam_on_the_rows_it_touches():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 3, generator=generator)
    dense = torch.nn.Parameter(start.clone())
    sparse = torch.nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.01}
    plain = torch.optim.AdamW([dense], **options)
    lazy = RowwiseAdamW([sparse], fused=True, **options)
    every = torch.arange(6)
    for step in range(4):
        weight = torch.randn(6, 3, generator=generator)
        for parameter, kind in ((dense, False), (sparse, True)):
            parameter.grad = None
            # Repeated rows add up.
            rows = torch.cat([every, every[:2]])
            found = torch.nn.functional.embedding(rows, parameter, sparse=kind)
            (found[:6] * weight).sum().add((found[6:] ** 2).sum()).backward()
        plain.step()
        lazy.step()
        assert torch.allclose(dense, sparse, atol=1e-6), step
    kept = sparse.detach().clone()
    torch.nn.functional.embedding(every[:2], sparse, sparse=True).sum().backward()
    lazy.step()
    assert torch.equal(sparse[2:], kept[2:])
    assert not torch.equal(sparse[:2], kept[:2])


def test_a_penalty_shrinks_embeddings_of_items_and_codes(rows):
    def trained(l2):
        config = replace(ARCHITECTURE, embedding_penalty=l2)
        return train_ranker(rows, ids=codes(), config=config, training=QUICK)

    free, held = trained(0.0), trained(1.0)
    for name in ("base", "codes"):
        sizes = [getattr(one.network.tables, name).square().sum() for one in (free, held)]
        assert sizes[1] < 0.5 * sizes[0]
    # The loss is the log loss plus half of the penalty times all squares.
    batch = next(iter(rows.batches(64, seed=0, device=torch.device("cpu")).batches(0, 0)))[0]
    network = held.network.eval()
    with torch.no_grad():
        squares = sum(p.square().sum() for t in network.all_tables for p in t.parameters())
        full, network.embedding_penalty = network(batch).loss, 0.0
        assert full.item() == pytest.approx((network(batch).loss + squares / 2).item())
    with pytest.raises(UsageError, match="embedding_penalty"):
        config = replace(ARCHITECTURE, sparse=True, embedding_penalty=0.1)
        train_ranker(rows, config=config, training=QUICK)


def test_large_tables_train_row_by_row(rows):
    found = train_ranker(
        rows, ids=codes(), config=replace(ARCHITECTURE, sparse=True), training=QUICK
    )
    assert found.network.sparse
    assert found.report["test"]["auc"] > found.report["test"]["popularity_auc"]
    with pytest.raises(UsageError, match="clip_norm"):
        train_ranker(rows, config=replace(ARCHITECTURE, sparse=True), training={"clip_norm": 1.0})


def test_the_widened_id_costs_what_the_codes_would(rows):
    ids = codes(levels=3, size=64)
    plain = train_ranker(rows, ids=ids, config=ARCHITECTURE, training={**QUICK, "epochs": 1})
    wide = train_ranker(
        rows,
        ids=ids,
        features={"control": "widened"},
        config=ARCHITECTURE,
        training={**QUICK, "epochs": 1},
    )
    extra = wide.report["parameters"]["wide"]
    assert wide.network.field_names[-3:] == ["wide:1", "wide:2", "wide:3"]
    assert wide.network.fields == plain.network.fields
    assert extra == pytest.approx(3 * 65 * 4, rel=0.1)


def test_a_stopped_run_resumes_to_the_same_bits(rows, tmp_path):
    settings = {
        "ids": codes(),
        "config": replace(ARCHITECTURE, options={"hidden": (8,)}),
        "training": {**QUICK, "epochs": 3},
    }
    whole = train_ranker(rows, **settings)
    with pytest.raises(KeyboardInterrupt):
        train_ranker(rows, checkpoint=tmp_path / "s", progress=Stop(5), **settings)
    again = train_ranker(rows, checkpoint=tmp_path / "s", resume=True, **settings)
    left, right = module_arrays(whole.network), module_arrays(again.network)
    assert all(np.array_equal(left[name], right[name]) for name in left)
    assert whole.report["training"] == again.report["training"]


def test_a_stream_trains(tmp_path):
    pq.write_table(log_table(), tmp_path / "log.parquet", row_group_size=300)
    stream = RankingStream.open(
        tmp_path / "log.parquet",
        items=item_table(),
        config=RankingDataConfig(label="rating>=4", dense=("price",)),
        buffer_rows=256,
    )
    found = train_ranker(stream, ids=codes(), config=ARCHITECTURE, training=QUICK)
    assert found.report["test"]["auc"] > found.report["test"]["popularity_auc"]


def test_context_and_history_train():
    table = log_table()
    found = prepare_ranking_data(
        table,
        items=item_table(),
        config=RankingDataConfig(
            label="rating>=4", history=3, categorical=("device",), dense=("price",)
        ),
    )
    ranker = train_ranker(found, ids=codes(), config=ARCHITECTURE, training=QUICK)
    assert "history:code:1" in ranker.network.field_names
    before = copy.deepcopy(ranker.network.state_dict())
    assert ranker.report["test"]["auc"] > 0.6
    assert all(torch.isfinite(v).all() for v in before.values())


def test_analysis_of_code_embeddings(rows, coded):
    e = code_embeddings(coded.network, rows.parts["test"])
    found = analyze_codes(coded.network, rows.parts["test"], clusters=(4, 8), default=4)
    assert found.fields == ("code:1", "code:2")
    assert [d.clusters for d in found.sweep] == [4, 8]
    flat = e.reshape(len(e), -1)
    assert singular_values(e) == pytest.approx(
        np.linalg.svd(flat.astype(np.float64), compute_uv=False), abs=1e-5
    )
    assert np.diag(found.cka) == pytest.approx(1)
    assert np.diag(found.correlation) == pytest.approx(1)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 1, 4)).astype(np.float32)
    turn = np.linalg.qr(generator.normal(size=(4, 4)))[0].astype(np.float32)
    pair = np.concatenate([x, 2 * x @ turn], 1)
    assert linear_cka(pair)[0, 1] == pytest.approx(1, abs=1e-5)
    assert abs(correlation(pair)[0, 1]) < 0.99
    assert code_embeddings(coded.network, rows.parts["test"], fused=True).shape == e.shape
    assert set(found.to_dict()) >= {"sweep", "levels", "codes", "cka", "singular_values"}


def test_reconstruction_improves_with_codes_that_tell_more():
    ids = codes(levels=2, size=8)
    generator = np.random.default_rng(1)
    centers = [generator.normal(size=(8, 6)) for _ in range(2)]
    x = sum(c[ids.codes[:, level]] for level, c in enumerate(centers)).astype(np.float32)
    quick = {"epochs": 25, "batch_size": 8, "learning_rate": 0.01, "precision": "fp32"}
    one, two = (
        probe_reconstruction(
            x, ids, features=CodeFeatures(scale=scale), width=8, held_out=0.2, training=quick
        )
        for scale in (1, 2)
    )
    assert two.error < one.error
    assert two.train_error < 0.5 * one.train_error
    assert two.items + two.held_out == len(x)


def test_information_kept_is_learnt_at_any_scale_of_the_embeddings():
    ids = codes(levels=2, size=8)
    centers = np.random.default_rng(1).normal(size=(8, 384)).astype(np.float32)
    x = centers[ids.codes[:, 0]] + centers[::-1][ids.codes[:, 1]]
    errors = [
        probe_reconstruction(factor * x + shift, ids, width=8, training={"precision": "fp32"}).error
        for factor, shift in ((1.0, 0.0), (0.03, 0.2))
    ]
    assert errors[0] < 0.3
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
