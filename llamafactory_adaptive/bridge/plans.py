"""The plan of a run: from a checkpoint, an adapter to go on with, a given file, or computed once and shared."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, local_rank, our_keys, split_names
from llamafactory_adaptive.config import AdaptiveConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, PlanError, Problem
from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE, STATE_JSON, is_complete
from llamafactory_adaptive.plan import RankPlan, load_plan
from llamafactory_adaptive.registry import get_method, methods


logger = logging.getLogger("llamafactory.adaptive")


def obtain_plan(args: Args, config: AdaptiveConfig) -> tuple[RankPlan, bool]:
    """The plan this run trains (a dynamic method's over-ranked start), and whether the host will load its adapter.

    Raises:
        AdaptiveError: nothing is loaded or written when the plan cannot be had.
    """
    from llamafactory_adaptive import pipeline, sameness
    from llamafactory_adaptive.bridge import loading

    checkpoint = checkpoint_to_resume(args)
    going_on = [] if args.get("create_new_adapter") else split_names(args.get("adapter_name_or_path"))
    if checkpoint is not None:
        if args.get("stage") == "rm" and not args.get("deepspeed"):
            reason = "without DeepSpeed the Trainer cannot load the value-head checkpoints that LLaMA-Factory writes"
            problem = Problem("resume_from_checkpoint", str(checkpoint), reason, "overwrite_output_dir: true")
            raise AdaptiveConfigError([problem])
        plan = _plan_beside(checkpoint)
        _check_same_base(plan, args, checkpoint)
        sameness.check_same_run(plan, config, str(checkpoint))
        shapes = loading.target_shapes(args)
        if config.course is not None:
            pipeline.check_shapes(plan, shapes, str(checkpoint / PLAN_FILE))
            return pipeline.start_plan(config, shapes, loading.provenance(args)), False
        return pipeline.check_plan(plan, shapes, config, str(checkpoint / PLAN_FILE)), bool(going_on)
    if going_on:
        adapter = Path(going_on[-1])
        if (adapter / STATE_JSON).is_file():
            raise PlanError(
                f"{adapter} is a checkpoint of a run that finds its ranks: resume it (resume_from_checkpoint), or go "
                "on with the adapter it ended with"
            )
        plan = _plan_beside(adapter)
        sameness.check_same_scale(plan, config, str(adapter))
        return pipeline.check_plan(plan, loading.target_shapes(args), config, str(adapter / PLAN_FILE)), True
    return fresh_plan(args, config), False


def fresh_plan(args: Args, config: AdaptiveConfig) -> RankPlan:
    """The plan of a run that starts anew: the given file, or computed. What lies in ``output_dir`` does not matter."""
    from llamafactory_adaptive import pipeline
    from llamafactory_adaptive.bridge import loading
    from llamafactory_adaptive.sameness import flat_options

    if config.plan_path:
        method = pipeline.make_method(config)
        samples = getattr(method, "sampling", None) is not None
        used = {"adaptive_plan", "adaptive_budget_unit"}
        if samples:
            read = set(config.options) - set(method.idle_on_a_plan)
            used |= {"adaptive_method", *(f"{config.method}_{option}" for option in read)}
        idle = [key for key in our_keys(args) if key not in used]
        if idle and local_rank() == 0:
            logger.warning(f"adaptive_plan is given, so these keys are not used: {', '.join(idle)}")
        plan = pipeline.check_plan(
            load_plan(Path(config.plan_path)), loading.target_shapes(args), config, config.plan_path
        )
        facts: dict[str, Any] = {"adaptive_plan": config.plan_path}
        if samples:
            facts["sampling"] = {"adaptive_method": config.method, **flat_options(config)}
        return replace(plan, provenance={**plan.provenance, **facts})
    if config.course is not None:
        return pipeline.start_plan(config, loading.target_shapes(args), loading.provenance(args))
    return compute_plan(args, config)


def refuse_finished_run(args: Args) -> None:
    """The host's own rule for a filled ``output_dir``, applied before anything is scored.

    Raises:
        AdaptiveConfigError: a model or adapter lies there, and the run neither resumes nor may overwrite.
    """
    from llamafactory.extras.constants import CHECKPOINT_NAMES

    output = Path(str(args["output_dir"]))
    if args.get("resume_from_checkpoint") is not None or args.get("overwrite_output_dir"):
        return
    if any((output / name).is_file() for name in CHECKPOINT_NAMES) and checkpoint_to_resume(args) is None:
        problem = Problem("output_dir", str(output), "it holds a finished run", "overwrite_output_dir: true")
        raise AdaptiveConfigError([problem])


def compute_plan(args: Args, config: AdaptiveConfig) -> RankPlan:
    """Build the plan in one process per node, or re-use it; the other processes of the node wait for the file."""
    from llamafactory_adaptive import pipeline
    from llamafactory_adaptive.bridge import loading, measuring

    request = pipeline.PlanRequest(config, loading.identity(args), loading.provenance(args))
    path = request.plan_path()
    if local_rank() != 0:
        return pipeline.wait_for_plan(path, float(args.get("ddp_timeout") or 1800))
    if not path.exists():
        shapes = loading.target_shapes(args)
        plan = pipeline.build_plan(
            request, shapes, lambda measurement, target: measuring.measure_in_own_process(args, measurement, target)
        )
        plan.write(path)
    return load_plan(path)


def advice(plan: RankPlan, config: AdaptiveConfig) -> list[str]:
    """Warnings a user should read before training on the plan."""
    from llamafactory_adaptive.report import concentration_warning

    remedy = get_method(plan.method).concentration_advice if plan.method in methods() else ""
    warning = concentration_warning(plan, config.max_rank) if remedy else None
    return [f"{warning} ({remedy})"] if warning else []


def checkpoint_to_resume(args: Args) -> Path | None:
    """The checkpoint the host would resume from, by its own rules, but only one that was written to its end."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    wanted, output = args.get("resume_from_checkpoint"), Path(str(args["output_dir"]))
    if isinstance(wanted, str):
        if not Path(wanted).is_dir():
            raise AdaptiveConfigError(
                [Problem("resume_from_checkpoint", wanted, "there is no such folder", f"{output}/checkpoint-<step>")]
            )
        return Path(wanted)
    last = _newest_for_the_host(args)
    if last is None or not (output / LOG_FILE).is_file():
        return last
    complete = [path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _newest_for_the_host(args: Args) -> Path | None:
    """The checkpoint in ``output_dir`` that the host would resume from, complete or not, when none is named."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted, output = args.get("resume_from_checkpoint"), Path(str(args["output_dir"]))
    if wanted is False or not output.is_dir() or (wanted is None and args.get("overwrite_output_dir")):
        return None
    last = get_last_checkpoint(str(output))
    return Path(last) if last else None


def what_the_host_resumes(args: Args, checkpoint: Path | None) -> Args:
    """The settings, with the checkpoint spelled out where the host would take one that was not written to its end.

    A process killed while it saves leaves such a folder.
    """
    last = None if isinstance(args.get("resume_from_checkpoint"), str) else _newest_for_the_host(args)
    if last is None or checkpoint == last:
        return args
    if local_rank() == 0:
        instead = f"resuming from {checkpoint.name}" if checkpoint else "starting afresh"
        logger.warning(f"{last} was not written to its end; {instead}")
    return {**args, "resume_from_checkpoint": str(checkpoint) if checkpoint else False}


def _check_same_base(plan: RankPlan, args: Args, checkpoint: Path) -> None:
    """Same shapes are not the same model; a folder may have moved, so its own name is what counts."""
    there, here = (str(name).rstrip("/") for name in (plan.provenance.get("base_model"), args["model_name_or_path"]))
    if plan.provenance.get("base_model") and Path(there).name != Path(here).name:
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
