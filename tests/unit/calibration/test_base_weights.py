"""Weights as modules compute with them, and their largest singular value, against whole decompositions."""

import bitsandbytes
import pytest
import torch

from llamafactory_adaptive.calibration.base_weights import dense_weight, largest_singular_value


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (5, 3), (1, 7)])
@pytest.mark.parametrize("spectrum", ["drawn", "flat"])
def test_the_largest_singular_value_is_that_of_a_decomposition(shape, spectrum):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if spectrum == "flat":  # nothing sets the largest apart from the others
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        w = 2.0 * u @ v
    expected = torch.linalg.svdvals(w)[0]
    assert float(largest_singular_value(w)) == pytest.approx(float(expected), rel=1e-4)


def test_a_zero_matrix_has_none():
    assert float(largest_singular_value(torch.zeros(4, 3))) == 0.0


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_weight_is_itself_and_a_quantised_one_what_its_module_multiplies_by(bias):
    plain = torch.nn.Linear(64, 32, bias=bias)
    assert torch.equal(dense_weight(plain), plain.weight)
    quantised = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(plain.state_dict())
    quantised = quantised.to("cpu")
    w = dense_weight(quantised)
    assert w.shape == (32, 64)
    x = torch.randn(5, 64)
    expected = quantised(x) - (quantised.bias if bias else 0.0)
    assert torch.allclose(x @ w.T, expected, atol=1e-4)
    assert 0 < (w - plain.weight).abs().max() < 0.05
