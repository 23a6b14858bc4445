"""Which components stay, against brute force."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.errors import InfeasibleBudgetError
from llamafactory_adaptive.ranks.allocation import Bounds, allocate, keep_components, reallocate_components


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
    kept_sum = sum(s for row, flags in zip(scores, keep, strict=True) for s, f in zip(row, flags, strict=True) if f)
    best = max(sum(chosen) for chosen in itertools.combinations(flat, budget))
    assert kept_sum == pytest.approx(best)


def test_ties_go_by_module_order():
    keep = keep_components([[1.0, 1.0], [1.0, 1.0]], Bounds([1, 1], 3, [0, 0], [2, 2]))
    assert keep == [[True, True], [True, False]]


def test_bounds_above_the_budget_and_nan_are_named():
    with pytest.raises(InfeasibleBudgetError, match="the lowest ranks alone cost 4, the budget is 3"):
        keep_components([[1.0, 2.0]], Bounds([2], 3, [2], [2]))
    with pytest.raises(ValueError, match="module 1 has a component whose score is not finite"):
        keep_components([[1.0], [float("nan")]], Bounds([1, 1], 2, [0, 0], [1, 1]))


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


def test_a_module_that_grows_turns_on_the_first_that_are_off_whatever_is_left_of_their_scores():
    grown = reallocate_components([1.0], [[5.0, 1.0, 9.0]], [[True, False, False]], Bounds([1], 2, [1], [3]))
    assert grown == [[True, True, False]]


@pytest.mark.parametrize(("scores", "on"), [([[1.0], [2.0]], [[True]]), ([[1.0]], [[True], [True]])], ids=str)
def test_rows_of_other_modules_are_refused(scores, on):
    with pytest.raises(ValueError, match="zip"):
        reallocate_components([1.0], scores, on, Bounds([1], 1, [0], [1]))
