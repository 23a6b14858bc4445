"""IGU-LoRA and AdaLoRA against NumPy, autograd, path integrals and PEFT's own allocator."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import reference
import torch
from dynamic import batch, scatter, start_plan, stream, triplet_model
from peft.tuners.adalora.layer import RankAllocator

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.methods import Orthogonality, is_dynamic
from llamafactory_adaptive.methods._registry import get_method, methods
from llamafactory_adaptive.methods._running_stats import SmoothedImportance
from llamafactory_adaptive.methods.adalora import Adalora, AdaloraOptions
from llamafactory_adaptive.methods.igu import Igu, IguOptions, sampled_path
from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.seeding import seeded_index
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.path_probe import Prober
from llamafactory_adaptive.training.probe_budget import ProbeBudget


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observed", [None, torch.tensor([1.0, 0.0, 1.0])])
def test_smoothing_matches_the_numpy_reference(observed):
    draws = np.random.default_rng(0).exponential(size=(9, 3)).astype(np.float32)
    found = SmoothedImportance(0.85, 0.7)
    for s in draws:
        found.update("x", torch.tensor(s), observed)
    mean, deviation = reference.smoothed(list(draws), 0.85, 0.7)
    seen = slice(None) if observed is None else observed.bool().numpy()
    assert np.allclose(found.mean["x"].numpy()[seen], mean[seen], rtol=1e-5)
    assert np.allclose(found.deviation["x"].numpy()[seen], deviation[seen], rtol=1e-5)
    if observed is not None:
        assert found.mean["x"][1] == found.deviation["x"][1] == 0
    assert torch.allclose(found.snr("x", 1e-6), (found.mean["x"] + 1e-6) / (found.deviation["x"] + 1e-6))


@pytest.mark.parametrize(
    ("options", "element"),
    [
        ({}, lambda s, u: (s + 1e-6) / (u + 1e-6)),
        ({"uncertainty": "product"}, lambda s, u: s * u),
    ],
)
@pytest.mark.parametrize("term", ["snr", "magnitude"])
def test_component_scores_match_the_numpy_reference(options, element, term):
    _, triplets, components = triplet_model()
    method = Igu(IguOptions(importance="off", lambda_term=term, **options))
    seen = {}
    for _ in stream(triplets, 6):
        for index, module in enumerate(triplets.modules):
            for kind, p in module.parameters().items():
                seen.setdefault((index, kind), []).append((p.data * p.grad).abs().double().numpy())
        components.update(method, None)
    found = components.scores(method)
    for index, module in enumerate(triplets.modules):
        parts = {kind: element(*reference.smoothed(seen[index, kind])) for kind in ("lambda", "P", "Q")}
        if term == "magnitude":
            parts["lambda"] = module.a.lambda_r.detach().abs().numpy()
        assert np.allclose(found[index], reference.component_scores(*parts.values()), rtol=1e-4)


def test_adalora_scores_and_keeps_what_pefts_own_allocator_does():
    """One recorded stream of weights and gradients through both."""
    _, triplets, components = triplet_model(rank=6, initial_lambda=0.0)
    shadows = {}
    for module in triplets.modules:
        for kind, letter, shape in (("Q", "A", None), ("P", "B", None), ("lambda", "E", (6, 1))):
            parameter = module.parameters()[kind]
            shadows[f"{module.name}.lora_{letter}.default"] = (parameter, shape or tuple(parameter.shape))
    theirs = {name: torch.nn.Parameter(torch.zeros(shape)) for name, (_, shape) in shadows.items()}
    model = type("Shadow", (), {"named_parameters": lambda self: theirs.items()})()
    config = peft.AdaLoraConfig(target_r=3, init_r=6, total_step=100, beta1=0.85, beta2=0.85)
    allocator = RankAllocator(model, config, "default")

    method = Adalora(AdaloraOptions())
    for _ in stream(triplets, 8):
        for name, (parameter, shape) in shadows.items():
            theirs[name].data.copy_(parameter.data.view(shape))
            theirs[name].grad = parameter.grad.view(shape).clone()
        allocator.update_ipt(model)
        components.update(method, None)

    ours = components.scores(method)
    budget = 3 * len(triplets.modules)
    pattern = allocator.mask_to_budget(model, budget)
    for module, row in zip(triplets.modules, ours, strict=True):
        e, a, b = (allocator._element_score(f"{module.name}.lora_{x}.default") for x in "EAB")
        assert np.allclose(row, (e.view(-1) + a.mean(1) + b.mean(0)).tolist(), rtol=1e-4)
    kept = keep_components(ours, Bounds([1] * len(ours), budget, [0] * len(ours), [6] * len(ours)))
    assert [pattern[f"{module.name}.lora_E.default"] for module in triplets.modules] == kept
    assert len({sum(row) for row in kept}) > 1


def test_factors_of_masked_components_are_not_scored_on_gradients_the_mask_made_zero():
    _, triplets, components = triplet_model()
    method = Igu(IguOptions(importance="off"))
    steps = stream(triplets, 4)
    for _ in range(3):
        next(steps)
        components.update(method, None)
    masks = [list(row) for row in triplets.masks]
    masks[0][1] = masks[3][0] = False
    triplets.mask(masks)
    before = {key: value.clone() for key, value in method.state().items()}
    next(steps)
    components.update(method, None)
    for block in components.blocks:
        old, new = before[f"mean.{block.name}"], method.state()[f"mean.{block.name}"]
        held = (old == new).view(len(block.modules), *block.shape)
        for place, index in enumerate(block.modules):
            for component, on in enumerate(masks[index]):
                part = held[place] if block.kind == "lambda" else held[place].transpose(0, int(block.kind == "P"))
                assert bool(part[component].all()) is (not on and block.kind != "lambda")


def test_a_nan_gradient_stops_the_choice():
    _, triplets, components = triplet_model()
    method = Igu(IguOptions())
    next(stream(triplets, 1))
    triplets.modules[2].p.grad[0, 0] = float("nan")
    components.update(method, None)
    scores = components.scores(method)
    assert math.isnan(scores[2][0])
    for parameter in components.parameters:  # fp16: the scaler skips this step, and it does not count as missing
        parameter.grad.fill_(float("inf"))
    components.arrived = False
    components.update(method := Igu(IguOptions()), None, overflow_is_possible=True)
    assert all(math.isfinite(s) for row in components.scores(method) for s in row)


def test_a_missing_gradient_is_named():
    _, triplets, components = triplet_model()
    next(stream(triplets, 1))
    for parameter in triplets.modules[1].parameters().values():
        parameter.grad = None
    with pytest.raises(GuardError, match=r"no gradient arrived at 1 modules at the first step, for example at model"):
        components.update(Igu(IguOptions()), None)


def test_the_loss_scale_is_taken_out_of_scores_and_put_into_the_regulariser():
    plain, scaled = [], []
    for scale, found in ((1.0, plain), (1024.0, scaled)):
        _, triplets, _ = triplet_model()
        components = Components(triplets, UnpartitionedEngine(lambda scale=scale: scale))
        next(stream(triplets, 1))
        for parameter in components.parameters:
            parameter.grad.mul_(scale)
        method = Igu(IguOptions())
        components.update(method, Orthogonality(50.0, "identity"))
        found += [components.scores(method), [parameter.grad / scale for parameter in components.parameters]]
    assert np.allclose(plain[0], scaled[0], rtol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(plain[1], scaled[1], strict=True))


def test_scores_see_the_gradient_without_the_regulariser():
    scores = []
    for orthogonality in (None, Orthogonality(1e3, "identity")):
        _, triplets, components = triplet_model()
        method = Igu(IguOptions())
        next(stream(triplets, 1))
        components.update(method, orthogonality)
        scores.append(components.scores(method))
    assert scores[0] == scores[1]


# -- integrated gradients --------------------------------------------------------------------------------------------


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
    triplets = Triplets(model, plan, 0.1, seed=1)
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
        found = prober.gradients(path)
        return sum(
            float((p.detach() * g).sum())
            for block, row in zip(components.blocks, found, strict=True)
            for p, g in zip(block.parameters, row, strict=True)
        )

    return attributions, float(full - none)


def test_integrated_gradients_are_complete_with_an_error_that_falls_as_one_over_n_squared():
    attributions, change = path_problem()
    errors = [abs(attributions(reference.trapezoid_path(n)) - change) for n in (64, 128, 256, 512)]
    assert errors[-1] < 1e-3 * abs(change)
    assert all(3.8 < a / b < 4.2 for a, b in itertools.pairwise(errors)), errors


def test_one_random_node_estimates_the_path_without_bias_and_averages_out_as_one_over_root_m():
    attributions, _ = path_problem()
    n = 8
    exact = attributions(reference.trapezoid_path(n))
    single = [attributions(sampled_path(n, node)) for node in range(1, n)]
    assert sum(single) / len(single) == pytest.approx(exact, rel=1e-9)
    method, spread = Igu(IguOptions(importance="integrated", intervals=n)), np.std(single)
    for m in (16, 256):  # 400 runs of m steps each, with the nodes that a run would draw
        drawn = [[round(method.path(seed, step)[0][0] * n) for step in range(m)] for seed in range(400)]
        means = np.array([[single[node - 1] for node in row] for row in drawn]).mean(1)
        assert np.sqrt(((means - exact) ** 2).mean()) == pytest.approx(spread / m**0.5, rel=0.15)


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
    assert triplets.position.value == 1.0
    with pytest.raises(GuardError, match="no training batch reached the model"):
        prober.gradients([(1.0, 1.0)])


def test_probes_keep_within_their_share_of_the_time(monkeypatch):
    """A clock of our own: a step trains 1 s, a probe takes 2 s, 10 % are allowed."""
    from llamafactory_adaptive.training import probe_budget

    now = [0.0]
    monkeypatch.setattr(probe_budget.time, "perf_counter", lambda: now[0])
    probe_budget, probed = ProbeBudget(0.1), []
    for step in range(400):
        probe_budget.begin()
        now[0] += 1.0
        probe_budget.trained()
        if probe_budget.due(step):
            now[0] += 2.0
            probe_budget.probed(step, 2.0, torch.device("cpu"))
            probed.append(step)
    assert probe_budget.probing / probe_budget.training <= 0.1
    assert 18 <= len(probed) <= 20
    assert ProbeBudget(None).due(0)


def test_draws_depend_on_their_arguments_alone_and_cover_all_choices():
    assert seeded_index(1, 2, 3, 20) == seeded_index(1, 2, 3, 20)
    positions = [Igu(IguOptions()).position(7, step, micro) for step in range(200) for micro in range(2)]
    assert set(positions) == {k / 20 for k in range(1, 21)}
    counts = np.bincount([seeded_index(0, step, 0, 20) for step in range(20_000)], minlength=20)
    assert abs(counts - 1000).max() < 150
    assert Igu(IguOptions(importance="off")).position(7, 1, 0) == 1.0


# -- what every dynamic method gets for free -------------------------------------------------------------------------


DYNAMIC = [name for name in methods() if is_dynamic(get_method(name))]


@pytest.mark.parametrize("name", DYNAMIC)
class TestContract:
    def make(self, name):
        return get_method(name)(get_method(name).Options())

    def test_scores_are_finite_complete_and_deterministic(self, name):
        found = []
        for _ in range(2):
            _, triplets, components = triplet_model()
            method = self.make(name)
            for _ in stream(triplets, 3):
                components.update(method, None)
            found.append(components.scores(method))
        assert found[0] == found[1]
        assert [len(row) for row in found[0]] == [4] * 14
        assert all(math.isfinite(s) for row in found[0] for s in row)

    def test_state_goes_to_another_instance_and_back(self, name):
        _, triplets, components = triplet_model()
        whole, parts = self.make(name), [self.make(name), self.make(name)]
        for step, _ in enumerate(stream(triplets, 4)):
            if step == 2:
                parts[1].load({key: value.clone() for key, value in parts[0].state().items()})
            components.update(whole, None)
            components.update(parts[step // 2], None)
        assert components.scores(whole) == components.scores(parts[1])

    def test_what_it_keeps_of_an_element_depends_on_that_element_alone(self, name):
        """So that under ZeRO it can live where the element lives."""
        generator = torch.Generator().manual_seed(0)
        draws = [(torch.randn(10, generator=generator), torch.randn(10, generator=generator)) for _ in range(4)]
        whole, parts = self.make(name), [self.make(name), self.make(name)]
        for w, g in draws:
            whole.observe("P/5x2", w.clone(), g.clone(), None)
            for part, piece in zip(parts, (slice(0, 3), slice(3, 10)), strict=True):
                part.observe("P/5x2", w[piece].clone(), g[piece].clone(), None)
        last = draws[-1][0]
        joined = torch.cat([parts[0].element_scores("P/5x2", last[:3]), parts[1].element_scores("P/5x2", last[3:])])
        assert torch.equal(whole.element_scores("P/5x2", last), joined)
