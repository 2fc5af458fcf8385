"""What is special about single tokenizers, and what they share with the rest of the library."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

import semid
from semid.errors import UsageError
from semid.exports.encoders import CodesGraph
from semid.quantization.balance import limit_sizes
from semid.quantization.beam import PartialResiduals
from semid.quantization.blocks import BLOCK_ROWS, ArrayBlocks, merge_nodes
from semid.quantization.mixture import HardAssignment, Mixture, fit_mixture, hard_start
from semid.quantization.residual import fit_residual
from semid.quantization.sharding import Shard, ShardedMatrix
from semid.report.compare import side_by_side
from semid.tokenizers.fsq import ScalarGrid, ScalarQuantizer

TRAINING: dict[str, Any] = {"epochs": 8, "batch_size": 128, "learning_rate": 3e-3}
NETWORK: dict[str, Any] = {"network": {"hidden": (32,)}, "training": TRAINING}


GRID: dict[str, Any] = {"dimension_levels": (8, 5), "groups": 2, **NETWORK}
SERVED: dict[str, Callable[[], semid.Tokenizer]] = {
    "fsq": lambda: semid.FSQ(**GRID),
    "fsq-dimensions": lambda: semid.FSQ(codes_per="dimension", **GRID),
    "fsq-stages": lambda: semid.FSQ(stages=2, **GRID),
    "opq": lambda: semid.OPQ(n_codebooks=5, codebook_size=16, rotation_iter=2),
    "rqgmm": lambda: semid.RQGMM(codebook_size=16, levels=2),
}


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
def test_it_serves(make, clustered, tmp_path):
    """It gets pages, heads, unique ids and other programs (the rest: the contract)."""
    tokenizer = make().fit(clustered)
    ids = tokenizer.encode(clustered)
    diagnosis = semid.diagnose(tokenizer, clustered)
    side_by_side({"one": diagnosis, "two": diagnosis}).write(tmp_path / "compared.html")
    rest = clustered - tokenizer.decode(ids)
    error = (rest**2).sum() / ((clustered - clustered.mean(0)) ** 2).sum()
    np.testing.assert_allclose(diagnosis.reconstruction.relative_error["all"], error, rtol=1e-3)
    assert len(np.unique(semid.make_unique(ids).ids.codes, axis=0)) == len(clustered)
    head = semid.DecodeHead.fit(ids, clustered)
    assert head.error is not None
    assert head.error < 1
    semid.export("torcheasyrec", tmp_path / "rec", ids=ids, tokenizer=tokenizer)
    assert (tmp_path / "rec").exists()


def degenerate() -> dict[str, np.ndarray]:
    """Return rows ``(600, 12)`` or ``(40, 60)`` that leave little to cluster in some columns."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(600, 12))
    few, constant, lone = x.copy(), x.copy(), x.copy()
    few[:, :4] = np.repeat(generator.normal(size=(5, 4)), 120, axis=0)
    constant[:, :4], lone[:, 1:] = 7.0, 3.0
    rows = {
        "fewer values than codes in a part": few,
        "a part without variance": constant,
        "one column with variance": lone,
        "low rank": x[:, :3] @ generator.normal(size=(3, 12)),
        "more columns than rows": generator.normal(size=(40, 60)),
        "far from the origin": x + 1e6,
        "zeros": np.where(np.arange(600)[:, None] % 2, x, 0.0),
    }
    return {name: each.astype(np.float32) for name, each in rows.items()}


ON_DEGENERATE: dict[str, Callable[[], semid.Tokenizer]] = {
    "pq": lambda: semid.PQ(n_codebooks=5, codebook_size=16),
    "opq": lambda: semid.OPQ(n_codebooks=5, codebook_size=16, rotation_iter=3, center=True),
    "codebooks": lambda: semid.Codebooks(levels=5, codebook_size=16, combine="concat"),
    "rqgmm": lambda: semid.RQGMM(codebook_size=16, max_em_iter=5),
    "rqgmm-spherical": lambda: semid.RQGMM(codebook_size=16, max_em_iter=5, covariance="spherical"),
    "balanced": lambda: semid.RQKMeans(codebook_size=16, balance={"mode": "hard", "rounds": 4}),
    "beam": lambda: semid.RQKMeans(codebook_size=16, beam_width=3, train_with_beam=True),
}


