"""Rank plans that tests of several rooms use."""

from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.planning.cache import PlanRequest
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan


def make_plan(ranks=(3, 5), **more):
    modules = tuple(
        ModulePlan(f"model.layers.{i}.mlp.up_proj", 10, 20, rank, 0.5, 0.5, {"trace": 1.5})
        for i, rank in enumerate(ranks)
    )
    fields = {"method": "sensitivity", "options": {"metric": "both"}, "budget_unit": "params", "lora_rank": 4,
              "lora_alpha": 8.0, "modules": modules, "provenance": {"seed": 1}}  # fmt: skip
    return RankPlan(**{**fields, **more})


def found_plan():
    """Four modules of two layers, one of which is left without an adapter."""
    modules = tuple(
        ModulePlan(f"model.layers.{layer}.mlp.{kind}", 8, 16, rank=rank)
        for layer, kind, rank in ((0, "up_proj", 2), (0, "down_proj", 6), (1, "up_proj", 4), (1, "down_proj", 0))
    )
    return RankPlan("igu", {}, "params", 4, 8.0, modules)


def plan_request(method="sensitivity", **more):
    """A request for a plan at a budget of rank 4; ``more`` are fields of the configuration."""
    bounds = {"min_rank": 1, "max_rank": 16, **more}
    config = AdaptiveConfig(method, {}, "params", 4, 8.0, bounds.pop("min_rank"), bounds.pop("max_rank"), None,
                            CalibrationConfig(None, 8, 2, 3), **bounds)  # fmt: skip
    return PlanRequest(config, {"model": "m"}, {"base_model": "m"})
