"""Packed modules keep components together or not at all, and what they keep is worth its cost."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.ranks.module_groups import half_adapted
from llamafactory_adaptive.ranks.whole_groups import in_order, keep_whole_groups, steps_of, units_of


PACKED, HIGHEST = [[0, 1, 2], [3, 4]], 3
COMPONENTS = st.lists(
    st.lists(st.sampled_from((-0.9, -1e-9, 0.0, 1e-30, 0.5, 1.0, 3.0, 7.0)), min_size=HIGHEST, max_size=HIGHEST),
    min_size=6, max_size=6,
)  # fmt: skip
COSTS = st.lists(st.integers(1, 9), min_size=6, max_size=6)


def chosen(scores, bounds):
    keep = keep_whole_groups(scores, bounds, PACKED)
    return keep, [sum(row) for row in keep]


@given(COMPONENTS, COSTS, st.integers(1, 2), st.integers(0, 1))
@settings(max_examples=300, deadline=None)
def test_no_group_is_half_adapted_and_the_budget_is_spent(scores, costs, lora_rank, least):
    bounds = Bounds(costs, lora_rank * sum(costs), [least] * 6, [HIGHEST] * 6)
    keep, ranks = chosen(scores, bounds)
    assert not half_adapted(ranks, PACKED)
    left = bounds.budget - bounds.cost(ranks)
    begun = {index for group in units_of(6, PACKED) if any(ranks[index] for index in group) for index in group}
    addable = [costs[index] for index in range(6) if ranks[index] < HIGHEST and (index in begun or index == 5)]
    closed = [sum(costs[index] for index in group) for group in PACKED if not any(ranks[index] for index in group)]
    assert 0 <= left < min([*addable, *closed], default=math.inf)
    assert min(ranks) >= least
    plain = keep_components(scores, bounds)
    if not half_adapted([sum(row) for row in plain], PACKED):
        assert keep == plain
    for row, kept in zip(scores, keep, strict=True):  # of each module the best
        mine = sorted((score for score, on in zip(row, kept, strict=True) if on), reverse=True)
        assert mine == sorted(row, reverse=True)[: sum(kept)]


POSITIVE = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=6, max_size=6)


@given(POSITIVE, COSTS)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_worth_as_much_as_can_be_had_but_for_what_does_not_fit(scores, costs):
    """Against every choice there is: what is taken by worth per cost lacks at most the one that did not fit."""
    bounds = Bounds(costs, sum(costs), [0] * 6, [2] * 6)
    best = [sorted(row, reverse=True) for row in scores]

    def worth(ranks):
        return sum(sum(row[:rank]) * cost for row, rank, cost in zip(best, ranks, costs, strict=True))

    possible = [
        ranks
        for ranks in itertools.product(range(3), repeat=6)
        if bounds.cost(ranks) <= bounds.budget and not half_adapted(ranks, PACKED)
    ]
    worths = [[score * cost for score in row] for row, cost in zip(best, costs, strict=True)]
    units = [steps_of(unit, each, worths, costs) for unit, each in enumerate(units_of(6, PACKED))]
    largest = max(sum(step.worth for step in steps) for steps in in_order(units))
    assert worth(chosen(scores, bounds)[1]) >= max(map(worth, possible)) - largest


@pytest.mark.parametrize(
    ("of_v", "others", "ranks"),
    [
        # with q and k a mean of (0.1 + 0.1 + 6.5) / 3 = 2.2: for its cost of three, 8, 7 and 1 can be had
        ([6.5, 0.0], [9.0, 8.0, 7.0, 1.0], [0, 0, 0, 4]),
        # a mean of 10.2, above all others
        ([30.5, 0.0], [9.0, 8.0, 7.0, 1.0], [1, 1, 1, 1]),
        # of 6.9, and of 11.2 with the second of v, which cannot be had without the first of all three
        ([20.5, 24.0], [9.0, 8.0, 7.0, 1.0], [1, 1, 2, 0]),
    ],
)
def test_a_group_is_weighed_as_a_whole(of_v, others, ranks):
    scores, bounds = [[0.1, 0.0], [0.0, 0.1], of_v, others], Bounds([1] * 4, 4, [0] * 4, [4] * 4)
    assert [sum(row) for row in keep_components(scores, bounds)][:2] == [0, 0], "v alone is among the best"
    keep = keep_whole_groups(scores, bounds, [[0, 1, 2]])
    assert [sum(row) for row in keep] == ranks
    assert keep[1] == ([False, True] if ranks[1] else [False, False])