@pytest.mark.parametrize("make", ON_DEGENERATE.values(), ids=ON_DEGENERATE)
@pytest.mark.parametrize("rows", degenerate().values(), ids=degenerate())
def test_rows_that_leave_little_to_cluster_are_fitted(rows, make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing divides by 0 or overflows
        model = make().fit(rows)
        ids = model.encode(rows)
    assert np.isfinite(ids.residual_norms).all()
    rest = rows - model.decode(ids)
    assert (rest**2).sum() < 0.5 * ((rows - rows.mean(0, dtype=float)) ** 2).sum()


# FSQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 7, 8, 16])
def test_fsq_bounds_as_the_paper(levels):
    z = np.linspace(-12, 12, 4001, dtype=np.float32)[:, None]
    grid = ScalarGrid((levels,), 1)
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.0 if levels % 2 else 0.5
    bounded = np.tanh(z.astype(float) + np.tan(offset / half)) * half - offset
    np.testing.assert_allclose(grid.bound(z), bounded / (levels // 2), rtol=1e-6, atol=1e-7)
    # Rounding gives exactly the paper's integers, levels of them.
    digits, _ = grid.digits(torch.from_numpy(grid.bound(z)))
    integers = digits[:, 0, 0].numpy() - levels // 2
    assert np.array_equal(integers, np.round(bounded[:, 0]).astype(int))
    assert np.array_equal(np.unique(integers), np.arange(levels) - levels // 2)


def test_fsq_gradient_passes_the_rounding():
    grid = ScalarGrid((5, 4), 2)
    z = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantized = ScalarQuantizer(grid, group=2)(z)
    weights = torch.arange(80.0).reshape(40, 2)
    (quantized.latent * weights).sum().backward()
    expected = z.detach().requires_grad_()
    (grid.bound_tensor(expected) * weights).sum().backward()
    torch.testing.assert_close(z.grad, expected.grad)
    assert float(quantized.commitment.sum()) == float(quantized.codebook) == 0.0


def test_fsq_stages_divide_the_cells():
    grid = ScalarGrid((4, 5), 3)
    latent = grid.bound(np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32))
    digits, residual = grid.digits(torch.from_numpy(latent))
    assert digits.shape == (5000, 3, 2)
    # After s stages half a step of 1 / L^(s-1) whole numbers at most is left.
    steps = 1 / (np.array([2, 2]) * np.array([4, 5]) ** 2)
    assert (np.abs(residual.numpy()) <= steps / 2 + 1e-6).all()


@pytest.fixture(scope="module")
def fsq(clustered: np.ndarray) -> semid.FSQ:
    return semid.FSQ(dimension_levels=(4, 5), groups=2, stages=2, **NETWORK).fit(clustered)


def test_fsq_rounding_is_the_nearest_codeword(fsq, clustered):
    ids = fsq.encode(clustered)
    searched = pickle.loads(pickle.dumps(fsq))
    searched._rounds = False  # the engine's search in place of rounding
    again = searched.encode(clustered)
    assert np.array_equal(again.codes, ids.codes)
    assert np.array_equal(again.residual_norms, ids.residual_norms)


def test_fsq_codes_of_dimensions_are_the_digits(fsq, clustered):
    arguments = {**fsq.get_params(deep=False), "codes_per": "dimension"}
    digits = semid.FSQ(**arguments).fit(clustered)
    assert digits.codebook_sizes == (4, 5) * 4
    codes = digits.encode(clustered).codes.astype(int)
    together = codes[:, 0::2] + 4 * codes[:, 1::2]  # the first dimension counts in ones
    assert np.array_equal(together, fsq.encode(clustered).codes)
    assert np.array_equal(digits.decode(codes), fsq.decode(together))


def test_fsq_of_one_stage_is_parallel(fsq, clustered):
    single = semid.FSQ(**{**fsq.get_params(deep=False), "stages": 1}).fit(clustered)
    assert fsq.hierarchical
    assert not single.hierarchical
    with pytest.raises(UsageError, match="parallel"):
        single.encode(clustered, beam_width=2)


def test_fsq_can_be_refined_and_saved(fsq, clustered, tmp_path):
    options = semid.RefineOptions(rounds=2, annealing_rounds=0, beam_width=2)
    refined = semid.refine(fsq, clustered, options=options)
    assert refined.report.validation_error <= fsq.report.validation_error
    refined.save(tmp_path / "model")
    codes = semid.load(tmp_path / "model").encode(clustered).codes
    assert np.array_equal(codes, refined.encode(clustered).codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension_levels": (8, 1)}, r"dimension_levels=\(8, 1\): give 2 to 65,536"),
        ({"dimension_levels": ()}, "at least one dimension"),
        ({"dimension_levels": (64, 64, 64)}, "262,144 codes per group.*codes_per='dimension'"),
        ({"dimension_levels": (8,) * 9, "groups": 30, "codes_per": "dimension"}, "270 codes"),
        ({"stages": 9}, "more finely than float32"),
        ({"network": {"latent": 7}}, "one column for each of its 9 dimensions"),
        ({"codes_per": "stage"}, "group or dimension"),
        ({"stages": 0}, "stages=0"),
    ],
)
def test_fsq_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        semid.FSQ(**arguments)


# RQGMM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["diagonal", "spherical"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mixture_is_scikit_learns(covariance, weighted):
    generator = np.random.default_rng(1)
    centers = 3 * generator.normal(size=(6, 5))
    x = centers[generator.integers(0, 6, 1500)] + generator.normal(size=(1500, 5))
    x = (x * [1.0, 3.0, 0.3, 1.0, 2.0]).astype(np.float32)
    weights = generator.integers(0, 4, 1500) if weighted else None
    labels = KMeans(6, n_init=1, max_iter=2, random_state=0).fit(x).labels_
    means = np.stack([x[labels == code].mean(0) for code in range(6)])
    rows, floor = ArrayBlocks(x), 0.01
    mass = None if weights is None else weights.astype(float)
    start = hard_start(rows, means, covariance=covariance, floor=floor, weights=mass)
    run = fit_mixture(rows, start, floor=floor, max_iter=8, tol=0.0, weights=mass, threads=2)
    # scikit-learn knows no weights: rows of weight w are there w times.
    again = x if weights is None else np.repeat(x, weights, axis=0)
    variances = start.variances if covariance == "diagonal" else start.variances[:, 0]
    twin = GaussianMixture(
        6, covariance_type={"diagonal": "diag"}.get(covariance, covariance), reg_covar=floor,
        max_iter=8, tol=0.0, means_init=start.means, weights_init=np.exp(start.log_weights),
        precisions_init=1.0 / variances,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight iterations are not the end
        twin.fit(again)
    expected = twin.covariances_ if covariance == "diagonal" else twin.covariances_[:, None]
    np.testing.assert_allclose(run.mixture.means, twin.means_, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(run.mixture.variances, expected, rtol=1e-3)
    np.testing.assert_allclose(np.exp(run.mixture.log_weights), twin.weights_, rtol=1e-3)
    assert run.history[-1] == pytest.approx(twin.lower_bound_, rel=1e-5)
    assert (np.diff(run.history) > -1e-6).all()
    # The hard assignment is that of the highest posterior, up to rounding.
    assigned = HardAssignment(run.mixture)(x)
    posteriors = twin.predict_proba(x)
    chosen = posteriors[np.arange(len(x)), assigned]
    np.testing.assert_allclose(chosen, posteriors.max(1), atol=1e-3)


@pytest.mark.parametrize("covariance", ["diagonal", "spherical"])
def test_a_sparse_product_with_posteriors_is_the_whole_one(covariance, monkeypatch):
    generator = np.random.default_rng(2)
    x = (generator.normal(size=(900, 6)) + 5.0).astype(np.float32)
    rows, found = ArrayBlocks(x), []
    for sparse in (0, 10**9):  # always, never
        monkeypatch.setattr("semid.quantization.mixture.SPARSE", sparse)
        start = hard_start(rows, x[:30], covariance=covariance, floor=0.1)
        found.append(fit_mixture(rows, start, floor=0.1, max_iter=5, tol=0.0))
    for name in ("means", "variances", "log_weights"):
        one, other = (getattr(run.mixture, name) for run in found)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0].history, found[1].history, rtol=1e-6)


def test_hard_assignments_at_every_scale():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 4)).astype(np.float32)
    means = generator.normal(size=(20, 4)).astype(np.float32)
    variances = generator.uniform(0.2, 2.0, size=(20, 4)).astype(np.float32)
    weights = np.log(generator.dirichlet(np.ones(20))).astype(np.float32)
    a, b, c = Mixture(means, variances, weights).terms()
    expected = (x.astype(float) @ a.T - 0.5 * x.astype(float) ** 2 @ b.T + c).argmax(1)
    for scale, offset in ((1e-12, 0.0), (1.0, 0.0), (1e12, 0.0), (1.0, 1e5)):
        scaled, shift = np.float32(scale), np.float32(offset)
        mixture = Mixture(means * scaled + shift, variances * scaled**2, weights)
        assigned = HardAssignment(mixture)(x * scaled + shift)
        assert (assigned == expected).mean() > 0.99


