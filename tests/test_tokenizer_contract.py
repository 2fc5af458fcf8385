"""One suite of behavior for every tokenizer: a new one joins by a line in TOKENIZERS."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import semid
from semid.artefact import TENSOR_FILE
from semid.errors import (
    ArtefactError,
    EmbeddingError,
    FingerprintError,
    InputError,
    NotFittedError,
    OutputExistsError,
    UsageError,
)
from semid.options import argument_types
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.factory import TOKENIZERS as TOKENIZERS_OF_ALL
from training_cases import Stop

SMALL: dict[str, Any] = {
    "network": {"hidden": (32,), "latent": 8, "pretrain_epochs": 2},
    "training": {"epochs": 8, "batch_size": 128, "learning_rate": 3e-3},
    "codebook_size": 16,
}


def parallel(kind: Callable[..., Tokenizer], **fixed: object) -> Callable[..., Tokenizer]:
    """Let the suite speak of levels where a tokenizer speaks of codebooks."""

    def make(**changes: object) -> Tokenizer:
        if "levels" in changes:
            changes["n_codebooks"] = changes.pop("levels")
        arguments = {**SMALL, **fixed, **changes}
        names = argument_types(kind)
        return kind(**{name: value for name, value in arguments.items() if name in names})

    return make


def fsq(**changes: object) -> Tokenizer:
    """Let the suite speak of levels where FSQ has stages, or else groups."""
    settings = {"network": {"hidden": (32,)}, "training": SMALL["training"], **changes}
    several = "stages" if settings.get("stages", 1) != 1 else "groups"
    if "levels" in settings:
        settings[several] = settings.pop("levels")
    return semid.FSQ(**settings)


NEURAL: dict[str, Callable[..., Tokenizer]] = {
    "vqvae": lambda **changes: semid.VQVAE(**{**SMALL, **changes}),
    "rqvae": lambda **changes: semid.RQVAE(**{**SMALL, "beam_width": 2, **changes}),
    "rqpvae": lambda **changes: semid.RQPVAE(**{**SMALL, "center": True, **changes}),
    "mocvae": parallel(semid.MoCVAE),
    "mocvae-maps": parallel(semid.MoCVAE, rule="gradient", projection=True),
    "drqvae": lambda **changes: semid.DRQVAE(**{**SMALL, **changes}),
    "fsq": lambda **changes: fsq(**{"dimension_levels": (4, 4), "groups": 2, **changes}),
    "fsq-stages": lambda **changes: fsq(
        **{"dimension_levels": (4, 4), "groups": 1, "stages": 2, **changes}
    ),
}


class WithPairs(semid.BARQ):
    """BARQ that brings its pairs along: the suite's calls know of embeddings alone."""

    def _check_behavior(self, interactions, pairs):
        pass

    def _behavior(self, interactions, pairs, *, ids, train):
        rows = np.arange(len(ids) - 1)
        given = np.stack([rows, rows + 1], axis=1) if pairs is None else pairs
        return super()._behavior(interactions, given, ids=ids, train=train)


def barq(**changes: object) -> Tokenizer:
    settings = {**SMALL, "objective": {"pairs_per_step": 32}, "balance_strength": 0.1, **changes}
    settings.setdefault("refine", {"rounds": 2})
    if settings.get("levels") == 1:
        settings["behavior_levels"] = 1
    return WithPairs(**{"beam_width": 2, "behavior_levels": 2, **settings})


def pipeline(**changes: object) -> Tokenizer:
    encoder = {"tokenizer": "drqvae", **SMALL, "levels": 1, "training": dict(SMALL["training"])}
    if "training" in changes:
        encoder["training"] = changes.pop("training")
    quantizer = {"tokenizer": "opq", "n_codebooks": 3, "codebook_size": 16, "rotation_iter": 2}
    for name in ("codebook_size", "levels"):
        if name in changes:
            quantizer["n_codebooks" if name == "levels" else name] = changes.pop(name)
    return semid.Pipeline(**{"encoder": encoder, "quantizer": quantizer, **changes})


