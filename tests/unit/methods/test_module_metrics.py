"""Metrics of modules and how they are combined, against NumPy."""

import numpy as np
import pytest
import torch

from llamafactory_adaptive.methods import _module_metrics
from tests.helpers import reference


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
