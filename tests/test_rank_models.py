"""Interaction layers and models against what they are by definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from semid.errors import UsageError
from semid.recommenders.ranking import MODELS
from semid.recommenders.ranking.layers import (
    CrossLayer,
    Dropout,
    ExpertCrossLayer,
    FactorizationMachine,
    FieldAttention,
    MoCFusion,
    SymmetricPolynomials,
)
from semid.recommenders.ranking.models import make_model
from semid.recommenders.ranking.network import RankerConfig

BATCH, FIELDS, WIDTH = 3, 5, 4


@pytest.fixture
def e():
    return torch.randn(BATCH, FIELDS, WIDTH, generator=torch.Generator().manual_seed(0))


def subsets(e, size):
    """Sum over all sets of fields of the product of their embeddings."""
    total = torch.zeros(len(e), e.shape[2])
    for chosen in itertools.combinations(range(e.shape[1]), size):
        total += e[:, list(chosen)].prod(1)
    return total


def test_factorization_machine_is_the_sum_over_pairs(e):
    pairs = sum((e[:, i] * e[:, j]).sum(1) for i, j in itertools.combinations(range(FIELDS), 2))
    assert torch.allclose(FactorizationMachine()(e), pairs, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_polynomials_are_sums_over_subsets(e, order):
    layer = SymmetricPolynomials(WIDTH, order=order, batch_norm=False)
    found = layer(e).view(BATCH, order, WIDTH)
    for k in range(order):
        assert torch.allclose(found[:, k], subsets(e, k + 1), atol=1e-4), k + 1


def test_polynomials_stay_in_float32_under_autocast(e):
    layer = SymmetricPolynomials(WIDTH, order=3, batch_norm=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(e)
    assert found.dtype == torch.float32
    assert torch.allclose(found, layer(e))


def test_batch_norm_gives_the_third_order_a_gradient():
    generator = torch.Generator().manual_seed(1)
    drawn, pull = (
        torch.randn(64, 6, 4, generator=generator),
        torch.randn(64, 4, generator=generator),
    )

    def gradient(*, batch_norm: bool) -> float:
        e = (drawn * 0.01).requires_grad_()
        layer = SymmetricPolynomials(4, order=3, batch_norm=batch_norm)
        layer(e)[:, 8:].square().mul(pull).sum().backward()
        return float(e.grad.abs().max())

    assert gradient(batch_norm=True) > 1e4 * gradient(batch_norm=False)


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_attention_agrees_with_torch(e, preset):
    layer = FieldAttention(WIDTH, head_width=3, heads=2, preset=preset)
    relu = torch.relu if preset == "authors" else (lambda x: x)

    def heads(linear):
        return relu(linear(e)).view(BATCH, FIELDS, 2, 3).transpose(1, 2)

    mixed = nn.functional.scaled_dot_product_attention(
        heads(layer.query), heads(layer.key), heads(layer.value)
    )
    expected = torch.relu(mixed.transpose(1, 2).reshape(BATCH, FIELDS, 6) + relu(layer.residual(e)))
    if preset == "authors":
        expected = nn.functional.layer_norm(expected, (6,))
    assert torch.allclose(layer(e), expected, atol=1e-5)


def test_attention_options_override_the_preset(e):
    layer = FieldAttention(
        WIDTH, head_width=2, preset="authors", layer_norm=False, residual=False, scale=False
    )
    assert layer.norm is None
    assert layer.residual is None
    assert layer.scale == 1.0
    assert layer(e).shape == (BATCH, FIELDS, 4)


def test_cross_layer_by_hand():
    layer = CrossLayer(2)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        layer.linear.bias.copy_(torch.tensor([0.5, 0.0]))
    x0, x = torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 4.0]])
    # W x + b = (1 + 8 + 0.5, -4); times x0 = (19, -12); plus x = (20, -8)
    assert layer(x0, x).tolist() == [[20.0, -8.0]]


def test_low_rank_and_expert_crosses_by_definition(e):
    x0 = e.flatten(1)
    width = x0.shape[1]
    low = CrossLayer(width, rank=2)
    full = low.outer.weight @ low.inner.weight
    assert torch.allclose(low(x0, x0), x0 * (x0 @ full.T + low.outer.bias) + x0, atol=1e-5)
    mixed = ExpertCrossLayer(width, rank=2, experts=3)
    gates = mixed.gate(x0).softmax(1)
    expected = x0.clone()
    for i in range(3):
        inner = torch.tanh(torch.tanh(x0 @ mixed.v[i]) @ mixed.c[i])
        expected += gates[:, i : i + 1] * x0 * (inner @ mixed.u[i] + mixed.bias)
    assert torch.allclose(mixed(x0, x0), expected, atol=1e-5)


def test_fusion_starts_as_nothing_and_is_the_formula(e):
    fusion = MoCFusion(FIELDS, WIDTH, rank=2)
    assert torch.equal(fusion(e), e)
    assert fusion.norm() == 0.0
    with torch.no_grad():
        fusion.up.normal_(generator=torch.Generator().manual_seed(2))
    flat = e.flatten(1)
    assert torch.allclose(fusion(e).flatten(1), flat + flat @ (fusion.down @ fusion.up), atol=1e-5)
    product = (fusion.down @ fusion.up).detach().norm()
    assert fusion.norm() == pytest.approx(float(product), rel=1e-5)
    with pytest.raises(UsageError, match=r"--fusion-rank \(fusion_rank=\) is 0; give 1 to"):
        RankerConfig(fusion_rank=0)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_takes_one_row_and_reads_every_field(name, e):
    torch.manual_seed(0)
    model = make_model(name, fields=FIELDS, width=WIDTH, options={"hidden": (6,), "dropout": 0.0})
    first = torch.randn(BATCH, FIELDS) if model.first_order else None
    inputs = e.clone().requires_grad_()
    logits = model(inputs, first)
    assert logits.shape == (BATCH,)
    logits.square().sum().backward()
    assert (inputs.grad.abs().sum((0, 2)) > 0).all()
    one = None if first is None else first[:1]
    assert model(e[:1], one).shape == (1,)  # in training mode
    model.eval()
    whole = model(e, first)
    assert torch.allclose(model(e[:1], one), whole[:1], atol=1e-5)


def test_deepfm_is_the_sum_of_its_parts(e):
    model = make_model(
        "deepfm", fields=FIELDS, width=WIDTH, options={"hidden": (6,), "dropout": 0.0}
    ).eval()
    first = torch.randn(BATCH, FIELDS)
    with torch.no_grad():
        model.bias.fill_(0.3)
    expected = 0.3 + first.sum(1) + subsets(e, 2).sum(1) + model.deep(e.flatten(1))[:, 0]
    assert torch.allclose(model(e, first), expected, atol=1e-4)


def test_dcnv2_structures(e):
    options = {"hidden": (6,), "dropout": 0.0}
    for structure in ("parallel", "stacked"):
        model = make_model(
            "dcnv2", fields=FIELDS, width=WIDTH, options={**options, "structure": structure}
        ).eval()
        x0 = x = e.flatten(1)
        for layer in model.cross:
            x = x0 * (x @ layer.linear.weight.T + layer.linear.bias) + x
        last = torch.cat([x, model.deep(x0)], 1) if structure == "parallel" else model.deep(x)
        assert torch.allclose(model(e), model.linear(last)[:, 0], atol=1e-4)
    for extra in ({"rank": 2}, {"rank": 2, "experts": 2}):
        made = make_model("dcnv2", fields=FIELDS, width=WIDTH, options={**options, **extra})
        assert made(e).shape == (BATCH,)


def test_wrong_names_and_values():
    with pytest.raises(UsageError, match="did you mean 'dcnv2'"):
        make_model("dcn", fields=2, width=2)
    with pytest.raises(UsageError, match="has no argument 'hiden'; did you mean 'hidden'"):
        make_model("deepfm", fields=2, width=2, options={"hiden": (3,)})
    with pytest.raises(UsageError, match="give a rank"):
        make_model("dcnv2", fields=2, width=2, options={"experts": 2})
    with pytest.raises(UsageError, match="preset"):
        make_model("autoint", fields=2, width=2, options={"preset": "code"})


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    drop = Dropout(0.2)
    x = torch.full((999, 101), 3.0, requires_grad=True)
    torch.manual_seed(0)
    y = drop(x)
    y.sum().backward()
    kept = y != 0
    assert abs(float(kept.float().mean()) - 0.8) < 0.005  # four standard errors
    assert torch.allclose(y[kept], torch.tensor(3.0 / 0.8), rtol=1e-4)
    assert torch.equal(x.grad != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)
    assert drop.eval()(x) is x
