"""Next-item models: metrics against brute force, what each part learns, and what a user can do."""

import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

import semid
from catalogue_cases import codes_info
from cli_cases import run
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.errors import FingerprintError, InteractionsError, UsageError
from semid.recommenders.retrieval.data import MIN_INTERACTIONS, pack, prepare_retrieval_data
from semid.recommenders.retrieval.evaluation import target_ranks
from semid.recommenders.retrieval.layers import (
    CodeSum,
    SoftmaxLoss,
    Transformer,
    TransformerOptions,
)
from semid.recommenders.retrieval.metrics import (
    MISSING,
    NDCGS,
    RECALLS,
    Ranks,
    popularity_slices,
    user_metrics,
)
from semid.recommenders.retrieval.networks import (
    MODELS,
    Composed,
    ComposedOptions,
    SASRec,
    SASRecOptions,
    _Sampler,
    make_model,
)
from semid.recommenders.retrieval.retriever import Retriever
from semid.recommenders.retrieval.training import train_retriever

ITEMS, SIZES = 60, (6, 8, 4)
CPU = torch.device("cpu")
SMALL = {"width": 32, "dropout": 0.0, "layers": 1}
QUICK = {"epochs": 25, "batch_size": 16, "learning_rate": 5e-3, "patience": None}
TINY_T5 = {"width": 16, "layers": 1, "heads": 2, "head_width": 8, "mlp_width": 32, "dropout": 0.0}
OPTIONS = {
    "popularity": {},
    "text-knn": {},
    "sasrec": SMALL,
    "composed": SMALL,
    "parallel": {**SMALL, "temperature": 0.2},
    "generative": {**SMALL, "beams": 20},
    "tiger": {**TINY_T5, "beams": 20},
}
LEARNED = ("sasrec", "composed", "parallel", "generative")


