"""The parts of the corrected IGU-LoRA, each against what it claims; the published one against its earlier values."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.methods.igu import Igu, IguOptions
from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.training.component_resets import rescale_lambda, reset_lambda
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.rank_search import favour_used
from tests.helpers.dynamic import batch, scatter, start_plan, stream, triplet_model
from tests.helpers.tiny import tiny_model


MENDED = IguOptions(importance="shrink", mend_strength=True)


# -- the start -------------------------------------------------------------------------------------------------------
def test_the_first_update_is_the_one_of_plain_lora_at_the_same_rate():
    """Equal rows of A, B = 0, one step of AdamW each: Delta W must be equal, at a scale of alpha / r = 2."""
    base, inputs = tiny_model(), batch()
    plan = start_plan(base)
    config = LoraConfig(**lora_config_arguments(plan), task_type="CAUSAL_LM")
    start = Igu(IguOptions()).initial_adapter
    searching = get_peft_model(base, config)
    triplets = Triplets(searching, plan, start.lambda_value, start.factors, seed=1)
    factors = {module.name: (module.q, module.p) for module in triplets.modules}
    rows = {name: q.detach().clone() for name, (q, _) in factors.items()}
    adamw_step(searching, inputs)
    found = {name: p.detach() @ (m.a.lambda_r[:, None] * m.q).detach()
             for m in triplets.modules for name, p in [(m.name, m.p)]}  # fmt: skip

    plain = get_peft_model(tiny_model(), config)
    layers = {name: plain.get_submodule(f"base_model.model.{name}") for name in rows}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(rows[name])
    adamw_step(plain, inputs)
    for name, layer in layers.items():
        expected = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        assert expected.norm() > 0
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-9)


def adamw_step(model, inputs):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model(**inputs).loss.backward()
    optimizer.step()


# -- scores ----------------------------------------------------------------------------------------------------------
CORRECTED_SCORES = [{"uncertainty": "product"}, {"uncertainty": "mean"}, {"uncertainty": "discounted"},
                    {"uncertainty": "snr"}]  # fmt: skip


def kept(options, gradient_scale):
    """Masks at half the budget after a stream of small gradients, multiplied as lora_alpha or a loss scale would."""
    _, triplets, components = triplet_model()
    method = Igu(options)
    for _ in stream(triplets, 5):
        for parameter in components.parameters:
            parameter.grad.mul_(1e-6 * gradient_scale)
        components.update(method, None)
    scores = components.scores(method)
    return keep_components(scores, Bounds([1] * len(scores), 2 * len(scores), [1] * len(scores), [4] * len(scores)))


@pytest.mark.parametrize("options", CORRECTED_SCORES, ids=lambda options: options["uncertainty"])
def test_masks_do_not_depend_on_alpha(options):
    masks = [kept(IguOptions(**options), alpha / 8) for alpha in (8, 16, 64)]
    assert masks[0] == masks[1] == masks[2]
    assert len({sum(row) for row in masks[0]}) > 1


def test_masks_of_the_published_variant_depend_on_alpha():
    options = IguOptions("published", importance="off")
    assert kept(options, 1.0) != kept(options, 8.0)


def test_descaled_scores_are_those_at_the_full_position_on_a_linear_model():
    """Loss linear in the output: its gradient at position a is a^3 times the one at 1."""
    scores = []
    for options in (IguOptions("published", importance="off"), IguOptions("published", descale=True)):
        model, triplets, components = linear_model()
        method, x = Igu(options), torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
        positions = []
        for step in range(4):
            model.zero_grad()
            for micro_batch in range(2):
                positions.append(method.position(0, step, micro_batch))
                triplets.position.take(positions[-1])
                model(x * (1 + step + micro_batch)).sum().backward()
            components.update(method, None)
        scores.append(components.scores(method))
    assert positions[0] == positions[1]
    assert len(set(positions)) == 4
    assert torch.allclose(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=1e-4)


def linear_model():
    """One linear layer with a triplet adapter of random factors."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=False))
    plan = RankPlan("igu", {}, "params", 2, 4.0, (ModulePlan("0", 6, 5, rank=4),))
    model = get_peft_model(base, LoraConfig(**lora_config_arguments(plan)))
    triplets = Triplets(model, plan, 0.1, "gaussian", seed=1)
    for parameter in triplets.modules[0].parameters().values():
        parameter.data.copy_(torch.randn(parameter.shape))
    return model, triplets, Components(triplets, UnpartitionedEngine())


