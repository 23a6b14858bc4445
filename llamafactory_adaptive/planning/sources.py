"""Where the plan of a run comes from: a checkpoint, an adapter to go on with, a given file, the cache, or scoring."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamafactory_adaptive.config.key_checks import CALIBRATION_KEYS
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE, STATE_JSON
from llamafactory_adaptive.methods import get_method, make_method, methods
from llamafactory_adaptive.planning import cache, compatibility, planner
from llamafactory_adaptive.planning.earlier_plans import check_resumed_run
from llamafactory_adaptive.planning.host import HostRun
from llamafactory_adaptive.planning.starts import StartFile, obtain_start
from llamafactory_adaptive.ranks.plan import INIT, RankPlan, load_plan, parse_plan


logger = logging.getLogger("llamafactory.adaptive")


@dataclass(frozen=True)
class PlanSource:
    """A run's plan, and where it came from.

    Attributes:
        plan: what the run trains; the over-ranked start of a search.
        origin: ``resumed`` from a checkpoint, ``continued`` from an adapter, ``given`` as a file, ``started`` for a
            search, ``re-used`` from the cache, ``scored``.
        start: what the factors start from; None where they start as PEFT starts them, or are trained already.
    """

    plan: RankPlan
    origin: Literal["resumed", "continued", "given", "started", "re-used", "scored"]
    start: StartFile | None = None

    def to_json(self) -> dict[str, Any]:
        """Encode the source for the other processes of the job, which get all they know of it from this one."""
        start = None if self.start is None else {"path": str(self.start.path), "facts": dict(self.start.facts)}
        return {"plan": self.plan.to_json(), "origin": self.origin, "start": start}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PlanSource":
        """Build the source from what :meth:`to_json` returned."""
        start = values["start"] and StartFile(Path(values["start"]["path"]), values["start"]["facts"])
        return cls(parse_plan(values["plan"], "the plan of rank 0"), values["origin"], start)


def obtain_plan(config: AdaptiveConfig, host: HostRun) -> PlanSource:
    """Find or build the plan that a run trains: of its checkpoint, of the adapter it goes on with, or a fresh one.

    One process of a job calls it and sends the others what it found.

    Raises:
        AdaptiveError: no plan can be had; this process has not loaded the model yet.
    """
    if host.checkpoint is not None:
        return _plan_of_checkpoint(config, host, host.checkpoint)
    source = plan_of_new_run(config, host)
    if source.origin == "continued" or (start := obtain_start(config, host, source.plan)) is None:
        return source
    return replace(source, plan=start.recorded_in(source.plan), start=start)


def plan_of_new_run(config: AdaptiveConfig, host: HostRun) -> PlanSource:
    """Find or build the plan of a run that resumes from no checkpoint, but for what its factors start from.

    Raises:
        AdaptiveError: no plan can be had.
    """
    return fresh_plan(config, host) if host.adapter is None else _plan_of_adapter(config, host, host.adapter)


def _plan_of_checkpoint(config: AdaptiveConfig, host: HostRun, checkpoint: Path) -> PlanSource:
    path, plan = str(checkpoint / PLAN_FILE), _plan_beside(checkpoint)
    _check_same_base(plan, host.provenance, checkpoint)
    check_resumed_run(plan, config, str(checkpoint))
    if config.search is not None:
        compatibility.check_shapes(plan, host.shapes, path)
        return PlanSource(planner.start_plan(config, host.shapes, host.provenance), "resumed")
    checked = compatibility.check_trained_plan(plan, host.shapes, config, path)
    return PlanSource(checked, "resumed")


def _plan_of_adapter(config: AdaptiveConfig, host: HostRun, adapter: Path) -> PlanSource:
    if (adapter / STATE_JSON).is_file():
        raise PlanError(
            f"{adapter} is a checkpoint of a run that trains no plain LoRA: resume it (resume_from_checkpoint), or go "
            "on with the adapter it ended with"
        )
    plan = _plan_beside(adapter)
    compatibility.check_same_scale(plan, config, str(adapter))
    if config.plan_path and load_plan(Path(config.plan_path)).ranks() != plan.ranks():
        raise PlanError(
            f"adaptive_plan {config.plan_path} has other ranks than {adapter}, which training goes on with; leave "
            "adaptive_plan out, or set create_new_adapter: true to merge that adapter and train a new one"
        )
    checked = compatibility.check_trained_plan(plan, host.shapes, config, str(adapter / PLAN_FILE))
    ours = {key: value for key, value in checked.provenance.items() if key != INIT}  # this run starts from the adapter
    return PlanSource(replace(checked, provenance=ours), "continued")


def fresh_plan(config: AdaptiveConfig, host: HostRun) -> PlanSource:
    """Build the plan of a run that starts anew: read from the given file, the start of a search, or from scores.

    Raises:
        AdaptiveError: the file does not fit the model, or the modules cannot be scored.
    """
    if config.plan_path:
        return PlanSource(_given_plan(config, host, config.plan_path), "given")
    if config.search is not None:
        return PlanSource(planner.start_plan(config, host.shapes, host.provenance), "started")
    return _computed_plan(config, host)


def _given_plan(config: AdaptiveConfig, host: HostRun, path: str) -> RankPlan:
    method = make_method(config.method, config.options)
    traits = method.traits
    used = {"adaptive_plan", "adaptive_budget_unit", "adaptive_max_nonfinite_steps"}
    if traits.read_with_plan:
        used |= {"adaptive_method", *(f"{config.method}_{option}" for option in traits.read_with_plan)}
    if config.init != "default":
        used |= {"adaptive_init", "adaptive_init_gamma", *CALIBRATION_KEYS}
    idle = [key for key in host.given_keys if key not in used]
    if idle:
        logger.warning(f"adaptive_plan is given, so these keys are not used: {', '.join(idle)}")
    plan = compatibility.check_plan(load_plan(Path(path)), host.shapes, config, path)
    facts: dict[str, Any] = {"adaptive_plan": path, **_this_run(plan, host.provenance)}
    if traits.samples:
        facts["sampling"] = {"adaptive_method": config.method, **compatibility.flat_options(config)}
    if config.given is not None:
        facts["second_stage"] = compatibility.second_stage(config, method)
    theirs = {key: value for key, value in plan.provenance.items() if key not in ("sampling", "second_stage", INIT)}
    return replace(plan, provenance={**theirs, **facts})


_OF_THE_RUN = ("base_model", "architecture", "quantization_bit", "seed", "versions")


def _this_run(plan: RankPlan, here: Mapping[str, Any]) -> dict[str, Any]:
    """Return model, seed and versions of a run on a given plan, and apart those that the plan was made for."""
    there = {key: plan.provenance.get(key) for key in _OF_THE_RUN if key in plan.provenance}
    for_one, for_other = there.get("architecture"), here.get("architecture")
    if for_one and for_other and for_one != for_other:
        logger.warning(
            f"the plan was made for {there.get('base_model')} ({for_one}), this run trains {here['base_model']} "
            f"({for_other}): the shapes fit, but its ranks were found on another architecture"
        )
    return {**{key: here[key] for key in _OF_THE_RUN if key in here}, "planned_for": there}


def _computed_plan(config: AdaptiveConfig, host: HostRun) -> PlanSource:
    """Score the modules and build the plan, or re-use a cached one."""
    request = cache.PlanRequest(config, host.identity, host.provenance)
    path = request.plan_path()
    cached = cache.cached_plan(path)
    if cached is not None:
        logger.info(f"adaptive: ranks re-used, planned before for the same request ({path})")
        return PlanSource(cached, "re-used")
    started = time.perf_counter()
    plan = planner.build_plan(request, host.shapes, host.measure)
    reused = plan.provenance.get("statistics_reused")  # None where nothing is measured
    scores = {None: "", True: ", with scores measured before", False: ", scores included"}[reused]
    logger.info(f"adaptive: ranks planned in {time.perf_counter() - started:.1f} s{scores}")
    cache.keep_plan(plan, path)
    return PlanSource(plan, "scored")


def advice(plan: RankPlan, config: AdaptiveConfig) -> list[str]:
    """List the warnings a user should read before training on the plan."""
    from llamafactory_adaptive.reports.tables import concentration_warning

    remedy = get_method(plan.method).concentration_advice if plan.method in methods() else ""
    warning = concentration_warning(plan, config.max_rank) if remedy else None
    return [f"{warning} ({remedy})"] if warning else []


def _check_same_base(plan: RankPlan, here: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint of another base model, though its shapes fit; only the last part of its path counts."""
    ours = str(here["base_model"]).rstrip("/")
    theirs = str(plan.provenance.get("base_model") or ours).rstrip("/")
    if compatibility.is_same_base(ours, theirs):
        return
    if compatibility.trained_base(plan.provenance) is None:
        logger.warning(
            f"{checkpoint} was written by an older version, which noted {theirs}, the model its plan was made for, "
            f"and not the one it trained; make sure that this was {ours}"
        )
        return
    raise PlanError(
        f"{checkpoint} belongs to another run: model_name_or_path is {theirs} there and {ours} here; change it back "
        "or use another output_dir"
    )


def _plan_beside(adapter: Path) -> RankPlan:
    if not (adapter / PLAN_FILE).is_file():
        remedy = (
            "use another output_dir, or overwrite_output_dir: true to start afresh"
            if adapter.name.startswith("checkpoint-")
            else "set create_new_adapter: true to merge it and train a new adapter, or finetuning_type: lora to go on"
        )
        raise PlanError(f"{adapter} is no local folder with {PLAN_FILE}, so its ranks have no plan; {remedy}")
    return load_plan(adapter / PLAN_FILE)
