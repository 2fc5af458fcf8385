"""BARQ: what each of its parts is for, on data in which behavior and content disagree."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import semid
from semid.errors import UsageError
from semid.quantization.blocks import ArrayBlocks
from semid.seeds import numpy_generator
from semid.tokenizers.behavior import TablePairs, compare_directions

NETWORK = {"hidden": (32,), "latent": 8}
TRAINING = {"epochs": 40, "batch_size": 128, "learning_rate": 3e-3}
SMALL = {"network": NETWORK, "training": TRAINING, "codebook_size": 8}


@pytest.fixture(scope="module")
def shelves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (900, 16): loud content, and 6 shelves that are bought together, seen in 3 columns."""
    generator = np.random.default_rng(11)
    shelf = generator.integers(0, 6, 900)
    content = generator.normal(size=(12, 13))[generator.integers(0, 12, 900)]
    quiet = generator.normal(size=(6, 3))[shelf]
    rows = np.concatenate([content, quiet], axis=1) + 0.2 * generator.normal(size=(900, 16))
    pairs = np.concatenate(
        [
            generator.permutation(np.flatnonzero(shelf == s))[: 2 * 60].reshape(-1, 2)
            for s in range(6)
        ]
    )
    return rows.astype(np.float32), shelf, pairs


def purity(codes: np.ndarray, labels: np.ndarray) -> float:
    """Share of items in the most frequent label of their code."""
    return sum(np.bincount(labels[codes == c]).max() for c in np.unique(codes)) / len(codes)


@pytest.fixture(scope="module")
def fitted(shelves):
    rows, _, pairs = shelves
    tokenizer = semid.BARQ(**SMALL, behavior_weight=4.0, objective={"pairs_per_step": 64})
    return tokenizer.fit(rows, pairs=pairs)


def test_the_first_code_follows_behavior(fitted, shelves):
    rows, shelf, _ = shelves
    content = semid.BARQ(codebook_size=8, behavior_weight=0.0).fit(rows)
    assert purity(fitted.encode(rows).codes[:, 0], shelf) > 0.9
    assert purity(content.encode(rows).codes[:, 0], shelf) < 0.6


def test_codes_decode_to_content_and_to_behavior(fitted, shelves):
    rows, shelf, _ = shelves
    ids = fitted.encode(rows)
    assert fitted.decode(ids).shape == rows.shape
    directions = fitted.decode_behavior(ids)
    assert directions.shape == (900, 8)
    directions = directions - directions.mean(axis=0)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosine = unit @ unit.T
    same = shelf[:, None] == shelf[None]
    assert cosine[same].mean() > cosine[~same].mean() + 0.5
    head = fitted.report.details["behavior_tables"]
    assert head["relative_error"] < 0.5


def test_refinement_is_part_of_the_fit(shelves):
    rows, _, _ = shelves
    plain = semid.BARQ(codebook_size=8, behavior_weight=0.0, refine={"rounds": 0}).fit(rows)
    refined = semid.BARQ(codebook_size=8, behavior_weight=0.0).fit(rows)
    assert refined.report.validation_error < plain.report.validation_error
    assert not plain.report.details["refine"]
    rounds = refined.report.details["refine"]
    assert rounds[-1]["error"] < rounds[0]["before"]


def test_without_behavior_or_refinement_it_is_residual_k_means(shelves):
    rows, _, _ = shelves
    settings = {"behavior_weight": 0.0, "refine": {"rounds": 0}, "beam_width": 1}
    settings["content_variance"] = 1.0
    plain = semid.BARQ(codebook_size=8, **settings).fit(rows)
    twin = semid.RQKMeans(codebook_size=8).fit(rows)
    assert plain.codebook_fingerprint == twin.codebook_fingerprint
    assert np.array_equal(plain.encode(rows).codes, twin.encode(rows).codes)


def test_prices_even_out_usage():
    generator = np.random.default_rng(4)
    heavy = generator.normal(size=(900, 4)) * np.exp(generator.normal(size=(900, 1)))
    settings = {"behavior_weight": 0.0, "validation_fraction": 0}
    plain, even = (
        semid.BARQ(codebook_size=16, **settings, balance_strength=limit).fit(
            heavy.astype(np.float32)
        )
        for limit in (0.0, 0.5)
    )
    usage = [
        np.array([level.perplexity for level in made.report.health.usage]) for made in (plain, even)
    ]
    assert (usage[1] > usage[0]).all()
    assert usage[1].mean() > 1.05 * usage[0].mean()


