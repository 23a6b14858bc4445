"""The budget over steps, and the choice of components, against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.errors import InfeasibleBudgetError
from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.ranks.schedule import PruningConfig, Schedule, make_schedule


def pruning(warmup=0.1, final=0.3, interval=10):
    return PruningConfig(16, warmup, final, interval, None, 0)


def test_the_cubic_budget_at_steps_worked_out_by_hand():
    plan = make_schedule(pruning(), 100, 1600, 800)
    assert (plan.begin, plan.end) == (10, 70)
    assert [plan.budget(t) for t in (0, 10, 40, 70, 100)] == [1600, 1600, 900, 800, 800]  # (1/2)^3 of 800 is 100
    assert [t for t in range(101) if plan.due(t)] == [20, 30, 40, 50, 60, 70]
    assert [plan.is_final(t) for t in (69, 70, 71)] == [False, True, True]


@given(
    total=st.integers(1, 5000),
    warmup=st.floats(0, 0.6),
    final=st.floats(0, 0.39),
    interval=st.integers(1, 50),
    start=st.integers(10, 10**6),
)
def test_the_budget_only_falls_and_there_is_always_one_final_allocation(total, warmup, final, interval, start):
    plan = make_schedule(pruning(warmup, final, interval), total, start, start // 2)
    budgets = [plan.budget(t) for t in range(total + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == start or plan.begin == 0
    assert 0 <= plan.begin < plan.end <= total
    assert plan.due(plan.end)
    assert plan.budget(plan.end) == start // 2
    assert not any(plan.due(t) for t in range(plan.end + 1, total + 1))


def test_ratios_of_max_steps_scale():
    short, long = (make_schedule(pruning(), n, 10**6, 10**5) for n in (100, 1000))
    assert all(short.budget(t) == long.budget(10 * t) for t in range(101))


def test_a_step_is_judged_by_whole_numbers():
    assert Schedule(0, 3, 1, 10**18 + 7, 7).budget(2) == 7 + 10**18 // 27


modules = st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=3), min_size=1, max_size=3)


@given(scores=modules, data=st.data())
def test_kept_components_are_the_greedy_choice_and_use_the_budget_up(scores, data):
    costs = [data.draw(st.integers(1, 7)) for _ in scores]
    lower = [data.draw(st.integers(0, len(row))) for row in scores]
    upper = [data.draw(st.integers(low, len(row))) for low, row in zip(lower, scores, strict=True)]
    least = sum(low * cost for low, cost in zip(lower, costs, strict=True))
    budget = least + data.draw(st.integers(0, 30))
    keep = keep_components(scores, Bounds(costs, budget, lower, upper))
    ranks = [sum(row) for row in keep]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert left >= 0
    assert all(low <= rank <= high for low, rank, high in zip(lower, ranks, upper, strict=True))
    assert all(costs[m] > left for m in range(len(scores)) if ranks[m] < upper[m])
    for row, flags in zip(scores, keep, strict=True):  # within a module never a worse one before a better one
        on, off = ([s for s, f in zip(row, flags, strict=True) if f is want] for want in (True, False))
        assert not on or not off or min(on) >= max(off)


@given(scores=modules, budget=st.integers(1, 9))
def test_at_equal_costs_the_sum_of_scores_is_the_largest_possible(scores, budget):
    """Brute force over all subsets."""
    flat = [s for row in scores for s in row]
    budget = min(budget, len(flat))
    keep = keep_components(scores, Bounds([1] * len(scores), budget, [0] * len(scores), [len(row) for row in scores]))
    found = sum(s for row, flags in zip(scores, keep, strict=True) for s, f in zip(row, flags, strict=True) if f)
    best = max(sum(chosen) for chosen in itertools.combinations(flat, budget))
    assert found == pytest.approx(best)


def test_ties_go_by_module_order():
    keep = keep_components([[1.0, 1.0], [1.0, 1.0]], Bounds([1, 1], 3, [0, 0], [2, 2]))
    assert keep == [[True, True], [True, False]]


def test_bounds_above_the_budget_and_nan_are_named():
    with pytest.raises(InfeasibleBudgetError, match="the lowest ranks alone cost 4, the budget is 3"):
        keep_components([[1.0, 2.0]], Bounds([2], 3, [2], [2]))
    with pytest.raises(ValueError, match="module 1 has a component whose score is not finite"):
        keep_components([[1.0], [float("nan")]], Bounds([1, 1], 2, [0, 0], [1, 1]))