# -- strength --------------------------------------------------------------------------------------------------------
def test_the_strength_is_the_best_multiplier_of_what_shrinkage_trains():
    """On (f w - 1)^2 / 2 with f = a^3: the w that is optimal in expectation, and the multiplier that mends it."""
    shrinkage = Igu(MENDED).shrinkage
    f = (torch.arange(1, 21, dtype=torch.float64) / 20) ** 3
    candidates = torch.linspace(0.5, 3.0, 250_001, dtype=torch.float64)
    losses = f.square().mean() * candidates.square() - 2 * f.mean() * candidates
    trained = float(candidates[losses.argmin()])
    assert shrinkage.strength == pytest.approx(1 / trained, abs=1e-5)
    assert shrinkage.strength == pytest.approx(0.61, abs=0.01)
    assert shrinkage.gradient_rms == pytest.approx(float(f.square().mean().sqrt()))
    assert Igu(IguOptions()).shrinkage is None


@pytest.mark.parametrize(("part", "shared"), [("descale", True), ("mend_strength", True), ("hysteresis", False)])
def test_micro_batches_of_a_step_share_a_position_where_its_moments_are_used(part, shared):
    """The mean of several draws would have a smaller root mean square than the one that states are scaled by."""
    method = Igu(IguOptions("published", **{part: 0.1 if part == "hysteresis" else True}))
    steps = [{method.position(0, step, micro_batch) for micro_batch in range(8)} for step in range(20)]
    assert {len(positions) == 1 for positions in steps} == {shared}
    assert len(set.union(*steps)) > 8


def test_the_output_does_not_change_when_shrinkage_ends():
    model, triplets, components = triplet_model()
    scatter(triplets)
    shrinkage = Igu(MENDED).shrinkage
    position = triplets.position
    position.strength = shrinkage.strength
    position.leave()
    with torch.no_grad():
        before = model(**batch()).logits
    saved = triplets.plain(model.state_dict())
    rescale_lambda(components, shrinkage)
    position.strength = 1.0
    position.leave()
    with torch.no_grad():
        after = model(**batch()).logits
    assert torch.allclose(before, after, atol=1e-6)
    again = triplets.plain(model.state_dict())
    assert all(torch.allclose(saved[key], again[key], rtol=1e-6) for key in saved)
    position.strength = 1.0 / shrinkage.strength
    position.leave()
    with torch.no_grad():
        assert not torch.allclose(model(**batch()).logits, after, atol=1e-4), "the adapter matters"


