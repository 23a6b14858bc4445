"""Pooled scores keep a group's share of the budget; packed modules are adapted together or not at all."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_adaptive.ranks.allocation import Bounds, allocate, water_fill
from llamafactory_adaptive.ranks.module_groups import allocate_whole_groups, group_name, packed_groups, pool_scores


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.3.mlp.up_proj", "up_proj", "model.layers.3"),
        ("model.layers.3.mlp.experts.7.up_proj", "up_proj", "model.layers.3"),
        ("model.visual.blocks.3.mlp.up_proj", "up_proj", "model.visual.blocks.3"),
        ("h.0.c_attn", "c_attn", "h.0"),
        ("0.proj", "proj", "0"),
        ("model.score", "score", "model.score"),
        ("model.w2.layers.10.fc", "fc", "model.w2.layers.10"),
    ],
)
def test_a_group_is_the_type_or_the_layer_of_one_tower(name, kind, layer):
    assert (group_name(name, "type"), group_name(name, "layer")) == (kind, layer)
    assert group_name(name, "module") == name


def test_pooling_keeps_what_each_group_had_of_the_budget():
    scores, costs, groups = [3.0, 1.0, 5.0, 0.0], [10, 30, 20, 20], ["a", "a", "b", "b"]
    pooled = pool_scores(scores, costs, groups)
    assert pooled == [1.5, 1.5, 2.5, 2.5], "means weighted by cost, by hand"
    free = Bounds(costs, 240, [0] * 4, [1000] * 4)
    spent = [[rank * cost for rank, cost in zip(water_fill(each, free, 240), costs, strict=True)]
             for each in (scores, pooled)]  # fmt: skip
    for members in ((0, 1), (2, 3)):
        assert sum(spent[1][i] for i in members) == pytest.approx(sum(spent[0][i] for i in members))


@given(st.lists(st.floats(0.0, 1e6), min_size=12, max_size=12), st.integers(1, 6), st.sampled_from(("type", "layer")))
@settings(max_examples=100, deadline=None)
def test_ranks_of_a_group_of_like_modules_differ_by_one_at_most(scores, lora_rank, granularity):
    names = [f"m.layers.{layer}.{kind}" for layer in range(4) for kind in ("q", "o", "up")]
    groups = [group_name(name, granularity) for name in names]
    pooled = pool_scores(scores, [7] * 12, groups)
    ranks = allocate(pooled, Bounds([7] * 12, 7 * 12 * lora_rank, [1] * 12, [4 * lora_rank] * 12)).ranks
    assert sum(ranks) == 12 * lora_rank
    for group in set(groups):
        theirs = [rank for rank, mine in zip(ranks, groups, strict=True) if mine == group]
        assert max(theirs) - min(theirs) <= 1


def test_packed_modules_are_siblings_of_the_kinds_that_servers_pack():
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in ("attn.q_proj", "attn.v_proj", "attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    hybrid = [f"m.linear_attn.in_proj_{kind}" for kind in ("qkv", "z", "b", "a")]
    found = packed_groups([*names, *hybrid, "other.mlp.up_proj"])
    assert found == [[0, 1], [3, 4], [6, 7], [9, 10], [12, 13], [14, 15]]


def _halves(ranks, packed):
    return [group for group in packed if len({ranks[i] > 0 for i in group}) > 1]


PACKED = [[0, 1, 2], [3, 4]]


@given(
    st.lists(st.sampled_from((0.0, 1e-9, 0.1, 1.0, 50.0)), min_size=6, max_size=6),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_no_group_is_half_adapted_and_the_budget_holds(scores, costs, lora_rank):
    bounds = Bounds(costs, lora_rank * sum(costs), [0] * 6, [8] * 6)
    found = allocate_whole_groups(scores, bounds, PACKED)
    assert not _halves(found.ranks, PACKED)
    assert found.spent == bounds.cost(found.ranks) <= bounds.budget
    addable = [cost for cost, rank in zip(costs, found.ranks, strict=True) if rank < 8]
    assert not addable or bounds.budget - found.spent < min(addable)


def test_only_the_members_that_lack_a_rank_get_one():
    bounds = Bounds([1] * 6, 12, [0] * 6, [12] * 6)
    found = allocate_whole_groups([1, 0, 0, 0, 0, 0], bounds, PACKED)
    assert found.ranks == (10, 1, 1, 0, 0, 0)


def test_groups_that_are_whole_are_left_alone():
    bounds = Bounds([1] * 6, 12, [0] * 6, [12] * 6)
    for scores in itertools.product((0.0, 1.0), repeat=6):
        plain = allocate(scores, bounds)
        found = allocate_whole_groups(scores, bounds, PACKED)
        assert (found == plain) == (not _halves(plain.ranks, PACKED))