def given(combine: str) -> Callable[..., Tokenizer]:
    fixed = {"combine": combine, "levels": 4, "codebook_size": 16, "center": True}
    kmeans = {"max_iter": 10, "tol": 0}
    return lambda **changes: semid.Codebooks(**{**fixed, "kmeans": kmeans, **changes})


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    "rqkmeans": lambda **changes: semid.RQKMeans(**{"levels": 3, "codebook_size": 16, **changes}),
    "rqkmeans-prepared": lambda **changes: semid.RQKMeans(
        **{"levels": 2, "codebook_size": 16, "normalize": True, "center": True, **changes}
    ),
    "pq": parallel(semid.PQ, n_codebooks=7, kmeans={"max_iter": 12, "tol": 0}),
    "opq": parallel(
        semid.OPQ, n_codebooks=4, center=True, rotation_iter=4, kmeans={"max_iter": 8, "tol": 0}
    ),
    "pipeline": pipeline,
    **{f"codebooks-{combine}": given(combine) for combine in ("sum", "mean", "concat")},
    **NEURAL,
    "barq": barq,
    "barq-content": lambda **changes: semid.BARQ(
        **{
            "levels": 3,
            "codebook_size": 16,
            "behavior_weight": 0.0,
            "refine": {"rounds": 2},
            **changes,
        }
    ),
    "rqkmeans-beam": lambda **changes: semid.RQKMeans(
        **{"levels": 3, "codebook_size": 16, "beam_width": 3, **changes}
    ),
    "rqgmm": lambda **changes: semid.RQGMM(**{"codebook_size": 16, "max_em_iter": 5, **changes}),
    "rqgmm-spherical": lambda **changes: semid.RQGMM(
        **{"levels": 2, "codebook_size": 16, "covariance": "spherical", "center": True, **changes}
    ),
    "rqkmeans-balanced": lambda **changes: semid.RQKMeans(
        **{"codebook_size": 16, "balance": {"mode": "soft", "rounds": 8}, "center": True, **changes}
    ),
    "rqkmeans-balanced-hard": lambda **changes: semid.RQKMeans(
        **{"levels": 2, "codebook_size": 16, "balance": {"mode": "hard", "rounds": 8}, **changes}
    ),
    "rqkmeans-train-with-beam": lambda **changes: semid.RQKMeans(
        **{"codebook_size": 16, "beam_width": 2, "train_with_beam": True, **changes}
    ),
}

sys.path.append(str(Path(__file__).parent / "plugin"))  # a package that is not semid's
TOKENIZERS["plugin"] = lambda **changes: TOKENIZERS_OF_ALL.load("lloyd")(**changes)
TOKENIZERS["plugin-product"] = lambda **changes: TOKENIZERS_OF_ALL.load("lloyd-product")(
    **{"levels": 5, **changes}  # parts of 5 and 4 columns
)

pytestmark = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS.keys())

Make = Callable[..., Tokenizer]


def brief(make: Make, epochs: int = 1, **changes: object) -> Tokenizer:
    """Make a tokenizer that trains shortly, for what must hold however long it trains."""
    if "training" in {**make().settings, **make().settings.get("encoder", {})}:
        changes["training"] = {**SMALL["training"], "epochs": epochs}
    if "refine" in make().settings:  # which the held-out rows decide on
        changes["refine"] = {"rounds": 0}
    return make(**changes)


@pytest.fixture(scope="module")
def fitted(clustered: np.ndarray) -> Callable[[Make], Tokenizer]:
    """Tokenizers as the suite makes them, fitted once; tests leave them as they are."""
    made: dict[Make, Tokenizer] = {}

    def get(make: Make) -> Tokenizer:
        if make not in made:
            made[make] = make().fit(clustered)
        return made[make]

    return get


