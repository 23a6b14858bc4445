"""Checks that a plan, checkpoint or adapter fits the requested run; messages name differences by YAML key."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import PlanError, first_of
from llamafactory_adaptive.ranks.plan import ModuleShape, RankPlan, load_plan


def check_shapes(plan: RankPlan, shapes: list[ModuleShape], source: str) -> None:
    """Refuse a plan whose modules are not those of the model.

    Raises:
        PlanError: modules differ; the message names the first differences.
    """
    differences = plan.differences(shapes)
    if differences:
        raise PlanError(f"{source} does not fit the model: {first_of(differences)}")


def check_plan(plan: RankPlan, shapes: list[ModuleShape], config: AdaptiveConfig, source: str) -> RankPlan:
    """Return a given plan with this run's budget and scale, or refuse it where it does not fit model or budget.

    The plan's ranks are used as they are, so a plan edited by hand is checked against what the YAML allows.

    Raises:
        PlanError: the plan is of another model, or costs more than the budget.
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


def check_same_run(plan: RankPlan, config: AdaptiveConfig, source: str) -> None:
    """Refuse to resume a run that was started with other settings of ranks.

    Raises:
        PlanError: settings differ; the message names each of them.
    """
    asked, theirs = _asked(config), _of_plan(plan)
    if config.plan_path:  # the file is what this run asks for; how it was scored says nothing about the run
        same = load_plan(Path(config.plan_path)).ranks() == plan.ranks()
        asked = {key: asked[key] for key in _SCALE_KEYS} | {"adaptive_plan": config.plan_path}
        theirs |= {"adaptive_plan": config.plan_path if same else "of other ranks"}
        sampling = plan.provenance.get("sampling")
        if sampling:  # ranks are given, but samples were still chosen by a method
            asked |= {"adaptive_method": config.method, **flat_options(config)}
            theirs |= sampling
        form, their_form = _forms(plan, config)
        asked, theirs = asked | form, theirs | their_form
    _refuse_differences(asked, theirs, source, "another output_dir")


_SCALE_KEYS = ("lora_rank", "lora_alpha", "adaptive_budget_unit")


def check_same_scale(plan: RankPlan, config: AdaptiveConfig, source: str) -> None:
    """Refuse to go on with an adapter of another budget or scale; how its ranks were found does not matter.

    Raises:
        PlanError: settings differ; the message names each of them.
    """
    asked, theirs = _asked(config), _of_plan(plan)
    _refuse_differences({key: asked[key] for key in _SCALE_KEYS}, theirs, source, "create_new_adapter: true")


def _refuse_differences(asked: Mapping[str, Any], theirs: Mapping[str, Any], source: str, remedy: str) -> None:
    faults = [
        f"{key} is {theirs.get(key)} there and {value} here"
        for key, value in asked.items()
        if theirs.get(key) != value
    ]
    if faults:
        raise PlanError(
            f"{source} belongs to another run: " + "; ".join(faults) + f"; change them back or use {remedy}"
        )


def _asked(config: AdaptiveConfig) -> dict[str, Any]:
    """Collect the settings that determine a run's ranks, by YAML key."""
    return {
        "adaptive_method": config.method,
        "adaptive_budget_unit": config.budget_unit,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "adaptive_plan": config.plan_path,
        "adaptive_min_rank": config.min_rank,
        "adaptive_max_rank": config.max_rank,
        **_search(config),
        **flat_options(config),
    }


def flat_options(config: AdaptiveConfig) -> dict[str, Any]:
    """Return the method's options by YAML key."""
    return {f"{config.method}_{key}": value for key, value in config.options.items()}


def _forms(plan: RankPlan, config: AdaptiveConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how this run trains given ranks, and how the run that wrote a plan did; empty where both trained LoRA."""
    theirs = plan.provenance.get("second_stage") or {}
    ours = {"adaptive_method": config.method, **flat_options(config)}
    if theirs:
        return {key: ours[key] for key in theirs if key in ours}, theirs
    key = f"{config.method}_second_stage"
    return ({}, {}) if config.given is None else ({key: ours.get(key)}, {key: "lora"})


def _search(config: AdaptiveConfig) -> dict[str, Any]:
    """Collect the settings of calibration or schedule that determine a run's ranks, by YAML key.

    Settings of costs alone (batch size, a limit on extra passes) are left out: they may change when a run resumes.
    """
    if config.search is None:
        facts = asdict(config.calibration)
        return {f"adaptive_calibration_{key}": value for key, value in facts.items() if key != "batch_size"}
    return {_search_key(key): value for key, value in asdict(config.search).items() if key not in _SAID_ELSEWHERE}


_SAID_ELSEWHERE = ("max_overhead", "live_rank", "refresh_ratio", "beta")


def _search_key(name: str) -> str:
    return name if name == "seed" else f"adaptive_{name}"


def _of_plan(plan: RankPlan) -> dict[str, Any]:
    """Collect the settings that :func:`_asked` names, for the run that wrote a plan."""
    calibration = plan.provenance.get("calibration", {})
    return {
        "adaptive_method": plan.method,
        "adaptive_budget_unit": plan.budget_unit,
        "lora_rank": plan.lora_rank,
        "lora_alpha": plan.lora_alpha,
        "adaptive_plan": plan.provenance.get("adaptive_plan"),
        **plan.provenance.get("bounds", {}),
        **{f"adaptive_calibration_{key}": value for key, value in calibration.items()},
        **{_search_key(key): value for key, value in plan.provenance.get("course", {}).items()},
        **{f"{plan.method}_{key}": value for key, value in plan.options.items()},
    }
