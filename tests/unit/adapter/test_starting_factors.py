"""The start of the factors: GoRA's formula against least squares, and slices of one file for mixed ranks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from llamafactory_adaptive.adapter.lora import contract_arguments, live_factors
from llamafactory_adaptive.adapter.starting_factors import StartingFactors, compressed_gradient
from tests.helpers.lora import mixed_ranks
from tests.helpers.tiny import tiny_model


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_of(a, gradient, scale=2.0, gamma=0.05):
    return compressed_gradient(torch.cat([a, a @ gradient.T], dim=1), a.shape[1], scale, gamma)


def test_the_product_is_the_least_squares_approximation_of_a_descent_step():
    a, gradient = drawn(3, 10), drawn(7, 10, seed=1)
    best = torch.linalg.lstsq(a.T, gradient.T).solution.T  # of B A = G
    b = start_of(a, gradient, scale=1.5, gamma=0.2)
    assert torch.allclose(b, -0.2 * (10 / 3) ** 0.5 / 1.5 * best)


def test_with_the_scale_of_the_paper_the_factor_is_the_papers():
    a, gradient, alpha, gamma = drawn(4, 25), drawn(6, 25, seed=1), 16.0, 0.05
    best = gradient @ torch.linalg.pinv(a)
    b = start_of(a, gradient, alpha / 4**0.5, gamma)
    assert torch.allclose(b, -gamma * 25**0.5 / alpha * best)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("rank", [2, 16])
def test_the_first_update_is_as_large_as_a_step_at_the_rate_gamma(rank, scale):
    a, gradient = drawn(rank, 64), drawn(400, 64, seed=1)
    update = scale * start_of(a, gradient, scale, gamma=0.1) @ a
    assert float(update.norm() / gradient.norm()) == pytest.approx(0.1, rel=0.05)
    assert float((update * gradient).sum()) < 0, "downhill"


@pytest.mark.parametrize("kind", ["eva", "gora"])
def test_each_module_takes_as_many_rows_as_its_rank(kind, tmp_path):
    model = tiny_model()
    ranks = mixed_ranks(model)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in ranks}
    held = {
        name: drawn(8, d_in + (d_out if kind == "gora" else 0), seed=number).float()
        for number, (name, (d_out, d_in)) in enumerate(shapes.items())
    }
    save_file(held, path := tmp_path / "start.safetensors")
    adapted = get_peft_model(model, LoraConfig(**contract_arguments(ranks, 2.0)))
    assert StartingFactors(kind, path, 0.05).copy_into(adapted, 2.0) == len(ranks)
    for name, (a, b) in live_factors(adapted).items():
        rows, d_in = held[name][: ranks[name]], shapes[name][1]
        assert torch.equal(a.weight, rows[:, :d_in])
        expected = compressed_gradient(rows, d_in, 2.0, 0.05).float() if kind == "gora" else torch.zeros_like(b.weight)
        assert torch.equal(b.weight, expected)