@pytest.fixture(scope="module")
def briefly(clustered: np.ndarray) -> Callable[..., Tokenizer]:
    """Tokenizers after one epoch, fitted once a seed."""
    made: dict[tuple[Make, int], Tokenizer] = {}

    def get(make: Make, seed: int = 0) -> Tokenizer:
        if (make, seed) not in made:
            made[make, seed] = brief(make, seed=seed).fit(clustered)
        return made[make, seed]

    return get


def test_same_seed_same_codes(make, briefly, clustered):
    again, first = brief(make).fit(clustered), briefly(make)
    assert np.array_equal(again.encode(clustered).codes, first.encode(clustered).codes)
    assert again.weights_fingerprint == first.weights_fingerprint


def test_other_seed_other_codebook(make, briefly):
    assert briefly(make, seed=1).codebook_fingerprint != briefly(make).codebook_fingerprint


def test_threads_change_nothing(make, briefly, clustered):
    single = brief(make, threads=1).fit(clustered)
    triple = brief(make, threads=3).fit(clustered)
    assert single.weights_fingerprint == triple.weights_fingerprint
    assert single.weights_fingerprint == briefly(make).weights_fingerprint


def test_saved_equals_loaded(make, fitted, clustered, tmp_path):
    tokenizer = fitted(make)
    tokenizer.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    assert isinstance(tokenizer, type(loaded))
    assert loaded.settings == tokenizer.settings
    assert loaded.weights_fingerprint == tokenizer.weights_fingerprint
    ours, theirs = tokenizer.encode(clustered), loaded.encode(clustered)
    assert np.array_equal(ours.codes, theirs.codes)
    assert np.array_equal(ours.residual_norms, theirs.residual_norms)
    assert np.array_equal(tokenizer.decode(ours), loaded.decode(theirs))
    assert loaded.report == tokenizer.report
    assert "verdict" in (tmp_path / "model" / "README.md").read_text(encoding="utf8")


def test_row_batch_and_blocks_agree(make, fitted, clustered):
    tokenizer = fitted(make)
    together = tokenizer.encode(clustered).codes
    singly = [tokenizer.encode(clustered[row]).codes[0] for row in range(10)]
    assert np.array_equal(np.stack(singly), together[:10])
    for size in (1, 7, 501):
        parts = [
            tokenizer.encode(clustered[start : start + size]).codes
            for start in range(0, min(30 * size, 1200), size)
        ]
        cut = np.concatenate(parts)
        assert np.array_equal(cut, together[: len(cut)])


def test_permuting_rows_permutes_codes(make, fitted, clustered):
    order = np.random.default_rng(0).permutation(len(clustered))
    tokenizer = fitted(make)
    assert np.array_equal(
        tokenizer.encode(clustered[order]).codes, tokenizer.encode(clustered).codes[order]
    )


def test_equal_rows_get_equal_codes(make, fitted, clustered):
    doubled = np.repeat(clustered[:50], 3, axis=0)
    codes = fitted(make).encode(doubled).codes
    assert np.array_equal(codes[0::3], codes[1::3])
    assert np.array_equal(codes[0::3], codes[2::3])


def test_unseen_rows_are_encoded(make, fitted, clustered):
    new = clustered + 0.5
    ids = fitted(make).encode(new)
    assert ids.codes.shape == (1200, fitted(make).levels)
    assert (ids.codes < np.array(fitted(make).codebook_sizes)).all()


def test_decoding_beats_the_mean_and_improves_with_levels(make, fitted, clustered):
    x = clustered
    tokenizer = fitted(make)
    if tokenizer.levels == 1:
        pytest.skip("has one level alone")
    if tokenizer.settings.get("normalize"):  # which loses the lengths of other rows
        x = clustered / np.linalg.norm(clustered, axis=1, keepdims=True)
        tokenizer = make().fit(x)
    shallow = make(levels=1).fit(x)

    def error(fit: Tokenizer) -> float:
        return float(((x - fit.decode(fit.encode(x))) ** 2).sum())

    # K-means is fitted to the end; the networks of this suite have had eight short epochs.
    share = 0.5 if isinstance(tokenizer, semid.RQKMeans) else 0.75
    assert error(tokenizer) < share * float(((x - x.mean(0)) ** 2).sum())
    assert error(tokenizer) < error(shallow)


