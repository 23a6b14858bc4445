"""From a request to a plan: measure (or re-use), score, allocate. Knows no host program.

The host hands in the target modules, what identifies model and data, and a way to run a measurement in a process of
its own; everything else is decided here.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamafactory_adaptive.allocate import allocate
from llamafactory_adaptive.calibration import Measurement
from llamafactory_adaptive.config import AdaptiveConfig, CalibrationError, PlanError
from llamafactory_adaptive.methods import Scores, ScoringContext, StaticMethod
from llamafactory_adaptive.plan import (
    SCHEMA_VERSION,
    ModuleShape,
    RankPlan,
    digest_of,
    load_plan,
    plan_from_allocation,
)
from llamafactory_adaptive.registry import get_method


CACHE_ENV = "LLAMAFACTORY_ADAPTIVE_CACHE"


def cache_folder() -> Path:
    """Where statistics and plans are re-used from: ``$LLAMAFACTORY_ADAPTIVE_CACHE`` or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llamafactory_adaptive"
    return Path(os.environ.get(CACHE_ENV, default))


@dataclass(frozen=True)
class PlanRequest:
    """What one run wants a plan for.

    Attributes:
        config: the validated configuration.
        identity: everything that determines the statistics (model, data, precision, versions), JSON-able.
        provenance: what a reader of the plan wants to know of it.
    """

    config: AdaptiveConfig
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def digest(self) -> str:
        """Names the plan in the cache: equal requests share one plan."""
        return digest_of({"identity": self.identity, "config": asdict(self.config), "schema": SCHEMA_VERSION})

    def plan_path(self) -> Path:
        """Where the plan of this request is kept."""
        return cache_folder() / "plans" / f"{self.digest()}.json"


# Runs a measurement where the model is, writing one tensor per module to the path as safetensors.
Measure = Callable[[Measurement, Path], None]


def make_method(config: AdaptiveConfig) -> StaticMethod:
    """The configured method with its options."""
    method = get_method(config.method)
    made: StaticMethod = method(method.Options(**config.options))
    return made


def build_plan(request: PlanRequest, shapes: list[ModuleShape], measure: Measure) -> RankPlan:
    """Score and allocate.

    Args:
        request: the configuration and what identifies model and data.
        shapes: target modules in model order.
        measure: called only when the method measures and no cached statistics fit.

    Raises:
        InfeasibleBudgetError, CalibrationError: see there.
    """
    config, started = request.config, time.perf_counter()
    method = make_method(config)
    measurement = method.measurement()
    statistics: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if measurement is not None:
        path = statistics_path(request, measurement)
        facts["statistics_reused"] = path.exists()
        if not path.exists():
            measure(measurement, path)
        statistics, measured = read_statistics(path, shapes)
        facts |= measured
    scores = method.score(statistics, ScoringContext(tuple(shapes), config.lora_rank, config.calibration.seed))
    facts["planning_seconds"] = round(time.perf_counter() - started, 2)
    return allocate_plan(request, shapes, scores, facts)


def allocate_plan(
    request: PlanRequest, shapes: list[ModuleShape], scores: Scores, facts: Mapping[str, Any]
) -> RankPlan:
    """Ranks for the scores under the configured budget and bounds, with where they came from."""
    config = request.config
    costs = [shape.cost(config.budget_unit) for shape in shapes]
    upper = [min(config.max_rank, shape.largest_rank) for shape in shapes]
    allocation = allocate(
        scores=[scores.values[shape.name] for shape in shapes],
        costs=costs,
        budget=config.lora_rank * sum(costs),
        lower=[min(config.min_rank, high) for high in upper],
        upper=upper,
    )
    return plan_from_allocation(
        shapes,
        scores.values,
        scores.metrics,
        allocation,
        method=config.method,
        options=dict(config.options),
        budget_unit=config.budget_unit,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        provenance={
            **request.provenance,
            **facts,
            "bounds": {"adaptive_min_rank": config.min_rank, "adaptive_max_rank": config.max_rank},
            "calibration": asdict(config.calibration),
            "request_digest": request.digest(),
        },
    )


