"""ElaLoRA: pruning and expansion against brute force, the budget at every exchange, and components that are new."""

import itertools
import math

import numpy as np
import pytest
import torch

from llamafactory_adaptive import rank_search
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError
from llamafactory_adaptive.methods.elalora import Elalora, ElaloraOptions
from llamafactory_adaptive.ranks.allocation import Bounds
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.ranks.search_config import ExchangeConfig
from llamafactory_adaptive.training.component_resets import begin_new
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.rank_search import RankSearchState
from tests.helpers import reference
from tests.helpers.dynamic import batch, scatter, stream, triplet_model
from tests.helpers.searches import trainer_of
from tests.helpers.tiny import tiny_model


def method(**options):
    return Elalora(ElaloraOptions(**options))


def searching(**more):
    return rank_search(tiny_model(), "elalora", lora_rank=2, **more)


def ranks_of(masks):
    return [sum(row) for row in masks]


def none_of(used):
    """No component that is new."""
    return [[False] * len(row) for row in used]


# -- what is chosen --------------------------------------------------------------------------------------------------
def of_every_choice(candidates, places, count, best):
    """The choice of ``count`` candidates, at most ``places`` of each module, whose scores have the best sum."""
    allowed = [
        chosen
        for chosen in itertools.combinations(candidates, count)
        if all(sum(module == m for _, m, _ in chosen) <= free for module, free in enumerate(places))
    ]
    return best(allowed, key=lambda chosen: sum(score for score, *_ in chosen))


@pytest.mark.parametrize("seed", range(12))
def test_what_is_pruned_and_expanded_is_the_best_of_all_choices(seed):
    """Five modules, ranks in units: b components with the least sum go, and the b most needed come."""
    rng = np.random.default_rng(seed)
    ranks, upper, lower, k, b = rng.integers(1, 5, 5), rng.integers(4, 7, 5), rng.integers(1, 3, 5), 2, 2
    lower = np.minimum(lower, ranks)
    used = [
        rng.permutation([True] * rank + [False] * (high - rank)).tolist()
        for rank, high in zip(ranks, upper, strict=True)
    ]
    scores = [rng.exponential(size=high).tolist() for high in upper]
    candidates = [
        (scores[m][i], m, i)
        for m, row in enumerate(used)
        for i in sorted((i for i, on in enumerate(row) if on), key=lambda i: scores[m][i])[:k]
    ]
    gone = of_every_choice(candidates, ranks - lower, b, min)
    after_pruning = ranks - [sum(m == module for _, m, _ in gone) for module in range(5)]
    grown = of_every_choice(candidates, upper - after_pruning, b, max)
    expected = after_pruning + [sum(m == module for _, m, _ in grown) for module in range(5)]

    bounds = Bounds([1] * 5, int(ranks.sum()), lower.tolist(), upper.tolist())
    masks = method(exchanged_ranks=b, candidates=k).exchange(scores, used, none_of(used), bounds, 0.0)
    assert ranks_of(masks) == expected.tolist()
    for module, (row, before) in enumerate(zip(masks, used, strict=True)):
        lost = {i for i, (new, old) in enumerate(zip(row, before, strict=True)) if old and not new}
        assert lost <= {i for _, m, i in gone if m == module}
        assert not lost or expected[module] < ranks[module], "a module that is reached again gets its own back"


def test_an_exchange_by_hand():
    scores = [[5.0, 1.0, 9.0, 0.0], [4.0, 3.0, 2.0, 0.0], [8.0, 0.0, 0.0, 0.0]]
    used = [[True, True, True, False], [True, True, True, False], [True, False, False, False]]
    bounds = Bounds([1, 1, 1], 7, [1, 1, 1], [4, 4, 4])
    # Put up: 1 and 5, 2 and 3, and 8 of the module with one component, which can grow but not shrink.
    for b, expected in ((1, [2, 3, 2]), (2, [3, 2, 2])):
        assert ranks_of(method(exchanged_ranks=b).exchange(scores, used, none_of(used), bounds, 0.0)) == expected
    both = method(exchanged_ranks=2).exchange(scores, used, none_of(used), bounds, 0.0)
    assert both[0] == used[0], "1 was pruned, then its module was the second to be expanded, for its 5"
    assert both[1:] == [[True, True, False, False], [True, True, False, False]]
    full = Bounds([1, 1, 1], 7, [1, 1, 1], [3, 3, 1])
    assert ranks_of(method().exchange(scores, used, none_of(used), full, 0.0)) == [3, 3, 1], (
        "no module can take what would be freed"
    )
    assert method().exchange(scores, used, none_of(used), bounds, 1.0) == used, "ranks are final"


