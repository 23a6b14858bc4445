"""What a step shows of rank-1 components, and components that come back."""

import math

import bitsandbytes
import numpy as np
import pytest
import torch

from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.methods import Orthogonality
from llamafactory_adaptive.methods.igu import Igu, IguOptions
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.training.component_resets import restart
from llamafactory_adaptive.training.components import Components
from tests.helpers.dynamic import batch, scatter, stream, triplet_model


@pytest.mark.parametrize("uncertainty", ["product", "mean"])
def test_factors_of_masked_components_are_not_scored_on_gradients_the_mask_made_zero(uncertainty):
    _, triplets, components = triplet_model()
    method = Igu(IguOptions(importance="off", uncertainty=uncertainty))
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
        held = old == new
        whole = len(block.modules) * math.prod(block.shape)
        assert held.numel() == (whole if uncertainty == "product" else len(block.modules) * block.rank)
        if uncertainty == "mean":
            held = block.spread(held)
        held = held.view(len(block.modules), *block.shape)
        for position, index in enumerate(block.modules):
            for component, on in enumerate(masks[index]):
                part = (
                    held[position] if block.kind == "lambda" else held[position].transpose(0, int(block.kind == "P"))
                )
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
    components.arrival.done = False
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
    for scale, results in ((1.0, plain), (1024.0, scaled)):
        _, triplets, _ = triplet_model()
        components = Components(triplets, UnpartitionedEngine(lambda scale=scale: scale))
        next(stream(triplets, 1))
        for parameter in components.parameters:
            parameter.grad.mul_(scale)
        method = Igu(IguOptions())
        components.update(method, Orthogonality(50.0, "identity"))
        results += [components.scores(method), [parameter.grad / scale for parameter in components.parameters]]
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


