"""Quantizers in training: gradients, moving averages, revival, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semid.errors import UsageError
from semid.seeds import torch_generator
from semid.tokenizers.neural.autoencoder import Autoencoder, ExactDecoder, ExactEncoder
from semid.tokenizers.neural.quantizers import (
    MIN_ENGINE_SIZE,
    RULES,
    Codebook,
    ParallelQuantizer,
    ResidualQuantizer,
    UpdateRule,
    nearest_labels,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def filled(quantizer, seed: int = 1):
    for number, book in enumerate(quantizer.books):
        codes, latent = book.codewords.shape
        words = drawn(codes, latent, seed=seed + number) / (1 + number)
        book.initialize_(words, torch.full((codes,), 1 / codes), batch=64)
    return quantizer


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_every_level_alone_moves_the_encoder(kind):
    model = Autoencoder([12], latent=6, hidden=(16,), seed=0)
    rule = UpdateRule(kind=kind, revive_below=0)
    quantizer = filled(ResidualQuantizer((8, 8, 8), 6, rule=rule, seed=0)).train()
    for level in range(3):
        model.zero_grad()
        quantizer(model.encode(drawn(64, 12))).commitment[level].backward()
        gradients = [layer.weight.grad for layer in model.encoder]
        assert all(float(gradient.norm()) > 1e-6 for gradient in gradients), f"level {level + 1}"


def test_commitment_of_a_level_has_the_gradient_of_its_formula():
    quantizer = filled(ResidualQuantizer((8, 8), 4, rule=UpdateRule(revive_below=0), seed=0))
    z = drawn(32, 4).requires_grad_()
    quantizer.eval()(z).commitment[1].backward()
    first, second = (book.codewords for book in quantizer.books)
    r = z.detach() - first[nearest_labels(z.detach(), first)]
    q = second[nearest_labels(r, second)]
    torch.testing.assert_close(z.grad, 2 * (r - q) / 32)


def test_straight_through_is_the_sum_forward_and_the_identity_backward():
    quantizer = filled(ResidualQuantizer((8, 8, 8), 4, rule=UpdateRule(), seed=0)).eval()
    z = drawn(20, 4).requires_grad_()
    found = quantizer(z)
    words = sum(book.codewords[found.codes[:, level]] for level, book in enumerate(quantizer.books))
    torch.testing.assert_close(found.latent, words)
    weights = drawn(20, 4, seed=9)
    (found.latent * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_residual_codes_equal_brute_force():
    quantizer = filled(ResidualQuantizer((9, 7), 5, rule=UpdateRule(), seed=0)).eval()
    z = drawn(50, 5)
    residual = z.double()
    for level, book in enumerate(quantizer.books):
        distances = torch.cdist(residual, book.codewords.double())
        assert torch.equal(quantizer(z).codes[:, level], distances.argmin(1))
        residual = residual - book.codewords.double()[distances.argmin(1)]


def test_gradient_rule_gives_codewords_the_gradient_of_the_loss():
    rule = UpdateRule(kind="gradient", revive_below=0)
    quantizer = filled(ResidualQuantizer((8, 8), 4, rule=rule, seed=0)).train()
    z = drawn(40, 4)
    found = quantizer(z)
    found.codebook.backward()
    residual = z
    for level, book in enumerate(quantizer.books):
        labels = found.codes[:, level]
        expected = torch.zeros(8, 4)
        expected.index_add_(0, labels, 2 * (book.codewords.detach()[labels] - residual) / 40)
        torch.testing.assert_close(book.codewords.grad, expected)
        residual = residual - book.codewords.detach()[labels]


def test_moving_averages_equal_a_float64_reference():
    decay, smoothing = 0.9, 1e-5
    rule = UpdateRule(decay=decay, revive_below=0, smoothing=smoothing)
    book = Codebook(8, 4, rule=rule, seed=0, name=0)
    start = drawn(8, 4, seed=3)
    book.initialize_(start, torch.full((8,), 1 / 8), batch=32)
    counts = np.full(8, 4.0)
    sums = start.double().numpy() * counts[:, None]
    for step in range(20):
        z = drawn(32, 4, seed=100 + step)
        labels = nearest_labels(z, book.codewords)
        book.observe_(z, labels)
        for code in range(8):
            own = z[labels == code].double().numpy()
            counts[code] = decay * counts[code] + (1 - decay) * len(own)
            sums[code] = decay * sums[code] + (1 - decay) * own.sum(axis=0)
        total = counts.sum()
        smoothed = (counts + smoothing) / (total + 8 * smoothing) * total
        np.testing.assert_allclose(book.codewords.numpy(), sums / smoothed[:, None], rtol=2e-4)
    assert int(book.used.sum()) == 20 * 32


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_a_planted_dead_code_comes_back(kind):
    rule = UpdateRule(kind=kind, decay=0.8, revive_below=0.1)
    quantizer = filled(ResidualQuantizer((8, 8), 4, rule=rule, seed=0)).train()
    for book in quantizer.books:
        with torch.no_grad():
            book.codewords[5] = 1000.0
            if kind == "ema":
                book.sums[5] = 1000.0 * book.counts[5]
    for step in range(40):
        quantizer(drawn(64, 4, seed=200 + step))
    for book in quantizer.books:
        assert int(book.revived) > 0
        book.take_usage_()
    quantizer(drawn(512, 4, seed=300))
    for book in quantizer.books:
        assert int(book.take_usage_()[5]) > 0
        assert float(book.codewords[5].detach().abs().max()) < 10


def test_revival_takes_a_vector_of_the_batch_and_resets_the_accumulators():
    book = Codebook(4, 3, rule=UpdateRule(decay=0.5, revive_below=0.5), seed=0, name=0)
    words = torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 2, 2], [99, 99, 99]])
    book.initialize_(words, torch.tensor([0.34, 0.33, 0.33, 0.0]), batch=30)
    z = torch.rand(30, 3, generator=torch_generator(0, "batch")) * 2
    book.observe_(z, nearest_labels(z, book.codewords))
    assert int(book.revived) >= 1
    assert any(torch.equal(book.codewords[3], row) for row in z)
    torch.testing.assert_close(book.sums[3], book.codewords[3] * book.counts[3])
    assert float(book.counts[3]) > 0.5 * float(book.counts.sum()) / 4


def test_revived_vectors_depend_on_seed_and_step_alone():
    def run(seed: int) -> torch.Tensor:
        book = Codebook(16, 3, rule=UpdateRule(decay=0.5, revive_below=0.9), seed=seed, name=0)
        book.initialize_(drawn(16, 3), torch.full((16,), 1 / 16), batch=20)
        for step in range(5):
            z = drawn(20, 3, seed=step)
            book.observe_(z, nearest_labels(z, book.codewords))
        return book.codewords

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)


@pytest.mark.parametrize("projection", [False, True])
def test_parallel_codebooks_are_averaged(projection):
    rule = UpdateRule(kind="gradient", revive_below=0)
    quantizer = filled(ParallelQuantizer((6, 6, 6), 4, rule=rule, seed=0, projection=projection))
    quantizer.train()
    z = drawn(30, 4).requires_grad_()
    found = quantizer(z)
    words = []
    for level, (book, space) in enumerate(zip(quantizer.books, quantizer.spaces(z), strict=True)):
        distances = torch.cdist(space.detach().double(), book.codewords.detach().double())
        assert torch.equal(found.codes[:, level], distances.argmin(1))
        words.append(book.codewords[found.codes[:, level]])
    torch.testing.assert_close(found.latent.detach(), torch.stack(words).mean(0).detach())
    found.commitment.sum().backward()
    assert float(z.grad.norm()) > 0
    for each in quantizer.maps:
        assert float(each.weight.grad.norm()) > 0


def test_one_parallel_codebook_is_one_level():
    z = drawn(40, 4)
    for kind in ("ema", "gradient"):
        rule = UpdateRule(kind=kind)
        one = filled(ParallelQuantizer((8,), 4, rule=rule, seed=0)).train()
        other = filled(ResidualQuantizer((8,), 4, rule=rule, seed=0)).train()
        a, b = one(z), other(z)
        torch.testing.assert_close(a.latent, b.latent)
        torch.testing.assert_close(a.commitment, b.commitment)
        torch.testing.assert_close(a.codebook, b.codebook)
        torch.testing.assert_close(one.books[0].codewords, other.books[0].codewords)


def test_rules_out_of_range_are_refused():
    for change in ({"kind": "mean"}, {"decay": 1.0}, {"revive_below": 1.0}):
        with pytest.raises(UsageError):
            UpdateRule(**change)


def test_exact_layers_equal_torch_and_ignore_the_rows_beside():
    model = Autoencoder([13, 7], latent=5, hidden=(33, 17), seed=0)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2100, 20)).astype(np.float32)
    model.standardize_(x.mean(axis=0, dtype=np.float64), 20.0)
    with torch.no_grad():
        z = model.encode(model.standard(torch.from_numpy(x)))
        back = model.decode(z) * model.scale + model.mean
    encode, decode = ExactEncoder(model), ExactDecoder(model)
    together = encode(x, threads=2)
    np.testing.assert_allclose(together, z.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decode(z.numpy()), back.numpy(), rtol=1e-4, atol=1e-5)
    for size in (1, 3, 257):
        for start in (0, 5, 1800):
            assert np.array_equal(encode(x[start : start + size]), together[start : start + size])


@pytest.mark.parametrize("kind", RULES)
def test_a_codebook_on_another_device_starts_from_centroids_on_the_cpu(kind: str) -> None:
    """The meta device holds no values, but refuses to mix like any other."""
    book = Codebook(8, 4, rule=UpdateRule(kind=kind), seed=0, name=0).to("meta")
    book.initialize_(torch.ones(8, 4), torch.full((8,), 1 / 8), batch=64)
    assert {t.device.type for t in book.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("codes", [64, MIN_ENGINE_SIZE // 128])
def test_labels_are_the_nearest_codewords_also_under_autocast(codes):
    z, words = drawn(200, 128, seed=1), drawn(codes, 128, seed=2)
    apart = torch.cdist(z.double(), words.double(), compute_mode="donot_use_mm_for_euclid_dist")
    with torch.autocast("cpu", torch.bfloat16):
        labels = nearest_labels(z, words)
    assert labels.equal(apart.argmin(dim=1))
