"""The plan of a run: from a checkpoint, an adapter to go on with, a given file, or computed once and shared."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, local_rank, our_keys, split_names
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, PlanError, Problem
from llamafactory_adaptive.files import PLAN_FILE, STATE_JSON, digest_of
from llamafactory_adaptive.folder_lock import locked
from llamafactory_adaptive.methods._registry import get_method, methods
from llamafactory_adaptive.ranks.plan import RankPlan, load_plan


logger = logging.getLogger("llamafactory.adaptive")
_LONGEST_SCORING = 6 * 3600.0  # ddp_timeout is often set to years


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold ``output_dir`` for this run: rank 0 of the job does, and where it is refused every process stops.

    Raises:
        AdaptiveError: another run works there.
    """
    from llamafactory_adaptive.engines.distributed import from_main

    with ExitStack() as stack:
        from_main(f"the lock of {folder}", lambda: stack.enter_context(locked(folder)))
        yield


def agreed_plan(args: Args, config: AdaptiveConfig, checkpoint: Path | None) -> tuple[RankPlan, bool]:
    """What :func:`obtain_plan` gives, once it is known that every process of the job has the same.

    Raises:
        AdaptiveError: on every process, before any of them loads the model.
    """
    from llamafactory_adaptive.engines.distributed import gather, refuse_differences
    from llamafactory_adaptive.training.callback import PLANS_DIFFER

    found: list[tuple[RankPlan, bool]] = []

    def work() -> tuple[str, str]:
        found.append(obtain_plan(args, config, checkpoint))
        asked = {key: value for key, value in asdict(config).items() if key != "plan_path"}
        return found[0][0].digest(), digest_of(asked)

    everyone = gather("the start of training with its rank plan", work, _scoring_limit(args))
    refuse_differences([plan for plan, _ in everyone], PLANS_DIFFER)
    refuse_differences([asked for _, asked in everyone], "were given other adaptive settings than rank 0")
    return found[0]


def _scoring_limit(args: Args) -> float:
    return min(float(args.get("ddp_timeout") or 1800), _LONGEST_SCORING)


def obtain_plan(args: Args, config: AdaptiveConfig, checkpoint: Path | None) -> tuple[RankPlan, bool]:
    """The plan this run trains (a dynamic method's over-ranked start), and whether the host will load its adapter.

    Raises:
        AdaptiveError: nothing is loaded or written when the plan cannot be had.
    """
    from llamafactory_adaptive.bridge import fingerprint, target_shapes
    from llamafactory_adaptive.planning import compatibility, planner
    from llamafactory_adaptive.training.checkpoint_files import damage, is_sealed

    going_on = [] if args.get("create_new_adapter") else split_names(args.get("adapter_name_or_path"))
    if checkpoint is not None:
        if args.get("stage") == "rm" and not args.get("deepspeed"):
            reason = "without DeepSpeed the Trainer cannot load the value-head checkpoints that LLaMA-Factory writes"
            problem = Problem("resume_from_checkpoint", str(checkpoint), reason, "overwrite_output_dir: true")
            raise AdaptiveConfigError([problem])
        plan = _plan_beside(checkpoint)
        _check_same_base(plan, args, checkpoint)
        compatibility.check_same_run(plan, config, str(checkpoint))
        shapes = target_shapes.target_shapes(args)
        if config.course is not None:
            compatibility.check_shapes(plan, shapes, str(checkpoint / PLAN_FILE))
            return planner.start_plan(config, shapes, fingerprint.provenance(args)), False
        return compatibility.check_plan(plan, shapes, config, str(checkpoint / PLAN_FILE)), bool(going_on)
    if going_on:
        adapter = Path(going_on[-1])
        if (adapter / STATE_JSON).is_file():
            raise PlanError(
                f"{adapter} is a checkpoint of a run that finds its ranks: resume it (resume_from_checkpoint), or go "
                "on with the adapter it ended with"
            )
        plan = _plan_beside(adapter)
        if is_sealed(adapter) and (fault := damage(adapter)):
            raise PlanError(f"{adapter} is damaged: {fault}; go on from another checkpoint or adapter")
        compatibility.check_same_scale(plan, config, str(adapter))
        return compatibility.check_plan(
            plan, target_shapes.target_shapes(args), config, str(adapter / PLAN_FILE)
        ), True
    return fresh_plan(args, config), False