def test_the_number_of_ranks_falls_as_the_authors_schedule_does():
    halves = [(progress, round(4 * (1 - progress**3))) for progress in (0.0, 0.25, 0.5, 0.6, 0.75, 0.9)]
    for progress, expected in [*halves, (1.0, 0)]:
        assert method(exchanged_ranks=4)._count(10, progress) == expected
    assert [method(exchanged_ranks=4, decay="none")._count(10, p) for p in (0.0, 0.99, 1.0)] == [4, 4, 0]
    assert [method()._count(modules, 0.0) for modules in (1, 72, 210)] == [1, 4, 12]


@pytest.mark.parametrize("unit", ["params", "ranks"])
def test_the_budget_is_spent_at_every_exchange(unit):
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (10, 10), (7, 30), (30, 7), (6, 6), (40, 2)]
    modules = tuple(ModulePlan(f"m{i}", *shape, rank=min(6, *shape)) for i, shape in enumerate(shapes))
    config = AdaptiveConfig("elalora", {}, unit, 2, 4.0, 1, 6, None, CalibrationConfig(None, 1, 1, 0),
                            ExchangeConfig(6, 0.1, 0.3, 1, 0))  # fmt: skip
    state = RankSearchState(RankPlan("elalora", {}, unit, 2, 4.0, modules), config)
    masks, elalora, seen = state.first_masks(), method(exchanged_ranks=3), set()
    for step in range(60):
        scores = [(rng.exponential(size=m.rank) * (1 + 3 * (i == step // 20))).tolist() for i, m in enumerate(modules)]
        before = masks
        masks = state.choose(step, scores, state.final_budget, before,
                             exchange=lambda *given: elalora.exchange(*given, progress=0.0))  # fmt: skip
        left = state.final_budget - state.cost(masks)
        free = [c for c, m, row in zip(state.costs, modules, masks, strict=True) if 0 < sum(row) < min(6, m.rank)]
        assert 0 <= left < min(free)
        assert unit == "params" or left == 0
        assert all(1 <= rank <= high for rank, high in zip(ranks_of(masks), state.bounds.upper, strict=True))
        assert state.fresh == [[new and not old for old, new in zip(*rows, strict=True)] for rows in
                               zip(before, masks, strict=True)]  # fmt: skip
        seen.add(tuple(ranks_of(masks)))
    assert len(seen) > 10


def test_a_choice_out_of_bounds_and_scores_that_are_no_numbers_end_the_run():
    modules = (ModulePlan("a", 5, 5, rank=3), ModulePlan("b", 5, 5, rank=3))
    config = AdaptiveConfig("x", {}, "ranks", 2, 4.0, 1, 3, None, CalibrationConfig(None, 1, 1, 0),
                            ExchangeConfig(3, 0.1, 0.3, 1, 0))  # fmt: skip
    state, on = RankSearchState(RankPlan("x", {}, "ranks", 2, 4.0, modules), config), [[True, True, False]] * 2
    for wrong in ([[True] * 3] * 2, [[False] * 3, [True] * 3]):
        with pytest.raises(GuardError, match=r"out of bounds, or above the budget of 4: \["):
            state.choose(1, [[1.0] * 3] * 2, 4, on, exchange=lambda *given, wrong=wrong: wrong)
    with pytest.raises(GuardError, match=r"step 1: module 1 .* not finite; training has diverged"):
        state.choose(1, [[1.0] * 3, [1.0, math.nan, 1.0]], 4, on, exchange=lambda *given: on)


# -- components that are new -----------------------------------------------------------------------------------------
def test_new_directions_have_length_1_and_are_orthogonal_to_all_others():
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(5, 9, generator=generator)
    kept[4] = kept[3] + 1e-3 * kept[4]  # nearly the same
    for rows, count in ((kept, 2), (kept, 4), (10 * kept[:1], 8)):
        new = method().new_directions(rows, count, generator)
        assert new.dtype == torch.float32
        assert torch.allclose(new @ new.T, torch.eye(count), atol=1e-5)
        assert float((new @ (rows / rows.norm(dim=1, keepdim=True)).T).abs().max()) < 1e-5
    first, again = (method().new_directions(kept, 2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_new_component_has_no_effect_no_past_and_no_score():
    model, triplets, _ = triplet_model()
    optimizer = torch.optim.AdamW([p for m in triplets.modules for p in m.parameters().values()], lr=0.1)
    components, elalora = Components(triplets, UnpartitionedEngine(optimizer=optimizer)), method()
    used = [[True, True, index % 2 == 0, False] for index in range(len(triplets.modules))]
    triplets.mask(used)
    for _ in stream(triplets, 3):
        components.update(elalora, None)
        optimizer.step()
    scatter(triplets)
    after = [list(row) for row in used]
    after[1][0], after[1][2], after[1][3], after[4][3] = False, True, True, True
    fresh = [[new and not old for old, new in zip(*rows, strict=True)] for rows in zip(used, after, strict=True)]
    kept = [[new and old for old, new in zip(*rows, strict=True)] for rows in zip(used, after, strict=True)]
    old = {id(p): p.detach().clone() for p in components.parameters}
    squares = {id(p): optimizer.state[p]["exp_avg_sq"].clone() for p in components.parameters}
    begin_new(components, after, fresh, elalora, seed=7)
    with torch.no_grad():
        triplets.mask(kept)
        without = model(**batch()).logits
        triplets.mask(after)
        assert torch.equal(model(**batch()).logits, without), "no effect on the output"
    for index, module in enumerate(triplets.modules):
        new = torch.tensor(fresh[index])
        for kind, p in module.parameters().items():
            x, was, momenta, square, old_square = (
                each.mT if kind == "P" else each
                for each in (p.detach(), old[id(p)], optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"],
                             squares[id(p)])
            )  # fmt: skip
            assert torch.equal(x[~new], was[~new])
            assert torch.equal(square[~new], old_square[~new])
            if new.any():
                assert not bool(momenta[new].any())
                mean = old_square[torch.tensor(used[index])].mean()
                assert torch.allclose(square[new], mean.expand_as(square[new]), rtol=1e-5)
            if kind == "lambda":
                assert not bool(x[new].any())
            elif new.any():
                assert torch.allclose(x[new].norm(dim=1), torch.ones(int(new.sum())))
                others = x[torch.tensor(after[index]) & ~new]
                assert float((x[new] @ others.T).abs().max()) < 1e-5
    scores = components.scores(elalora)
    zero = [[score == 0 for score in row] for row in scores]
    assert all(flag for row, news in zip(zero, fresh, strict=True) for flag, new in zip(row, news, strict=True) if new)

    seen = {}  # from here on it is scored as if nothing had been before
    for _ in stream(triplets, 4, seed=5):
        module = triplets.modules[4]
        for kind, p in module.parameters().items():
            seen.setdefault(kind, []).append((p.data * p.grad).abs().double().numpy())
        components.update(elalora, None)
    parts = (np.prod(reference.smoothed(seen[kind]), axis=0) for kind in ("lambda", "P", "Q"))
    assert components.scores(elalora)[4][3] == pytest.approx(reference.component_scores(*parts)[3], rel=1e-4)


def test_what_came_at_the_last_exchange_is_not_put_up_at_the_next():
    scores, used = [[5.0, 2.0, 0.0], [4.0, 3.0, 0.1]], [[True, True, False], [True, True, True]]
    bounds, fresh = Bounds([1, 1], 5, [1, 1], [3, 3]), [[False] * 3, [False, False, True]]
    elalora = method(exchanged_ranks=1, candidates=1)
    assert elalora.exchange(scores, used, none_of(used), bounds, 0.0) == [[True, True, True], [True, True, False]]
    # of the others the one of module 0 is the least, and module 1, whose least is still much needed, is full
    assert elalora.exchange(scores, used, fresh, bounds, 0.0) == used


# -- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_exchanges_ranks_under_one_budget_and_leaves_plain_lora(tmp_path):
    search = searching(interval=1, exchanged_ranks=4, warmup_ratio=0.2)
    trainer = trainer_of(search, tmp_path, max_steps=10)
    trainer.train()
    trainer.save_model()
    plan, history = search.finalize(tmp_path), search.callback.bound.search.state.history
    assert [entry["step"] for entry in history] == [3, 4, 5, 6, 7]
    asked = {entry["budget_asked"] for entry in history}
    cheapest = min(module.parameters_per_rank for module in plan.modules)
    assert len(asked) == 1
    assert all(0 <= entry["budget_asked"] - entry["budget_used"] < cheapest for entry in history)
    assert history[-1]["ranks"] == history[-2]["ranks"], "none are exchanged where ranks become final"
    ranks = plan.ranks()
    assert len(set(ranks.values())) > 1
    assert list(ranks.values()) == history[-1]["ranks"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"init_rank": 4}, r"init_rank: 4 is invalid: method='elalora' starts at the ranks of the budget"),
        ({"min_rank": 0}, r"min_rank: 0 is invalid: a module without components .* never come back; try min_rank=1"),
        ({"max_rank": 2}, r"max_rank: 2 is invalid: all modules start at lora_rank \(2\), and none could grow"),
        ({"warmup_ratio": 0.8}, r"with final_ratio 0.3 it leaves no step to exchange ranks in"),
        ({"max_overhead": 0.1}, "makes extra passes"),
    ],
)
def test_settings_that_leave_nothing_to_exchange_are_refused(wrong, said):
    with pytest.raises(AdaptiveConfigError, match=said):
        searching(**wrong)
