"""IGU-LoRA and AdaLoRA against NumPy, autograd, path integrals and PEFT's own allocator."""

import math

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

from llamafactory_adaptive.methods import is_dynamic
from llamafactory_adaptive.methods._registry import get_method, make_method, methods
from llamafactory_adaptive.methods._running_stats import RunningMean, SmoothedImportance
from llamafactory_adaptive.methods.adalora import Adalora, AdaloraOptions
from llamafactory_adaptive.methods.igu import Igu, IguOptions
from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.seeding import seeded_index
from tests.helpers import reference
from tests.helpers.dynamic import stream, triplet_model


# -- scores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("observed", [None, torch.tensor([1.0, 0.0, 1.0])])
def test_smoothing_matches_the_numpy_reference(observed):
    draws = np.random.default_rng(0).exponential(size=(9, 3)).astype(np.float32)
    smoothed = SmoothedImportance(0.85, 0.7)
    for s in draws:
        smoothed.update("x", torch.tensor(s), observed)
    mean, deviation = reference.smoothed(list(draws), 0.85, 0.7)
    seen = slice(None) if observed is None else observed.bool().numpy()
    assert np.allclose(smoothed.mean["x"].numpy()[seen], mean[seen], rtol=1e-5)
    assert np.allclose(smoothed.deviation["x"].numpy()[seen], deviation[seen], rtol=1e-5)
    if observed is not None:
        assert smoothed.mean["x"][1] == smoothed.deviation["x"][1] == 0
    assert torch.allclose(smoothed.snr("x", 1e-6), (smoothed.mean["x"] + 1e-6) / (smoothed.deviation["x"] + 1e-6))


def test_a_running_mean_keeps_what_is_not_observed_and_goes_on_after_a_resume():
    draws = list(np.random.default_rng(1).exponential(size=(7, 3)).astype(np.float32))
    running = RunningMean(0.75)
    for s in draws[:3]:
        running.update("x", torch.tensor(s))
    resumed = RunningMean(0.75)
    resumed.load({name: value.clone() for name, value in running.state().items()})
    for s in draws[3:]:
        resumed.update("x", torch.tensor(s), torch.tensor([1.0, 1.0, 0.0]))
    assert np.allclose(resumed.mean["x"][:2], reference.running_mean(draws, 0.75)[:2], rtol=1e-5)
    assert resumed.mean["x"][2] == pytest.approx(np.mean([s[2] for s in draws[:3]]), rel=1e-5)


def of_s_and_u(combined):
    """Smooth importances to S and U, and combine these."""
    return lambda importances: combined(*reference.smoothed(importances))


@pytest.mark.parametrize(
    ("options", "element"),
    [
        ({}, of_s_and_u(lambda s, u: (s + 1e-6) / (u + 1e-6))),
        ({"uncertainty": "product"}, of_s_and_u(lambda s, u: s * u)),
        ({"uncertainty": "discounted"}, of_s_and_u(lambda s, u: s * s / (s + u))),
        ({"uncertainty": "mean"}, lambda importances: np.mean(importances, axis=0)),
        ({"uncertainty": "mean", "beta1": 0.6}, lambda importances: reference.running_mean(importances, 0.6)),
    ],
)
@pytest.mark.parametrize("term", ["snr", "magnitude"])
def test_component_scores_match_the_numpy_reference(options, element, term):
    _, triplets, components = triplet_model()
    method = Igu(IguOptions("published", importance="off", lambda_term=term, **options))
    seen = {}
    for _ in stream(triplets, 6):
        for index, module in enumerate(triplets.modules):
            for kind, p in module.parameters().items():
                seen.setdefault((index, kind), []).append((p.data * p.grad).abs().double().numpy())
        components.update(method, None)
    scores = components.scores(method)
    for index, module in enumerate(triplets.modules):
        parts = {kind: element(seen[index, kind]) for kind in ("lambda", "P", "Q")}
        if term == "magnitude":
            parts["lambda"] = module.a.lambda_r.detach().abs().numpy()
        assert np.allclose(scores[index], reference.component_scores(*parts.values()), rtol=1e-4)