def fresh_plan(args: Args, config: AdaptiveConfig) -> RankPlan:
    """The plan of a run that starts anew: the given file, or computed. What lies in ``output_dir`` does not matter."""
    from llamafactory_adaptive.bridge import fingerprint, target_shapes
    from llamafactory_adaptive.planning import compatibility, planner
    from llamafactory_adaptive.planning.compatibility import flat_options

    if config.plan_path:
        method = planner.make_method(config)
        samples = getattr(method, "sampling", None) is not None
        used = {"adaptive_plan", "adaptive_budget_unit", "adaptive_max_nonfinite_steps"}
        if samples:
            read = set(config.options) - set(method.idle_on_a_plan)
            used |= {"adaptive_method", *(f"{config.method}_{option}" for option in read)}
        idle = [key for key in our_keys(args) if key not in used]
        if idle and local_rank() == 0:
            logger.warning(f"adaptive_plan is given, so these keys are not used: {', '.join(idle)}")
        plan = compatibility.check_plan(
            load_plan(Path(config.plan_path)), target_shapes.target_shapes(args), config, config.plan_path
        )
        facts: dict[str, Any] = {"adaptive_plan": config.plan_path, **_this_run(plan, fingerprint.provenance(args))}
        if samples:
            facts["sampling"] = {"adaptive_method": config.method, **flat_options(config)}
        return replace(plan, provenance={**plan.provenance, **facts})
    if config.course is not None:
        return planner.start_plan(config, target_shapes.target_shapes(args), fingerprint.provenance(args))
    return compute_plan(args, config)


_OF_THE_RUN = ("base_model", "architecture", "quantization_bit", "seed", "versions")


def _this_run(plan: RankPlan, here: dict[str, Any]) -> dict[str, Any]:
    """What a run on a given plan says of itself; what the plan was made for is noted apart."""
    there = {key: plan.provenance.get(key) for key in _OF_THE_RUN if key in plan.provenance}
    for_one, for_other = there.get("architecture"), here.get("architecture")
    if for_one and for_other and for_one != for_other and local_rank() == 0:
        logger.warning(
            f"the plan was made for {there.get('base_model')} ({for_one}), this run trains {here['base_model']} "
            f"({for_other}): the shapes fit, but its ranks were found on another architecture"
        )
    return {**{key: here[key] for key in _OF_THE_RUN if key in here}, "planned_for": there}


def refuse_finished_run(args: Args, checkpoint: Path | None) -> None:
    """The host's own rule for a filled ``output_dir``, applied before anything is scored.

    Raises:
        AdaptiveConfigError: a model or adapter lies there, and the run neither resumes nor may overwrite.
    """
    from llamafactory.extras.constants import CHECKPOINT_NAMES

    output = Path(str(args["output_dir"]))
    if args.get("resume_from_checkpoint") is not None or args.get("overwrite_output_dir"):
        return
    if any((output / name).is_file() for name in CHECKPOINT_NAMES) and checkpoint is None:
        problem = Problem("output_dir", str(output), "it holds a finished run", "overwrite_output_dir: true")
        raise AdaptiveConfigError([problem])


def compute_plan(args: Args, config: AdaptiveConfig) -> RankPlan:
    """Build the plan in one process per node, or re-use it; the other processes of the node wait for the file."""
    from llamafactory_adaptive.bridge import fingerprint, measure_process, target_shapes
    from llamafactory_adaptive.engines.distributed import failure_of, launched_number, launched_processes
    from llamafactory_adaptive.planning import cache, planner

    request = cache.PlanRequest(config, fingerprint.identity(args), fingerprint.provenance(args))
    path = request.plan_path()
    if local_rank() != 0:
        planner_rank = launched_number() - local_rank()  # the node's first
        return cache.wait_for_plan(path, _scoring_limit(args), lambda: failure_of(planner_rank))
    cached = cache.cached_plan(path)
    if cached is not None:
        logger.info(f"adaptive: ranks re-used, planned before for the same request ({path})")
        return cached
    started = time.perf_counter()
    plan = planner.build_plan(
        request,
        target_shapes.target_shapes(args),
        lambda measurement, target: measure_process.measure_in_own_process(args, measurement, target),
    )
    scores = "with scores measured before" if plan.provenance.get("statistics_reused") else "scores included"
    logger.info(f"adaptive: ranks planned in {time.perf_counter() - started:.1f} s, {scores}")
    return cache.keep_plan(plan, path, others_wait=launched_processes() > 1)


def advice(plan: RankPlan, config: AdaptiveConfig) -> list[str]:
    """Warnings a user should read before training on the plan."""
    from llamafactory_adaptive.reports.tables import concentration_warning

    remedy = get_method(plan.method).concentration_advice if plan.method in methods() else ""
    warning = concentration_warning(plan, config.max_rank) if remedy else None
    return [f"{warning} ({remedy})"] if warning else []


def _check_same_base(plan: RankPlan, args: Args, checkpoint: Path) -> None:
    """Same shapes are not the same model; a folder may have moved, so its own name is what counts."""
    facts, here = plan.provenance, str(args["model_name_or_path"]).rstrip("/")
    there = str(facts.get("base_model") or here).rstrip("/")
    if Path(there).name == Path(here).name or (Path(here).exists() and Path(there).resolve() == Path(here).resolve()):
        return
    if facts.get("adaptive_plan") and "planned_for" not in facts:  # an older version noted the plan's model here
        if local_rank() == 0:
            logger.warning(
                f"{checkpoint} was written by an older version, which noted {there}, the model its plan was made "
                f"for, and not the one it trained; make sure that this was {here}"
            )
        return
    raise PlanError(
        f"{checkpoint} belongs to another run: model_name_or_path is {there} there and {here} here; change it "
        "back or use another output_dir"
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