def test_wrong_or_missing_arguments_are_refused(shelves):
    rows, _, pairs = shelves
    with pytest.raises(UsageError, match="barq learns from behavior"):
        semid.BARQ(**SMALL).fit(rows)
    with pytest.raises(UsageError, match="behavior_weight=0"):
        semid.BARQ(codebook_size=8, behavior_weight=0).fit(rows, pairs=pairs)
    with pytest.raises(UsageError, match="behavior_levels=4"):
        semid.BARQ(behavior_levels=4)
    with pytest.raises(UsageError, match="balance_strength=-1"):
        semid.BARQ(balance_strength=-1)
    content = semid.BARQ(codebook_size=8, behavior_weight=0).fit(rows)
    with pytest.raises(UsageError, match="without behavior"):
        content.decode_behavior(content.encode(rows))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Squared error relative to the variance of what is wanted."""
    return float(((found - wanted) ** 2).sum() / ((wanted - wanted.mean(axis=0)) ** 2).sum())


def test_tables_follow_the_codes_of_a_refinement(shelves):
    rows, _, pairs = shelves
    plain = semid.BARQ(**SMALL, refine={"rounds": 0}, objective={"pairs_per_step": 64})
    plain.fit(rows, pairs=pairs)
    refined = semid.refine(plain, rows)
    codes = refined.encode(rows).codes
    assert not np.array_equal(codes, plain.encode(rows).codes)
    directions = plain.latent(rows)[:, -8:]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert error(refined.decode(codes), rows) < 0.95 * error(plain.decode(codes), rows)
    found, stale = (made.decode_behavior(codes) for made in (refined, plain))
    assert error(found, directions) < 0.95 * error(stale, directions)


def test_a_refinement_keeps_prices_and_levels_of_behavior(shelves):
    rows, _, pairs = shelves
    settings = {**SMALL, "refine": {"rounds": 0}, "objective": {"pairs_per_step": 64}}
    plain = semid.BARQ(**settings, balance_strength=0.5).fit(rows, pairs=pairs)
    refined = semid.refine(plain, rows)
    for before, after in zip(plain.codebooks, refined.codebooks, strict=True):
        assert np.array_equal(before[:, -3:], after[:, -3:])
        assert after[:, -3:].any()
    for deeper in refined.codebooks[1:]:
        assert not deeper[:, -11:-3].any()  # behavior


def test_content_is_the_leading_components_and_decodes_to_whole_rows():
    generator = np.random.default_rng(2)
    loud = generator.normal(size=(10, 4))[generator.integers(0, 10, 700)]
    follows = 0.2 * np.abs(loud) @ generator.normal(size=(4, 6))
    rows = np.concatenate([loud, follows], axis=1).astype(np.float32)
    rows = rows @ np.linalg.qr(generator.normal(size=(10, 10)))[0].astype(np.float32) + 1
    made = semid.BARQ(codebook_size=8, behavior_weight=0.0, content_variance=0.8).fit(rows)
    latent = made.latent(rows)
    left = rows - rows.mean(axis=0)
    values = np.linalg.svd(left, compute_uv=False) ** 2
    held = np.cumsum(values) / values.sum()
    assert latent.shape[1] == np.argmax(held >= 0.8) + 1 < 10
    lost = error(made.decode_latent(latent), rows)
    assert lost == pytest.approx(1 - held[latent.shape[1] - 1], abs=0.02)  # fitted on 95 % of them
    assert error(made.decode(made.encode(rows)), rows) < 0.7 * lost  # tables know of the others
    with pytest.raises(UsageError, match="content_variance=0"):
        semid.BARQ(content_variance=0)


def log_of(lines: np.ndarray) -> dict[str, np.ndarray]:
    """Return a log of users ``(users, length)`` who see one row of the catalogue after another."""
    users, length = lines.shape
    return {
        "user_id": np.repeat([f"u{n}" for n in range(users)], length),
        "item_id": lines.reshape(-1).astype(str),
        "timestamp": np.tile(np.arange(length), users),
    }


def test_behavior_that_teaches_nothing_is_left_out(shelves, tmp_path, caplog):
    """What is learned from items at random cannot rank the next one; the fit is that without it."""
    rows, _, _ = shelves
    log = pa.table(log_of(np.random.default_rng(5).integers(0, 900, (1200, 3))))
    given = {**SMALL, "objective": {"pairs_per_step": 64}}
    source = semid.open_embeddings(rows)
    tokenizer = semid.BARQ(**given).fit(source, interactions=log)
    evidence = tokenizer.report.details["behavior"]
    assert not evidence["kept"]
    assert evidence["pairs"] > 60
    assert evidence["low"] <= 0
    assert abs(evidence["learned"] - 0.5) < 0.1
    assert "behavior is left out: on" in caplog.text
    plain = semid.BARQ(**given, behavior_weight=0.0).fit(source)
    assert tokenizer.codebook_fingerprint == plain.codebook_fingerprint
    with pytest.raises(UsageError, match="without behavior"):
        tokenizer.decode_behavior(tokenizer.encode(rows))
    tokenizer.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    assert np.array_equal(loaded.encode(rows).codes, plain.encode(rows).codes)
    assert np.array_equal(loaded.decode(loaded.encode(rows)), plain.decode(plain.encode(rows)))
    kept = semid.BARQ(**given, check_behavior=False).fit(source, interactions=log)
    assert kept.report.details["behavior"] == {"kept": True}
    assert kept.decodes_behavior


def test_behavior_that_teaches_is_kept(shelves):
    rows, shelf, _ = shelves
    generator = np.random.default_rng(6)
    by_shelf = [np.flatnonzero(shelf == s) for s in range(6)]
    lines = np.array([generator.choice(by_shelf[n % 6], 3, replace=False) for n in range(600)])
    given = {**SMALL, "behavior_weight": 4.0, "objective": {"pairs_per_step": 64}}
    tokenizer = semid.BARQ(**given).fit(rows, interactions=pa.table(log_of(lines)))
    evidence = tokenizer.report.details["behavior"]
    assert evidence["kept"]
    assert evidence["low"] > 0
    assert evidence["learned"] > evidence["embeddings"] + 0.1
    assert purity(tokenizer.encode(rows).codes[:, 0], shelf) > 0.9


def test_evidence_equals_a_brute_force_version():
    generator = np.random.default_rng(7)
    rows = generator.normal(size=(40, 5)).astype(np.float32)
    first, second = generator.integers(0, 40, (2, 90))
    source = TablePairs(first, second, 40, protocol="")
    turned = lambda x: np.ascontiguousarray(x[:, :3])  # noqa: E731
    found = compare_directions(source, ArrayBlocks(rows), turned, seed=3)
    drawn = source.draw(source.count, numpy_generator(3, "evidence"))
    pairs = sorted({(int(a), int(b)) for a, b in zip(*drawn, strict=True)})
    related = {(int(a), int(b)) for a, b in zip(first, second, strict=True)}
    related |= {(b, a) for a, b in related}
    values = []
    for vectors in (rows, rows[:, :3]):
        unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float64)
        values.append([])
        for a, b in pairs:
            others = [c for _, c in pairs if c != a and (a, c) not in related]
            values[-1].append(np.mean([unit[a] @ unit[c] < unit[a] @ unit[b] for c in others]))
    gains = np.subtract(values[1], values[0])
    half = 1.96 * gains.std(ddof=1) / len(gains) ** 0.5
    assert found.pairs == len(pairs)
    assert found.embeddings == pytest.approx(np.mean(values[0]))
    assert found.learned == pytest.approx(np.mean(values[1]))
    assert found.low == pytest.approx(gains.mean() - half)
    assert found.high == pytest.approx(gains.mean() + half)


def test_few_pairs_are_no_evidence():
    rows = np.eye(8, dtype=np.float32)
    source = TablePairs(np.arange(4), np.arange(4, 8), 8, protocol="")
    found = compare_directions(source, ArrayBlocks(rows), lambda x: x, seed=0)
    assert (found.low, found.high) == (-1, 1)
