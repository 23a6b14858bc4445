"""TsqLoRA: sensitivities, ranks that grow and shrink, components that come back, contradicting options."""

import math

import bitsandbytes
import pytest
import torch
from dynamic import batch, scatter, stream, triplet_model
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.ranks.allocation import Bounds, allocate, reallocate_components
from llamafactory_adaptive.ranks.schedule import ReallocationConfig, make_schedule
from llamafactory_adaptive.training.components import Components


# -- sensitivities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensitivity", ["weight_gradient", "fisher"])
def test_component_scores_are_means_over_an_interval_of_elements_in_use(sensitivity):
    _, triplets, components = triplet_model(initial_lambda=None)
    masks = [[(i + j) % 3 != 0 for j in range(4)] for i in range(len(triplets.modules))]
    triplets.mask(masks)
    method = Tsq(TsqOptions(sensitivity=sensitivity))
    seen = {}
    for step, _ in enumerate(stream(triplets, 5)):
        for index, module in enumerate(triplets.modules):
            for kind, p in module.parameters().items():
                s = (p.data * p.grad).abs() if sensitivity == "weight_gradient" else p.grad.square()
                seen.setdefault((index, kind), []).append(s)
        components.update(method, None)
        if step == 2:
            method.allocated()
    means = {key: sum(parts[3:]) / 2 for key, parts in seen.items()}  # the last interval's two steps
    found = components.scores(method, mean=True)
    for index in range(len(triplets.modules)):
        on = torch.tensor(masks[index])
        elements = torch.cat([means[index, "P"][:, on].flatten(), means[index, "Q"][on].flatten()])
        used = [score for score, flag in zip(found[index], masks[index], strict=True) if flag]
        assert sum(used) / len(used) == pytest.approx(float(elements.mean()), rel=1e-5)


def test_one_noisy_batch_before_a_refresh_does_not_move_ranks():
    """An interval of 50 steps with a last batch whose gradients are 5 times as large in one module."""
    ranks = []
    for noise in (1.0, 5.0):
        _, triplets, components = triplet_model(initial_lambda=None)
        method = Tsq(TsqOptions())
        for step, _ in enumerate(stream(triplets, 50)):
            if step == 49:
                for p in triplets.modules[3].parameters().values():
                    p.grad.mul_(noise)
            components.update(method, None)
        n = len(triplets.modules)
        scores = components.scores(method, mean=True)
        kept = reallocate_components(
            [sum(row) for row in scores], scores, triplets.masks, Bounds([1] * n, 2 * n, [1] * n, [4] * n)
        )
        ranks.append([sum(row) for row in kept])
    assert ranks[0] == ranks[1]


# -- ranks -----------------------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.lists(st.floats(0, 1e6), min_size=6, max_size=6), min_size=1, max_size=6),
    data=st.data(),
)
def test_reallocation_keeps_the_budget_the_best_and_the_shares(scores, data):
    n = len(scores)
    sensitivities = data.draw(st.lists(st.floats(0, 1e6), min_size=n, max_size=n))
    costs = data.draw(st.lists(st.integers(1, 50), min_size=n, max_size=n))
    on = [[index < data.draw(st.integers(1, 6)) for index in range(6)] for _ in range(n)]
    on = [[flag or index == 0 for index, flag in enumerate(row)] for row in on]
    budget = 3 * sum(costs)
    bounds = Bounds(costs, budget, [1] * n, [6] * n)
    kept = reallocate_components(sensitivities, scores, on, bounds)
    assert tuple(sum(row) for row in kept) == allocate(sensitivities, bounds).ranks
    spent = sum(cost * sum(row) for cost, row in zip(costs, kept, strict=True))
    open_costs = [cost for cost, row in zip(costs, kept, strict=True) if sum(row) < 6]
    assert 0 <= budget - spent < min(open_costs, default=math.inf)
    for row, before, after in zip(scores, on, kept, strict=True):
        stay = [row[i] for i in range(6) if before[i] and after[i]]
        go = [row[i] for i in range(6) if before[i] and not after[i]]
        assert not (stay and go) or min(stay) >= max(go), "the best stay"
        assert not (go and any(not b and a for b, a in zip(before, after, strict=True))), "grown or shrunk, not both"


def test_refreshes_come_at_equal_distances_and_never_at_the_very_end():
    plan = make_schedule(ReallocationConfig(32, 0.25, 0.85, 0), 100, 800, 800)
    assert [t for t in range(101) if plan.due(t)] == [25, 50, 75]
    assert plan.is_final(75)
    assert not plan.is_final(74)
    assert plan.budget(0) == plan.budget(100) == 800
    assert [t for t in range(13) if make_schedule(ReallocationConfig(32, 0.25, 0.85, 0), 12, 8, 8).due(t)] == [3, 6, 9]
    assert make_schedule(ReallocationConfig(32, 0.5, 0.85, 0), 1, 8, 8).due(1), "even one step ends with an allocation"


# -- components that come back ---------------------------------------------------------------------------------------


def grown(model, triplets, components):
    """One component of two modules goes off and comes back; returns what was fresh."""
    off = [list(row) for row in triplets.masks]
    off[0][1] = off[5][3] = off[5][0] = False
    fresh = [[not flag for flag in row] for row in off]
    triplets.mask(off)
    with torch.no_grad():
        before = model(**batch()).logits
    components.restart(fresh, seed=4)
    triplets.mask([[True] * 4 for _ in off])
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before), "no effect on the output"
    return fresh


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
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
        components.restart([[True] * 4 for _ in triplets.masks], 0)


def test_without_lambda_the_live_form_is_plain_lora_from_its_usual_start(tmp_path):
    import peft
    from tiny import tiny_model

    model, triplets, _ = triplet_model(initial_lambda=None)
    assert not any("lambda" in name for name, _ in model.named_parameters())
    for module in triplets.modules:
        assert (module.p == 0).all()
        bound = module.q.shape[1] ** -0.5
        assert 0.5 * bound < module.q.abs().max() <= bound
    scatter(triplets)
    triplets.mask([[i != 2 for i in range(4)] for _ in triplets.modules])
    with torch.no_grad():
        live = model(**batch()).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(peft.PeftModel.from_pretrained(tiny_model(), tmp_path)(**batch()).logits, live)


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


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, []),
        ({"phi": "quality"}, []),
        ({"sampling": False, "reallocation": False}, ["tsq_sampling"]),
        ({"sampling": False, "phi": "quality"}, ["tsq_phi"]),
        ({"reallocation": False, "phi": "quality"}, ["tsq_phi"]),
        ({"norm_weight": 0.0, "loss_drop_weight": 0.0}, ["tsq_norm_weight"]),
        ({"temperature": 5.0, "clip_quantile": 0.5, "sampling": False}, ["tsq_temperature", "tsq_clip_quantile"]),
        ({"sensitivity": "fisher", "beta": 0.1, "reallocation": False}, ["tsq_sensitivity", "tsq_beta"]),
        ({"projection": 0}, ["tsq_projection"]),
        ({"projection": 0, "alignment_weight": 1.0}, []),
        ({"step_size": 0.1}, ["tsq_step_size"]),
        ({"clip_term": "gradient_norm"}, ["tsq_clip_term"]),
        ({"clip_term": "gradient_norm", "clip_quantile": 0.9}, []),
    ],
)
def test_options_that_contradict_each_other(options, keys):
    assert [problem.key for problem in TsqOptions(**options).check()] == keys