class RatioAllocator(RankAllocator):
    """PEFT's allocator with the score of IGU-LoRA's released code, mean over deviation."""

    def _element_score(self, n):
        return (self.exp_avg_ipt[n] + 1e-6) / (self.exp_avg_unc[n] + 1e-6)


@pytest.mark.parametrize(
    ("method", "allocator_class"),
    [
        (Adalora(AdaloraOptions()), RankAllocator),
        (Igu(IguOptions("published", importance="off")), RatioAllocator),
        (Igu(IguOptions("published")), RatioAllocator),
    ],
    ids=["adalora", "igu as published without shrinkage", "igu as published"],
)
def test_scores_and_masks_are_those_of_pefts_allocator(method, allocator_class):
    """One recorded stream of weights and gradients through both, under a falling budget."""
    _, triplets, components = triplet_model(
        rank=6, initial_lambda=0.0 if method.initial_adapter.lambda_value == 0 else 0.1
    )
    shadows = {}
    for module in triplets.modules:
        for kind, letter, shape in (("Q", "A", None), ("P", "B", None), ("lambda", "E", (6, 1))):
            parameter = module.parameters()[kind]
            shadows[f"{module.name}.lora_{letter}.default"] = (parameter, shape or tuple(parameter.shape))
    theirs = {name: torch.nn.Parameter(torch.zeros(shape)) for name, (_, shape) in shadows.items()}
    model = type("Shadow", (), {"named_parameters": lambda self: theirs.items()})()
    config = peft.AdaLoraConfig(target_r=3, init_r=6, total_step=100, beta1=0.85, beta2=0.85)
    allocator = allocator_class(model, config, "default")

    for _ in stream(triplets, 8):
        for name, (parameter, shape) in shadows.items():
            theirs[name].data.copy_(parameter.data.view(shape))
            theirs[name].grad = parameter.grad.view(shape).clone()
        allocator.update_ipt(model)
        components.update(method, None)

    ours = components.scores(method)
    for module, row in zip(triplets.modules, ours, strict=True):
        e, a, b = (allocator._element_score(f"{module.name}.lora_{x}.default") for x in "EAB")
        assert np.allclose(row, (e.view(-1) + a.mean(1) + b.mean(0)).tolist(), rtol=1e-4)
    for rank in (5, 3, 1):
        budget = rank * len(triplets.modules)
        pattern = allocator.mask_to_budget(model, budget)
        kept = keep_components(ours, Bounds([1] * len(ours), budget, [0] * len(ours), [6] * len(ours)))
        assert [pattern[f"{module.name}.lora_E.default"] for module in triplets.modules] == kept
        assert len({sum(row) for row in kept}) > 1


def test_draws_depend_on_their_arguments_alone_and_cover_all_choices():
    assert seeded_index(1, 2, 3, 20) == seeded_index(1, 2, 3, 20)
    positions = [Igu(IguOptions("published")).position(7, step, micro) for step in range(200) for micro in range(2)]
    assert set(positions) == {k / 20 for k in range(1, 21)}
    counts = np.bincount([seeded_index(0, step, 0, 20) for step in range(20_000)], minlength=20)
    assert abs(counts - 1000).max() < 150
    assert Igu(IguOptions(importance="off")).position(7, 1, 0) == 1.0


# -- what every dynamic method gets for free -------------------------------------------------------------------------
DYNAMIC = [name for name in methods() if is_dynamic(get_method(name)) and not make_method(name, {}).traits.spectral]
COMPONENTWISE = [name for name in DYNAMIC if make_method(name, {}).traits.componentwise]
SPECTRAL = [name for name in methods() if make_method(name, {}).traits.spectral]


