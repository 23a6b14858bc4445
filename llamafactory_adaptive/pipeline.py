"""From a request to a plan: measure (or re-use), score, allocate. Knows no host program.

The host hands in the target modules, what identifies model and data, and a way to run a measurement in a process of
its own; everything else is decided here.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamafactory_adaptive.allocate import Allocation, allocate
from llamafactory_adaptive.calibration import Measurement
from llamafactory_adaptive.config import AdaptiveConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, CalibrationError, PlanError, Problem
from llamafactory_adaptive.files import digest_of, is_intact, note_checksum, usable_entry
from llamafactory_adaptive.methods import Scores, ScoringContext, StaticMethod
from llamafactory_adaptive.plan import (
    SCHEMA_VERSION,
    ModulePlan,
    ModuleShape,
    RankPlan,
    load_plan,
    plan_from_allocation,
)
from llamafactory_adaptive.registry import get_method


CACHE_ENV = "LLAMAFACTORY_ADAPTIVE_CACHE"


def cache_folder() -> Path:
    """Where statistics and plans are re-used from: ``$LLAMAFACTORY_ADAPTIVE_CACHE`` or the user's cache folder.

    Raises:
        AdaptiveConfigError: it cannot be written.
    """
    # Set to nothing is not set: files would land wherever the run was started.
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "llamafactory_adaptive")
    folder = Path(os.path.expanduser(os.environ.get(CACHE_ENV) or default))
    try:
        for part in ("plans", "statistics", "quality"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        if not os.access(folder / "plans", os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        problem = Problem(CACHE_ENV, str(folder), f"the cache cannot be written ({error})", f"{CACHE_ENV}=<folder>")
        raise AdaptiveConfigError([problem]) from error
    return folder


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
        asked = {key: value for key, value in asdict(self.config).items() if key != "max_nonfinite_steps"}
        return digest_of({"identity": self.identity, "config": asked, "schema": SCHEMA_VERSION})

    def plan_path(self) -> Path:
        """Where the plan of this request is kept."""
        return cache_folder() / "plans" / f"{self.digest()}.json"


# Runs a measurement where the model is, writing one tensor per module to the path as safetensors.
Measure = Callable[[Measurement, Path], None]


def make_method(config: AdaptiveConfig) -> Any:
    """The configured method, static or dynamic, with its options."""
    method = get_method(config.method)
    return method(method.Options(**config.options))


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
    _spend(config, shapes, [1.0] * len(shapes))  # bounds that cannot hold are found before anything is measured
    method: StaticMethod = make_method(config)
    measurement = method.measurement()
    statistics: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    if measurement is not None:
        path = statistics_path(request, measurement)
        facts["statistics_reused"] = usable_entry(path)
        if not facts["statistics_reused"]:
            measure(measurement, path)
            note_checksum(path)
        statistics, measured = read_statistics(path, shapes)
        facts |= measured
    scores = method.score(statistics, ScoringContext(tuple(shapes), config.lora_rank, config.calibration.seed))
    facts["planning_seconds"] = round(time.perf_counter() - started, 2)
    return allocate_plan(request, shapes, scores, facts)


def start_plan(config: AdaptiveConfig, shapes: list[ModuleShape], provenance: Mapping[str, Any]) -> RankPlan:
    """The live plan that a dynamic method starts from: no model, no data, equal on every process.

    Raises:
        InfeasibleBudgetError: bounds and budget do not fit each other for these modules.
    """
    assert config.course is not None
    _spend(config, shapes, [1.0] * len(shapes))
    modules = tuple(
        ModulePlan(
            shape.name,
            shape.in_features,
            shape.out_features,
            rank=min(config.course.live_rank, config.max_rank, shape.largest_rank),
        )
        for shape in shapes
    )
    facts = {**provenance, **_bounds(config), "course": asdict(config.course)}
    return RankPlan(modules=modules, provenance=facts, **_header(config))


def _header(config: AdaptiveConfig) -> dict[str, Any]:
    """What a plan says of the configuration it was made for."""
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
    """Ranks for the scores under the configured budget and bounds, with where they came from.

    Raises:
        CalibrationError: a score is no number.
    """
    config = request.config
    wrong = [name for name, score in scores.values.items() if not math.isfinite(score)]
    if wrong:
        raise CalibrationError(f"{config.method} gave no finite score for {_some(wrong)}: no ranks follow from that")
    allocation = _spend(config, shapes, [scores.values[shape.name] for shape in shapes])
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
            "calibration": asdict(config.calibration),
            "request_digest": request.digest(),
        },
    )


def _spend(config: AdaptiveConfig, shapes: list[ModuleShape], scores: list[float]) -> Allocation:
    costs = [shape.cost(config.budget_unit) for shape in shapes]
    upper = [min(config.max_rank, shape.largest_rank) for shape in shapes]
    lower = [min(config.min_rank, high) for high in upper]
    return allocate(scores, costs, config.lora_rank * sum(costs), lower, upper)


def statistics_path(request: PlanRequest, measurement: Measurement) -> Path:
    """Cache file of a measurement. The batch size is no part of it: it must not change the result."""
    calibration = {key: value for key, value in asdict(request.config.calibration).items() if key != "batch_size"}
    key = digest_of({"identity": request.identity, "calibration": calibration, "measurement": measurement.key})
    return cache_folder() / "statistics" / f"{key}.safetensors"


def read_statistics(path: Path, shapes: list[ModuleShape]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load cached statistics of the target modules, and the facts noted with them.

    Raises:
        CalibrationError: they are of other modules, or hold what is no number.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {shape.name: file.get_tensor(shape.name) for shape in shapes}
            facts = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"the statistics in {path} do not fit this model ({error}); delete the file") from error
    wrong = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise CalibrationError(
            f"the statistics in {path} hold NaN or infinity for {_some(wrong)}; delete the file and run again"
        )
    return tensors, {
        "calibration_tokens": int(facts.get("tokens", 0)),
        "calibration_samples": int(facts.get("samples", 0)),
        "calibration_rows_sha256": facts.get("rows_sha256", ""),
        "calibration_seconds": float(facts.get("seconds", 0.0)),
    }


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def cached_plan(path: Path) -> RankPlan | None:
    """Read a plan from the cache; None where there is none, or a damaged one, which is told of and set aside."""
    return load_plan(path) if usable_entry(path) else None


def keep_plan(plan: RankPlan, path: Path) -> RankPlan:
    """Write a plan into the cache; returns it as others will read it."""
    plan.write(path)
    note_checksum(path)
    return load_plan(path)


def check_shapes(plan: RankPlan, shapes: list[ModuleShape], source: str) -> None:
    """Refuse a plan of another model.

    Raises:
        PlanError: naming the first differences.
    """
    differences = plan.differences(shapes)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise PlanError(f"{source} does not fit the model: " + "; ".join(differences[:3]) + more)


def check_plan(plan: RankPlan, shapes: list[ModuleShape], config: AdaptiveConfig, source: str) -> RankPlan:
    """Accept a given plan for this model and budget, or say where it differs.

    The plan's ranks are used as they are; budget and scale are this run's, so a plan edited by hand is judged against
    what the YAML allows.

    Raises:
        PlanError: another model, or more than the budget.
    """
    check_shapes(plan, shapes, source)
    order = {shape.name: index for index, shape in enumerate(shapes)}
    plan = replace(
        plan,
        budget_unit=config.budget_unit,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        modules=tuple(sorted(plan.modules, key=lambda module: order[module.name])),
    )
    budget, kind = plan.budget(), plan.budget_kind
    asked, used = budget[f"asked_{kind}"], budget[f"used_{kind}"]
    if used > asked:
        raise PlanError(
            f"{source} costs {used:,} {kind}, the budget of lora_rank {config.lora_rank} is {asked:,}: "
            f"{used - asked:,} too many; lower ranks in the plan or set "
            f"lora_rank: {-(-used * config.lora_rank // asked)}"
        )
    return plan


def wait_for_plan(path: Path, seconds: float) -> RankPlan:
    """Other processes of the node wait here until the planning one has written its file and its checksum.

    Raises:
        CalibrationError: the time limit passed.
    """
    deadline = time.monotonic() + seconds
    while not is_intact(path):
        if time.monotonic() > deadline:
            raise CalibrationError(
                f"no plan appeared at {path} within {seconds:g} s: see the messages of the process that scores"
            )
        time.sleep(0.2)
    return load_plan(path)
