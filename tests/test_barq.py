"""BARQ: what each of its parts is for, on data in which behavior and content disagree."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import semid
from semid.errors import UsageError
from semid.progress import QuietProgress
from semid.quantization.blocks import ArrayBlocks
from semid.seeds import numpy_generator
from semid.tokenizers.barq_choice import Trial, WeightSearch
from semid.tokenizers.barq_head import train_tables
from semid.tokenizers.behavior import Behavior, TablePairs

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
    """What is learned from items at random finds no next item; the fit is that without it."""
    rows, _, _ = shelves
    log = pa.table(log_of(np.random.default_rng(5).integers(0, 900, (1200, 3))))
    given = {**SMALL, "training": {**TRAINING, "epochs": 8}, "objective": {"pairs_per_step": 64}}
    source = semid.open_embeddings(rows)
    tokenizer = semid.BARQ(**given).fit(source, interactions=log)
    choice = tokenizer.report.details["behavior"]
    assert choice["weight"] == 0
    assert choice["pairs"] > 60
    assert [trial["weight"] for trial in choice["trials"]][:2] == [0, 0.5]
    assert all(trial["low"] <= 0 for trial in choice["trials"])
    assert "behavior is left out: it does not pay on" in caplog.text
    plain = semid.BARQ(**given, behavior_weight=0.0).fit(source)
    assert tokenizer.codebook_fingerprint == plain.codebook_fingerprint
    with pytest.raises(UsageError, match="without behavior"):
        tokenizer.decode_behavior(tokenizer.encode(rows))
    tokenizer.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    assert np.array_equal(loaded.encode(rows).codes, plain.encode(rows).codes)
    assert np.array_equal(loaded.decode(loaded.encode(rows)), plain.decode(plain.encode(rows)))
    kept = semid.BARQ(**given, check_behavior=False).fit(source, interactions=log)
    assert kept.report.details["behavior"] == {"weight": 2.0}
    assert kept.decodes_behavior


@pytest.fixture(scope="module")
def shelf_log(shelves) -> pa.Table:
    """Users who buy three items of a shelf."""
    generator = np.random.default_rng(6)
    by_shelf = [np.flatnonzero(shelves[1] == s) for s in range(6)]
    lines = [generator.choice(by_shelf[n % 6], 3, replace=False) for n in range(600)]
    return pa.table(log_of(np.array(lines)))


def test_behavior_that_teaches_is_kept(shelves, shelf_log, tmp_path):
    rows, shelf, _ = shelves
    given = {**SMALL, "objective": {"pairs_per_step": 64}}
    tokenizer = semid.BARQ(**given, behavior_weight=8.0).fit(rows, interactions=shelf_log)
    choice = tokenizer.report.details["behavior"]
    none, *others = choice["trials"]
    assert [none["weight"], others[0]["weight"]] == [0, 2]
    chosen = next(trial for trial in others if trial["weight"] == choice["weight"])
    assert chosen["low"] > 0
    assert chosen["hits"] > 1.1 * none["hits"]
    assert chosen["error"] > none["error"]
    assert purity(tokenizer.encode(rows).codes[:, 0], shelf) > 0.9
    # The fit is the one with that weight alone.
    given["check_behavior"] = False
    alone = semid.BARQ(**given, behavior_weight=choice["weight"])
    alone.fit(rows, interactions=shelf_log)
    assert alone.weights_fingerprint == tokenizer.weights_fingerprint
    tokenizer.save(tmp_path / "model")
    line = f"| {chosen['weight']:g} | {chosen['hits']:.4f} | {chosen['low']:+.4f} to "
    assert line in (tmp_path / "model" / "README.md").read_text()
    loaded = semid.load(tmp_path / "model")
    assert np.array_equal(loaded.encode(rows).codes, tokenizer.encode(rows).codes)
    assert loaded.report.details["behavior"] == choice


class Stop(QuietProgress):
    """Interrupts a fit at a step; counts them all where that is 0."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps = at, 0

    def step(self, done: int = 1, **fields: object) -> None:
        self.steps += bool(fields)
        if fields and self.steps == self.at:
            raise KeyboardInterrupt


