"""Codebooks from elsewhere: arrays, FAISS indexes, checkpoints that must not run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import semid
from cli_cases import run
from semid.errors import ArtefactError, UsageError
from semid.exports.codebook_files import read_checkpoint

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(1500, 12)) * np.geomspace(2, 0.3, 12) + 1).astype(np.float32)


def residual_codes(x: np.ndarray, books: list[np.ndarray], normalize: bool) -> np.ndarray:
    """Brute force in float64."""
    rest, codes = x.astype(float), []
    for book in books:
        if normalize:
            rest = rest / np.linalg.norm(rest, axis=1, keepdims=True)
        codes.append(((rest[:, None] - book[None]) ** 2).sum(2).argmin(1))
        rest = rest - book[codes[-1]]
    return np.stack(codes, axis=1)


def test_given_levels_are_those_of_the_tokenizer_they_came_from(x):
    model = semid.RQKMeans(levels=3, codebook_size=(8, 16, 4), center=True, beam_width=3).fit(x)
    mean = model._preprocess.mean
    same = semid.from_codebooks(list(model.codebooks), mean=mean, beam_width=3)
    assert same.codebook_sizes == (8, 16, 4)
    assert same.hierarchical
    ids = model.encode(x)
    np.testing.assert_array_equal(same.encode(x).codes, ids.codes)
    np.testing.assert_array_equal(same.decode(ids.codes), model.decode(ids))
    assert same.codebook_fingerprint == model.codebook_fingerprint


def test_given_product_codes_are_those_of_opq(x):
    model = semid.OPQ(n_codebooks=5, codebook_size=16, center=True, rotation_iter=2).fit(x)
    same = semid.from_codebooks(
        [torch.from_numpy(book) for book in model.codebooks],
        combine="concat",
        mean=model._preprocess.mean,
        projection=model.rotation,
    )
    np.testing.assert_array_equal(same.encode(x).codes, model.encode(x).codes)
    np.testing.assert_allclose(
        same.decode(model.encode(x).codes), model.decode(model.encode(x)), atol=1e-4
    )


def test_parallel_codebooks_of_one_vector_are_averaged(x):
    books = [x[:6], x[100:109]]
    model = semid.from_codebooks(books, combine="mean")
    codes = model.encode(x).codes
    for level, book in enumerate(books):
        exact = ((x[:, None].astype(float) - book[None]) ** 2).sum(2).argmin(1)
        np.testing.assert_array_equal(codes[:, level], exact)
    np.testing.assert_allclose(
        model.decode(codes), (books[0][codes[:, 0]] + books[1][codes[:, 1]]) / 2, rtol=1e-6
    )


def test_a_map_and_offset_are_undone_by_decode(x):
    generator = np.random.default_rng(2)
    projection, offset = generator.normal(size=(12, 12)), generator.normal(size=12)
    latent = x @ projection + offset
    model = semid.from_codebooks([latent[:900]], projection=projection, offset=offset)
    assert model.levels == 1
    np.testing.assert_allclose(model.decode(model.encode(x[:900])), x[:900], atol=1e-2)


def test_every_step_takes_given_codebooks(x, tmp_path, monkeypatch):
    model = semid.from_codebooks(list(semid.RQKMeans(levels=2, codebook_size=16).fit(x).codebooks))
    model.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    ids = loaded.encode(x)
    assert loaded.weights_fingerprint == model.weights_fingerprint
    assert semid.diagnose(loaded, x).model.kind == "codebooks"
    assert semid.compare({"a": loaded, "b": model}, x) is not None
    refined = semid.refine(loaded, x)
    assert refined.report.details["refine"]
    after = semid.refresh(loaded, ids, x[:1400], max_churn=0.2)
    assert after.report.churn.share <= 0.2
    assert after.tokenizer.kind == "codebooks"
    semid.export("onnx", tmp_path / "x.onnx", tokenizer=loaded)
    semid.export("huggingface", tmp_path / "hf", ids=ids, tokenizer=loaded)
    semid.export("faiss", tmp_path / "x.index", ids=ids, tokenizer=loaded)
    assert (tmp_path / "x.index").exists()


BAD = {
    "no codebooks": ([], {}, "holds no codebooks"),
    "one row": ([np.zeros((1, 4))], {}, "give 2 to"),
    "three axes": ([np.zeros((2, 3, 4))], {}, r"arrays\[0\] has shape \(2, 3, 4\)"),
    "words": ([[["a", "b"]]], {}, "holds no numbers"),
    "not finite": ([np.full((2, 2), np.nan)], {}, "NaN"),
    "too long": ([np.full((2, 4), 1e30)], {}, "length 2e\\+30"),
    "long offset": ([np.zeros((2, 4))], {"offset": np.full(4, 1e30)}, "offset holds a vector"),
    "widths": ([np.zeros((2, 3)), np.zeros((2, 4))], {}, "widths"),
    "combine": ([np.zeros((2, 3))], {"combine": "max"}, "combine"),
    "mean": ([np.zeros((2, 3))], {"mean": np.zeros(4)}, "mean has shape"),
    "projection": ([np.zeros((2, 3))], {"projection": np.eye(4)}, "projection has shape"),
    "offset": ([np.zeros((2, 3))], {"offset": np.zeros(4)}, "offset has shape"),
    "beam": ([np.zeros((2, 3))], {"combine": "mean", "beam_width": 2}, "beam_width=2"),
    "normalized": ([np.zeros((2, 3))], {"combine": "mean", "normalize_residuals": True}, "sum"),
}


@pytest.mark.parametrize("case", BAD)
def test_arrays_that_are_no_codebooks_are_refused(case):
    arrays, settings, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        semid.from_codebooks(arrays, **settings)


# FAISS ------------------------------------------------------------------------------------------


def test_a_faiss_product_index_gives_its_codes(x, tmp_path):
    index = faiss.index_factory(12, "OPQ4,PQ4x4")
    index.train(x)
    index.add(x)
    faiss.write_index(index, str(tmp_path / "x.index"))
    model = semid.import_codebooks("faiss", tmp_path / "x.index")
    assert (model.combine, model.codebook_sizes) == ("concat", (16,) * 4)
    decoded = model.decode(model.encode(x))
    np.testing.assert_allclose(decoded, index.reconstruct_n(0, len(x)), atol=2e-3)


def test_a_faiss_residual_index_gives_its_codes(x, tmp_path):
    index = faiss.IndexResidualQuantizer(12, 3, 4)
    index.train(x)
    faiss.write_index(index, str(tmp_path / "x.index"))
    model = semid.import_codebooks("faiss", tmp_path / "x.index")
    assert (model.codebook_sizes, model.beam_width) == ((16,) * 3, index.rq.max_beam_size)
    packed = faiss.unpack_bitstrings(index.rq.compute_codes(x), 3, 4)
    assert (model.encode(x).codes == packed).all(axis=1).mean() > 0.99


def test_additive_codebooks_encode_nearly_as_well_by_a_beam(x, tmp_path):
    index = faiss.IndexLocalSearchQuantizer(12, 3, 4)
    index.train(x)
    faiss.write_index(index, str(tmp_path / "x.index"))
    model = semid.import_codebooks("faiss", tmp_path / "x.index")
    ours = ((x - model.decode(model.encode(x))) ** 2).sum()
    theirs = ((x - index.lsq.decode(index.lsq.compute_codes(x))) ** 2).sum()
    assert ours < 1.02 * theirs


def test_other_indexes_are_named(x, tmp_path):
    for description, message in (("Flat", "IndexFlat"), ("L2norm,PQ4x4", "NormalizationTransform")):
        index = faiss.index_factory(12, description)
        index.train(x)
        faiss.write_index(index, str(tmp_path / "x.index"))
        with pytest.raises(UsageError, match=message):
            semid.import_codebooks("faiss", tmp_path / "x.index")
    faiss.write_index(faiss.IndexPQ(12, 4, 4), str(tmp_path / "raw.index"))
    with pytest.raises(ArtefactError, match="not trained"):
        semid.import_codebooks("faiss", tmp_path / "raw.index")
    (tmp_path / "bad.index").write_bytes(b"IxPQ" + b"\0" * 9)
    with pytest.raises(ArtefactError, match="cannot be read as a FAISS index"):
        semid.import_codebooks("faiss", tmp_path / "bad.index")


# Checkpoints ------------------------------------------------------------------------------------


class OneRecTokenizer(torch.nn.Module):
    """Residual K-means with the names that OpenOneRec's file has."""

    def __init__(self, books):
        super().__init__()
        self.centroids = torch.nn.ParameterList([torch.nn.Parameter(book) for book in books])