def test_quantize_combines_the_codewords_in_their_columns(make, fitted, clustered):
    tokenizer = fitted(make)
    codes = tokenizer.encode(clustered).codes
    mixed = np.zeros((len(codes), tokenizer.latent_dim))
    books = zip(tokenizer.codebooks, tokenizer.latent_slices, strict=True)
    for level, (book, columns) in enumerate(books):
        mixed[:, columns] += book[codes[:, level]]
    if tokenizer.combine == "mean":
        mixed /= tokenizer.levels
    quantized = tokenizer.quantize(codes)
    assert quantized.shape == tokenizer.latent(clustered).shape
    np.testing.assert_allclose(quantized, mixed, rtol=1e-5, atol=1e-5)
    covered = np.zeros(tokenizer.latent_dim, int)
    for columns in tokenizer.latent_slices:
        covered[columns] += 1
    assert (covered == (1 if tokenizer.combine == "concat" else tokenizer.levels)).all()


def test_a_report_measures_each_codebook_in_its_columns(make, fitted, clustered):
    tokenizer = fitted(make)
    diagnosis = semid.diagnose(tokenizer, clustered)
    codes, latent = tokenizer.encode(clustered).codes, tokenizer.latent(clustered)
    residual = latent.copy()
    assert diagnosis.model.latent == latent.shape[1]
    books = zip(tokenizer.codebooks, tokenizer.latent_slices, strict=True)
    for level, (book, columns) in enumerate(books):
        if not tokenizer.hierarchical:
            residual = latent.copy()
        residual[:, columns] -= book[codes[:, level]]
        spread = ((latent - latent.mean(0))[:, columns].astype(float) ** 2).sum()
        error = diagnosis.reconstruction.per_level[level].errors["all"]
        assert error == pytest.approx((residual[:, columns] ** 2).sum() / spread, rel=1e-4)
    # Margins, too, are those of a codebook in its columns: at little noise they predict its flips.
    flips, margins = diagnosis.flips.input.flips.points[2], diagnosis.flips.input.margins.points[2]
    for measured, expected in zip(flips.code, margins.code, strict=True):
        assert expected == pytest.approx(measured.value, abs=0.05, rel=0.5)
    # The explorer's nearest codewords, relative to the spread in these columns.
    near = diagnosis.explorer["neighbors"][-1]
    book, spread = tokenizer.codebooks[-1], 2 * latent[:, columns].var(0).sum()
    distance = ((book[near["code"][0]] - book[near["near"][0][0]]) ** 2).sum() / spread
    assert near["distance"][0][0] == pytest.approx(distance, rel=0.01)


def test_shared_ids_move_to_the_nearest_free_codes(make, fitted, clustered):
    tokenizer = fitted(make)
    rows = np.repeat(clustered[:1], 3, axis=0)
    plain = tokenizer.encode(rows)
    unique = semid.make_unique(plain, method="reassign", tokenizer=tokenizer, embeddings=rows).ids
    assert np.array_equal(unique.codes[:, :-1], plain.codes[:, :-1])
    # What the last codebook quantizes, and the codewords nearest to it.
    columns, book = tokenizer.latent_slices[-1], tokenizer.codebooks[-1]
    inputs = tokenizer.latent(rows[:1])[0, columns]
    if tokenizer.hierarchical:
        inputs = inputs - tokenizer.quantize(plain.codes[:1])[0] + book[plain.codes[0, -1]]
    nearest = np.argsort(((inputs - book) ** 2).sum(1), kind="stable")[:3]
    assert sorted(unique.codes[:, -1]) == sorted(nearest)