# -- components that come back ---------------------------------------------------------------------------------------
def grown(model, triplets, components):
    """One component of two modules goes off and comes back; returns what was fresh."""
    off = [list(row) for row in triplets.masks]
    off[0][1] = off[5][3] = off[5][0] = False
    fresh = [[not flag for flag in row] for row in off]
    triplets.mask(off)
    with torch.no_grad():
        before = model(**batch()).logits
    restart(components, fresh, seed=4)
    triplets.mask([[True] * 4 for _ in off])
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before), "no effect on the output"
    return fresh


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rmsprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adamw 8-bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.1, min_8bit_size=64),
    "lion 32-bit": lambda p: bitsandbytes.optim.Lion32bit(p, lr=0.01),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_component_that_comes_back_has_no_effect_and_no_past(name):
    model, triplets, _ = triplet_model(initial_lambda=None)
    optimizer = OPTIMIZERS[name]([p for m in triplets.modules for p in m.parameters().values()])
    components, method = Components(triplets, UnpartitionedEngine(optimizer=optimizer)), Tsq(TsqOptions())
    for _ in stream(triplets, 3):
        components.update(method, None)
        optimizer.step()
    old = {id(p): p.detach().clone() for p in components.parameters}
    moments = {id(p): {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in
               components.parameters}  # fmt: skip
    fresh = grown(model, triplets, components)
    for index, module in enumerate(triplets.modules):
        flags = torch.tensor(fresh[index])
        for kind, p in module.parameters().items():
            new, was = (x.mT if kind == "P" else x for x in (p.detach(), old[id(p)]))
            assert torch.equal(new[~flags], was[~flags])
            if kind == "P":
                assert (new[flags] == 0).all()
            elif flags.any():
                assert (new[flags].abs() <= p.shape[1] ** -0.5).all()
                assert (new[flags] != was[flags]).all()
            for key, state in optimizer.state[p].items():
                if not torch.is_tensor(state) or state.shape != p.shape:
                    continue
                table = optimizer.state[p][f"qmap{key[-1]}"] if state.dtype == torch.uint8 else None
                value = state if table is None else table[state.long()]
                value = value.mT if kind == "P" else value
                if not flags.any():
                    continue
                if key in ("exp_avg_sq", "square_avg", "state2"):
                    was = moments[id(p)][key]
                    was = was if table is None else table[was.long()]
                    used = (was.mT if kind == "P" else was)[~flags]
                    assert torch.allclose(value[flags], used.mean(), rtol=1e-4 if table is None else 0.1), key
                else:
                    assert (value[flags] == 0).all(), key
                kept, before = (x.mT if kind == "P" else x for x in (state, moments[id(p)][key]))
                assert torch.equal(kept[~flags], before[~flags])


def test_first_updates_of_a_component_that_comes_back_are_not_larger_than_those_of_others():
    """Late in a run, when Adam's correction of its first steps is long over; constant gradients of one size."""
    model, triplets, _ = triplet_model(initial_lambda=None)
    parameters = [p for m in triplets.modules for p in m.parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    components, method = Components(triplets, UnpartitionedEngine(optimizer=optimizer)), Tsq(TsqOptions())
    next(stream(triplets, 1))
    for p in parameters:
        p.grad = torch.sign(p.grad)
    for _ in range(2000):
        optimizer.step()
    components.update(method, None)
    fresh = grown(model, triplets, components)
    p, flags = triplets.modules[0].p, torch.tensor(fresh[0])
    start = p.detach().clone()
    for _ in range(20):
        optimizer.step()
    moved = (p.detach() - start).abs()
    assert moved[:, flags].max() < 1.05 * moved[:, ~flags].max()


def test_an_optimizer_that_keeps_no_state_per_weight_is_refused():
    _, triplets, _ = triplet_model(initial_lambda=None)
    parameters = [p for m in triplets.modules for p in m.parameters().values()]
    optimizer = torch.optim.Adafactor(parameters, lr=0.1)
    components, method = Components(triplets, UnpartitionedEngine(optimizer=optimizer)), Tsq(TsqOptions())
    next(stream(triplets, 1))
    components.update(method, None)
    optimizer.step()
    with pytest.raises(GuardError, match=r"optimizer's row_var is not kept per weight, .*optim: adamw_torch"):
        restart(components, [[True] * 4 for _ in triplets.masks], 0)


def test_masked_components_get_no_gradient_and_the_guard_watches_b():
    model, triplets, components = triplet_model(initial_lambda=None)
    scatter(triplets)
    triplets.mask([[i != 2 for i in range(4)] for _ in triplets.modules])
    model(**batch()).loss.backward()
    for module in triplets.modules:
        assert (module.q.grad[2] == 0).all()
        assert (module.p.grad[:, 2] == 0).all()
        assert (module.q.grad[1] != 0).any()
    triplets.modules[3].p.grad = None
    with pytest.raises(GuardError, match="no gradient arrived at 1 modules"):
        components.update(Tsq(TsqOptions()), None)


def test_what_is_only_observed_does_not_train():
    _, triplets, components = triplet_model()
    next(stream(triplets, 1))
    triplets.mask([[True, False, True, True], *triplets.masks[1:]])
    before = triplets.modules[0].a.lambda_r.grad.clone()
    components.update(None, None)
    assert triplets.modules[0].a.lambda_r.grad.tolist() == (before * torch.tensor([1.0, 0, 1, 1])).tolist()


def test_a_module_that_gets_no_gradient_is_named_where_nothing_is_observed():
    _, triplets, components = triplet_model()
    next(stream(triplets, 1))
    for parameter in triplets.modules[1].parameters().values():
        parameter.grad = None
    name = triplets.modules[1].name
    with pytest.raises(
        GuardError, match=rf"no gradient arrived at 1 modules at the first step, for example at {name}"
    ):
        components.update(None, None)


@pytest.mark.parametrize("kind", ["lambda", "P"])
def test_lambda_or_p_may_have_a_gradient_of_zero(kind):
    _, triplets, components = triplet_model()
    next(stream(triplets, 1))
    for module in triplets.modules:
        module.parameters()[kind].grad.zero_()
    components.update(None, None)


def test_a_search_that_goes_on_with_masks_does_not_look_at_what_it_does_not_observe():
    _, triplets, components = triplet_model()
    next(stream(triplets, 1))
    triplets.mask([[False] * 4, *triplets.masks[1:]])
    for parameter in triplets.modules[0].parameters().values():
        parameter.grad = None
    components.update(None, None)
    assert not components.arrival.done


def test_gradients_are_read_once_where_nothing_is_to_be_done_with_them(monkeypatch):
    _, triplets, components = triplet_model()
    reads, gradients = [], components.engine.gradients
    monkeypatch.setattr(components.engine, "gradients", lambda p: reads.append(1) or gradients(p))
    for _ in stream(triplets, 3):
        components.update(None, None)
    assert len(reads) == 1


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_scaled_states_are_those_of_scaled_gradients(name):
    """Against a twin whose gradients were half as large; halves are exact, also in 8-bit states."""
    states = []
    for size in (1.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(8, 16, generator=generator))
        optimizer = OPTIMIZERS[name]([parameter])
        for _ in range(4):
            parameter.grad = size * torch.randn(8, 16, generator=generator)
            optimizer.step()
        engine = UnpartitionedEngine(optimizer=optimizer)
        if size == 1.0:
            engine.rescale(parameter, 1.0, 0.5)
        states.append({key: dequantised(optimizer.state[parameter], key) for key in optimizer.state[parameter]})
    assert states[0].keys() == states[1].keys()
    for key, found in states[0].items():
        assert torch.allclose(found, states[1][key], rtol=1e-4, atol=1e-9), key


def dequantised(state, key):
    """A state in full; those of 8 bits are indices, times the scale of their only block."""
    held = torch.as_tensor(state[key])
    if held.dtype != torch.uint8:
        return held.float()
    return state[f"qmap{key[-1]}"][held.long()] * state[f"absmax{key[-1]}"]