@pytest.mark.parametrize("mended", [True, False])
def test_updates_do_not_jump_when_shrinkage_ends(mended):
    """Steady gradients times a^3, then those of the full position, where lambda is smaller by the strength or not."""
    _, triplets, _ = triplet_model()
    kinds = triplets.modules[0].parameters()
    parameters = list(kinds.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    components = Components(triplets, UnpartitionedEngine(optimizer=optimizer))
    method = Igu(MENDED)
    before = []
    for step in range(1500):
        position = (1 + 7 * step % 20) / 20  # every node of the default's 20 equally often, in a mixed order
        before = [*before[-499:], moved(optimizer, parameters, [position**3] * 3)]
    steady = torch.tensor(before).mean(0)
    after = [1.0] * 3
    if mended:
        rescale_lambda(components, method.shrinkage)
        after = [1.0 if kind == "lambda" else method.shrinkage.strength for kind in kinds]
    updates = torch.tensor([moved(optimizer, parameters, after) for _ in range(40)])
    largest = float((updates / steady).max())
    # On its own the mean of the gradient over its root mean square rises from E a^3 / (E a^6)^0.5 to 1.
    rise = method.shrinkage.gradient_rms / method.shrinkage.mean
    assert rise == pytest.approx(1.49, abs=0.01)
    assert largest < 1.03 * rise if mended else largest > 1.5 * rise


def moved(optimizer, parameters, gradients):
    """Step with one gradient on all elements of a parameter; return the mean size of each parameter's update."""
    old = [p.detach().clone() for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return [float((p.detach() - o).abs().mean()) for p, o in zip(parameters, old, strict=True)]


# -- returns ---------------------------------------------------------------------------------------------------------
def test_others_replace_components_in_use_only_if_they_are_better_by_the_hysteresis():
    on = [[True, False, False]]
    for other, winner in ((1.05, 0), (1.15, 1)):
        scores = favour_used([[1.0, other, 0.1]], on, 0.1, used_first=False)
        assert keep_components(scores, Bounds([1], 1, [0], [3])) == [[i == winner for i in range(3)]]
    assert favour_used([[1.0, 2.0, 3.0]], on, 0.0, used_first=False) == [[1.0, 2.0, 3.0]]


def test_what_was_removed_fills_only_what_components_in_use_leave():
    """Costs 3 and 2: of a budget of 8, all in use cost 7 or leave room for the best of the others."""
    assert Igu(IguOptions()).return_rule.used_first
    on, scores = [[True, True, False], [True, False, False]], [[1e-9, 2e-9, 5.0], [3e-9, 0.5, 0.7]]
    compared = favour_used(scores, on, 0.0, used_first=True)
    assert keep_components(compared, Bounds([3, 2], 8, [0, 0], [3, 3])) == on
    assert keep_components(compared, Bounds([3, 2], 7, [0, 0], [3, 3])) == [[False, True, False], [True, False, True]]
    with pytest.raises(ValueError, match="not finite"):
        keep_components(favour_used([[1.0, math.nan]], [[True, False]], 0.0, True), Bounds([1], 1, [0], [2]))


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-150, 1e8])
def test_the_order_of_what_was_removed_does_not_depend_on_the_size_of_scores(scale):
    scores = [[scale * score for score in (3e-17, 1e-17, 2e-17, 5e-17)]]
    compared = favour_used(scores, [[False, True, False, False]], 0.0, used_first=True)
    assert sorted(range(4), key=lambda index: -compared[0][index]) == [1, 3, 0, 2]


def test_a_component_that_comes_back_starts_from_lambda_zero_and_without_momentum():
    model, triplets, _ = triplet_model()
    scatter(triplets)
    optimizer = torch.optim.AdamW([p for m in triplets.modules for p in m.parameters().values()], lr=0.1)
    components = Components(triplets, UnpartitionedEngine(optimizer=optimizer))
    for _ in stream(triplets, 3):
        components.update(Igu(IguOptions()), None)
        optimizer.step()
    fresh = [[False] * 4 for _ in triplets.masks]
    fresh[2][1] = fresh[7][3] = True
    triplets.mask([[not flag for flag in row] for row in fresh])
    with torch.no_grad():
        before = model(**batch()).logits
    old = [module.a.lambda_r.detach().clone() for module in triplets.modules]
    others = [module.p.detach().clone() for module in triplets.modules]
    reset_lambda(components, fresh)
    triplets.mask([[True] * 4 for _ in fresh])
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before), "no effect on the output"
    for module, was, p, row in zip(triplets.modules, old, others, fresh, strict=True):
        flags = torch.tensor(row)
        assert (module.a.lambda_r[flags] == 0).all()
        assert torch.equal(module.a.lambda_r[~flags], was[~flags])
        assert torch.equal(module.p, p)
        assert (optimizer.state[module.a.lambda_r]["exp_avg"][flags] == 0).all()