def test_refresh_keeps_most_ids(make, fitted, clustered):
    tokenizer = fitted(make)
    if getattr(tokenizer, "needs_behavior", False):
        pytest.skip("learns from behavior")
    published = tokenizer.encode(clustered)
    after = semid.refresh(tokenizer, published, clustered[:1100], max_churn=0.1)
    assert after.report.churn.share <= 0.1
    assert after.ids.levels == tokenizer.levels


def test_refinement_lowers_the_error_or_says_why_not(make, fitted, clustered):
    tokenizer = fitted(make)
    if not tokenizer.encodes_nearest:
        with pytest.raises(UsageError, match="nearest codewords"):
            semid.refine(tokenizer, clustered)
    elif tokenizer.hierarchical and tokenizer.combine == "sum":
        refined = semid.refine(tokenizer, clustered)
        assert refined.report.validation_error <= tokenizer.report.validation_error * 1.001
    else:
        with pytest.raises(UsageError, match="parallel"):
            semid.refine(tokenizer, clustered)


def test_residual_norm_is_what_the_levels_leave(make, fitted, clustered):
    tokenizer = fitted(make)
    ids = tokenizer.encode(clustered)
    left = tokenizer.latent(clustered) - tokenizer.quantize(ids)
    np.testing.assert_allclose(
        ids.residual_norms, np.linalg.norm(left, axis=1), rtol=1e-3, atol=1e-4
    )


def test_half_precision_and_read_only_maps(make, fitted, clustered, tmp_path):
    half = clustered.astype(np.float16)
    np.save(tmp_path / "half.npy", half)
    mapped = np.load(tmp_path / "half.npy", mmap_mode="r")
    expected = fitted(make).encode(half.astype(np.float32)).codes
    assert np.array_equal(fitted(make).encode(half).codes, expected)
    assert np.array_equal(fitted(make).encode(mapped).codes, expected)
    assert np.array_equal(fitted(make).encode(tmp_path / "half.npy").codes, expected)
    ours, theirs = brief(make).fit(mapped), brief(make).fit(half)
    assert ours.codebook_fingerprint == theirs.codebook_fingerprint


def test_held_out_rows_are_never_trained_on(make, fitted, briefly, clustered):
    report = fitted(make).report
    assert report is not None
    assert 0 < report.held_out_items < 200
    assert report.validation_error is not None
    spoilt = clustered.copy()
    from semid.data.ids import held_out_mask
    from semid.tokenizers.stored import HELD_OUT_SALT

    held = held_out_mask(semid.open_embeddings(clustered).ids, 0.05, salt=HELD_OUT_SALT)
    spoilt[held] += 100.0
    # Where held-out rows choose the epoch, there is to be one epoch alone to choose.
    expected = briefly(make).codebook_fingerprint
    assert brief(make).fit(spoilt).codebook_fingerprint == expected
    everything = brief(make, validation_fraction=0).fit(clustered)
    assert everything.report is not None
    assert everything.report.held_out_items == 0
    assert everything.report.validation_error is None


def test_interrupted_and_resumed_equals_uninterrupted(make, clustered, tmp_path):
    def run() -> Tokenizer:
        return brief(make, epochs=3)

    whole = run().fit(clustered).weights_fingerprint
    # Nine steps an epoch: before the codebooks are made, and after; DRQ-VAE also in its K-means.
    settings = make().settings
    trains = "training" in settings and settings.get("behavior_weight", 1.0)
    stops = [4, 23] if trains else [1, 4, 9]
    stops += [29] * (make().kind == "drqvae")
    for after in stops:
        folder = tmp_path / f"after-{after}"
        with pytest.raises(KeyboardInterrupt):
            run().fit(clustered, checkpoint=folder, progress=Stop(after))
        if after == stops[0]:
            with pytest.raises(OutputExistsError, match="--resume"):
                run().fit(clustered, checkpoint=folder)
            with pytest.raises(ArtefactError, match="other settings or data"):
                brief(make, epochs=3, seed=5).fit(clustered, checkpoint=folder, resume=True)
            with pytest.raises(ArtefactError, match="other settings or data"):
                run().fit(clustered + 1, checkpoint=folder, resume=True)
        resumed = run().fit(clustered, checkpoint=folder, resume=True)
        assert resumed.weights_fingerprint == whole