def test_a_search_that_was_interrupted_continues(shelves, shelf_log, tmp_path):
    given = {**SMALL, "training": {**TRAINING, "epochs": 8}, "objective": {"pairs_per_step": 64}}
    run = lambda: semid.BARQ(**given, behavior_weight=8.0)  # noqa: E731
    whole = run().fit(shelves[0], interactions=shelf_log, progress=(progress := Stop()))
    choice = whole.report.details["behavior"]
    assert len(choice["trials"]) > 2
    last = progress.steps - len(whole.report.details["refine"])
    for at in range(last - 2 * len(choice["trials"]) - 6, last, 5):
        fit = {"interactions": shelf_log, "checkpoint": tmp_path / str(at)}
        with pytest.raises(KeyboardInterrupt):
            run().fit(shelves[0], **fit, progress=Stop(at))
        resumed = run().fit(shelves[0], **fit, resume=True)
        assert resumed.weights_fingerprint == whole.weights_fingerprint
        assert resumed.report.details["behavior"] == choice


def test_evidence_equals_a_brute_force_version():
    """Hits, interval and price of codebooks, read from ranks that are counted one by one."""
    generator = np.random.default_rng(7)
    rows = generator.normal(size=(120, 5)).astype(np.float32)
    rows[:, 3:] *= 2  # behavior
    pairs = generator.integers(0, 120, (2, 90))
    source = TablePairs(*pairs, 120, protocol="")
    search = WeightSearch(source, 120, seed=3, threads=1)
    drawn = source.draw(4 * source.count, numpy_generator(3, "evidence"))
    pairs = sorted({(int(a), int(b)) for a, b in zip(*drawn, strict=True)})
    space, held_out = ArrayBlocks(rows), ArrayBlocks(rows[:30])
    hits, errors = [], []
    for width in (3, 5):  # without behavior, and with it
        books = [rows[generator.permutation(120)[:40]] * np.float32(scale) for scale in (1, 0.5)]
        for book in books:
            book[:, width:] = 0
        assert search.add(float(width), books, space, held_out, content=3) or hits
        residual, codes = rows.copy(), []
        for book in books:
            codes.append(((residual[:, None] - book[None]) ** 2).sum(2).argmin(1))
            residual -= book[codes[-1]]
        vectors, codes = rows - residual, np.stack(codes, axis=1)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        equal = np.cumprod(codes[:, None] == codes[None], axis=2).sum(2)
        hits.append([])
        for a, b in pairs:
            others = np.delete(np.arange(120), a)
            same, near = equal[a, others], np.round(unit[others] @ unit[a], 5)
            by_codes, by_vectors = (
                np.clip((12 - (s > t).sum()) / (s == t).sum(), 0, 1)
                for s, t in ((same, equal[a, b]), (near, np.round(unit[b] @ unit[a], 5)))
            )
            hits[-1].append((by_codes + by_vectors) / 2)
        content = rows[:30, :3]
        lost = (residual[:30, :3] ** 2).sum()
        errors.append(lost / ((content - content.mean(axis=0)) ** 2).sum())
    assert search.choose()["pairs"] == len(pairs)
    assert search.choose()["cutoff"] == 12
    for trial, each, price in zip(search.trials, hits, errors, strict=True):
        assert trial.hits == pytest.approx(np.mean(each))
        assert trial.error == pytest.approx(price, rel=1e-5)
    gains, first = np.subtract(hits[1], hits[0]), np.array(pairs)[:, 0]
    deviations = gains - gains.mean()
    half = 1.96 * np.sqrt(sum(deviations[first == a].sum() ** 2 for a in set(first))) / len(pairs)
    assert search.trials[1].low == pytest.approx(gains.mean() - half)
    assert search.trials[1].high == pytest.approx(gains.mean() + half)


def test_a_log_without_users_to_judge_by_is_left_out(shelves, shelf_log, caplog):
    rows, few = shelves[0], shelf_log.slice(0, 12)  # four users, all of them for training
    given = {**SMALL, "training": {"epochs": 1}, "objective": {"pairs_per_step": 4}}
    tokenizer = semid.BARQ(**given).fit(rows, interactions=few)
    assert tokenizer.report.details["behavior"] == {"weight": 0}
    assert "users kept for selection have no two different known items in a row" in caplog.text
    assert not tokenizer.decodes_behavior


def choose(*trials: Trial) -> float:
    """Return the weight that a search takes after these trials."""
    search = WeightSearch(TablePairs(np.arange(4), np.arange(4, 8), 8, protocol=""), 8, seed=0)
    search.trials = list(trials)
    return search.choose()["weight"]


