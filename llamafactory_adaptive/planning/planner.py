"""From a request to a plan: measure (or re-use), score, allocate. Independent of the host program.

The host passes the target modules, what identifies model and data, and a function that runs a measurement in a process
of its own; everything else is decided here.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import CalibrationError, InfeasibleBudgetError, first_of, refuse
from llamafactory_adaptive.files import usable_entry
from llamafactory_adaptive.methods import Scores, ScoringContext, StaticMethod, make_method
from llamafactory_adaptive.planning.cache import (
    PlanRequest,
    keep_statistics,
    read_statistics,
    statistics_path,
)
from llamafactory_adaptive.ranks.allocation import Allocation, Bounds, spend_rest
from llamafactory_adaptive.ranks.module_groups import allocate_whole_groups, group_name, packed_groups, pool_scores
from llamafactory_adaptive.ranks.module_names import is_routed_expert, module_type
from llamafactory_adaptive.ranks.plan import (
    ASKED_ALPHA,
    GRANULARITY,
    ModulePlan,
    ModuleShape,
    RankPlan,
    plan_from_allocation,
)


# Runs a measurement where the model is, writing one tensor per module to the path as safetensors; the path lies in an
# empty folder, for this measurement alone.
Measure = Callable[[Measurement, Path], None]


def build_plan(request: PlanRequest, shapes: list[ModuleShape], measure: Measure) -> RankPlan:
    """Score the target modules and allocate ranks to them.

    Args:
        request: the configuration and what identifies model and data.
        shapes: target modules in model order.
        measure: called only when the method measures and no cached statistics fit.

    Raises:
        InfeasibleBudgetError: the rank bounds leave no allocation within the budget.
        CalibrationError: the measurement failed, or a statistic or score is not finite.
    """
    config, started = request.config, time.perf_counter()
    _spend(config, shapes, [1.0] * len(shapes))  # bounds that cannot hold are found before anything is measured
    method: StaticMethod = make_method(config.method, config.options)
    measurement = method.measurement()
    statistics: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if measurement is not None:
        path = statistics_path(request, measurement)
        facts["statistics_reused"] = usable_entry(path)
        if facts["statistics_reused"]:
            statistics, measured = read_statistics(path, shapes)
        else:
            with TemporaryDirectory(prefix="adaptive-") as scratch:
                measure(measurement, fresh := Path(scratch) / path.name)
                statistics, measured = read_statistics(fresh, shapes)
                keep_statistics(fresh, path)
        facts |= measured
    scores = method.score(statistics, ScoringContext(tuple(shapes), config.lora_rank, config.calibration.seed))
    facts["planning_seconds"] = round(time.perf_counter() - started, 2)
    return allocate_plan(request, shapes, scores, facts)


def start_plan(config: AdaptiveConfig, shapes: list[ModuleShape], provenance: Mapping[str, Any]) -> RankPlan:
    """Build the live plan that a dynamic method starts from, without model or data: equal on every process.

    Raises:
        AdaptiveConfigError: the method needs gradients of single samples, which some module does not have.
        InfeasibleBudgetError: the rank bounds leave no allocation within the budget for these modules.
    """
    assert config.search is not None
    _check_single_samples(config, shapes)
    _spend(config, shapes, [1.0] * len(shapes))
    modules = tuple(
        ModulePlan(
            shape.name,
            shape.in_features,
            shape.out_features,
            rank=min(config.search.live_rank, config.max_rank, shape.largest_rank),
        )
        for shape in shapes
    )
    facts = {**provenance, **_bounds(config), "course": asdict(config.search)}  # the name in plan files
    if config.asked_alpha is not None:
        facts[ASKED_ALPHA] = config.asked_alpha
    return RankPlan(modules=modules, provenance=facts, **_header(config))


def _check_single_samples(config: AdaptiveConfig, shapes: list[ModuleShape]) -> None:
    """Refuse routed experts where gradients of single samples are needed: they read tokens of all samples mixed."""
    traits = make_method(config.method, config.options).traits
    routed = [shape.name for shape in shapes if is_routed_expert(shape.name)]
    if not routed or not (traits.samples or traits.sample_moment):
        return
    others = sorted({module_type(shape.name) for shape in shapes} - {module_type(name) for name in routed})
    refuse(
        "lora_target",
        first_of(routed, ", ", 1),
        f"{config.method} takes gradients of single samples, and a routed expert reads tokens of all samples mixed",
        f"lora_target: {','.join(others)}" if others else "adaptive_method: igu",
    )


def _header(config: AdaptiveConfig) -> dict[str, Any]:
    """Return the fields of a plan that record the configuration it was made for."""
    return {
        "method": config.method,
        "options": dict(config.options),
        "budget_unit": config.budget_unit,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
    }


def _bounds(config: AdaptiveConfig) -> dict[str, Any]:
    return {"bounds": {"adaptive_min_rank": config.min_rank, "adaptive_max_rank": config.max_rank}}


def allocate_plan(
    request: PlanRequest, shapes: list[ModuleShape], scores: Scores, facts: Mapping[str, Any]
) -> RankPlan:
    """Allocate ranks for the scores under the configured budget and bounds, and record where they came from.

    Raises:
        CalibrationError: a score is NaN or infinite.
        InfeasibleBudgetError: modules of score 0 are to keep their lowest rank, and the others cannot hold the budget.
    """
    config = request.config
    wrong = [name for name, score in scores.values.items() if not math.isfinite(score)]
    if wrong:
        raise CalibrationError(
            f"{config.method} gave no finite score for {first_of(wrong, most=1)}: no ranks follow from that"
        )
    scores = _pool(config, shapes, scores)
    try:
        allocation = _spend(config, shapes, [scores.values[s.name] for s in shapes], bool(scores.zeros_stay))
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(f"{error}{scores.zeros_stay and f'; or {scores.zeros_stay}'}") from error
    return plan_from_allocation(
        shapes,
        scores.values,
        scores.metrics,
        allocation,
        **_header(config),
        provenance={
            **request.provenance,
            **facts,
            **_bounds(config),
            **({} if config.granularity == "module" else {GRANULARITY: config.granularity}),
            "calibration": asdict(config.calibration),
            "request_digest": request.digest(),
        },
    )


def _pool(config: AdaptiveConfig, shapes: list[ModuleShape], scores: Scores) -> Scores:
    """Give all modules of a group one score, and keep their own as a metric."""
    if config.granularity == "module":
        return scores
    names = [shape.name for shape in shapes]
    costs = [shape.cost(config.budget_unit) for shape in shapes]
    groups = [group_name(name, config.granularity) for name in names]
    pooled = pool_scores([scores.values[name] for name in names], costs, groups)
    metrics = {**scores.metrics, "own_score": scores.values}
    return replace(scores, values=dict(zip(names, pooled, strict=True)), metrics=metrics)


def _spend(
    config: AdaptiveConfig, shapes: list[ModuleShape], scores: list[float], zeros_stay: bool = False
) -> Allocation:
    costs = [shape.cost(config.budget_unit) for shape in shapes]
    upper = [min(config.max_rank, shape.largest_rank) for shape in shapes]
    lower = [min(config.min_rank, high) for high in upper]
    bounds = Bounds(costs, config.lora_rank * sum(costs), lower, upper)
    packed = packed_groups([shape.name for shape in shapes])
    if zeros_stay:
        stay = [high if score else low for score, low, high in zip(scores, lower, upper, strict=True)]
        allocation = allocate_whole_groups(scores, replace(bounds, upper=stay), packed)
        return spend_rest(allocation, bounds, [index for index, score in enumerate(scores) if not score])
    return allocate_whole_groups(scores, bounds, packed)