def test_too_few_rows_are_refused(make, clustered):
    with pytest.raises(EmbeddingError, match=r"10 distinct rows cannot fill codebook_size=16"):
        make().fit(clustered[:10])
    with pytest.raises(EmbeddingError, match=r"12 distinct rows"):
        make().fit(np.tile(clustered[:12], (30, 1)))
    with pytest.raises(EmbeddingError, match="validation_fraction"):
        make(validation_fraction=0.9).fit(clustered[:40])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(make, fitted, clustered, bad):
    spoilt = clustered.copy()
    spoilt[17, 3] = bad
    with pytest.raises(EmbeddingError, match="row 17"):
        make().fit(spoilt)
    with pytest.raises(EmbeddingError, match="row 17"):
        fitted(make).encode(spoilt)


def test_wrong_width_is_refused(make, fitted, clustered):
    with pytest.raises(EmbeddingError, match="width 23, the tokenizer was fitted on width 24"):
        fitted(make).encode(clustered[:, :23])


def test_wrong_codes_are_refused(make, fitted, clustered):
    tokenizer = fitted(make)
    codes = tokenizer.encode(clustered[:5]).codes.astype(np.int64)
    with pytest.raises(InputError, match="shape"):
        tokenizer.decode(codes[:, :0])
    with pytest.raises(InputError, match="shape"):
        tokenizer.decode(codes.astype(np.float32))
    last = tokenizer.levels - 1
    codes[2, last] = 16
    with pytest.raises(InputError, match=f"row 2, level {last}, code 16, allowed 0 to 15"):
        tokenizer.decode(codes)
    codes[2, last] = -1
    with pytest.raises(InputError, match="outside their codebook"):
        tokenizer.quantize(codes)


def test_codes_of_another_codebook_are_refused(make, fitted, briefly, clustered):
    other = briefly(make, seed=1)
    with pytest.raises(FingerprintError, match="another codebook"):
        fitted(make).decode(other.encode(clustered[:4]))


def test_unfitted_says_so(make, clustered):
    with pytest.raises(NotFittedError, match="fit"):
        make().encode(clustered)
    with pytest.raises(NotFittedError, match="fit"):
        _ = make().codebooks
    with pytest.raises(NotFittedError, match="fit"):
        make().save("never-written")
    assert not Path("never-written").exists()


def test_save_never_replaces_unasked(make, fitted, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("keep", encoding="utf8")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="overwrite"):
            fitted(make).save(tmp_path / "model", overwrite=overwrite)
    assert (tmp_path / "model" / "precious.txt").read_text(encoding="utf8") == "keep"
    (tmp_path / "model" / "precious.txt").unlink()
    fitted(make).save(tmp_path / "model", overwrite=True)
    fitted(make).save(tmp_path / "model", overwrite=True)
    assert semid.load(tmp_path / "model").dim == 24
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_artefacts_are_refused(make, fitted, tmp_path):
    from safetensors.numpy import load_file, save_file

    fitted(make).save(tmp_path / "model")
    file = tmp_path / "model" / TENSOR_FILE
    whole = file.read_bytes()
    tensors = load_file(file)
    name = sorted(tensors)[0]

    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="cut short"):
        semid.load(tmp_path / "model")
    altered = dict(tensors)
    altered[name] = tensors[name] + 1
    save_file(altered, file)
    with pytest.raises(ArtefactError, match="checksum"):
        semid.load(tmp_path / "model")
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ArtefactError, match=f"missing: {name}"):
        semid.load(tmp_path / "model")
    file.unlink()
    with pytest.raises(ArtefactError, match="copy the whole folder"):
        semid.load(tmp_path / "model")


