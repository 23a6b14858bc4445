"""Integrated gradients along the path from no adapter to the whole one."""

import itertools
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.methods.igu import Igu, IguOptions, sampled_path
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.path_probe import Prober
from tests.helpers import reference
from tests.helpers.dynamic import batch, scatter, start_plan, triplet_model


class Smooth(torch.nn.Module):
    """tanh layers in fp64 throughout: transformers keeps norms in fp32, whose noise hides an error of 1e-6."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(6, 12), torch.nn.Linear(12, 3)

    def forward(self, x, target):
        out = self.down_proj(torch.tanh(self.up_proj(x)))
        return SimpleNamespace(loss=(torch.tanh(out) - target).square().mean())


def path_problem():
    """A smooth model whose adapter matters, its loss with and without it, and a way to probe it."""
    torch.manual_seed(0)
    base = Smooth().double()
    plan = start_plan(base)
    model = peft.get_peft_model(base, peft.LoraConfig(**lora_config_arguments(plan)))
    triplets = Triplets(model, plan, 0.1, "gaussian", seed=1)
    components = Components(triplets, UnpartitionedEngine())
    scatter(triplets, std=1.0)
    inputs = {"x": torch.randn(8, 6).double(), "target": torch.rand(8, 3).double()}
    prober = Prober(model, components, seed=0)
    with torch.no_grad():
        full = model(**inputs).loss
        with model.disable_adapter():
            none = model(**inputs).loss
    assert abs(full - none) > 0.1

    def attributions(path):
        prober.inputs = dict(inputs)
        gradients = prober.gradients(path)
        return sum(
            float((p.detach() * g).sum())
            for block, row in zip(components.blocks, gradients, strict=True)
            for p, g in zip(block.parameters, row, strict=True)
        )

    return attributions, float(full - none)


def test_integrated_gradients_are_complete_with_an_error_that_falls_as_one_over_n_squared():
    attributions, change = path_problem()
    errors = [abs(attributions(reference.trapezoid_path(n)) - change) for n in (64, 128, 256, 512)]
    assert errors[-1] < 1e-3 * abs(change)
    assert all(3.8 < a / b < 4.2 for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("descale", [True, False])
def test_one_random_node_estimates_the_path_without_bias_and_averages_out_as_one_over_root_m(descale):
    attributions, _ = path_problem()
    n = 8
    exact = attributions(reference.trapezoid_path(n))
    odds = np.arange(1, n) ** 2 / sum(k * k for k in range(1, n)) if descale else np.full(n - 1, 1 / (n - 1))
    single = np.array([attributions(sampled_path(n, node, odds[node - 1])) for node in range(1, n)])
    assert (odds * single).sum() == pytest.approx(exact, rel=1e-9)
    method = Igu(IguOptions(importance="integrated", intervals=n, descale=descale))
    spread = (odds * (single - exact) ** 2).sum() ** 0.5
    for m in (16, 256):  # 400 runs of m steps each, with the nodes that a run would draw
        drawn = [[round(method.path(seed, step)[0][0] * n) for step in range(m)] for seed in range(400)]
        means = np.array([[single[node - 1] for node in row] for row in drawn]).mean(1)
        assert np.sqrt(((means - exact) ** 2).mean()) == pytest.approx(spread / m**0.5, rel=0.15)


def test_a_steps_score_varies_by_the_node_as_the_method_says():
    """On a loss that is linear in P diag(lambda) Q the gradient of each factor grows as the square of the position."""
    steps = np.array([sum(weight * at**2 for at, weight in sampled_path(20, node, 1 / 19)) for node in range(1, 20)])
    mean = steps.mean()
    descaled = Igu(IguOptions(importance="integrated", intervals=20))
    for step in range(50):
        assert sum(weight * at**2 for at, weight in descaled.path(0, step)) == pytest.approx(mean, rel=1e-12)
    assert mean == pytest.approx(sum(weight * at**2 for at, weight in reference.trapezoid_path(20)))
    assert (steps.std() / mean, steps.min() / mean, steps.max() / mean) == pytest.approx((0.80, 0.082, 2.64), rel=0.01)
    running = steps.std() / mean * ((1 - 0.85) / (1 + 0.85)) ** 0.5  # of independent draws
    assert running == pytest.approx(0.23, rel=0.01)


def test_probing_leaves_gradients_random_state_and_position_alone():
    model, triplets, components = triplet_model()
    model.train()
    prober = Prober(model, components, seed=0)
    prober.armed = True
    model(**batch()).loss.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    prober.gradients([(0.25, 1.0)])
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert triplets.position.factor == 1.0
    with pytest.raises(GuardError, match="no training batch reached the model"):
        prober.gradients([(1.0, 1.0)])
