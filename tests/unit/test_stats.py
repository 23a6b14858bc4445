"""Moments and metrics against NumPy and autograd."""

import numpy as np
import pytest
import torch

from llamafactory_adaptive.calibration import input_moments
from llamafactory_adaptive.methods import _module_metrics
from tests.helpers import reference


def test_second_moments_are_the_hessian_diagonal_of_a_linear_layer():
    """H of 1/2 sum_t (w . x_t)^2 is X^T X; autograd differentiates twice, our sum does not."""
    x = torch.randn(40, 7, dtype=torch.float64)

    def reconstruction(w):
        return 0.5 * (x @ w).square().sum()

    hessian = torch.autograd.functional.hessian(reconstruction, torch.randn(7, dtype=torch.float64))
    assert torch.allclose(input_moments.second_moment_sum(x), hessian.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_weights_pick_and_weigh_across_chunks(dtype, monkeypatch):
    monkeypatch.setitem(input_moments._CHUNK_ELEMENTS, "cpu", 50)  # several chunks, the last one short
    x, weights, mask = torch.randn(33, 6).to(dtype), torch.rand(33), torch.zeros(33)
    rows = torch.tensor([0, 3, 4, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 32])
    mask[rows] = 1
    spans = input_moments.spans_of(mask)
    assert spans == [(0, 1), (3, 5), (9, 10), (20, 30), (32, 33)]
    expected = (weights[rows].double()[:, None] * x[rows].double() ** 2).sum(0)
    assert torch.allclose(input_moments.second_moment_sum(x, spans, weights), expected, rtol=1e-5)
    assert torch.allclose(input_moments.second_moment_sum(x, spans), (x[rows].double() ** 2).sum(0), rtol=1e-5)
    assert torch.allclose(input_moments.second_moment_sum(x), (x.double() ** 2).sum(0), rtol=1e-5)


def test_the_input_is_left_alone():
    x = torch.randn(5, 3)
    before = x.clone()
    input_moments.second_moment_sum(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("fraction", "energy"), [(0.5, 0.85), (1 / 3, 0.80), (1e-6, 1e-6), (1.0, 1.0)])
def test_metrics_against_numpy(fraction, energy):
    lam = torch.rand(17, dtype=torch.float64) ** 4 + 1e-3
    trace, top, rank = reference.metrics(lam.numpy(), fraction, energy)
    assert float(lam.sum()) == pytest.approx(trace)
    assert float(_module_metrics.top_k_mean(lam, fraction)) == pytest.approx(top)
    assert abs(int(_module_metrics.effective_rank(lam, energy)) - rank) <= (energy == 1.0)  # rounding decides at 100 %


def test_combination_ignores_constant_factors_and_constant_metrics():
    a, b = torch.rand(9, dtype=torch.float64) + 0.1, torch.rand(9, dtype=torch.float64) + 0.1
    assert torch.allclose(_module_metrics.combine(a, b), _module_metrics.combine(1000 * a, 0.01 * b))
    assert torch.allclose(_module_metrics.weigh(torch.full((4,), 3.0)), torch.zeros(4), atol=1e-6)
    assert torch.allclose(_module_metrics.combine(a, b, equal=True), a / a.mean() + b / b.mean())


def test_transforms_tame_and_level():
    huge = torch.tensor([1.0, 2.0, 3.0, 1e6])
    compressed = _module_metrics.log_compress(huge)
    assert compressed[3] / compressed[0] < 100
    assert torch.equal(compressed.argsort(), huge.argsort())
    levelled = _module_metrics.normalise_within(torch.tensor([1.0, 3.0, 100.0, 300.0]), ["q", "q", "k", "k"])
    assert np.allclose(levelled, [0.5, 1.5, 0.5, 1.5])
