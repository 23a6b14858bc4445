"""The allocator against brute force, against a bisection, and under generated inputs."""

import itertools
import random
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamafactory_adaptive.errors import InfeasibleBudgetError
from llamafactory_adaptive.ranks.allocation import Allocation, Bounds, allocate, water_fill
from tests.helpers import reference


@st.composite
def problems(draw, positive=st.floats(1e-6, 1e6), zeros=st.just(0.0)):  # noqa: B008
    n = draw(st.integers(1, 12))
    costs = draw(st.lists(st.integers(1, 50), min_size=n, max_size=n))
    lower = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    upper = [low + draw(st.integers(0, 12)) for low in lower]
    least, most = (sum(r * c for r, c in zip(bound, costs, strict=True)) for bound in (lower, upper))
    scores = draw(st.lists(zeros | positive, min_size=n, max_size=n))
    return scores, Bounds(costs, draw(st.integers(least, most)), lower, upper)


@given(problems(st.floats(0.0, 1e6) | st.floats(0.0, 1e-290)))
@example(([0.0, 0.0, 0.0, 36056.0, 124360.5, 4.5447163373705554e-120], Bounds([1] * 6, 18, [1] * 6, [6] * 6)))
@settings(max_examples=400, deadline=None)
def test_budget_and_bounds_hold_and_what_is_left_buys_nothing(problem):
    scores, bounds = problem
    result = allocate(scores, bounds)
    spent = sum(r * c for r, c in zip(result.ranks, bounds.costs, strict=True))
    assert spent == result.spent <= bounds.budget
    assert all(low <= r <= high for low, r, high in zip(bounds.lower, result.ranks, bounds.upper, strict=True))
    addable = [c for c, r, high in zip(bounds.costs, result.ranks, bounds.upper, strict=True) if r < high]
    assert not addable or bounds.budget - spent < min(addable)


@given(problems(zeros=st.nothing()))
@settings(max_examples=200, deadline=None)
def test_water_level_matches_bisection(problem):
    scores, bounds = problem
    filled = water_fill(scores, bounds, bounds.budget)
    expected = reference.water_filled(*(np.array(x, float) for x in (scores, bounds.costs)), bounds.budget,
                                      *(np.array(x, float) for x in (bounds.lower, bounds.upper)))  # fmt: skip
    assert np.allclose(filled, expected, rtol=1e-6, atol=1e-6)


@given(problems(), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_a_constant_factor_of_the_scores_cancels(problem, factor):
    scores, bounds = problem
    ideal = allocate(scores, bounds).ideal
    scaled = allocate([s * factor for s in scores], bounds).ideal
    assert np.allclose(ideal, scaled, rtol=1e-6, atol=1e-6)


def test_five_modules_equal_the_best_of_all_compositions():
    """Largest remainder minimises the squared distance to the ideal ranks among all exact compositions."""
    rng = random.Random(3)
    for _ in range(30):
        scores, total = [rng.uniform(0.2, 3) for _ in range(5)], rng.randint(8, 14)
        result = allocate(scores, Bounds([1] * 5, total, [0] * 5, [8] * 5))

        def distance(ranks, ideal=result.ideal):
            return sum((r - x) ** 2 for r, x in zip(ranks, ideal, strict=True))

        best = min(distance(r) for r in itertools.product(range(9), repeat=5) if sum(r) == total)
        assert sum(result.ranks) == total
        assert distance(result.ranks) == pytest.approx(best, abs=1e-9)


def test_equal_scores_give_the_uniform_rank_at_any_cost():
    assert allocate([0.3] * 4, Bounds([100, 7, 35, 1], 6 * 143, [1] * 4, [24] * 4)).ranks == (6, 6, 6, 6)


def test_selected_modules_keep_their_bounds_and_the_whole_budget():
    assert Bounds([3, 4, 5], 60, [0, 1, 2], [7, 8, 9]).select([2, 0]) == Bounds([5, 3], 60, [2, 0], [9, 7])


def test_no_modules_take_no_budget():
    assert allocate([], Bounds([], 0, [], [])) == Allocation((), (), 0, 0)


def test_ties_go_by_module_order():
    assert allocate([1.0] * 4, Bounds([1] * 4, 6, [0] * 4, [4] * 4)).ranks == (2, 2, 1, 1)


def test_overflow_of_a_capped_module_goes_to_the_rest_by_their_shares():
    result = allocate([100.0, 2.0, 1.0], Bounds([1] * 3, 19, [1] * 3, [10] * 3))
    assert result.ideal == pytest.approx((10, 6, 3))


def test_zero_scores_get_the_minimum_and_the_rest_only_when_all_others_are_full():
    assert allocate([0.0, 1.0], Bounds([1, 1], 6, [0, 0], [8, 8])).ranks == (0, 6)
    assert allocate([0.0, 0.0, 1.0], Bounds([1] * 3, 24, [1] * 3, [10] * 3)).ranks == (7, 7, 10)
    # 39 less the 4 of the capped module is 35, which buys 5 ranks at 2 + 5 each.
    bounds = Bounds([2, 5, 1], 39, [1, 2, 0], [9, 9, 4])
    assert water_fill([0.0, 0.0, 1.0], bounds, 39) == pytest.approx([5.0, 5.0, 4.0])


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (2, 9, "the lowest ranks alone cost 4,000, the budget is 3,000; lower adaptive_min_rank or raise lora_rank"),
        (0, 1, "the highest ranks together cost 2,000, the budget is 3,000; raise adaptive_max_rank or lower "
               "lora_rank (no rank exceeds the smaller side of its module)"),
    ],
    ids=["lowest", "highest"],
)  # fmt: skip
def test_infeasible_bounds_name_both_numbers(low, high, said):
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate([1.0, 1.0], Bounds([1000, 1000], 3000, [low] * 2, [high] * 2))
    assert str(caught.value) == said


@pytest.mark.parametrize("short", range(4), ids=["scores", "costs", "lower", "upper"])
def test_lists_of_unlike_lengths_are_refused_and_not_cut(short):
    lists = [[1.0] * 3, [1] * 3, [0] * 3, [4] * 3]
    lists[short].pop()
    scores, costs, lower, upper = lists
    with pytest.raises(ValueError, match="zip"):
        allocate(scores, Bounds(costs, 9, lower, upper))
    with pytest.raises(ValueError, match="zip"):
        water_fill(scores, Bounds(costs, 9, lower, upper), 9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="score of module 1"):
        allocate([1.0, bad], Bounds([1, 1], 4, [1, 1], [8, 8]))


def lines_run(modules):
    """Lines of Python that allocating takes: what a clock would measure, but equal on every machine."""
    rng, count = random.Random(0), 0
    scores = [rng.lognormvariate(0, 3) for _ in range(modules)]
    costs = [rng.choice((768, 1152, 2112)) for _ in scores]

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = allocate(scores, Bounds(costs, 8 * sum(costs), [1] * modules, [32] * modules))
    finally:
        sys.settrace(before)
    assert 0 <= result.budget - result.spent < 768
    return count


def test_ten_times_the_modules_take_ten_times_the_work():
    """A model of 50,000 modules (experts, each counted) is planned in well under a second on any machine."""
    assert lines_run(5_000) < 12 * lines_run(500)
    assert lines_run(500) < 100 * 500
