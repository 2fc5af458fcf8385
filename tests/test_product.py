"""Product quantization against faiss and brute force, and inputs that have too little to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import semid
from cli_cases import run
from semid.errors import UsageError
from semid.quantization.blocks import ArrayBlocks, statistics
from semid.quantization.engine import narrow
from semid.quantization.kmeans import KMeansOptions
from semid.quantization.nearest import index_codebook, nearest
from semid.quantization.product import fit_product, part_slices, part_statistics
from semid.quantization.rotation import allocate_eigenvalues, fit_rotation, procrustes
from semid.quantization.sharding import as_sharded
from semid.tokenizers.neural.autoencoder import perceptron

faiss = pytest.importorskip("faiss")


def rows(count: int = 3000, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Rows of correlated columns of falling variance."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, dim)) * np.geomspace(3, 0.1, dim)
    turn, _ = np.linalg.qr(generator.normal(size=(dim, dim)))
    return (mixed @ turn).astype(np.float32) + np.float32(5)


def relative_error(x: np.ndarray, decoded: np.ndarray) -> float:
    return float(((x - decoded) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_faiss_with_equal_codebooks(bits):
    x = rows()
    model = semid.PQ(n_codebooks=4, codebook_size=2**bits, validation_fraction=0).fit(x)
    index = faiss.ProductQuantizer(24, 4, bits)
    faiss.copy_array_to_vector(np.stack(model.codebooks).ravel(), index.centroids)
    packed = index.compute_codes(x)
    expected = np.stack(
        [faiss.unpack_bitstrings(packed, 4, bits)[:, part] for part in range(4)], axis=1
    )
    codes = model.encode(x).codes
    # faiss adds in float32; where it differs, both codewords are equally near up to that rounding.
    different = (codes != expected).any(axis=1)
    assert different.mean() < 0.002
    np.testing.assert_allclose(
        ((x - model.decode(codes)) ** 2).sum(1), ((x - model.decode(expected)) ** 2).sum(1),
        rtol=1e-4, atol=1e-3,
    )  # fmt: skip


def test_error_is_at_most_that_of_faiss_after_as_many_iterations():
    x = rows(4000)
    kmeans = {"max_iter": 25, "tol": 0}
    for parts in (4, 8):
        ours = semid.PQ(
            n_codebooks=parts, codebook_size=64, validation_fraction=0, kmeans=kmeans
        ).fit(x)
        theirs = faiss.ProductQuantizer(24, parts, 6)
        theirs.cp.niter, theirs.cp.max_points_per_centroid = 25, 10**6
        theirs.train(x)
        error = relative_error(x, theirs.decode(theirs.compute_codes(x)))
        assert relative_error(x, ours.decode(ours.encode(x))) <= error * 1.002


def test_a_learned_rotation_beats_principal_components_and_no_rotation():
    x = rows(4000)
    settings = {"n_codebooks": 6, "codebook_size": 32, "validation_fraction": 0}
    errors = [
        relative_error(x, model.decode(model.encode(x)))
        for model in (
            semid.PQ(**settings).fit(x),
            semid.OPQ(**settings, rotation_iter=0).fit(x),
            semid.OPQ(**settings, rotation_iter=30).fit(x),
        )
    ]
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    opq = faiss.OPQMatrix(24, 6)
    opq.pq = faiss.ProductQuantizer(24, 6, 5)
    opq.niter = 30
    opq.train(x)
    turned = opq.apply(x)
    theirs = faiss.ProductQuantizer(24, 6, 5)
    theirs.train(turned)
    error = relative_error(turned, theirs.decode(theirs.compute_codes(turned)))
    assert errors[2] < error * 1.01


def test_a_rotation_is_orthogonal_and_inverted_by_decode():
    x = rows()
    model = semid.OPQ(n_codebooks=4, codebook_size=16, rotation_iter=3).fit(x)
    np.testing.assert_allclose(model.rotation @ model.rotation.T, np.eye(24), atol=1e-5)
    ids = model.encode(x)
    np.testing.assert_allclose(
        model.decode(ids), model.quantize(ids) @ model.rotation.T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        ids.residual_norms, np.linalg.norm(x - model.decode(ids), axis=1), rtol=1e-3
    )


def test_procrustes_finds_the_rotation_between_two_clouds():
    x = rows(500)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))
    rotation = procrustes(x.T.astype(float) @ (x @ turn))
    np.testing.assert_allclose(rotation, turn, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_alternation_moves_rotation_and_codewords_to_what_the_codes_ask_for(weighted):
    x = rows(500)
    weights = np.random.default_rng(1).uniform(0, 3, len(x)) if weighted else None
    slices, options = part_slices(24, 5), KMeansOptions()

    def fit(iterations: int):
        return fit_rotation(
            as_sharded(ArrayBlocks(x), weights=weights, threads=1, memory_bytes=1 << 30), slices,
            [16] * 5, rotate=lambda y, turn, threads: y @ turn, iterations=iterations, seed=0,
            options=options, threads=1,
        )  # fmt: skip

    before, after = fit(0), fit(1)
    turned, mass = x @ before.rotation, np.ones(len(x)) if weights is None else weights
    quantized, error = np.empty_like(turned), 0.0
    for part, book, moved in zip(slices, before.books, after.books, strict=True):
        apart = ((turned[:, None, part] - book) ** 2).sum(axis=2)
        codes = apart.argmin(axis=1)
        quantized[:, part], error = book[codes], error + mass @ apart.min(axis=1)
        for code in np.unique(codes[mass > 0]):
            mine = codes == code
            mean = np.average(turned[mine][:, part], axis=0, weights=mass[mine])
            np.testing.assert_allclose(moved[code], mean, rtol=1e-4, atol=1e-5)
    assert after.error == [pytest.approx(error, rel=1e-5)]
    best = procrustes((x * mass[:, None]).T.astype(np.float64) @ quantized)
    np.testing.assert_allclose(after.rotation, best, atol=1e-4)


def test_components_are_shared_out_by_their_product():
    values = np.array([16.0, 8.0, 4.0, 2.0])
    order = allocate_eigenvalues(values, part_slices(4, 2))
    assert sorted(map(sorted, (order[:2], order[2:]))) == [[0, 3], [1, 2]]
    assert np.prod(values[order[:2]]) == np.prod(values[order[2:]])


def test_parts_cover_the_columns_and_differ_by_one_at_most():
    for dim, parts in ((10, 4), (24, 5), (7, 7), (64, 8), (3, 1)):
        slices = part_slices(dim, parts)
        widths = [part.stop - part.start for part in slices]
        assert sum(widths) == dim
        assert max(widths) - min(widths) <= 1
        assert [part.start for part in slices[1:]] == [part.stop for part in slices[:-1]]


def test_more_codebooks_than_columns_are_refused():
    with pytest.raises(UsageError, match="n_codebooks=25 for embeddings of width 24"):
        semid.PQ(n_codebooks=25, codebook_size=4).fit(rows())


def test_columns_without_values_leave_codes_dead_and_say_so(caplog):
    x = rows()
    x[:, 6:12] = 1.0  # the second of four parts does not vary
    x[:, 12:18] = np.round(x[:, 12:13] > 5)  # the third has two values
    for kind in (semid.PQ, semid.OPQ):
        caplog.clear()
        model = kind(n_codebooks=4, codebook_size=32, validation_fraction=0).fit(x)
        assert np.isfinite(model.decode(model.encode(x))).all()
        if kind is semid.PQ:
            assert "codebook 2: only 1 of 32 codewords differ" in caplog.text
            assert "codebook 3: only 2 of 32 codewords differ" in caplog.text
            np.testing.assert_array_equal(model.decode(model.encode(x))[:, 6:18], x[:, 6:18])
            assert set(model.encode(x).codes[:, 1]) == {0}


def test_empty_codewords_move_to_the_farthest_rows():
    x = np.repeat(np.eye(4, dtype=np.float32) * 10, 50, axis=0)
    start = [np.zeros((4, 4), np.float32)]
    books, fits = fit_product(
        ArrayBlocks(x), part_slices(4, 1), [4], seed=0, options=KMeansOptions(), init=start
    )
    assert sorted(map(tuple, books[0])) == sorted(map(tuple, np.eye(4) * 10))
    assert fits[0].inertia == 0


def test_streams_threads_and_memory_change_nothing(tmp_path):
    x = rows(70_000, 8)  # two blocks
    np.save(tmp_path / "x.npy", x)
    settings = {"seed": 1, "options": KMeansOptions(max_iter=3)}
    slices = part_slices(8, 3)
    first, _ = fit_product(ArrayBlocks(x), slices, [16] * 3, threads=1, **settings)
    mapped = semid.open_embeddings(tmp_path / "x.npy")
    second, _ = fit_product(mapped, slices, [16] * 3, threads=3, memory_bytes=0, **settings)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_move_codewords_and_samples_train_alike():
    x = rows(2000, 4)
    weights = np.where(x[:, 0] > 5, 1.0, 0.0)
    one = semid.PQ(n_codebooks=2, codebook_size=2, validation_fraction=0)
    light, heavy = one.fit(x).codebooks[0], one.fit(x, weights=weights).codebooks[0]
    assert (heavy[:, 0] > light[:, 0].min()).all()
    sampled = semid.PQ(
        n_codebooks=2, codebook_size=16, validation_fraction=0, kmeans={"sample_per_code": 40}
    ).fit(x)
    full = semid.PQ(n_codebooks=2, codebook_size=16, validation_fraction=0).fit(x)
    errors = [relative_error(x, model.decode(model.encode(x))) for model in (sampled, full)]
    assert errors[1] < errors[0] < 1.3 * errors[1]
    restarted = semid.PQ(
        n_codebooks=2, codebook_size=16, validation_fraction=0, kmeans={"n_init": 3}
    ).fit(x)
    assert relative_error(x, restarted.decode(restarted.encode(x))) <= errors[1]


# The kernel of narrow rows ----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 16, 17, 48, 64])
@pytest.mark.parametrize("codes", [1, 2, 63, 64, 300])
def test_narrow_search_equals_brute_force(dim, codes):
    generator = np.random.default_rng(dim * 1000 + codes)
    x = generator.normal(size=(517, dim)).astype(np.float32) + 100
    book = generator.normal(size=(codes, dim)).astype(np.float32) + 100
    book[codes // 2 :] = np.round(book[codes // 2 :])  # duplicates and ties
    x[::7] = np.round(x[::7])
    indexed = index_codebook(torch.from_numpy(book))
    assert narrow.suits(indexed.table)
    found = nearest(torch.from_numpy(x), indexed, threads=2)
    exact = ((x.astype(float)[:, None] - book.astype(float)[None]) ** 2).sum(2)
    np.testing.assert_array_equal(found.labels.numpy(), exact.argmin(1))
    np.testing.assert_allclose(found.distances.numpy(), exact.min(1), rtol=1e-6)
    # Bit for bit what the other routes give.
    other = nearest(torch.from_numpy(x), indexed, route="fp32")
    np.testing.assert_array_equal(found.labels.numpy(), other.labels.numpy())
    np.testing.assert_array_equal(found.distances.numpy(), other.distances.numpy())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_narrow_search_holds_at_any_scale_and_distance(scale):
    generator = np.random.default_rng(3)
    book = (generator.normal(size=(100, 6)) * scale).astype(np.float32)
    x = (generator.normal(size=(300, 6)) * scale).astype(np.float32)
    x[:50] = (x[:50].astype(float) * 1e3 + 1e6 * scale).clip(-1e38, 1e38)
    exact = ((x.astype(float)[:, None] - book.astype(float)[None]) ** 2).sum(2)
    found = nearest(torch.from_numpy(x), torch.from_numpy(book)).labels.numpy()
    np.testing.assert_array_equal(found, exact.argmin(1))


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_equal_with_and_without_sorting(weighted):
    generator = np.random.default_rng(4)
    x = generator.normal(size=(9000, 5)).astype(np.float32)
    labels = generator.integers(0, 37, 9000)
    weights = generator.random(9000) if weighted else None
    single = part_statistics(x, labels, x[:, 0] ** 2, 37, weights)
    several = statistics(x, labels, x[:, 0] ** 2, codes=37, weights=weights, threads=3)
    np.testing.assert_array_equal(single.sums, several.sums)
    np.testing.assert_array_equal(single.counts, several.counts)
    assert single.inertia == several.inertia


# Commands ---------------------------------------------------------------------------------------


def test_every_command_takes_rotated_product_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    semid.SyntheticCatalogue(items=600, dim=10, seed=0).write("data")
    items, log = "data/items.parquet", "data/interactions.parquet"
    source = ("data/embeddings.npy", "--ids", items)
    small = ("--codebook-size", 8, "--levels", 4, "--seed", 1)
    assert run("fit", *source, "--tokenizer", "opq", *small, "-o", "model", "-q") == 0
    assert run("fit", *source, "--tokenizer", "pq", *small, "-o", "plain", "-q") == 0
    assert "fitted pq" in capsys.readouterr().out
    assert semid.load("model").rotation.shape == (10, 10)
    assert run("encode", "model", *source, "-o", "ids.parquet", "-q") == 0
    assert run("report", "model", *source, "--interactions", log, "-o", "report.html", "-q") == 0
    assert run("compare", "model", "plain", *source, "-o", "compare.html", "-q") == 0
    assert run("refine", "model", *source, "-o", "refined", "-q") == 2
    assert "parallel" in capsys.readouterr().err
    refresh = ("refresh", "model", *source, "--catalogue", "ids.parquet")
    assert run(*refresh, "-o", "next", "-q") == 0
    rank = ("rank", log, "--items", items, "--ids", "ids.parquet", "--epochs", 1)
    assert run(*rank, "--hidden", 4, "--width", 2, "-o", "ranker", "-q") == 0
    unique = ("unique", "ids.parquet", "--method", "reassign", "--model", "model")
    assert run(*unique, "--embeddings", *source, "-o", "unique.parquet", "-q") == 0
    assert run("export", "unique.parquet", "--to", "lcrec", "-o", "index.json") == 0
    # 10 columns in 4 parts are unequal, which FAISS has no index for.
    faiss_export = ("export", "ids.parquet", "--model", "model", "--to", "faiss", "-o", "x.index")
    assert run(*faiss_export) == 2
    assert "--levels 5" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [semid.PQ, semid.OPQ])
def test_the_faiss_export_holds_codes_and_codebooks(kind, tmp_path):
    x = rows(700)
    model = kind(n_codebooks=4, codebook_size=16, center=True).fit(x)
    ids = model.encode(x)
    semid.export("faiss", tmp_path / "x.index", ids=ids, tokenizer=model)
    index = faiss.read_index(str(tmp_path / "x.index"))
    assert (index.ntotal, index.pq.M, index.pq.nbits) == (700, 4, 4)
    np.testing.assert_allclose(index.reconstruct_n(0, 700), model.quantize(ids), atol=1e-5)
    nearest_id = index.search(model.latent(x[:50]), 1)[1][:, 0]
    assert (ids.codes[nearest_id] == ids.codes[:50]).mean() > 0.95


# Search by codes --------------------------------------------------------------------------------

SEARCHED = {
    "concat": lambda: semid.OPQ(n_codebooks=5, codebook_size=16),
    "sum": lambda: semid.RQKMeans(levels=3, codebook_size=16),
    "mean": lambda: semid.MoCVAE(
        n_codebooks=2, codebook_size=8, network={"hidden": (8,), "latent": 6},
        training={"epochs": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("combine", SEARCHED)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_scan_of_codes_equals_brute_force(combine, metric):
    x = rows(900) - 5
    model = SEARCHED[combine]().fit(x)
    ids = semid.make_unique(model.encode(x)).ids  # an appended token is no codeword
    assert model.combine == combine
    found = semid.search_codes(model, ids, x[:20], k=7, metric=metric, threads=2)
    z, quantized = model.latent(x[:20]).astype(float), model.quantize(model.encode(x)).astype(float)
    if metric == "l2":
        exact = ((z[:, None] - quantized[None]) ** 2).sum(2)
        best = np.sort(exact, axis=1)[:, :7]
    else:
        exact = z @ quantized.T
        best = -np.sort(-exact, axis=1)[:, :7]
    np.testing.assert_allclose(found.scores, best, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        np.take_along_axis(exact, found.rows, axis=1), best, rtol=1e-3, atol=1e-3
    )
    alone = semid.search_codes(model, ids, x[:20], k=7, metric=metric, threads=1)
    np.testing.assert_array_equal(found.rows, alone.rows)


def test_equal_codes_come_in_row_order_and_bad_arguments_are_refused():
    x = rows(300)
    model = semid.PQ(n_codebooks=3, codebook_size=8).fit(x)
    ids = model.encode(np.repeat(x[:1], 6, axis=0))
    assert semid.search_codes(model, ids, x[:1], k=4).rows.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(UsageError, match="k=7: give 1 to 6"):
        semid.search_codes(model, ids, x[:1], k=7)
    with pytest.raises(UsageError, match="metric"):
        semid.search_codes(model, ids, x[:1], k=2, metric="cosine")


@pytest.mark.parametrize(("inputs", "width"), [(1, 1), (7, 50), (33, 16)])
def test_rows_rotate_the_same_alone_and_among_many(inputs, width):
    generator = np.random.default_rng(inputs)
    x = generator.normal(size=(300, inputs)).astype(np.float32)
    layers = [
        tuple(generator.normal(size=size).astype(np.float32) for size in (shape, shape[1]))
        for shape in ((inputs, width), (width, 5))
    ]
    many = perceptron(x, layers)  # tiles of rows
    few = np.concatenate([perceptron(x[i : i + 1], layers) for i in range(300)])
    np.testing.assert_array_equal(many, few)
    hidden = np.maximum(x.astype(np.float64) @ layers[0][0] + layers[0][1], 0)
    np.testing.assert_allclose(many, hidden @ layers[1][0] + layers[1][1], rtol=1e-4, atol=1e-4)
