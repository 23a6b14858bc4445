"""Cuts by singular values: against brute force, monotone, and within the budget."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.errors import InfeasibleBudgetError
from llamafactory_adaptive.ranks.component_cuts import AdapterSpectrum, ModuleSpectrum
from llamafactory_adaptive.ranks.module_groups import packed_groups
from llamafactory_adaptive.ranks.plan import ModuleShape


def spectrum(*modules, min_rank=1):
    """Modules as (d_in + d_out, singular values)."""
    return AdapterSpectrum(
        tuple(
            ModuleSpectrum(ModuleShape(f"layers.{index}.up_proj", 1, cost - 1), len(values), tuple(values))
            for index, (cost, values) in enumerate(modules)
        ),
        min_rank,
    )


values = st.lists(st.floats(0.01, 10), min_size=1, max_size=4).map(lambda row: sorted(row, reverse=True))
spectra = st.builds(
    lambda modules, least: spectrum(*modules, min_rank=least),
    st.lists(st.tuples(st.integers(2, 7), values), min_size=1, max_size=4), st.integers(0, 2),
)  # fmt: skip


@given(adapter=spectra)
def test_a_larger_budget_never_keeps_less_and_none_is_exceeded(adapter):
    kept = []
    for budget in range(adapter.least, adapter.parameters + 1):
        cut = adapter.cut(budget)
        left = budget - cut.parameters
        assert left >= 0
        assert all(left < cost for rank, one, cost in zip(cut.ranks, adapter.modules, adapter.costs, strict=True)
                   if rank < one.used)  # fmt: skip
        assert all(rank >= low for rank, low in zip(cut.ranks, adapter.lower, strict=True))
        kept.append(cut.kept_share)
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(kept))
    assert kept[-1] == pytest.approx(1.0)


@given(adapter=spectra, share=st.floats(0.05, 1.0))
def test_the_budget_for_an_energy_is_the_smallest_of_all(adapter, share):
    budgets = range(adapter.least, adapter.parameters + 1)
    allowed = (1 - share) * adapter.energy
    found = adapter.cut_to_energy(share)
    assert found.budget == next(b for b in budgets if adapter.cut(b).lost <= allowed * (1 + 1e-12) + 1e-300)
    assert found.parameters <= found.budget
    assert found.kept_share >= share - 1e-9


@given(rows=st.lists(values, min_size=1, max_size=3), ranks=st.integers(1, 6))
def test_at_equal_costs_no_other_choice_keeps_more(rows, ranks):
    """Brute force over all ranks of the modules."""
    adapter = spectrum(*((5, row) for row in rows), min_rank=0)
    budget = min(ranks, sum(map(len, rows))) * 5
    choices = itertools.product(*(range(len(row) + 1) for row in rows))
    best = max(sum(v * v for row, r in zip(rows, choice, strict=True) for v in row[:r])
               for choice in choices if 5 * sum(choice) <= budget)  # fmt: skip
    assert adapter.cut(budget).kept_share == pytest.approx(best / adapter.energy)


def packed(*modules, min_rank=0):
    """Modules as (name, d_in + d_out, singular values)."""
    return AdapterSpectrum(
        tuple(
            ModuleSpectrum(ModuleShape(name, 1, cost - 1), len(values), tuple(values))
            for name, cost, values in modules
        ),
        min_rank,
    )


def whole(cut):
    """Tell whether of each packed group all modules have a rank or none has."""
    groups = packed_groups([one.shape.name for one in cut.spectra])
    return all(len({bool(cut.ranks[index]) for index in group}) == 1 for group in groups)


def test_what_servers_keep_packed_is_kept_whole_or_not_at_all():
    """By energy per parameter q, then o and then q again would be kept: of q, k and v the first alone."""
    adapter = packed(
        ("l.q_proj", 4, [4.0, 3.0]), ("l.k_proj", 2, [0.0]), ("l.v_proj", 2, [0.1]), ("l.o_proj", 4, [3.2, 0.1])
    )
    assert adapter.least == 4
    assert adapter.cut(4).ranks == (0, 0, 0, 1), "q alone would be more, and has no place without k and v"
    assert adapter.cut(12).ranks == (1, 1, 1, 1)
    assert adapter.cut(16).ranks == (2, 1, 1, 1)
    assert adapter.cut_to_energy(1.0).ranks == (2, 1, 1, 2)
    lowest = packed(*((one.shape.name, 4, one.values) for one in adapter.modules), min_rank=1)
    assert lowest.cut(16).ranks == (1, 1, 1, 1)


kinds = st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj"]), min_size=1, max_size=4, unique=True)
rows = st.lists(st.tuples(st.integers(2, 7), values), min_size=4, max_size=4)
one_layer = st.builds(lambda names, rows: list(zip(names, rows, strict=False)), kinds, rows)
packed_spectra = st.lists(one_layer, min_size=1, max_size=2).map(
    lambda layers: packed(*((f"{number}.{name}", *row) for number, layer in enumerate(layers) for name, row in layer))
)


@given(adapter=packed_spectra, share=st.floats(0.05, 1.0))
def test_every_budget_is_kept_and_no_group_is_cut_in_two(adapter, share):
    for budget in range(adapter.least, adapter.parameters + 1):
        cut = adapter.cut(budget)
        assert whole(cut)
        assert any(cut.ranks)
        assert cut.parameters <= budget
    for parameters, lost in adapter.path:
        assert adapter.cut(parameters).lost == pytest.approx(lost, abs=1e-9)
    found = adapter.cut_to_energy(share)
    assert whole(found)
    assert found.kept_share >= share - 1e-9


def test_wide_modules_pay_more_for_a_component():
    adapter = spectrum((10, [3.0, 2.0]), (2, [1.5, 1.4]), min_rank=0)
    assert adapter.cut(4).ranks == (0, 2)  # 2.25 / 2 and 1.96 / 2 against 9 / 10
    assert adapter.cut(14).ranks == (1, 2)
    assert adapter.cut(14).kept_by_type() == {"up_proj": pytest.approx((9 + 2.25 + 1.96) / (13 + 4.21))}


def test_components_that_are_zero_are_left_out_but_for_the_lowest_rank():
    adapter = spectrum((2, [1.0, 0.0, 0.0]), (2, [0.0, 0.0]))
    assert adapter.cut(10).ranks == (1, 1)
    assert adapter.cut_to_energy(1.0).ranks == (1, 1)
    assert spectrum((2, [1.0, 0.0]), (2, [0.0]), min_rank=0).cut(6).ranks == (1, 0)


def test_the_smallest_budget_holds_a_component_that_is_not_zero():
    adapter = spectrum((2, [0.0]), (6, [1.0, 0.5]), min_rank=0)
    assert adapter.least == 6
    assert adapter.cut(adapter.least).ranks == (0, 1)
    assert adapter.budgets(3)[-1] == 6
    group = packed(("l.q_proj", 4, [1.0]), ("l.k_proj", 2, [0.0]), ("l.v_proj", 2, [0.0]), ("l.o_proj", 2, [0.0]))
    assert (group.least, group.cut(8).ranks) == (8, (1, 1, 1, 0))


def test_budgets_fall_geometrically_from_the_whole_adapter():
    adapter = spectrum((10, [1.0] * 64), (30, [1.0] * 64))
    assert adapter.budgets(5) == [2560, 1280, 640, 320, 160]
    assert adapter.uniform(4) == 160
    low = spectrum((10, [1.0, 1.0]), (30, [1.0, 1.0]))
    assert low.budgets(5)[0] == 80
    assert low.budgets(5)[-1] == low.least == 40
    assert spectrum((10, [1.0])).budgets(5) == [10]


def test_the_knee_keeps_what_is_above_the_average():
    adapter = spectrum((2, [4.0, 3.0, 0.5, 0.4]), (2, [2.0, 0.3]), min_rank=0)
    average = adapter.energy / adapter.parameters
    assert adapter.knee().ranks == tuple(
        sum(v * v / 2 > average for v in row) for row in ([4.0, 3.0, 0.5, 0.4], [2.0, 0.3])
    )


def test_lowest_ranks_that_cost_too_much_are_refused():
    with pytest.raises(InfeasibleBudgetError, match="the lowest ranks alone cost 8"):
        spectrum((3, [1.0]), (5, [1.0])).cut(7)


def test_little_singular_values_beside_large_ones_are_not_rounded_off():
    adapter = spectrum((2, [1e8, 1e-3, 1e-4]))
    assert adapter.cut(4).lost == pytest.approx(1e-8)
    assert math.isclose(adapter.cut_to_energy(1.0).lost, 0.0)
    assert adapter.cut_to_energy(1.0).ranks == (3,)
