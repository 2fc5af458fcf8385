"""What is special about FSQ, and what it shares with the rest of the library."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import semid
from semid.errors import UsageError
from semid.report.compare import side_by_side
from semid.tokenizers.fsq import ScalarGrid, ScalarQuantizer

TRAINING: dict[str, Any] = {"epochs": 8, "batch_size": 128, "learning_rate": 3e-3}
NETWORK: dict[str, Any] = {"network": {"hidden": (32,)}, "training": TRAINING}


def serve(tokenizer: semid.Tokenizer, x: np.ndarray, folder: Path) -> None:
    """Take a tokenizer to pages, heads, unique ids and other programs (the rest: the contract)."""
    ids = tokenizer.encode(x)
    diagnosis = semid.diagnose(tokenizer, x)
    side_by_side({"one": diagnosis, "two": diagnosis}).write(folder / "compared.html")
    error = ((x - tokenizer.decode(ids)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    np.testing.assert_allclose(diagnosis.reconstruction.relative_error["all"], error, rtol=1e-3)
    assert len(np.unique(semid.make_unique(ids).ids.codes, axis=0)) == len(x)
    head = semid.DecodeHead.fit(ids, x)
    assert head.error is not None
    assert head.error < 1
    semid.export("torcheasyrec", folder / "rec", ids=ids, tokenizer=tokenizer)


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


@pytest.mark.parametrize("codes_per", ["group", "dimension"])
def test_fsq_serves(codes_per, clustered, tmp_path):
    grid = {"dimension_levels": (8, 5), "groups": 2, "codes_per": codes_per}
    serve(semid.FSQ(**grid, **NETWORK).fit(clustered), clustered, tmp_path)


def test_fsq_of_several_stages_serves(fsq, clustered, tmp_path):
    serve(fsq, clustered, tmp_path)


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
