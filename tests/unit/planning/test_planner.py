"""Scores to a plan: what is measured when, and what is refused before anything is."""

import dataclasses

import pytest

from llamafactory_adaptive.errors import AdaptiveConfigError, CalibrationError, InfeasibleBudgetError
from llamafactory_adaptive.methods import Scores
from llamafactory_adaptive.planning.planner import allocate_plan, build_plan, start_plan
from llamafactory_adaptive.ranks.allocation import Bounds, allocate
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.ranks.search_config import PruningConfig, ReallocationConfig
from tests.helpers.plans import plan_request


SHAPES = [ModuleShape("a", 10, 30), ModuleShape("b", 5, 5), ModuleShape("c", 100, 2)]


def unmeasured(*_):
    raise AssertionError("measured")


def test_bounds_that_cannot_hold_are_found_before_anything_is_measured():
    with pytest.raises(InfeasibleBudgetError):
        build_plan(plan_request(min_rank=9), SHAPES, unmeasured)


def test_ranks_are_the_allocation_of_the_scores_within_bounds_that_the_modules_allow():
    scores = {"a": 1.0, "b": 4.0, "c": 2.5}
    plan = allocate_plan(plan_request(), SHAPES, Scores(scores, {"theta": scores}), {"tokens": 5})
    expected = allocate([1.0, 4.0, 2.5], Bounds([40, 10, 102], 4 * 152, [1, 1, 1], [10, 5, 2]))
    assert tuple(plan.ranks().values()) == expected.ranks
    assert [module.metrics["theta"] for module in plan.modules] == [1.0, 4.0, 2.5]
    facts = plan.provenance
    assert facts["bounds"] == {"adaptive_min_rank": 1, "adaptive_max_rank": 16}
    assert (facts["base_model"], facts["tokens"], facts["calibration"]["seed"]) == ("m", 5, 3)


def test_a_score_that_is_no_number_is_named():
    scores = Scores({"a": 1.0, "b": float("nan"), "c": float("inf")})
    with pytest.raises(CalibrationError, match=r"sensitivity gave no finite score for b \(and 1 more\)"):
        allocate_plan(plan_request(), SHAPES, scores, {})


def test_a_search_starts_at_its_live_rank_where_bounds_and_modules_allow_it():
    search = PruningConfig(8, 0.1, 0.3, 10, None, 0)
    config = dataclasses.replace(plan_request("igu", search=search, max_rank=6).config, lora_rank=3)
    plan = start_plan(config, SHAPES, {"seed": 1})
    assert plan.ranks() == {"a": 6, "b": 5, "c": 2}
    assert plan.provenance["course"]["init_rank"] == 8, "the name in plan files"


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"sampling": False}, True),  # sensitivities over samples
        ({"sampling": False, "sensitivity_over": "step"}, False),
        ({"sensitivity_over": "step"}, True),
    ],
)
def test_routed_experts_are_refused_where_gradients_of_single_samples_are_needed(options, refused):
    experts = [ModuleShape(f"model.layers.0.mlp.experts.{i}.up_proj", 8, 8) for i in range(3)]
    shapes = [ModuleShape("model.layers.0.self_attn.q_proj", 8, 8), *experts]
    search = ReallocationConfig(8, 0.2, 0.85, 0)
    config = dataclasses.replace(plan_request("tsq", search=search).config, options=options)
    assert len(start_plan(config, shapes[:1], {}).modules) == 1
    if not refused:
        assert len(start_plan(config, shapes, {}).modules) == 4
        return
    with pytest.raises(AdaptiveConfigError) as caught:
        start_plan(config, shapes, {})
    for words in ("experts.0.up_proj (and 2 more)", "a routed expert reads", "lora_target: q_proj"):
        assert words in str(caught.value)