class Hostile:
    """Runs a command when a pickle that holds it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def books_of(x: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(x[:8].copy()), torch.from_numpy(x[50:66] - x[:16])]


def test_openonerec_and_torcheasyrec_files_are_read(x, tmp_path):
    books = books_of(x)
    torch.save(OneRecTokenizer(books).state_dict(), tmp_path / "one.pt")
    layers = {f"model.quantizer.layers.{i}.centroids": book for i, book in enumerate(books)}
    extra = {"model.quantizer.layers.0._is_initialized": torch.tensor(True)}
    torch.save({"state": {**layers, **extra}, "step": 3}, tmp_path / "easy.pt")
    save_file(layers, tmp_path / "easy.safetensors")
    expected = residual_codes(x, [book.numpy() for book in books], normalize=False)
    for source, name in (
        ("openonerec", "one.pt"),
        ("torcheasyrec", "easy.pt"),
        ("torcheasyrec", "easy.safetensors"),
    ):
        model = semid.import_codebooks(source, tmp_path / name)
        np.testing.assert_array_equal(model.encode(x).codes, expected)


@pytest.mark.parametrize("stored", [None, False, True])
def test_grid_checkpoints_scale_residuals_and_run_no_code(x, tmp_path, stored):
    books = books_of(x)
    names = {f"quantization_layer_list.{i}.centroids": book for i, book in enumerate(books)}
    hyper = {"optimizer": Hostile(tmp_path / "witness")}
    if stored is not None:
        hyper["normalize_residuals"] = stored
    torch.save({"state_dict": names, "hyper_parameters": hyper}, tmp_path / "grid.ckpt")
    model = semid.import_codebooks("grid-checkpoint", tmp_path / "grid.ckpt")
    assert not (tmp_path / "witness").exists()
    expected = residual_codes(x, [book.numpy() for book in books], normalize=stored is not False)
    np.testing.assert_array_equal(model.encode(x).codes, expected)
    model.save(tmp_path / "model")
    loaded = semid.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.encode(x).codes, expected)
    assert semid.diagnose(loaded, x, explorer=False).model.kind == "codebooks"
    assert loaded.has_encoder_module == (stored is False)
    if stored is not False:
        for refused in (
            lambda: semid.refine(loaded, x),
            lambda: semid.refresh(loaded, loaded.encode(x), x),
            lambda: semid.export("onnx", tmp_path / "x.onnx", tokenizer=loaded),
        ):
            with pytest.raises(UsageError, match="normalize_residuals"):
                refused()
    # The file is hostile: reading it as pickles are read does run the command.
    torch.load(tmp_path / "grid.ckpt", weights_only=False)
    assert (tmp_path / "witness").exists()


def test_checkpoints_of_other_kinds_are_named(x, tmp_path):
    books = books_of(x)
    torch.save({"weights": books}, tmp_path / "other.pt")
    with pytest.raises(ArtefactError, match=r"no codebooks .*weights\.0"):
        semid.import_codebooks("openonerec", tmp_path / "other.pt")
    torch.save({"centroids.0": books[0], "centroids.2": books[1]}, tmp_path / "gap.pt")
    with pytest.raises(ArtefactError, match=r"levels \[0, 2\]"):
        semid.import_codebooks("openonerec", tmp_path / "gap.pt")
    names = {"quantization_layer_list.0.centroids": books[0], "encoder.0.weight": books[1]}
    torch.save({"state_dict": names}, tmp_path / "vae.ckpt")
    with pytest.raises(ArtefactError, match="holds an encoder"):
        semid.import_codebooks("grid-checkpoint", tmp_path / "vae.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"centroids.0": [1]}))
    for name in ("plain.pt", "other.pt"):
        damaged = tmp_path / f"cut-{name}"
        damaged.write_bytes((tmp_path / name).read_bytes()[:-40])
        with pytest.raises(ArtefactError, match="cannot be read"):
            read_checkpoint(damaged)
    with pytest.raises(ArtefactError, match="is no file"):
        semid.import_codebooks("openonerec", tmp_path / "missing.pt")
    with pytest.raises(UsageError, match="did you mean 'openonerec'"):
        semid.import_codebooks("openonrec", tmp_path / "gap.pt")


def test_storages_of_every_type_are_read(tmp_path):
    tensors = {
        str(kind): torch.arange(6).reshape(2, 3).to(kind)
        for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    }
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).T
    tensors["part"] = torch.arange(10.0)[3:7]
    torch.save(tensors, tmp_path / "x.pt")
    for name, tensor in read_checkpoint(tmp_path / "x.pt").items():
        assert torch.equal(tensor, tensors[name])


def test_the_command_imports_codebooks(x, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(OneRecTokenizer(books_of(x)).state_dict(), "one.pt")
    np.save("x.npy", x)

    assert run("import", "one.pt", "--from", "openonerec", "-o", "model") == 0
    assert "imported codebooks of 8, 16 codewords: model" in capsys.readouterr().out
    assert run("encode", "model", "x.npy", "-o", "ids.parquet", "-q") == 0
    assert run("report", "model", "x.npy", "-o", "report.json", "-q") == 0
    again = ("import", "one.pt", "--from", "openonerec", "-o", "other", "--ids", "x.csv")
    assert run(*again) == 2
    assert "--ids would change nothing" in capsys.readouterr().err