def make_ids(*, shared: bool = False, items: int = ITEMS) -> SemanticIds:
    """Ids whose codes count up with the item; with ``shared`` two items have each id."""
    number = np.arange(items) // (2 if shared else 1)
    codes = np.stack([number // 10 % SIZES[0], number % 8, number // 8 % SIZES[2]], axis=1)
    names, norms = ItemIds([f"i{item}" for item in range(items)]), np.zeros(items, np.float32)
    return SemanticIds(names, codes.astype(np.uint16), norms, codes_info(SIZES))


def make_log(*, users: int = 80, length: int = 9, items: int = ITEMS, seed: int = 0) -> pa.Table:
    """Users who walk through the items in steps of one, from a place of their own."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, items, users)
    lengths = generator.integers(length - 3, length + 1, users)
    rows = [
        (f"u{user}", f"i{(start + step) % items}", step)
        for user, (start, count) in enumerate(zip(starts, lengths, strict=True))
        for step in range(count)
    ]
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(("user_id", "item_id", "timestamp"), columns, strict=True)))


def make_vectors(items: int = ITEMS) -> np.ndarray:
    """Vectors on a circle, so that neighbors on the walk are neighbors in space."""
    angle = 2 * np.pi * np.arange(items) / items
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def fit(model: str, **changes) -> Retriever:
    """Train a model on the walks."""
    keywords = {"ids": make_ids(), "options": OPTIONS[model], "training": QUICK} | changes
    if model == "text-knn":
        keywords |= {"embeddings": make_vectors(), "items": make_ids().items}
    return train_retriever(make_log(), model=model, **keywords)


@pytest.fixture(scope="module")
def trained() -> dict[str, Retriever]:
    """Every model, trained once."""
    return {model: fit(model) for model in OPTIONS if model != "tiger"}


# Metrics --------------------------------------------------------------------------------------


def test_metrics_equal_a_mean_over_all_orders_of_ties():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, (30, 6)).astype(np.float64)
    target = generator.integers(0, 6, 30)
    at_target = scores[np.arange(30), target][:, None]
    ranks = Ranks((scores > at_target).sum(1), (scores == at_target).sum(1))
    metrics = user_metrics(ranks)
    worst, best = user_metrics(ranks, "worst"), user_metrics(ranks, "best")
    for row in range(30):
        places = []
        for order in itertools.permutations(range(6)):
            # A stable sort of the permuted items: one order of the ties.
            listed = sorted(order, key=lambda item: -scores[row, item])
            places.append(listed.index(target[row]) + 1)
        place = np.array(places)
        for k in RECALLS:
            assert metrics[f"recall@{k}"][row] == pytest.approx((place <= k).mean())
        for k in NDCGS:
            gains = np.where(place <= k, 1 / np.log2(place + 1), 0)
            assert metrics[f"ndcg@{k}"][row] == pytest.approx(gains.mean())
            assert best[f"ndcg@{k}"][row] == pytest.approx(gains.max())
            assert worst[f"ndcg@{k}"][row] == pytest.approx(gains.min())
        assert metrics["mrr"][row] == pytest.approx((1 / place).mean())


def test_targets_outside_the_list_are_misses():
    metrics = user_metrics(Ranks(np.array([MISSING, 0]), np.array([1, 1])))
    assert all(values[0] == 0 and values[1] == 1 for values in metrics.values())


def test_popularity_slices_take_a_third_of_the_interactions_each():
    counts = np.array([30, 10, 10, 10, 5, 5, 5, 5, 5, 5, 0])
    masks = popularity_slices(counts, np.arange(11))
    sums = [int(counts[masks[name]].sum()) for name in ("head items", "mid items", "tail items")]
    assert sums == [30, 30, 30]
    assert np.flatnonzero(masks["unseen items"]).tolist() == [10]
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1] * 11


@pytest.mark.parametrize("model", ["sasrec", "composed", "generative"])
def test_ranks_equal_a_loop_over_users_and_items(model):
    data = prepare_retrieval_data(make_log(), ids=make_ids(shared=True))
    network = make_model(model, data.items, MODELS.load(model).options.of(OPTIONS[model]), seed=0)
    histories, targets = data.histories("test", 5)
    # Some users had the target before.
    histories = [
        np.append(history[1:], target) if user % 7 == 0 else history
        for user, (history, target) in enumerate(zip(histories, targets, strict=True))
    ]
    counts = data.items.counts
    ranks = target_ranks(network, histories, targets, counts=counts, device=CPU)
    classes = network.classes.numpy()
    network.eval()
    listed = set()
    for user, (history, target) in enumerate(zip(histories, targets, strict=True)):
        with torch.no_grad():
            scores, best = network.top(pack([history]), len(classes))
        by_class = np.full(classes.max() + 1, -np.inf)
        by_class[best[0]] = scores[0]
        by_item = by_class[classes]
        if not network.exact:  # the search lists fewer ids than there are
            by_item = np.where(np.isin(classes, best[0, :50].numpy()), by_item, -np.inf)
        mine = by_item[target]
        # Users are scored in batches, so near-equal sums may round to either side.
        assert ranks.items.above[user] == pytest.approx((by_item > mine).sum(), abs=1)
        assert ranks.items.ties[user] == (by_item == mine).sum()
        outside = ~np.isin(np.arange(len(by_item)), history)
        if target in history:
            assert ranks.without_history.above[user] == MISSING
        else:
            above = (by_item[outside] > mine).sum()
            assert ranks.without_history.above[user] == pytest.approx(above, abs=1)
            assert ranks.without_history.ties[user] == (by_item[outside] == mine).sum()
        order = np.lexsort((np.arange(len(by_item)), -counts, classes, -by_item))
        listed |= set(order[:10].tolist())
    assert np.mean(ranks.listed) == pytest.approx(len(listed) / len(classes), abs=0.1)
    assert (ranks.ids is None) == (model == "sasrec")


# Parts of the networks ------------------------------------------------------------------------


def test_packed_histories_give_the_states_of_single_ones():
    torch.manual_seed(0)
    transformer = Transformer(TransformerOptions(width=16, dropout=0.0, max_length=8)).eval()
    table = torch.randn(20, 16)
    generator = np.random.default_rng(1)
    histories = [generator.integers(0, 20, length) for length in (3, 8, 1, 5, 2, 2)]
    packed = pack(histories)
    assert packed.items.shape == (3, 8)
    states = transformer(table[packed.items], packed)
    for row, history in enumerate(histories):
        alone = pack([history])
        torch.testing.assert_close(states[row], transformer(table[alone.items], alone)[0])
    # With targets every place predicts, and none sees a later one.
    training = pack(histories, [np.roll(history, -1) for history in histories])
    states = transformer(table[training.items], training)
    expected = []
    for history in histories:
        for end in range(1, len(history) + 1):
            alone = pack([history[:end]])
            expected.append(transformer(table[alone.items], alone)[0])
    torch.testing.assert_close(states, torch.stack(expected))
    assert training.targets.tolist() == [i for h in histories for i in np.roll(h, -1)]


def test_layers_start_near_the_identity():
    torch.manual_seed(0)
    transformer = Transformer(TransformerOptions(width=32, dropout=0.0)).eval()
    vectors = torch.randn(ITEMS, 32) * 0.02
    batch = pack([np.array([item]) for item in range(ITEMS)])
    states = transformer(vectors[batch.items], batch)
    given = functional.layer_norm(vectors + transformer.positions.weight[0], (32,))
    # However small an item's vector is, it is most of what the layers return at first.
    assert functional.cosine_similarity(states, given).min() > 0.9


def test_the_softmax_loss_equals_the_cross_entropy_of_torch():
    torch.manual_seed(0)
    states = torch.randn(600, 8, requires_grad=True)
    vectors = torch.randn(37, 8, requires_grad=True)
    # The last classes are targets alone: they do not stand among the others.
    targets, bias = torch.randint(0, 37, (600,)), torch.randn(37)
    for others in (37, 20):
        columns = torch.where(targets < others, targets, -1)
        parts = (states, vectors[targets], bias[targets], vectors[:others], bias[:others], columns)
        loss = SoftmaxLoss.apply(*parts)
        logits = states @ vectors.T + bias
        beside = (torch.arange(37) >= others) & (torch.arange(37) != targets[:, None])
        expected = functional.cross_entropy(logits.masked_fill(beside, -torch.inf), targets)
        torch.testing.assert_close(loss, expected)
        mine = torch.autograd.grad(3 * loss, (states, vectors))
        theirs = torch.autograd.grad(3 * expected, (states, vectors))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_code_sums_and_their_gradient_equal_a_gather():
    codes = np.array([[0, 1], [2, 0], [0, 0], [2, 1]])
    layer = CodeSum(codes, (3, 2), 5)
    gathered = layer.table[:3][codes[:, 0]] + layer.table[3:][codes[:, 1]]
    torch.testing.assert_close(layer(), gathered)
    weights = torch.randn(4, 5)
    (mine,) = torch.autograd.grad((layer() * weights).sum(), layer.table)
    (theirs,) = torch.autograd.grad((gathered * weights).sum(), layer.table)
    torch.testing.assert_close(mine, theirs)


def test_sampled_softmax_tends_to_the_full_one():
    data = prepare_retrieval_data(make_log(), ids=make_ids())
    torch.manual_seed(0)
    full = SASRec(data.items, SASRecOptions(width=32, dropout=0.0)).eval()
    with torch.no_grad():
        full.table.mul_(20)
    batch = pack(*zip(*data.training(50), strict=True))
    sampled = SASRec(data.items, SASRecOptions(width=32, dropout=0.0, loss="sampled")).eval()
    sampled.load_state_dict(full.state_dict())
    sampled.settings = SASRecOptions(width=32, loss="sampled", negatives=200_000)
    assert sampled(batch).loss.item() == pytest.approx(full(batch).loss.item(), rel=0.02)


def test_inverse_probabilities_of_drawn_classes_count_every_class_once():
    counts = np.array([40, 0, 9, 3, 3, 1, 1])
    sampler, draws = _Sampler(counts, np.arange(7)), 3000
    torch.manual_seed(0)
    weights = torch.zeros(draws, 7)
    targets = torch.arange(7)
    for row in weights:
        drawn, log_probability, columns = sampler(4, targets)
        assert len(drawn.unique()) == len(drawn)
        places = {int(class_): place for place, class_ in enumerate(drawn)}
        assert columns.tolist() == [places.get(class_, -1) for class_ in range(7)]
        row[drawn] = torch.exp(-log_probability)
    error = weights.std(0) / draws**0.5
    wrong = (weights.mean(0) - torch.tensor([1.0, 0, 1, 1, 1, 1, 1])).abs() > 4 * error
    assert not wrong.any(), weights.mean(0)


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_softmax_counts_a_class_as_often_as_it_has_training_items(loss):
    """The loss over distinct ids is the loss over items whose vectors are equal."""
    data = prepare_retrieval_data(make_log(), ids=make_ids(shared=True))
    torch.manual_seed(0)
    options = ComposedOptions(width=16, dropout=0.0, loss=loss, negatives=100_000)
    model = Composed(data.items, options).eval()
    batch = pack(*zip(*data.training(50), strict=True))
    vectors = model.vectors()[model.classes]
    states = model.transformer(vectors[batch.items], batch)
    logits = (states @ vectors.T).masked_fill(torch.from_numpy(data.items.counts == 0), -torch.inf)
    per_item = functional.cross_entropy(logits, batch.targets)
    sizes = torch.bincount(model.classes)[model.classes[batch.targets]]
    # A class's probability is shared by its items.
    assert per_item.item() == pytest.approx(
        (model(batch).loss + sizes.log().mean()).item(), rel=1e-4
    )


@pytest.mark.parametrize("model", ["generative", "tiger"])
def test_a_search_with_a_beam_per_id_equals_scoring_every_id(model):
    pytest.importorskip("transformers")
    data = prepare_retrieval_data(make_log(users=6), ids=make_ids(shared=True))
    network = make_model(model, data.items, MODELS.load(model).options.of(OPTIONS[model]), seed=0)
    network.eval()
    histories, _ = data.histories("test", 4)
    batch = pack(histories)
    with torch.no_grad():
        scores = network.scores(batch)
        assert torch.isfinite(scores).all()
        # Teacher forcing of each id gives the same log-probability.
        items = data.items
        first_of = np.unique(network.classes.numpy(), return_index=True)[1]
        for class_, item in enumerate(first_of):
            forced = pack(histories, [np.append(h[1:], item) for h in histories])
            ends = np.cumsum([len(h) for h in histories]) - 1
            one = forced._replace(places=forced.places[ends], targets=forced.targets[ends])
            for user in range(len(histories)):
                single = one._replace(
                    places=one.places[user : user + 1], targets=one.targets[user : user + 1]
                )
                loss = network(single).loss.item() * len(items.sizes)
                assert -loss == pytest.approx(scores[user, class_].item(), rel=1e-3, abs=1e-3)
            if class_ == 5:
                break
        best, _ = network.top(batch, 5)
    torch.testing.assert_close(best, scores.topk(5).values)


# Learning -------------------------------------------------------------------------------------


def test_every_model_learns_the_walk_better_than_popularity(trained):
    base = trained["popularity"].results["test"].metrics["ndcg@10"].value
    for model in LEARNED:
        results = trained[model].results["test"]
        assert results.metrics["ndcg@10"].value > max(3 * base, 0.5), model
        report = trained[model].report["training"]
        assert report["best_score"] > report["history"][0]["score"], model
        low, high = results.metrics["ndcg@10"].low, results.metrics["ndcg@10"].high
        assert low <= results.metrics["ndcg@10"].value <= high
    assert trained["text-knn"].results["test"].metrics["recall@10"].value == 1.0


@pytest.mark.slow
def test_tiger_learns_the_walk():
    pytest.importorskip("transformers")
    options = {**TINY_T5, "width": 32, "max_length": 4}
    tiger = fit("tiger", options=options, training={**QUICK, "epochs": 15})
    assert tiger.results["test"].metrics["recall@10"].value > 0.5


def test_unseen_items_are_recommended_by_their_codes_alone():
    """An item that no user took is scored by codes it shares; a table of items cannot score it."""
    log = make_log(users=200)
    log = log.filter(pa.array([item != "i30" for item in log["item_id"].to_pylist()]))
    asked = pa.table(
        {"user_id": ["x"] * 3, "item_id": ["i28", "i29", "i30"], "timestamp": [0, 1, 2]}
    )
    for model in ("composed", "sasrec"):
        retriever = train_retriever(
            log, ids=make_ids(), model=model, options=OPTIONS[model], training=QUICK
        )
        results = retriever.evaluate(asked)
        rank = 1 / results.metrics["mrr"].value if results.metrics["mrr"].value else np.inf
        assert results.slices["unseen items"].users == 1
        assert rank <= 12 if model == "composed" else rank == np.inf


def test_held_out_items_leave_training_and_stay_targets():
    data = prepare_retrieval_data(make_log(), ids=make_ids(), cold_items=0.2)
    cold = data.items.counts == 0
    assert 4 <= cold.sum() <= 22
    seen = np.concatenate([items for pair in data.training(50) for items in pair])
    assert not cold[seen].any()
    _, targets = data.histories("test", 50)
    assert cold[targets].any()
    assert "0.2 of the items held out of training" in data.protocol


def test_ids_learn_from_the_training_histories_alone():
    data = prepare_retrieval_data(
        pa.table({"user_id": ["u", "v"], "item_id": [list("abcd"), list("cba")]})
    )
    log = data.training_log()
    assert log.to_pydict() == {"user_id": ["u", "v"], "item_id": [["a", "b"], ["c"]]}
    assert len(semid.read_interactions(log)) == 3


def test_windows_train_every_item_but_the_first_once():
    data = prepare_retrieval_data(make_log(users=5, length=40), ids=make_ids())
    windows = data.training(7)
    assert max(len(inputs) for inputs, _ in windows) == 7
    targets = np.concatenate([targets for _, targets in windows])
    expected = [data.sequences[user][1:-2] for user in range(len(data.sequences))]
    assert targets.tolist() == np.concatenate(expected).tolist()
    for inputs, following in windows:
        assert inputs[1:].tolist() == following[:-1].tolist()
        assert len(inputs) == len(following)


# Use ------------------------------------------------------------------------------------------


def test_recommendations_continue_the_walk_and_leave_out_the_history(trained, tmp_path):
    retriever = trained["composed"]
    best = retriever.recommend(["i3", "i4", "i5"], k=5)
    assert "i6" in best.items
    assert len(best.items) == 5
    assert not {"i3", "i4", "i5"} & set(best.items)
    assert (np.diff(best.scores) <= 0).all()
    several = retriever.recommend([["i3", "i4", "i5"], ["i20"], []], k=5)
    assert several[0].items == best.items
    popular = np.argsort(-retriever.items.counts, kind="stable")[:5]
    assert several[2].items == [f"i{item}" for item in popular]
    with_history = retriever.recommend(["i3", "i4", "i5"], k=ITEMS, exclude_history=False)
    assert sorted(with_history.items) == sorted(retriever.items.ids.strings().to_pylist())
    user = retriever.recommend(users=["u3"], k=3)[0]
    history = retriever.sequences[3]
    assert user.items == retriever.recommend([f"i{item}" for item in history], k=3).items


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("model", ["text-knn", "composed", "parallel", "generative"])
def test_slots_are_kept_for_items_that_training_never_saw(model, shared):
    retriever = fit(model, ids=make_ids(shared=shared), training={"epochs": 1}, cold_items=0.3)
    cold = {f"i{item}" for item in np.flatnonzero(retriever.items.counts == 0)}
    history = ["i3", next(iter(sorted(cold)))]
    # With all items asked for, the same scores say which unseen ones are best.
    every = retriever.recommend(history, k=ITEMS)
    plain = retriever.recommend(history, k=6)
    kept = retriever.recommend(history, k=6, cold_slots=2)
    assert kept.items[:4] == plain.items[:4]
    best = [item for item in every.items if item in cold and item not in plain.items[:4]][:2]
    places = [every.items.index(item) for item in kept.items[4:]]
    scores = every.scores[places]
    assert set(kept.items[4:]) <= cold - set(kept.items[:4]) - set(history)
    assert scores == pytest.approx(every.scores[[every.items.index(item) for item in best]])
    np.testing.assert_allclose(kept.scores[4:], scores, rtol=1e-5, atol=1e-6)
    # More slots than there are unseen items: the others take the rest.
    many = retriever.recommend(history, k=ITEMS - 2, cold_slots=ITEMS - 2)
    assert sorted(many.items) == sorted(every.items)
    # A history without a known item has nothing to score unseen items by.
    assert retriever.recommend([[]], k=3, cold_slots=2)[0].items == (
        retriever.recommend([[]], k=3)[0].items
    )


def test_slots_that_nothing_can_fill_are_refused(trained):
    with pytest.raises(UsageError, match="has seen every item"):
        trained["composed"].recommend(["i3"], cold_slots=1)
    with pytest.raises(UsageError, match="give 0 to 10"):
        trained["composed"].recommend(["i3"], cold_slots=11)
    blind = fit("sasrec", training={"epochs": 1}, cold_items=0.3)
    with pytest.raises(UsageError, match="sasrec cannot score items"):
        blind.recommend(["i3"], cold_slots=1)


@pytest.mark.parametrize("model", [model for model in OPTIONS if model != "tiger"])
def test_saved_equals_loaded(model, trained, tmp_path):
    path = trained[model].save(tmp_path / "model")
    loaded = semid.load(path)
    histories = [["i1", "i2"], ["i40"], ["nothing"]]
    for a, b in zip(trained[model].recommend(histories), loaded.recommend(histories), strict=True):
        assert a.items == b.items
        np.testing.assert_array_equal(a.scores, b.scores)
    again = loaded.evaluate(make_log(), replicates=0)
    before = trained[model].results["test"]
    assert {n: e.value for n, e in again.metrics.items()} == {
        n: e.value for n, e in before.metrics.items()
    }
    assert loaded.report == trained[model].report
    assert type(before).from_dict(before.to_dict()).to_dict() == before.to_dict()


def test_items_of_one_id_are_ordered_as_asked():
    ids = make_ids(shared=True)
    retriever = train_retriever(
        make_log(), ids=ids, model="parallel", options=OPTIONS["parallel"], training=QUICK
    )
    history = ["i3", "i4", "i5"]
    by_popularity = retriever.recommend(history, k=ITEMS, exclude_history=False)
    counts = dict(
        zip(retriever.items.ids.strings().to_pylist(), retriever.items.counts, strict=True)
    )
    for first, second in itertools.pairwise(range(0, ITEMS, 2)):
        assert by_popularity.scores[first] == by_popularity.scores[first + 1]
        pair = by_popularity.items[first : first + 2]
        assert counts[pair[0]] >= counts[pair[1]]
        assert by_popularity.scores[first] >= by_popularity.scores[second]
    drawn = retriever.recommend(history, k=ITEMS, exclude_history=False, within_ids="random")
    assert drawn.items == (
        retriever.recommend(history, k=ITEMS, exclude_history=False, within_ids="random").items
    )
    assert drawn.items != by_popularity.items
    assert sorted(drawn.items) == sorted(by_popularity.items)
    with pytest.raises(UsageError, match="needs the items' embeddings"):
        retriever.recommend(history, within_ids="embedding")


def test_a_scan_of_codes_equals_the_matrix_of_scores(trained):
    network = trained["parallel"].network
    batch = pack([np.array([1, 2, 3]), np.array([40]), np.array([9, 10])])
    with torch.no_grad():
        expected = network.scores(batch).topk(7)
        values, classes = network.top(batch, 7)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0)
    assert torch.equal(network.scores(batch).gather(1, classes), values)


def test_resumed_equals_uninterrupted(tmp_path):
    settings = {"training": {**QUICK, "epochs": 4}, "ids": make_ids()}
    options = {**SMALL, "dropout": 0.2, "loss": "sampled", "negatives": 16}
    whole = train_retriever(make_log(), options=options, **settings)

    class Stop:
        """Interrupts in the middle of the third epoch."""

        def __init__(self) -> None:
            self.steps = 0

        def start(self, *args: object, **keywords: object) -> None:
            self.steps = 0

        def step(self, count: int = 1, **figures: object) -> None:
            self.steps += 1
            if self.steps == 14:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_retriever(
            make_log(), options=options, checkpoint=tmp_path / "c", progress=Stop(), **settings
        )
    resumed = train_retriever(
        make_log(), options=options, checkpoint=tmp_path / "c", resume=True, **settings
    )
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert resumed.report["test"]["metrics"] == whole.report["test"]["metrics"]


def test_bad_input_is_refused_in_a_sentence(trained):
    ids = make_ids()
    one = pa.table({"user_id": ["a", "b"], "item_id": ["i1", "i2"], "timestamp": [1, 2]})
    with pytest.raises(InteractionsError, match=r"no user .* has 3 interactions"):
        train_retriever(one, ids=ids)
    three = {"user_id": ["a"] * 3, "item_id": ["i1", "i2", "i3"], "timestamp": [1, 2, 3]}
    with pytest.raises(InteractionsError, match="histories of four items"):
        train_retriever(pa.table(three), ids=ids)
    assert train_retriever(pa.table(three), ids=ids, model="popularity").results["test"].users == 1
    with pytest.raises(InteractionsError, match="none of the"):
        train_retriever(
            pa.table({"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [1, 2, 3]}),
            ids=ids,
        )
    with pytest.raises(InteractionsError, match="has no order"):
        train_retriever(make_log().drop_columns(["timestamp"]), ids=ids)
    with pytest.raises(UsageError, match=r"needs Semantic IDs \(--ids"):
        train_retriever(make_log(), model="composed")
    with pytest.raises(UsageError, match=r"needs item embeddings"):
        train_retriever(make_log(), ids=ids, model="text-knn")
    with pytest.raises(UsageError, match=r"composd.*composed"):
        train_retriever(make_log(), ids=ids, model="composd")
    with pytest.raises(UsageError, match="heads=3 do not divide width=64"):
        train_retriever(make_log(), ids=ids, options={"heads": 3})
    other = make_ids()
    other = SemanticIds(
        other.items,
        other.codes,
        other.residual_norms,
        CodesInfo(**{**vars(other.info), "codebook_fingerprint": "c" * 64}),
    )
    with pytest.raises(FingerprintError):
        trained["composed"].evaluate(make_log(), ids=other)
    with pytest.raises(UsageError, match="'nobody' is not in the training log"):
        trained["composed"].recommend(users=["nobody"])
    with pytest.raises(UsageError, match="either histories= or users="):
        trained["composed"].recommend()
    with pytest.raises(UsageError, match="k=0"):
        trained["composed"].recommend(["i1"], k=0)


def test_a_log_of_one_user_and_a_log_of_ties_train(caplog):
    walk = pa.table(
        {
            "user_id": ["a"] * 6,
            "item_id": [f"i{item}" for item in range(6)],
            "timestamp": [7] * 6,
        }
    )
    settings = {"ids": make_ids(), "options": SMALL, "training": {**QUICK, "epochs": 1}}
    retriever = train_retriever(walk, **settings)
    assert retriever.results["test"].users == 1
    assert "ties shuffled with seed 0" in retriever.report["protocol"]
    assert MIN_INTERACTIONS == 3


# Command line ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a log, ids and items, to be in."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(make_log(), "log.parquet")
    make_ids().write("ids.parquet")
    titles = [f"</script><b>title {item}" for item in range(ITEMS)]
    names = [f"i{item}" for item in range(ITEMS)]
    table = {"item_id": names, "title": titles, "embedding": make_vectors().tolist()}
    pq.write_table(pa.table(table), "items.parquet")
    return tmp_path


FEW = ("--epochs", 2, "--width", 16, "--batch-size", 16, "-q")


def test_one_model_is_trained_shown_and_asked(files, capsys):
    words = "retrieve log.parquet --ids ids.parquet --items items.parquet --report page.html"
    assert run(*words.split(), "-o", "model", *FEW) == 0
    shown = capsys.readouterr().out
    assert "leave-last-out of 80 users" in shown
    assert "recall@10" in shown
    page = (files / "page.html").read_text(encoding="utf8")
    assert "&lt;/script&gt;&lt;b&gt;title" in page
    assert "</script><b>title" not in page
    loaded = semid.load("model")
    assert f"{loaded.report['test']['metrics']['recall@10']['value']:.4f}" in shown
    assert run("recommend", "model", "--k", 3, "-o", "best.parquet", "-q") == 0
    table = pq.read_table("best.parquet")
    assert table.column_names == ["user_id", "items", "scores"]
    first = loaded.recommend(users=[table["user_id"][5].as_py()], k=3)[0]
    assert table["items"][5].as_py() == first.items
    lists = pa.table({"user_id": ["new"], "item_id": [["i1", "unknown", "i2"]]})
    pq.write_table(lists, "new.parquet")
    words = "recommend model --histories new.parquet -o new-best.parquet -q"
    assert run(*words.split()) == 0
    assert pq.read_table("new-best.parquet")["items"][0].as_py() == (
        loaded.recommend(["i1", "i2"]).items
    )
    assert run("recommend", "model", "-o", "best.parquet", "-q") == 2
    assert "output 'best.parquet' exists" in capsys.readouterr().err


def test_a_comparison_grows_and_pairs_the_same_users(files, capsys):
    words = ("retrieve", "log.parquet", "--ids", "ids.parquet", "-o", "cmp", *FEW)
    assert run(*words, "--model", "composed,popularity") == 0
    assert run(*words, "--model", "composed,popularity,sasrec", "--seeds", 2, "--resume") == 0
    lines = (files / "cmp" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("composed", 0),
        ("popularity", 0),
        ("sasrec", 0),
        ("composed", 1),
        ("sasrec", 1),
    ]
    text = (files / "cmp" / "tables.md").read_text()
    values = {
        (row["model"], row["seed"]): row["results"]["metrics"]["recall@10"]["value"] for row in rows
    }
    difference = values["composed", 0] + values["composed", 1]
    difference = (difference - values["sasrec", 0] - values["sasrec", 1]) / 2
    shown = re.search(r"\| composed \| ([+-][0-9.]+) \(", text)
    assert float(shown[1]) == pytest.approx(difference, abs=1e-4)
    assert not list((files / "cmp" / "states").iterdir())


def test_flags_that_would_do_nothing_are_refused(files, capsys):
    base = ("retrieve", "log.parquet", "--ids", "ids.parquet", "-o", "out", "-q")
    for words, message in (
        (("--model", "sasrec", "--item-id"), "--item-id would change nothing"),
        (("--model", "popularity", "--epochs", 3), "--epochs would change nothing"),
        (("--embeddings", "items.parquet"), "--embeddings would change nothing"),
        (("--seeds", 2, "--seed", 3), "--seed would change nothing"),
        (("--set", "options.nothing=3"), "options.nothing"),
        (("--model", "sasrek"), "sasrec"),
    ):
        assert run(*base, *words) == 2, words
        assert message in " ".join(capsys.readouterr().err.split()), words
    assert not (files / "out").exists()
