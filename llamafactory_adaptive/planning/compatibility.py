"""Checks that a plan, checkpoint or adapter fits the requested run; messages name differences by YAML key."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import PlanError, first_of
from llamafactory_adaptive.options import with_earlier_values
from llamafactory_adaptive.ranks.plan import (
    ASKED_ALPHA,
    GRANULARITY,
    INIT,
    ModuleShape,
    RankPlan,
    load_plan,
    sufficient_rank,
)


def check_shapes(plan: RankPlan, shapes: list[ModuleShape], source: str) -> None:
    """Refuse a plan whose modules are not those of the model.

    Raises:
        PlanError: modules differ; the message names the first differences.
    """
    differences = plan.differences(shapes)
    if differences:
        raise PlanError(f"{source} does not fit the model: {first_of(differences)}")


def is_same_base(name: str, other: str) -> bool:
    """Tell whether two names or paths mean one base model: one place, or the same last part, as copies have."""
    ours, theirs = name.rstrip("/"), other.rstrip("/")
    here_too = Path(ours).exists() and Path(theirs).resolve() == Path(ours).resolve()
    return here_too or Path(theirs).name == Path(ours).name


def trained_base(provenance: Mapping[str, Any]) -> Any:
    """Return the base model that a plan's run trained; None where it is not recorded.

    Older versions noted at its place the model that a given plan had been made for.
    """
    if provenance.get("adaptive_plan") and "planned_for" not in provenance:
        return None
    return provenance.get("base_model")


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
        provenance={key: fact for key, fact in plan.provenance.items() if key != ASKED_ALPHA},
        modules=tuple(sorted(plan.modules, key=lambda module: order[module.name])),
    )
    budget, kind = plan.budget(), plan.budget_kind
    asked, used = budget[f"asked_{kind}"], budget[f"used_{kind}"]
    if used > asked:
        raise PlanError(
            f"{source} costs {used:,} {kind}, the budget of lora_rank {config.lora_rank} is {asked:,}: "
            f"{used - asked:,} too many; lower ranks in the plan or set "
            f"lora_rank: {sufficient_rank(plan)}"
        )
    return plan


def check_trained_plan(plan: RankPlan, shapes: list[ModuleShape], config: AdaptiveConfig, source: str) -> RankPlan:
    """Return the plan of weights that trained already with this run's budget, or refuse it as :func:`check_plan` does.

    Where ``lora_alpha`` is the one that their run divided by another rank than ``lora_rank``, their scale stays.

    Raises:
        PlanError: the plan is of another model, or costs more than the budget.
    """
    checked, asked = check_plan(plan, shapes, config, source), plan.provenance.get(ASKED_ALPHA)
    if asked != config.lora_alpha:
        return checked
    return replace(checked, lora_alpha=plan.lora_alpha, provenance={**checked.provenance, ASKED_ALPHA: asked})


def check_same_run(plan: RankPlan, config: AdaptiveConfig, source: str, method: Any) -> None:
    """Refuse to resume a run that was started with other settings of ranks.

    Args:
        plan: the plan of the run so far.
        config: configuration of the run that is asked for.
        source: where the plan is from, for messages.
        method: the method of ``config``, with its options.

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
        ours_too, theirs_too = _second_stages(plan, config, method)
        asked, theirs = asked | init_settings(config) | ours_too, theirs | theirs_too
        measured = plan.provenance.get(INIT, {}).get("calibration")
        if config.init != "default" and measured is not None:  # calibration is then about the factors alone
            asked, theirs = asked | _calibration(asdict(config.calibration)), theirs | _calibration(measured)
    else:
        for option in method.traits.only_with_plan:
            asked.pop(f"{config.method}_{option}", None)
    _refuse_differences(asked, theirs, source, "another output_dir")


_SCALE_KEYS = ("lora_rank", "lora_alpha", "adaptive_budget_unit")


def check_same_scale(plan: RankPlan, config: AdaptiveConfig, source: str) -> None:
    """Refuse to go on with an adapter of another budget or scale; how its ranks were found does not matter.

    Where its run divided ``lora_alpha`` by another rank than ``lora_rank``, either alpha names the scale.

    Raises:
        PlanError: settings differ; the message names each of them.
    """
    asked, theirs = _asked(config), _of_plan(plan)
    if config.lora_alpha == plan.lora_alpha:
        theirs["lora_alpha"] = plan.lora_alpha
    if given := plan.provenance.get(ASKED_ALPHA):
        source += f", whose lora_alpha {given} was divided by the rank that its run started at,"
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
        "lora_alpha": config.alpha_in_settings,
        "adaptive_plan": config.plan_path,
        "adaptive_min_rank": config.min_rank,
        "adaptive_max_rank": config.max_rank,
        "adaptive_granularity": config.granularity,
        **init_settings(config),
        **_search(config),
        **flat_options(config),
    }


def init_settings(config: AdaptiveConfig) -> dict[str, Any]:
    """Return the settings that determine what the factors start from, by YAML key."""
    size = {"adaptive_init_gamma": config.init_gamma} if config.init == "gora" else {}
    return {"adaptive_init": config.init, **size}


def flat_options(config: AdaptiveConfig) -> dict[str, Any]:
    """Return the method's options by YAML key."""
    return {f"{config.method}_{key}": value for key, value in config.options.items()}


def second_stage(config: AdaptiveConfig, method: Any) -> dict[str, Any]:
    """Return the settings by which the method of ``config`` trains given ranks, by YAML key."""
    read = method.traits.read_with_plan
    return {"adaptive_method": config.method, **{f"{config.method}_{key}": config.options[key] for key in read}}


def _second_stages(plan: RankPlan, config: AdaptiveConfig, method: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how this run trains given ranks and how the run of a plan did; empty where both train plain LoRA."""
    theirs = plan.provenance.get("second_stage")
    if theirs:
        return second_stage(config, method), theirs
    if config.given is None:
        return {}, {}
    # Before methods had a form of their own on given ranks, all trained plain LoRA.
    before = with_earlier_values(type(method).Options, {})
    keys = {name: f"{config.method}_{name}" for name in method.traits.only_with_plan}
    ours, earlier = ({key: options[name] for name, key in keys.items()} for options in (config.options, before))
    return ours, earlier


def _search(config: AdaptiveConfig) -> dict[str, Any]:
    """Collect the settings of calibration or schedule that determine a run's ranks, by YAML key.

    Settings of costs alone (batch size, a limit on extra passes) are left out: they may change when a run resumes.
    """
    if config.search is None:
        return _calibration(asdict(config.calibration))
    return {_search_key(key): value for key, value in asdict(config.search).items() if key not in _SAID_ELSEWHERE}


def _calibration(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"adaptive_calibration_{key}": value for key, value in facts.items() if key != "batch_size"}


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
        "lora_alpha": plan.provenance.get(ASKED_ALPHA, plan.lora_alpha),
        "adaptive_plan": plan.provenance.get("adaptive_plan"),
        **plan.provenance.get("bounds", {}),
        "adaptive_granularity": plan.provenance.get(GRANULARITY, "module"),
        "adaptive_init": "default",
        **plan.provenance.get(INIT, {}),
        **{f"adaptive_calibration_{key}": value for key, value in calibration.items()},
        **{_search_key(key): value for key, value in plan.provenance.get("course", {}).items()},
        **{f"{plan.method}_{key}": value for key, value in plan.options.items()},
    }
