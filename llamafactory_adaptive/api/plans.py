"""Rank plans computed from scores of modules."""

from dataclasses import dataclass, fields
from typing import Any

from llamafactory_adaptive.api.scoring import ModuleScores
from llamafactory_adaptive.api.settings import budget_settings, common_settings, python_errors
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import refuse, refuse_all
from llamafactory_adaptive.planning.cache import PlanRequest
from llamafactory_adaptive.planning.planner import allocate_plan
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.tables import rank_table


@dataclass(frozen=True)
class PrintablePlan(RankPlan):
    """A rank plan that can be printed as a table: ``print(plan.table())``."""

    @classmethod
    def from_plan(cls, plan: RankPlan) -> "PrintablePlan":
        """Copy a plan, unchanged, into a printable one."""
        return cls(**{field.name: getattr(plan, field.name) for field in fields(RankPlan)})

    def table(self) -> str:
        """Format the rank per layer and module type, a line per type, and the cost against uniform LoRA."""
        return rank_table(self)


def plan_ranks(
    scores: ModuleScores,
    lora_rank: int = 8,
    lora_alpha: int | None = None,
    budget_unit: str = "params",
    min_rank: int = 1,
    max_rank: int | None = None,
    granularity: str = "module",
) -> PrintablePlan:
    """Compute one rank per module from scores, at no more than the cost of a uniform LoRA of rank ``lora_rank``.

    Args:
        scores: scores from :func:`score_modules`.
        lora_rank: the budget, as the rank of a uniform LoRA.
        lora_alpha: alpha of that uniform LoRA (default: 2 x ``lora_rank``); every module gets the same alpha/r.
        budget_unit: ``"params"`` counts trainable parameters, ``"ranks"`` the sum of ranks.
        min_rank: lowest rank of a module; 0 lets a module go without an adapter.
        max_rank: highest rank of a module (default: 4 x ``lora_rank``).
        granularity: modules that share one score, the mean of their own by cost: ``"module"`` for none, ``"type"`` for
            all of a type, ``"layer"`` for all of a layer.

    Returns:
        A RankPlan. ``plan.ranks()`` gives module name to rank, ``plan.table()`` text to print, ``plan.budget()`` the
        cost in parameters and ranks; ``plan.save(path)`` writes what ``adaptive_plan: <path>`` of a YAML reads.

    Raises:
        AdaptiveConfigError: an argument is out of range, or bounds and budget do not fit each other.
        InfeasibleBudgetError: the lowest ranks alone cost more than the budget.
    """
    if not isinstance(scores, ModuleScores):
        remedy = "scores=score_modules(model, batches)"
        refuse("scores", type(scores).__name__, "they must come from score_modules", remedy)
    bounds = {"budget_unit": budget_unit, "min_rank": min_rank, "max_rank": max_rank}
    common, faults = common_settings(scores.method, **bounds, granularity=granularity)
    rank, alpha, high, more = budget_settings(scores.method, lora_rank, lora_alpha, common)
    refuse_all(*faults, *more)
    facts: dict[str, Any] = dict(scores.facts)
    calibration = CalibrationConfig(None, facts["calibration_samples"], facts["calibration_batch_size"], scores.seed)
    config = AdaptiveConfig.from_checked(common, scores.method, scores.options, (rank, alpha, high), calibration)
    identity = {"rows": facts["calibration_rows_sha256"], "base_model": facts["base_model"]}
    request = PlanRequest(config, identity, facts)
    with python_errors(scores.method):
        return PrintablePlan.from_plan(allocate_plan(request, list(scores.shapes), scores.score(rank), {}))
