"""Rotated factors: the same model, the singular values of dense products, and a cut that loses the least."""

import itertools

import pytest
import torch

from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.rank_search import RankSearchState
from llamafactory_adaptive.training.rotation import rotate
from tests.helpers.dynamic import batch, scatter, start_plan, stream, triplet_model


SPLITS = ("rows", "balanced")


def dense(triplets):
    """The update of every module, with its mask, fp64."""
    flags = [torch.tensor(row, dtype=torch.float64) for row in triplets.masks]
    return [
        (m.p.detach().double() * on) @ m.q.detach().double() for m, on in zip(triplets.modules, flags, strict=True)
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_the_model_stays_as_it_is_and_the_squares_are_those_of_dense_products(split):
    model, triplets, components = triplet_model(initial_lambda=None)
    scatter(triplets)
    masks = [[True] * 4 for _ in triplets.modules]
    masks[3] = [True, False, True, True]
    triplets.mask(masks)
    with torch.no_grad():
        before = model(**batch()).logits
    products = dense(triplets)
    sizes = [m.q.detach().double().square().sum(1).mean() for m in triplets.modules]
    squares = rotate(components, make_method("svd", {"split": split}))
    triplets.mask([[True] * 4 for _ in triplets.modules])
    with torch.no_grad():
        assert torch.allclose(model(**batch()).logits, before, atol=1e-4)
    for product, found, module, size in zip(products, squares, triplets.modules, sizes, strict=True):
        expected = torch.linalg.svdvals(product)[:4]
        assert torch.allclose(torch.tensor(found).double(), expected.square(), rtol=1e-4, atol=1e-6)
        gram, other = module.q.detach() @ module.q.detach().T, module.p.detach().T @ module.p.detach()
        for matrix in (gram, other):
            assert torch.allclose(matrix, torch.diag(matrix.diag()), atol=1e-4), "rows and columns are orthogonal"
        if split == "rows":
            assert torch.allclose(gram.diag().double(), size.expand(4), rtol=1e-4), "rows keep their mean square"
        else:
            kept = expected > 1e-6
            assert torch.allclose(gram.diag().double()[kept], expected[kept], rtol=1e-3)


def test_states_of_the_optimizer_restart_from_the_mean_of_their_factor():
    _, triplets, _ = triplet_model(initial_lambda=None)
    parameters = [p for m in triplets.modules for p in m.parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    components = Components(triplets, UnpartitionedEngine(optimizer=optimizer))
    for _ in stream(triplets, 3):
        optimizer.step()
    means = [optimizer.state[p]["exp_avg_sq"].mean() for p in parameters]
    rotate(components, make_method("svd", {}))
    for parameter, mean in zip(parameters, means, strict=True):
        state = optimizer.state[parameter]
        assert not bool(state["exp_avg"].any())
        assert torch.allclose(state["exp_avg_sq"], mean.expand_as(state["exp_avg_sq"]), rtol=1e-5)


def state_of(modules, unit="params", **more):
    config = AdaptiveConfig(
        "svd", {}, unit, 2, 4.0, more.pop("min_rank", 1), 8, None, CalibrationConfig(None, 0, 0, 0)
    )
    return RankSearchState(RankPlan("svd", {}, unit, 2, 4.0, tuple(modules)), config)


def test_the_cut_loses_the_least_of_all_cuts_of_one_cost():
    """Brute force over three modules: with equal costs the greedy choice is the best there is."""
    generator = torch.Generator().manual_seed(3)
    modules = [ModulePlan(f"m{i}", 6, 6, rank=4) for i in range(3)]
    spectra = [torch.rand(4, generator=generator).sort(descending=True).values.square().tolist() for _ in modules]
    decisions = state_of(modules, "ranks")
    masks = decisions.choose(5, spectra, decisions.final_budget, [[True] * 4] * 3)
    lost = [sum(row[rank:]) for row in spectra for rank in range(5)]
    best = min(
        itertools.product(range(1, 5), repeat=3),
        key=lambda ranks: (sum(ranks) != 6, sum(lost[5 * i + rank] for i, rank in enumerate(ranks))),
    )
    assert tuple(map(sum, masks)) == best


def test_a_factor_that_is_not_finite_stops_the_cut():
    model, triplets, components = triplet_model(initial_lambda=None)
    triplets.modules[2].p.data[0, 0] = float("inf")
    squares = rotate(components, make_method("svd", {}))
    plan = start_plan(model.base_model.model)
    decisions = state_of(plan.modules)
    with pytest.raises(GuardError, match="module 2 has a component whose score is not finite; training has diverged"):
        decisions.choose(4, squares, decisions.final_budget, triplets.masks)
