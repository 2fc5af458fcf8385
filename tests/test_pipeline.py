"""One tokenizer on the latent of another equals the two one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import semid
from cli_cases import run
from semid.errors import EmbeddingError, UsageError
from semid.progress import QuietProgress
from semid.seeds import numpy_generator

NETWORK = {"hidden": (16,), "latent": 6}
TRAINING = {"epochs": 2, "batch_size": 128}


def encoder(**changes: object) -> semid.DRQVAE:
    settings = {"levels": 1, "codebook_size": 8, "network": NETWORK, "training": TRAINING}
    return semid.DRQVAE(**{**settings, **changes})


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return semid.SyntheticCatalogue(items=900, dim=12, seed=1).matrix()


def test_it_equals_the_two_one_after_the_other(x):
    quantizer = semid.OPQ(n_codebooks=3, codebook_size=8, rotation_iter=2)
    together = semid.Pipeline(encoder=encoder(), quantizer=quantizer).fit(x)
    first = encoder().fit(x)
    latents = first.latent(x)
    second = semid.OPQ(n_codebooks=3, codebook_size=8, rotation_iter=2).fit(latents)
    codes = together.encode(x).codes
    np.testing.assert_array_equal(codes, second.encode(latents).codes)
    np.testing.assert_allclose(
        together.decode(codes), first.decode_latent(second.decode(codes)), atol=1e-5
    )
    assert (together.combine, together.hierarchical, together.levels) == ("concat", False, 3)
    assert together.kind == "pipeline"
    # What was given stays unfitted.
    assert "not fitted" in repr(quantizer)


def test_residual_kmeans_on_the_latent_is_drq(x):
    kmeans = {"max_iter": 5}
    drq = encoder(levels=3, kmeans=kmeans).fit(x)
    pipeline = semid.Pipeline(
        encoder=encoder(), quantizer=semid.RQKMeans(levels=3, codebook_size=8, kmeans=kmeans)
    ).fit(x)
    assert pipeline.hierarchical
    np.testing.assert_array_equal(pipeline.encode(x).codes, drq.encode(x).codes)
    refined = semid.refine(pipeline, x)
    assert refined.beam_width > 1
    assert semid.refine(drq, x).codebook_fingerprint == refined.codebook_fingerprint


def test_a_contrastive_encoder_learns_from_pairs(x):
    generator = numpy_generator(0, "pairs")
    pairs = generator.integers(0, len(x), (400, 2))
    model = semid.Pipeline(
        encoder=encoder(contrastive_weight=0.5, pairs_per_step=32),
        quantizer=semid.PQ(n_codebooks=2, codebook_size=8),
    )
    assert model.needs_behavior
    with pytest.raises(UsageError, match="needs pairs"):
        model.fit("nowhere.npy")
    with_pairs = model.fit(x, pairs=pairs)
    without = semid.Pipeline(
        encoder=encoder(), quantizer=semid.PQ(n_codebooks=2, codebook_size=8)
    ).fit(x)
    assert with_pairs.weights_fingerprint != without.weights_fingerprint
    with pytest.raises(UsageError, match="would not be used"):
        without.fit(x, pairs=pairs)


@pytest.mark.parametrize("continues", [True, False])
def test_a_refresh_keeps_the_encoder(x, continues):
    network = {"codebook_size": 8, "network": {"hidden": (8,), "latent": 4}, "training": TRAINING}
    second = semid.RQKMeans(levels=2, codebook_size=8) if continues else semid.VQVAE(**network)
    model = semid.Pipeline(encoder=encoder(), quantizer=second).fit(x)
    assert second.can_warm_start == continues
    after = semid.refresh(model, model.encode(x), x[:800], max_churn=0.1)
    kept = after.tokenizer._encoder.weights_fingerprint
    assert kept == model._encoder.weights_fingerprint
    assert after.report.churn.share <= 0.1


def test_every_command_takes_a_recipe_of_two(x, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", x)
    Path("two.toml").write_text(
        'tokenizer = "pipeline"\n'
        '[encoder]\ntokenizer = "drqvae"\nlevels = 1\ncodebook_size = 8\n'
        "[encoder.network]\nhidden = [16]\nlatent = 6\n[encoder.training]\nepochs = 1\n"
        '[quantizer]\ntokenizer = "opq"\nn_codebooks = 2\ncodebook_size = 8\n'
    )

    assert run("fit", "x.npy", "--recipe", "two.toml", "-o", "model", "-q") == 0
    assert "fitted pipeline" in capsys.readouterr().out
    assert run("encode", "model", "x.npy", "-o", "ids.parquet", "-q") == 0
    assert run("report", "model", "x.npy", "-o", "report.json", "-q") == 0
    assert json.loads(Path("report.json").read_text())["model"]["latent"] == 6
    unique = ("unique", "ids.parquet", "--method", "reassign", "--model", "model")
    assert run(*unique, "--embeddings", "x.npy", "-o", "unique.parquet", "-q") == 0
    refresh = ("refresh", "model", "x.npy", "--catalogue", "ids.parquet")
    assert run(*refresh, "-o", "next", "-q") == 0
    export = ("export", "--model", "model", "--to", "torch-export", "-o", "x.pt2")
    assert run(*export) == 0


BAD = {
    "nothing": ({}, "encoder is NoneType"),
    "no tokenizer": ({"encoder": 5, "quantizer": semid.PQ()}, "encoder is int"),
    "a table without a name": ({"encoder": {"levels": 1}, "quantizer": semid.PQ()}, "tokenizer"),
    "an unknown name": (
        {"encoder": {"tokenizer": "drqva"}, "quantizer": semid.PQ()},
        "did you mean 'drqvae'",
    ),
    "no decoder": ({"encoder": semid.RQKMeans(), "quantizer": semid.PQ()}, "decodes no latents"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_pair_of_tokenizers_is_refused(case):
    arguments, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        semid.Pipeline(**arguments)


def test_too_wide_a_quantizer_is_refused(x):
    model = semid.Pipeline(
        encoder=encoder(), quantizer=semid.PQ(n_codebooks=7, codebook_size=4)
    )  # of a latent of 6
    with pytest.raises(UsageError, match="n_codebooks=7 for embeddings of width 6"):
        model.fit(x, progress=QuietProgress())


def test_an_encoder_with_more_codewords_than_rows_is_refused(x):
    quantizer = semid.RQKMeans(levels=1, codebook_size=8)
    pair = semid.Pipeline(encoder=encoder(codebook_size=1000), quantizer=quantizer)
    with pytest.raises(EmbeddingError, match="cannot fill codebook_size=1000"):
        pair.fit(x)