def test_options_out_of_range_are_refused(make):
    for change in (
        {"levels": 0},
        {"codebook_size": 1},
        {"codebook_size": (16, 16, 16, 16, 16)},
        {"beam_width": 0},
        {"validation_fraction": 1.0},
    ):
        known = {*make().settings, *(("levels",) if "n_codebooks" in make().settings else ())}
        if not change.keys() <= known:
            continue  # not an option of this tokenizer
        with pytest.raises(UsageError):
            make(**change)


def test_repr_shows_settings(make, fitted):
    assert "not fitted" in repr(make())
    assert "dim=24" in repr(fitted(make))


def test_arguments_follow_scikit_learn(make):
    tokenizer = make()
    arguments = tokenizer.get_params(deep=False)
    cloned = clone(tokenizer)
    assert type(cloned) is type(tokenizer)
    assert all(cloned.get_params(deep=False)[name] is value for name, value in arguments.items())
    cloned.set_params(seed=7, validation_fraction=0.25)
    assert cloned.settings == {**tokenizer.settings, "seed": 7, "validation_fraction": 0.25}
    assert type(tokenizer)(**tokenizer.settings).settings == tokenizer.settings
    with pytest.raises(UsageError, match="validation_fraction"):
        cloned.set_params(validation_fraction=2.0)
    with pytest.raises(UsageError, match="no argument 'levles'"):
        cloned.set_params(levles=2)


def test_numbers_of_numpy_are_arguments(make, briefly, tmp_path, clustered):
    plain = briefly(make)
    numbers = {
        name: np.array(value)[()]
        for name, value in plain.get_params(deep=False).items()
        if isinstance(value, int | float)
    }
    same = clone(plain).set_params(**numbers).fit(clustered)
    same.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    assert plain.weights_fingerprint == same.weights_fingerprint == loaded.weights_fingerprint
    assert plain.settings == loaded.settings


def test_it_is_the_last_step_of_a_pipeline(make, clustered):
    pipeline = Pipeline([("scale", StandardScaler()), ("ids", brief(make))])
    codes = pipeline.fit_transform(clustered)
    assert np.array_equal(codes, pipeline.transform(clustered))
    scaled = pipeline["scale"].transform(clustered)
    assert np.array_equal(codes, pipeline["ids"].encode(scaled).codes)


def test_copies_and_pickles_encode_alike(make, fitted, clustered):
    assert "not fitted" in repr(pickle.loads(pickle.dumps(make())))
    tokenizer = fitted(make)
    for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert copied.settings == tokenizer.settings
        assert copied.weights_fingerprint == tokenizer.weights_fingerprint
        assert np.array_equal(copied.encode(clustered).codes, tokenizer.encode(clustered).codes)


def test_renumbered_codewords_decode_alike(make, fitted, clustered):
    tokenizer = fitted(make)
    generator = np.random.default_rng(3)
    numbers = [generator.permutation(size) for size in tokenizer.codebook_sizes]
    renumbered = tokenizer.renumbered(numbers)
    codes = tokenizer.encode(clustered).codes
    expected = np.stack([number[codes[:, level]] for level, number in enumerate(numbers)], axis=1)
    assert np.array_equal(renumbered.encode(clustered).codes, expected)
    assert np.array_equal(renumbered.decode(expected), tokenizer.decode(codes))


def test_the_exported_graph_gives_the_same_codes(make, fitted, clustered):
    from semid.exports.encoders import CodesGraph

    tokenizer = fitted(make)
    if not tokenizer.has_encoder_module:
        with pytest.raises(UsageError, match="no encoder graph"):
            CodesGraph(tokenizer)
        return
    codes = CodesGraph(tokenizer)(torch.from_numpy(clustered)).numpy()
    # A network may add in another order, which decides near-ties; a beam among equal parents too.
    assert (codes == tokenizer.encode(clustered).codes).mean() > 0.999
