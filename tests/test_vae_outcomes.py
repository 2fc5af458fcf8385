"""What training brings: outcomes of whole fits on small data whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

import semid
from semid.data.interactions import TEST, split_users
from semid.diagnostics.spaces import geometry
from semid.errors import DivergedError, EmbeddingError, UsageError
from semid.registry import recipe_names
from semid.tokenizers.factory import RECIPES, TOKENIZERS, make_tokenizer, read_recipe
from semid.tokenizers.neural.continuous import uniformity

NETWORK = {"hidden": (32,), "latent": 8, "pretrain_epochs": 2}
TRAINING = {"epochs": 12, "batch_size": 128, "learning_rate": 3e-3}
SMALL = {"network": NETWORK, "training": TRAINING, "codebook_size": 16}


SHORT = {**SMALL, "training": {**TRAINING, "epochs": 3}}


@pytest.fixture(scope="module")
def fitted(clustered):
    """Tokenizers with the settings above, fitted once; tests leave them as they are."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = kind(**SMALL).fit(clustered)
        return made[kind]

    return get


@pytest.mark.parametrize(
    "kind", [semid.RQVAE, semid.RQPVAE, semid.VQVAE, semid.MoCVAE, semid.DRQVAE]
)
def test_the_returned_model_is_better_than_the_first_epoch(kind, fitted):
    tokenizer = fitted(kind)
    training = tokenizer.report.details["training"]
    assert training["best_score"] < 0.95 * training["first_score"]
    held_out = tokenizer.report.validation_error
    assert held_out < 0.8
    if kind is not semid.DRQVAE:  # the score of DRQ is without quantization
        assert held_out == pytest.approx(training["best_score"], rel=0.1)


@pytest.mark.parametrize("kind", [semid.RQPVAE, semid.MoCVAE])
def test_codes_do_not_die_where_they_are_revived(kind, fitted):
    usage = fitted(kind).report.health.usage
    assert [level.dead for level in usage] == [0, 0, 0]


def test_drq_codes_are_those_of_residual_k_means_on_its_latents(fitted, clustered):
    tokenizer = fitted(semid.DRQVAE)
    latents = tokenizer.latent(clustered)
    twin = semid.RQKMeans(codebook_size=16).fit(latents)
    assert np.array_equal(twin.encode(latents).codes, tokenizer.encode(clustered).codes)
    assert twin.codebook_fingerprint == tokenizer.codebook_fingerprint
    whole = ((clustered - tokenizer.decode_latent(latents)) ** 2).sum()
    assert whole < ((clustered - tokenizer.decode(tokenizer.encode(clustered))) ** 2).sum()


def test_one_codebook_of_a_mixture_is_a_vq_vae(clustered):
    one = semid.MoCVAE(n_codebooks=1, **SHORT).fit(clustered)
    other = semid.VQVAE(**SHORT).fit(clustered)
    assert one.codebook_fingerprint == other.codebook_fingerprint
    assert np.array_equal(one.encode(clustered).codes, other.encode(clustered).codes)


def test_codebooks_of_a_mixture_are_no_copies(fitted):
    books = fitted(semid.MoCVAE).codebooks
    assert all(abs(books[0] - other).max() > 0.1 for other in books[1:])


def behavior(items: int = 600, users: int = 3000) -> tuple[np.ndarray, pa.Table]:
    """Rows of mostly noise whose quiet half says which items go together."""
    generator = np.random.default_rng(0)
    topic = generator.integers(0, 12, items)
    loud = generator.normal(size=(items, 20))
    quiet = 0.6 * np.eye(12)[topic] + 0.15 * generator.normal(size=(items, 12))
    members = [np.flatnonzero(topic == t) for t in range(12)]
    owners, taken = [], []
    for user in range(users):
        chosen = generator.choice(members[generator.integers(0, 12)], 4)
        owners += [f"u{user}"] * 4
        taken += [f"i{item}" for item in chosen]
    table = pa.table({"user_id": owners, "item_id": taken, "position": list(range(4)) * users})
    return np.concatenate([loud, quiet], axis=1).astype(np.float32), table


def held_out_auc(latents: np.ndarray, table: pa.Table) -> float:
    """Cosine of co-viewed pairs of test users against random pairs."""
    owners = table["user_id"].to_pylist()
    items = np.array([int(item[1:]) for item in table["item_id"].to_pylist()])
    test = split_users(owners) == TEST
    same = np.array([a == b for a, b in pairwise(owners)])
    at = np.flatnonzero(same & test[:-1] & (items[:-1] != items[1:]))
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    close = (unit[items[at]] * unit[items[at + 1]]).sum(1)
    strangers = np.random.default_rng(1).integers(0, len(latents), len(at))
    far = (unit[items[at]] * unit[strangers]).sum(1)
    return float((close[:, None] > far[None, :]).mean())


@pytest.mark.slow
def test_contrastive_training_raises_the_auc_of_held_out_pairs():
    x, table = behavior()
    ids = [f"i{n}" for n in range(len(x))]
    network = {"hidden": (64,), "latent": 16}
    training = {"epochs": 120, "batch_size": 128, "learning_rate": 3e-3}
    common = {"codebook_size": 16, "network": network, "training": training}
    plain = semid.DRQVAE(**common).fit(x, ids=ids)
    moved = semid.DRQVAE(**common, contrastive_weight=0.5, pairs_per_step=128)
    moved.fit(x, ids=ids, interactions=table)
    before, after = (held_out_auc(t.latent(x), table) for t in (plain, moved))
    assert before < 0.75
    assert after > before + 0.1
    assert "test users" in moved.report.details["protocol"]
    # All latents drawing together would raise cosines too: the spectrum shows they did not.
    width = geometry(moved.latent(x), name="latent", sample=None, seed=0).participation_ratio
    assert width > 4