def statistics_path(request: PlanRequest, measurement: Measurement) -> Path:
    """Cache file of a measurement. The batch size is no part of it: it must not change the result."""
    calibration = {key: value for key, value in asdict(request.config.calibration).items() if key != "batch_size"}
    key = digest_of({"identity": request.identity, "calibration": calibration, "measurement": measurement.key})
    return cache_folder() / "statistics" / f"{key}.safetensors"


def read_statistics(path: Path, shapes: list[ModuleShape]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load cached statistics of the target modules, and the facts noted with them."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {shape.name: file.get_tensor(shape.name) for shape in shapes}
            facts = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"the statistics in {path} do not fit this model ({error}); delete the file") from error
    return tensors, {
        "calibration_tokens": int(facts.get("tokens", 0)),
        "calibration_samples": int(facts.get("samples", 0)),
        "calibration_rows_sha256": facts.get("rows_sha256", ""),
        "calibration_seconds": float(facts.get("seconds", 0.0)),
    }


def check_plan(plan: RankPlan, shapes: list[ModuleShape], config: AdaptiveConfig, source: str) -> RankPlan:
    """Accept a given plan for this model and budget, or say where it differs.

    The plan's ranks are used as they are; budget and scale are this run's, so a plan edited by hand is judged against
    what the YAML allows.

    Raises:
        PlanError: another model, or more than the budget.
    """
    differences = plan.differences(shapes)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise PlanError(f"{source} does not fit the model: " + "; ".join(differences[:3]) + more)
    order = {shape.name: index for index, shape in enumerate(shapes)}
    plan = RankPlan(
        method=plan.method,
        options=plan.options,
        budget_unit=config.budget_unit,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        modules=tuple(sorted(plan.modules, key=lambda module: order[module.name])),
        provenance={**plan.provenance, "plan": source},
    )
    budget, kind = plan.budget(), "parameters" if config.budget_unit == "params" else "ranks"
    asked, used = budget[f"asked_{kind}"], budget[f"used_{kind}"]
    if used > asked:
        raise PlanError(
            f"{source} costs {used:,} {kind}, the budget of lora_rank {config.lora_rank} is {asked:,}: "
            f"{used - asked:,} too many; lower ranks in the plan or set "
            f"lora_rank: {-(-used * config.lora_rank // asked)}"
        )
    return plan


def check_same_run(plan: RankPlan, config: AdaptiveConfig, source: str) -> None:
    """Refuse to resume a run that asked for something else.

    Raises:
        PlanError: naming each difference.
    """
    asked = {
        "adaptive_method": config.method,
        "adaptive_budget_unit": config.budget_unit,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
    }
    found = {
        "adaptive_method": plan.method,
        "adaptive_budget_unit": plan.budget_unit,
        "lora_rank": plan.lora_rank,
        "lora_alpha": plan.lora_alpha,
    }
    if config.plan_path:
        del asked["adaptive_method"]
    faults = [f"{key} is {found[key]} there and {value} here" for key, value in asked.items() if found[key] != value]
    if not faults and not config.plan_path and dict(plan.options) != dict(config.options):
        changed = sorted(k for k in config.options if plan.options.get(k) != config.options[k])
        faults = [
            f"{config.method}_{key} is {plan.options.get(key)} there and {config.options[key]} here" for key in changed
        ]
    if faults:
        raise PlanError(
            f"{source} belongs to another run: " + "; ".join(faults) + "; change them back or use another output_dir"
        )


def wait_for_plan(path: Path, seconds: float) -> RankPlan:
    """Other processes of the job wait here until the planning one has renamed its file into place.

    Raises:
        PlanError: the time limit passed.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise PlanError(f"no plan appeared within {seconds:g} s (ddp_timeout): see the messages of rank 0")
        time.sleep(0.2)
    return load_plan(path)
