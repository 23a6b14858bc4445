"""Ranks by type, by hand: weights scaled to the exact budget, and what is refused."""

from dataclasses import replace

import pytest

from llamafactory_adaptive.errors import AdaptiveConfigError, InfeasibleBudgetError
from llamafactory_adaptive.methods import Scores, ScoringContext
from llamafactory_adaptive.methods.by_type import ByType, ByTypeOptions
from llamafactory_adaptive.planning.planner import allocate_plan
from llamafactory_adaptive.ranks.plan import ModuleShape
from tests.helpers.plans import plan_request


SHAPES = [
    ModuleShape(f"m.layers.{i}.{name}", 32, 32)
    for i in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
]


def ranks(text, min_rank=1, **more):
    scores = ByType(ByTypeOptions(text)).score({}, ScoringContext(tuple(SHAPES), 4, 0))
    plan = allocate_plan(plan_request("by_type", min_rank=min_rank, **more), SHAPES, scores, {})
    assert plan.budget()["left_ranks"] == 0
    return [module.rank for module in plan.modules]


def test_numbers_are_weights_at_exactly_the_budget():
    one, three = ranks("q_proj:1, k_proj:1, o_proj:2, down_proj:4"), ranks("q_proj:3,k_proj:3,o_proj:6,down_proj:12")
    assert one == three == [2, 2, 4, 8] * 2


def test_types_left_out_keep_the_lowest_rank_or_none_unless_a_packed_sibling_has_one():
    assert ranks("down_proj:5") == [1, 1, 1, 13] * 2
    assert ranks("down_proj:5,o_proj:3", min_rank=0) == [0, 0, 6, 10] * 2
    assert ranks("q_proj:1", min_rank=0) == [15, 1, 0, 0] * 2, "k_proj gets 1"


def test_types_that_cannot_hold_the_budget_are_refused_and_the_rest_goes_only_where_an_adapter_is():
    with pytest.raises(
        InfeasibleBudgetError, match=r"raise adaptive_max_rank .*; or name more types in by_type_ranks"
    ):
        ranks("down_proj:5", min_rank=0, max_rank=15)
    wide = [replace(shape, in_features=100) if "down" in shape.name else shape for shape in SHAPES]
    scores = ByType(ByTypeOptions("down_proj:1")).score({}, ScoringContext(tuple(wide), 4, 0))
    plans = [allocate_plan(plan_request("by_type", min_rank=low), wide, scores, {}) for low in (0, 1)]
    found = [[module.rank for module in plan.modules] for plan in plans]
    assert found[0] == [0, 0, 0, 10, 0, 0, 0, 9]
    assert plans[0].budget()["left_parameters"] == 84, "a rank of q_proj has 64, one of down_proj 132"
    assert found[1] == [2, 1, 1, 8, 1, 1, 1, 8]
    assert plans[1].budget()["left_parameters"] == 2592 - 7 * 64 - 16 * 132 == 32, "less than any rank"


def test_a_type_with_a_weight_never_loses_a_rank_to_one_left_out():
    shapes = [ModuleShape("a.q_proj", 80, 80), ModuleShape("a.o_proj", 64, 64), ModuleShape("a.down_proj", 150, 150)]
    scores = ByType(ByTypeOptions("q_proj:1,down_proj:1")).score({}, ScoringContext(tuple(shapes), 8, 0))
    plan = allocate_plan(plan_request("by_type"), shapes, scores, {})
    assert [module.rank for module in plan.modules] == [6, 1, 4], "q_proj comes twice before o_proj once"
    assert plan.budget()["left_parameters"] == 2352 - 6 * 160 - 128 - 4 * 300 == 64


@pytest.mark.parametrize(
    "text", ["", "q_proj", "q_proj:", ":4", "q_proj:4,q_proj:2", "q_proj:-1", "q_proj:nan", "q_proj:4,,o:1"]
)
def test_a_text_that_is_not_types_and_numbers_is_a_problem(text):
    (problem,) = ByTypeOptions(text).check()
    assert (problem.key, problem.value) == ("by_type_ranks", text)
    assert "must be types and numbers" in problem.allowed


def test_weights_that_are_all_zero_are_a_problem():
    assert "gives every type 0" in ByTypeOptions("q_proj:0").check()[0].allowed
    assert ByTypeOptions("q_proj:4, down_proj:0.5").check() == []


def test_a_type_that_no_module_has_is_refused_with_those_that_are():
    with pytest.raises(AdaptiveConfigError, match=r"up_proj is the type of no target module; theirs are q_proj, k"):
        ranks("q_proj:1,up_proj:2")


@pytest.mark.parametrize("granularity", ["type", "layer"])
def test_any_scores_can_be_pooled_and_the_plan_tells_both(granularity):
    own = {shape.name: float(1 + index) for index, shape in enumerate(SHAPES)}
    plan = allocate_plan(plan_request(granularity=granularity), SHAPES, Scores(own), {})
    assert plan.provenance["granularity"] == granularity
    assert [module.metrics["own_score"] for module in plan.modules] == list(own.values())
    means = [3.0, 4.0, 5.0, 6.0] * 2 if granularity == "type" else [2.5] * 4 + [6.5] * 4
    assert [module.score for module in plan.modules] == means
    plain = allocate_plan(plan_request(), SHAPES, Scores(own), {})
    assert "granularity" not in plain.provenance
    assert "own_score" not in plain.modules[0].metrics