def test_what_test_users_do_changes_nothing():
    x, table = behavior(items=200, users=600)
    ids = [f"i{n}" for n in range(len(x))]
    owners = table["user_id"].to_pylist()
    kept = split_users(owners) != TEST
    options = {
        "codebook_size": 8,
        "contrastive_weight": 0.5,
        "pairs_per_step": 32,
        "network": NETWORK,
        "training": {"epochs": 2, "batch_size": 64},
    }
    whole = semid.DRQVAE(**options).fit(x, ids=ids, interactions=table)
    part = semid.DRQVAE(**options).fit(x, ids=ids, interactions=table.filter(pa.array(kept)))
    assert whole.weights_fingerprint == part.weights_fingerprint


def test_kl_and_uniformity_change_the_latent(fitted, clustered):
    pairs = np.stack([np.arange(600), np.arange(600) + 600], axis=1)
    plain = fitted(semid.DRQVAE)
    normal = semid.DRQVAE(**SMALL, kl_weight=0.05).fit(clustered)
    assert normal.latent(clustered).std() < plain.latent(clustered).std()
    # Uniformity alone can pull the pairs' directions apart: it is lower where it was trained for.
    left, even = (
        semid.DRQVAE(**SHORT, uniformity_weight=weight, contrastive_weight=1e-9).fit(
            clustered, pairs=pairs
        )
        for weight in (0.0, 0.5)
    )
    found = [uniformity(torch.from_numpy(t.latent(clustered))) for t in (left, even)]
    assert found[1] < found[0]


def test_weights_say_which_items_matter(fitted, clustered):
    weights = np.ones(len(clustered))
    weights[:300] = 50.0
    plain = fitted(semid.RQPVAE)
    leaning = semid.RQPVAE(**SMALL).fit(clustered, weights=weights)

    def error(tokenizer) -> float:
        found = tokenizer.decode(tokenizer.encode(clustered[:300]))
        return float(((clustered[:300] - found) ** 2).sum())

    assert error(leaning) < error(plain)


def test_a_rate_that_diverges_stops_with_advice(clustered):
    training = {**TRAINING, "learning_rate": 1e8, "clip_norm": None, "schedule": "constant"}
    with pytest.raises(DivergedError, match="--learning-rate"):
        semid.RQPVAE(codebook_size=16, network=NETWORK, training=training).fit(clustered)


@pytest.mark.parametrize("kind", [semid.RQVAE, semid.MoCVAE, semid.VQVAE])
def test_one_step_into_the_infinite_is_no_model(kind, clustered):
    training = {"epochs": 1, "learning_rate": 1e30}
    with pytest.raises(DivergedError, match="--learning-rate"):
        kind(codebook_size=8, network=NETWORK, training=training).fit(clustered)


def test_every_shipped_recipe_makes_a_tokenizer():
    assert recipe_names(RECIPES)
    for name in recipe_names(RECIPES):
        recipe = read_recipe(name)
        kind = recipe.pop("tokenizer")
        tokenizer = make_tokenizer(kind, recipe)
        assert tokenizer.kind == kind
        for key, value in recipe.items():
            if key in tokenizer.settings and not isinstance(value, dict):
                assert tokenizer.settings[key] in (value, [value] * tokenizer.levels)
    assert set(TOKENIZERS) >= {read_recipe(name)["tokenizer"] for name in recipe_names(RECIPES)}


def test_recipes_and_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'rqpvae'"):
        read_recipe("rqpva")
    (tmp_path / "a.toml").write_text("levels = 3", encoding="utf8")
    with pytest.raises(UsageError, match="tokenizer"):
        read_recipe(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("levels = [", encoding="utf8")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_recipe(tmp_path / "b.toml")
    with pytest.raises(UsageError, match=r"--max-iter \(kmeans.max_iter\) does not apply"):
        make_tokenizer("rqvae", {"kmeans.max_iter": 3})
    with pytest.raises(UsageError, match="epoch"):
        make_tokenizer("rqvae", {"training": {"epoch": 3}})
    made = make_tokenizer("mocvae", {"levels": 7, "training": {"epochs": 3}, "training.epochs": 9})
    assert made.levels == 7
    assert made.settings["training"]["epochs"] == 9


def test_parallel_codes_have_no_beam(fitted, clustered):
    with pytest.raises(UsageError, match="parallel"):
        fitted(semid.MoCVAE).encode(clustered, beam_width=2)


def test_several_inputs_have_projections_of_their_own(clustered, tmp_path):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(len(clustered), 6)).astype(np.float32)
    brand = [None if n % 50 == 0 else f"brand {n % 7}" for n in range(len(clustered))]
    both = semid.fuse({"text": clustered, "image": image}, categories={"brand": brand})
    assert both.inputs == (24, 6, 64)
    rows = both.rows(np.array([3, 10, 50]))
    assert np.array_equal(rows[:, :24], clustered[[3, 10, 50]])
    assert np.array_equal(rows[0, 30:], rows[1, 30:])  # brand 3 both
    assert not rows[2, 30:].any()
    tokenizer = semid.RQPVAE(**SHORT).fit(both)
    tokenizer.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    assert np.array_equal(loaded.encode(both).codes, tokenizer.encode(both).codes)
    projections = [name for name in tokenizer._tensors() if "projections" in name]
    assert len(projections) == 6
    with pytest.raises(EmbeddingError, match="'image' has 5"):
        semid.fuse({"text": clustered, "image": image[:5]})