@pytest.mark.parametrize("name", DYNAMIC)
class TestContract:
    def make(self, name):
        return get_method(name)(get_method(name).Options())

    def test_scores_are_finite_complete_and_deterministic(self, name):
        scores = []
        for _ in range(2):
            _, triplets, components = triplet_model()
            method = self.make(name)
            for _ in stream(triplets, 3):
                components.update(method, None)
            scores.append(components.scores(method))
        assert scores[0] == scores[1]
        assert [len(row) for row in scores[0]] == [4] * 14
        assert all(math.isfinite(s) for row in scores[0] for s in row)

    def test_state_goes_to_another_instance_and_back(self, name):
        _, triplets, components = triplet_model()
        uninterrupted, parts = self.make(name), [self.make(name), self.make(name)]
        for step, _ in enumerate(stream(triplets, 4)):
            if step == 2:
                parts[1].load({key: value.clone() for key, value in parts[0].state().items()})
            components.update(uninterrupted, None)
            components.update(parts[step // 2], None)
        assert components.scores(uninterrupted) == components.scores(parts[1])

    def test_what_it_keeps_of_an_element_depends_on_that_element_alone(self, name):
        """So that under ZeRO it can live where the element lives."""
        generator = torch.Generator().manual_seed(0)
        draws = [(torch.randn(10, generator=generator), torch.randn(10, generator=generator)) for _ in range(4)]
        unsplit, parts = self.make(name), [self.make(name), self.make(name)]
        if unsplit.traits.componentwise:
            pytest.skip("keeps nothing of elements")
        for w, g in draws:
            unsplit.observe("P/5x2", w.clone(), g.clone(), None)
            for part, piece in zip(parts, (slice(0, 3), slice(3, 10)), strict=True):
                part.observe("P/5x2", w[piece].clone(), g[piece].clone(), None)
        last = draws[-1][0]
        joined = torch.cat([parts[0].element_scores("P/5x2", last[:3]), parts[1].element_scores("P/5x2", last[3:])])
        assert torch.equal(unsplit.element_scores("P/5x2", last), joined)


@pytest.mark.parametrize("name", COMPONENTWISE)
def test_the_importance_of_an_element_depends_on_that_element_alone(name):
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(10, generator=generator), torch.randn(10, generator=generator)
    method = make_method(name, {})
    parts = [method.importance_of(w[piece], g[piece].clone()) for piece in (slice(0, 3), slice(3, 10))]
    assert torch.equal(method.importance_of(w, g.clone()), torch.cat(parts))
    assert bool((parts[0] >= 0).all())


@pytest.mark.parametrize("name", COMPONENTWISE)
def test_components_in_use_go_on_being_observed_and_masked_ones_of_igu_keep_what_they_had(name):
    method = make_method(name, {})
    _, triplets, components = triplet_model(initial_lambda=method.initial_adapter.lambda_value)
    for step, _ in enumerate(stream(triplets, 6)):
        if step == 3:
            triplets.mask([[index != 1 for index in range(4)] for _ in triplets.modules])
            before = {block.name: method.component_scores(block.name).clone() for block in components.blocks}
        components.update(method, None)
    for block in components.blocks:
        after = method.component_scores(block.name)
        assert after.shape == (len(block.modules), block.rank)
        assert not torch.equal(after[:, 0], before[block.name][:, 0])
        if block.kind != "lambda" and name == "igu":  # tsq averages over an interval, in which they had no effect
            assert torch.equal(after[:, 1], before[block.name][:, 1])


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_rotation_keeps_the_product_and_orders_its_singular_values(name):
    generator = torch.Generator().manual_seed(0)
    for rank_of_p in (4, 2, 0):
        p, q = torch.randn(9, 4, generator=generator), torch.randn(4, 7, generator=generator)
        p[:, rank_of_p:] = 0.0
        new_p, new_q, squares = make_method(name, {}).rotate(p, q)
        assert new_p.dtype == new_q.dtype == torch.float32
        assert torch.allclose(new_p @ new_q, p @ q, atol=1e-5)
        expected = torch.linalg.svdvals((p @ q).double())[:4].square()
        assert torch.allclose(squares.double(), expected, atol=1e-9, rtol=1e-5)
        assert torch.allclose((new_p[:, :2] @ new_q[:2]).double(), best_of_rank_2((p @ q).double()), atol=1e-5)
        assert bool(new_q.any(1).all()), "no component is dead"


def best_of_rank_2(x):
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :2] * s[:2]) @ v[:2]