def test_the_weight_that_pays_most_is_taken(caplog):
    none = Trial(0.0, hits=0.10, error=0.40)
    light, middle = Trial(0.5, 0.11, 0.42, 0.005, 0.015), Trial(1.0, 0.13, 0.43, 0.02, 0.04)
    assert choose(none, light, middle) == 1.0
    assert choose(none, middle, Trial(2.0, 0.135, 0.46, 0.02, 0.05)) == 1.0  # costs more
    assert not caplog.text
    assert choose(none, Trial(0.5, 0.11, 0.42, -0.005, 0.025)) == 0.0  # may be chance
    assert choose(none, Trial(0.5, 0.11, 0.46, 0.005, 0.015)) == 0.0  # costs more than it brings
    assert "a content error of 0.400 and 0.460" in caplog.text


def test_a_large_catalogue_is_searched_in_part(monkeypatch):
    """The items of pairs are among those searched, whose number is bounded."""
    monkeypatch.setattr("semid.tokenizers.barq_choice.POOL_ROWS", 100)
    rows = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)
    first, second = np.arange(5, 400, 20), np.arange(6, 400, 20)
    rows[second] = rows[first]
    search = WeightSearch(TablePairs(first, second, 400, protocol=""), 400, seed=0)
    read: list[np.ndarray] = []

    class Watched(ArrayBlocks):
        def rows(self, indices: np.ndarray) -> np.ndarray:
            read.append(indices)
            return super().rows(indices)

    search.add(0.0, [rows], Watched(rows), ArrayBlocks(rows), content=4)
    assert len(read[0]) == len(np.unique(read[0])) == 100
    assert np.isin([*first, *second], read[0]).all()
    assert search.trials[0].hits == 1


def test_heavier_weights_are_tried_while_scores_are_above_none():
    rows = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    rows[:100] = rows[100:200]
    source = TablePairs(np.arange(100), np.arange(100, 200), 400, protocol="")
    search, blocks = WeightSearch(source, 400, seed=0), ArrayBlocks(rows)
    scales = (0.0, 1.0, 0.9, 0.0)  # codewords: all alike, exact, a little short, all alike
    more = [search.add(s, [rows * np.float32(s)], blocks, blocks, content=4) for s in scales]
    assert more == [True, True, True, False]
    assert search.choose()["weight"] == 1


def test_few_pairs_are_no_evidence():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 4)).astype(np.float32)
    rows[:20] = rows[20:40]
    for few, low in ((20, -1), (40, 0)):
        order = np.r_[20:40, 0:20][:few]
        search = WeightSearch(TablePairs(np.arange(few), order, 400, protocol=""), 400, seed=0)
        for columns in (slice(0), slice(4)):
            book = np.zeros_like(rows)
            book[:, columns] = rows[:, columns]
            search.add(1.0, [book], ArrayBlocks(rows), ArrayBlocks(rows), content=4)
        assert search.trials[1].hits == 1
        assert (search.trials[1].low > 0) == (low == 0)


class Pairs:
    """Pairs as a `PairSource`."""

    def __init__(self, pairs: np.ndarray, items: int) -> None:
        table = TablePairs(pairs[:, 0], pairs[:, 1], items, protocol="pairs of a test")
        self.draw, self.positives, self.count = table.draw, table.positives, table.count


def test_a_trained_head_tells_more_than_least_squares_and_only_what_others_confirm():
    generator = np.random.default_rng(2)
    group = generator.integers(0, 12, 600)
    codes = np.stack([group, generator.integers(0, 12, 600)], axis=1)
    order = np.argsort(group + generator.random(600))
    same = np.stack([order[:-1], order[1:]], axis=1)
    train, select = same[::2], same[1::2]
    # Others pair each group with the sixth one after it.
    partner = np.array([generator.choice(np.flatnonzero(group == (g + 6) % 12)) for g in group])
    apart = np.stack([np.arange(600), partner], axis=1)
    start = [0.1 * generator.normal(size=(12, 8)).astype(np.float32) for _ in range(2)]

    def train_on(tables, pairs, kept):
        behavior = Behavior(Pairs(pairs, 600), Pairs(kept, 600))
        return train_tables(tables, codes, behavior, temperature=0.07, seed=0)

    trained, losses = train_on(start, train, select)
    assert losses["loss"] < 0.9 * losses["loss_before_training"]
    vectors = trained[0][codes[:, 0]] + trained[1][codes[:, 1]]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    within = group[:, None] == group[None]
    assert cosine[within].mean() > cosine[~within].mean() + 0.5
    # Where the pairs of selection users say otherwise, the tables stay.
    tables, _ = train_on(start, apart, apart)
    kept, losses = train_on(tables, train, apart)
    assert losses["loss"] > losses["loss_before_training"]
    assert all(np.array_equal(a, b) for a, b in zip(kept, tables, strict=True))