def test_rqgmm_survives_singular_covariances():
    # Few distinct rows, a column that never varies, and levels that leave nothing.
    generator = np.random.default_rng(0)
    x = np.repeat(generator.normal(size=(20, 6)), 30, axis=0).astype(np.float32)
    x[:, 2] = 7.0
    for covariance in ("diagonal", "spherical"):
        model = semid.RQGMM(codebook_size=16, covariance=covariance, validation_fraction=0).fit(x)
        ids = model.encode(x)
        assert np.isfinite(ids.residual_norms).all()
        assert model.report.training_error < 0.05
        assert all(level["floor"] > 0 for level in model.report.details["levels"])


def test_rqgmm_takes_the_spread_of_clusters_into_account():
    """Two clusters whose columns have very different noise: nearest centroids cut them wrongly."""
    x, labels = stretched(2000, seed=0)
    right = {}
    for model in (
        semid.RQKMeans(levels=1, codebook_size=2),
        semid.RQGMM(levels=1, codebook_size=2),
    ):
        codes = model.fit(x).encode(x).codes[:, 0]
        right[model.kind] = max((codes == labels).mean(), (codes != labels).mean())
    assert right["rqgmm"] > 0.97
    assert right["rqkmeans"] < 0.8


def stretched(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    noise = generator.normal(size=(count, 4)) * [0.5, 4.0, 4.0, 0.5]
    return (noise + np.outer(labels, [3.0, 0, 0, 3.0])).astype(np.float32), labels


def test_rqgmm_has_no_beam_and_no_refinement(clustered):
    model = semid.RQGMM(codebook_size=16, levels=2).fit(clustered)
    with pytest.raises(UsageError, match="has no beam"):
        model.encode(clustered, beam_width=2)
    with pytest.raises(UsageError, match="no argument 'beam_width'"):
        semid.RQGMM(beam_width=2)


def test_rqgmm_is_no_index_of_nearest_codewords(clustered, tmp_path):
    pytest.importorskip("faiss")
    model = semid.RQGMM(codebook_size=16, levels=2, max_em_iter=2).fit(clustered)
    with pytest.raises(UsageError, match=r"most probable code.*export to onnx"):
        semid.export("faiss", tmp_path / "x", ids=model.encode(clustered), tokenizer=model)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_knows_that_its_mixture_takes_no_nearest_codewords(clustered):
    encoder = semid.DRQVAE(levels=1, codebook_size=16, **NETWORK)
    quantizer = semid.RQGMM(codebook_size=16, levels=2, max_em_iter=4)
    model = semid.Pipeline(encoder=encoder, quantizer=quantizer).fit(clustered)
    with pytest.raises(UsageError, match="nearest codewords"):
        semid.refine(model, clustered)
    with pytest.raises(UsageError, match="has no beam"):
        model.encode(clustered, beam_width=2)
    graph = CodesGraph(model)(torch.from_numpy(clustered)).numpy()
    assert (graph == model.encode(clustered).codes).mean() > 0.99


# Training with a beam ---------------------------------------------------------------------------


def brute_beam(x: np.ndarray, books: list[np.ndarray], width: int) -> np.ndarray:
    """Return what the best partial codes leave of each row: ``(n, width, dim)``, best first."""
    left = x[:, None].astype(np.float64)
    for book in books:
        children = (left[:, :, None] - book).reshape(len(x), -1, x.shape[1])
        order = np.argsort((children**2).sum(2), axis=1, kind="stable")[:, :width]
        left = np.take_along_axis(children, order[:, :, None], axis=1)
    return left


def test_each_level_is_fitted_to_all_partial_codes(clustered):
    width, kmeans = 3, {"max_iter": 100, "tol": 0.0}
    arguments = {"levels": 3, "codebook_size": 16, "beam_width": width, "validation_fraction": 0}
    model = semid.RQKMeans(train_with_beam=True, kmeans=kmeans, **arguments).fit(clustered)
    books = [book.astype(np.float64) for book in model.codebooks]
    for level in (1, 2):
        partial = brute_beam(clustered, books[:level], width)
        squared = (partial**2).sum(2)
        weights = ((squared[:, :1] / squared) ** 3).ravel()[:, None]
        rows = partial.reshape(-1, 24)
        labels = ((rows[:, None] - books[level]) ** 2).sum(2).argmin(1)
        groups = [labels == code for code in range(16)]
        means = np.stack([(weights * rows)[g].sum(0) / weights[g].sum() for g in groups])
        # K-means ran to its end: each codeword is the mean of the partial residuals nearest to it.
        np.testing.assert_allclose(books[level], means, atol=1e-3)


def test_training_with_a_beam_generalizes_with_few_rows_per_codeword():
    generator = np.random.default_rng(0)
    factors = generator.normal(size=(2400, 6)) @ generator.normal(size=(6, 16))
    x = (factors + 0.3 * generator.normal(size=(2400, 16))).astype(np.float32)
    train, test = x[:1200], x[1200:]
    errors = {}
    for trained in (False, True):
        model = semid.RQKMeans(
            levels=3, codebook_size=128, beam_width=5, train_with_beam=trained
        ).fit(train)
        errors[trained] = float(((test - model.decode(model.encode(test))) ** 2).sum())
    assert errors[True] < 0.97 * errors[False]


def test_training_with_a_beam_keeps_clear_clusters(clustered):
    errors = {
        trained: semid.RQKMeans(levels=2, codebook_size=16, beam_width=3, train_with_beam=trained)
        .fit(clustered)
        .report.training_error
        for trained in (False, True)
    }
    assert errors[True] < 1.1 * errors[False]


def test_beam_training_weights_samples_and_memory(clustered):
    arguments = {"levels": 2, "codebook_size": 16, "beam_width": 3, "train_with_beam": True}
    plain = semid.RQKMeans(**arguments).fit(clustered)
    ones = semid.RQKMeans(**arguments).fit(clustered, weights=np.full(1200, 2.0))
    assert ones.codebook_fingerprint == plain.codebook_fingerprint
    weights = np.where(clustered[:, 0] > 0, 1.0, 1e-6)
    heavy = semid.RQKMeans(**arguments).fit(clustered, weights=weights)
    errors = [
        float(((clustered - m.decode(m.encode(clustered))) ** 2).sum(1)[weights == 1].sum())
        for m in (plain, heavy)
    ]
    assert errors[1] < errors[0]
    sampled = semid.RQKMeans(kmeans={"sample_per_code": 40}, **arguments).fit(clustered)
    assert sampled.report.validation_error < 2 * plain.report.validation_error
    # A view that is not held in memory gives the same bits.
    rows = ArrayBlocks(clustered)
    options = {"seed": 3, "beam_width": 3}
    held, _ = fit_residual(rows, (16, 16, 16), **options)
    read, _ = fit_residual(rows, (16, 16, 16), memory_bytes=0, **options)
    assert all(np.array_equal(*pair) for pair in zip(held, read, strict=True))


def test_partial_residuals_come_in_whole_blocks(clustered):
    codes = np.random.default_rng(0).integers(0, 16, size=(1200, 3, 2))
    books = [np.random.default_rng(n).normal(size=(16, 24)).astype(np.float32) for n in (1, 2)]
    view = PartialResiduals(ArrayBlocks(clustered), codes, books)
    expected = clustered[:, None] - books[0][codes[..., 0]] - books[1][codes[..., 1]]
    for size in (7, 500, 1200, 65_536):
        starts, blocks = zip(*view.blocks(size), strict=True)
        assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
        assert list(starts) == [number * size for number in range(len(blocks))]
        np.testing.assert_allclose(np.concatenate(blocks), expected.reshape(-1, 24), atol=1e-5)
    numbers = np.array([5, 3599, 0])
    np.testing.assert_allclose(view.rows(numbers), expected.reshape(-1, 24)[numbers], atol=1e-5)


def test_beam_training_refuses():
    with pytest.raises(UsageError, match=r"beam_width=1.*--beam-width"):
        semid.RQKMeans(train_with_beam=True)
    rows = ShardedMatrix(FewShards(), dim=4)
    with pytest.raises(UsageError, match="all rows in one process"):
        semid.RQKMeans(beam_width=2, train_with_beam=True, codebook_size=2).fit_rows(rows)


class FewShards:
    """Rows in two shards, as several processes hold them."""

    def __init__(self) -> None:
        x = np.random.default_rng(0).normal(size=(2 * BLOCK_ROWS, 4)).astype(np.float32)
        self.shards = [
            Shard(ArrayBlocks(x[:BLOCK_ROWS])),
            Shard(ArrayBlocks(x[BLOCK_ROWS:]), first_row=BLOCK_ROWS),
        ]
        self.spans = [(0, BLOCK_ROWS), (BLOCK_ROWS, 2 * BLOCK_ROWS)]

    def call(self, method, arguments):
        return {
            place: getattr(self.shards[place], method)(*args) for place, args in arguments.items()
        }

    def call_all(self, method, *arguments):
        return merge_nodes([getattr(shard, method)(*arguments) for shard in self.shards])


# Balance ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skewed() -> np.ndarray:
    """Rows of which half lie in one dense cluster, so that K-means has very unequal codes."""
    generator = np.random.default_rng(0)
    dense = 0.3 * generator.normal(size=(1000, 8))
    return np.concatenate([dense, 3 * generator.normal(size=(1000, 8))]).astype(np.float32)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_balance_evens_out_codes_at_a_stated_price(mode, skewed):
    arguments = {"levels": 2, "codebook_size": 16, "validation_fraction": 0}
    plain = semid.RQKMeans(**arguments).fit(skewed)
    model = semid.RQKMeans(balance={"mode": mode}, **arguments).fit(skewed)
    usage = [m.report.health.usage for m in (plain, model)]
    for before, after in zip(*usage, strict=True):
        assert after.perplexity > before.perplexity
    if mode == "hard":
        assert usage[1][0].largest_share < 0.5 * usage[0][0].largest_share
        assert usage[1][0].perplexity > 1.7 * usage[0][0].perplexity
    # The price is the error of codes with offsets over that of K-means on the same rows.
    records, codes = model.report.details["balance"], model.encode(skewed).codes
    rows = skewed
    for level, (record, book) in enumerate(zip(records, model.codebooks, strict=True)):
        largest = np.bincount(codes[:, level], minlength=16).max() / 125
        assert record["largest_over_mean"] == pytest.approx(largest)
        rows = rows - book[codes[:, level], :8]
        error = (rows.astype(float) ** 2).sum(1).mean()
        assert record["mean_squared_error"] == pytest.approx(error, rel=1e-4)
        assert record["price"] == pytest.approx(error / record["kmeans"] - 1, rel=1e-3, abs=1e-4)
        assert record["price"] > 0
    # Level 1 starts from the rows themselves, and so from the plain fit.
    inertia = plain.report.details["levels"][0]["inertia"]
    assert records[0]["kmeans"] == pytest.approx(inertia / 2000)


def test_codes_of_balance_are_those_of_a_power_diagram(skewed, tmp_path):
    model = semid.RQKMeans(levels=2, codebook_size=16, center=True, balance={"mode": "hard"}).fit(
        skewed
    )
    rows, codes = skewed - model._preprocess.mean, model.encode(skewed).codes
    for level, book in enumerate(model.codebooks):
        offsets = book[:, 8 + level].astype(float) ** 2
        assert offsets.min() == 0 < offsets.max()
        assert not book[:, 8 + 1 - level].any()
        scores = ((rows[:, None] - book[:, :8]) ** 2).sum(2) + offsets
        assert (scores.argmin(1) == codes[:, level]).mean() > 0.999
        rows = rows - book[codes[:, level], :8]
    model.save(tmp_path / "model")
    assert np.array_equal(semid.load(tmp_path / "model").encode(skewed).codes, codes)


def test_a_limit_bounds_soft_offsets(skewed):
    for strength in (0.1, 1.0):
        model = semid.RQKMeans(
            levels=1,
            codebook_size=16,
            balance={"mode": "soft", "strength": strength},
            validation_fraction=0,
        ).fit(skewed)
        plain = semid.RQKMeans(levels=1, codebook_size=16, validation_fraction=0).fit(skewed)
        unit = plain.report.details["levels"][0]["inertia"] / len(skewed)
        assert (model.codebooks[0][:, 8] ** 2).max() <= strength * unit * 1.0001


def test_groups_of_limited_size_cost_little_more_than_the_best():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(240, 3)).astype(np.float32) ** 3
    centroids = x[generator.permutation(240)[:12]]
    distances = ((x[:, None] - centroids).astype(float) ** 2).sum(2)
    labels = limit_sizes(ArrayBlocks(x), distances.argmin(1), centroids, np.zeros(12), 20)
    assert np.array_equal(np.bincount(labels, minlength=12), np.full(12, 20))
    row, column = linear_sum_assignment(np.repeat(distances, 20, axis=1))
    best = distances[row, column // 20].sum()
    assert best <= distances[np.arange(240), labels].sum() < 1.25 * best
    unlimited = limit_sizes(ArrayBlocks(x), distances.argmin(1), centroids, np.zeros(12), 240)
    assert np.array_equal(unlimited, distances.argmin(1))


def test_balance_refines_and_fits_again(skewed):
    model = semid.RQKMeans(levels=2, codebook_size=16, balance={"mode": "soft", "rounds": 10}).fit(
        skewed
    )
    options = semid.RefineOptions(rounds=2, annealing_rounds=0, beam_width=2)
    refined = semid.refine(model, skewed, options=options)
    for before, after in zip(model.codebooks, refined.codebooks, strict=True):
        assert np.array_equal(before[:, 8:], after[:, 8:])  # offsets stay
    errors = [m.report.details["balance"][-1]["mean_squared_error"] for m in (model, refined)]
    assert errors[0] != errors[1]
    again = model.fit_again(skewed[:1900])
    assert again.report.details["warm_start"]
    assert again.codebooks[0].shape == (16, 10)
    assert again.decode(again.encode(skewed)).shape == skewed.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balance": {"mode": "even"}}, r"balance.mode='even': give off or soft or hard"),
        ({"balance": {"strength": 0}}, "strength"),
        (
            {"balance": {"mode": "hard"}, "train_with_beam": True, "beam_width": 2},
            "exclude each other",
        ),
        ({"balance": {"mode": "hard"}, "kmeans": {"sample_per_code": 9}}, "--sample-per-code"),
    ],
)
def test_balance_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        semid.RQKMeans(**arguments)


def test_balance_needs_all_rows():
    with pytest.raises(UsageError, match="all rows in one process"):
        semid.RQKMeans(balance={"mode": "hard"}, codebook_size=2).fit_rows(
            ShardedMatrix(FewShards(), dim=4)
        )
