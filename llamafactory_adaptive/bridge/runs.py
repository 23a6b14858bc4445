"""One training run inside LLaMA-Factory: obtain the plan, hand over to the host, prove the result."""

import atexit
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from llamafactory_adaptive.bridge.arguments import (
    Args,
    asks_for_adaptive,
    command_line_settings,
    local_rank,
    our_keys,
    parse_config,
    split_names,
    to_mapping,
)
from llamafactory_adaptive.config import (
    AdaptiveConfig,
    AdaptiveConfigError,
    AdaptiveError,
    InfeasibleBudgetError,
    PlanError,
    Problem,
)
from llamafactory_adaptive.plan import PLAN_FILE, RankPlan, load_plan
from llamafactory_adaptive.registry import get_method, methods


logger = logging.getLogger("llamafactory.adaptive")

# The callback (with plan and counters) of the run this process is in; read where upstream builds its LoraConfig.
_current: ContextVar[Any] = ContextVar("adaptive_run", default=None)


def inject_ranks(lora_config: Any) -> Callable[..., Any]:
    """Replace the name ``LoraConfig`` in the host: in an adaptive run its rank arguments come from the plan."""

    @wraps(lora_config, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        callback = _current.get()
        if callback is not None:
            from llamafactory_adaptive.adapter import lora_config_arguments

            kwargs |= lora_config_arguments(callback.plan)
            callback.counters.configs_injected += 1
        return lora_config(*args, **kwargs)

    return make


def adaptive_training_function(original: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Wrap the host's training function: adaptive runs get their plan first and their proof last."""

    @wraps(original)
    def run(config: dict[str, Any]) -> None:
        raw = config["args"]
        if not asks_for_adaptive(raw):
            _refuse_stray_keys(raw)
            return original(config)
        from llamafactory_adaptive.bridge.seams import require_seams

        require_seams()
        args = to_mapping(raw)
        adaptive = parse_config(args)
        if not args.get("do_train"):
            return original(config)  # evaluation of an existing adapter: nothing to allocate
        return _train(original, config, args, adaptive)

    return run


def _train(original: Callable[[dict[str, Any]], None], config: dict[str, Any], args: Args, adaptive: AdaptiveConfig
           ) -> None:  # fmt: skip
    from llamafactory_adaptive.controller import AdaptiveCallback, finish
    from llamafactory_adaptive.gradients import init_deepspeed_on_cpu

    started = time.perf_counter()
    _refuse_what_the_host_would(args)
    plan, trained_before = obtain_plan(args, adaptive)
    if local_rank() == 0:
        for line in advice(plan, adaptive):
            logger.warning(line)
    callback = AdaptiveCallback(plan, time.perf_counter() - started)
    if args.get("deepspeed") and _no_accelerator():
        init_deepspeed_on_cpu()
    token = _current.set(callback)
    try:
        original({**config, "callbacks": [*(config.get("callbacks") or []), callback]})
    finally:
        _current.reset(token)
    if int(os.environ.get("RANK", "0")) == 0:
        finish(Path(args["output_dir"]), callback, trained_before)


def _refuse_what_the_host_would(args: Args) -> None:
    """Two rules of the host that depend on the process and the disk; it would apply them only after scoring."""
    problems = []
    if args.get("deepspeed") and "LOCAL_RANK" not in os.environ:
        problems.append(Problem("deepspeed", args["deepspeed"], "DeepSpeed runs under torchrun", "FORCE_TORCHRUN=1"))
    output = Path(str(args["output_dir"]))
    filled = any((output / name).is_file() for name in ("adapter_model.safetensors", "model.safetensors"))
    if filled and not args.get("overwrite_output_dir") and _checkpoint_to_resume(args) is None:
        problems.append(Problem("output_dir", str(output), "it holds a finished run", "overwrite_output_dir: true"))
    if problems:
        raise AdaptiveConfigError(problems)


def _refuse_stray_keys(raw: Mapping[str, Any] | list[str]) -> None:
    """Keys of ours without ``finetuning_type: adaptive`` would train plain LoRA unnoticed."""
    stray = our_keys(raw)
    if stray:
        kind = raw.get("finetuning_type", "lora") if isinstance(raw, Mapping) else "lora"
        raise AdaptiveConfigError(
            [Problem("finetuning_type", kind, f"{', '.join(stray)} would have no effect", "finetuning_type: adaptive")]
        )


def obtain_plan(args: Args, config: AdaptiveConfig) -> tuple[RankPlan, bool]:
    """The plan this run trains, and whether the host will load its adapter instead of making one.

    Raises:
        AdaptiveError: nothing is loaded or written when the plan cannot be had.
    """
    from llamafactory_adaptive import pipeline
    from llamafactory_adaptive.bridge.loading import target_shapes

    checkpoint = _checkpoint_to_resume(args)
    going_on = [] if args.get("create_new_adapter") else split_names(args.get("adapter_name_or_path"))
    if checkpoint is not None:
        plan = _plan_beside(checkpoint)
        pipeline.check_same_run(plan, config, str(checkpoint))
        return pipeline.check_plan(plan, target_shapes(args), config, str(checkpoint / PLAN_FILE)), bool(going_on)
    if going_on:
        adapter = Path(going_on[-1])
        plan = _plan_beside(adapter)
        pipeline.check_same_scale(plan, config, str(adapter))
        return pipeline.check_plan(plan, target_shapes(args), config, str(adapter / PLAN_FILE)), True
    if config.plan_path:
        idle = [key for key in our_keys(args) if key != "adaptive_plan" and key != "adaptive_budget_unit"]
        if idle and local_rank() == 0:
            logger.warning(f"adaptive_plan is given, so these keys are not used: {', '.join(idle)}")
        plan = pipeline.check_plan(load_plan(Path(config.plan_path)), target_shapes(args), config, config.plan_path)
        return replace(plan, provenance={**plan.provenance, "adaptive_plan": config.plan_path}), False
    return compute_plan(args, config), False


def compute_plan(args: Args, config: AdaptiveConfig) -> RankPlan:
    """Build the plan in one process per node, or re-use it; the other processes of the node wait for the file."""
    from llamafactory_adaptive import pipeline
    from llamafactory_adaptive.bridge import loading

    request = pipeline.PlanRequest(config, loading.identity(args), loading.provenance(args))
    path = request.plan_path()
    if local_rank() != 0:
        return pipeline.wait_for_plan(path, float(args.get("ddp_timeout") or 1800))
    if not path.exists():
        shapes = loading.target_shapes(args)
        plan = pipeline.build_plan(
            request, shapes, lambda measurement, target: loading.measure_in_own_process(args, measurement, target)
        )
        plan.write(path)
    return load_plan(path)


def advice(plan: RankPlan, config: AdaptiveConfig) -> list[str]:
    """Warnings a user should read before training on the plan."""
    from llamafactory_adaptive.report import concentration_warning

    remedy = get_method(plan.method).concentration_advice if plan.method in methods() else ""
    warning = concentration_warning(plan, config.max_rank) if remedy else None
    return [f"{warning} ({remedy})"] if warning else []


def _checkpoint_to_resume(args: Args) -> Path | None:
    """The checkpoint the host would resume from, by its own rules."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted, output = args.get("resume_from_checkpoint"), Path(str(args["output_dir"]))
    if isinstance(wanted, str):
        if not Path(wanted).is_dir():
            raise AdaptiveConfigError(
                [Problem("resume_from_checkpoint", wanted, "there is no such folder", f"{output}/checkpoint-<step>")]
            )
        return Path(wanted)
    if not output.is_dir() or (wanted is None and args.get("overwrite_output_dir")):
        return None
    last = get_last_checkpoint(str(output)) if wanted is None or wanted else None
    return Path(last) if last else None


def _plan_beside(adapter: Path) -> RankPlan:
    if not (adapter / PLAN_FILE).is_file():
        remedy = (
            "use another output_dir, or overwrite_output_dir: true to start afresh"
            if adapter.name.startswith("checkpoint-")
            else "set create_new_adapter: true to merge it and train a new adapter, or finetuning_type: lora to go on"
        )
        raise PlanError(f"{adapter} has no {PLAN_FILE}: it was not trained by this plugin; {remedy}")
    return load_plan(adapter / PLAN_FILE)


def _no_accelerator() -> bool:
    import torch

    return not torch.accelerator.is_available()


def with_clean_exit(run_exp: Callable[..., None]) -> Callable[..., None]:
    """Wrap the host's entry: user errors on a command line end in one message and exit code 2, no traceback.

    A program that passes ``args`` itself gets the exception.
    """

    @wraps(run_exp)
    def run(args: Any = None, callbacks: Any = None) -> None:
        if args is not None:
            return run_exp(args, callbacks)
        try:
            run_exp(None, callbacks)
        except AdaptiveError as error:
            exit_with(error)
        if "LOCAL_RANK" in os.environ and _no_accelerator() and asks_for_adaptive(command_line_settings()):
            _leave_without_finalizing()

    return run


def _leave_without_finalizing() -> NoReturn:
    """End a finished worker of a CPU job here.

    Threads of gloo may still hold Python objects when the interpreter is torn down, which now and then aborts the
    process (pytorch/pytorch#179291); torchrun then kills the others, perhaps while rank 0 still writes, and reports a
    failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_with(error: AdaptiveError) -> NoReturn:
    """Print a user error once and leave with code 2."""
    # Configuration and plan are the same in every worker: one of them says what is wrong.
    everywhere = isinstance(error, (AdaptiveConfigError, PlanError, InfeasibleBudgetError))
    if not everywhere or int(os.environ.get("RANK", "0")) == 0:
        print(f"llamafactory-adaptive: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error


def checked_launch(original: Callable[[], None]) -> Callable[[], None]:
    """Wrap the host's launcher: check an adaptive run, and plan it, before torchrun starts its workers."""

    @wraps(original)
    def launch() -> None:
        if len(sys.argv) < 3 or sys.argv[1] != "train" or {"-h", "--help"} & set(sys.argv):
            return original()
        try:
            adaptive = prepare_launch(sys.argv[2:])
        except AdaptiveError as error:
            exit_with(error)
        try:
            return original()
        except subprocess.CalledProcessError as error:
            if not adaptive:
                raise
            raise SystemExit(error.returncode) from error  # the workers have said why

    return launch


def prepare_launch(words: list[str]) -> bool:
    """Validate ``X.yaml key=value ...`` if it asks for adaptive; returns whether it does.

    Where torchrun is about to start, the plan is made here, alone on the machine: what a user can mend ends in one
    message and exit code 2, and the workers find the plan in the cache.
    """
    from llamafactory_adaptive.bridge.seams import require_seams

    saved, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        if not _mentions_adaptive(words):
            return False
        args = command_line_settings()
    finally:
        sys.argv = saved
    if not asks_for_adaptive(args):
        return False
    require_seams()
    config = parse_config(args)
    if args.get("do_train") and _starts_torchrun():
        obtain_plan(args, config)
    return True


def _starts_torchrun() -> bool:
    from llamafactory.extras.misc import get_device_count, is_env_enabled, use_kt, use_ray

    return is_env_enabled("FORCE_TORCHRUN") or (get_device_count() > 1 and not use_ray() and not use_kt())


def _mentions_adaptive(words: list[str]) -> bool:
    """Cheap look before anything heavy is imported for a plain run."""
    try:
        text = Path(words[0]).read_text(encoding="utf-8") if not words[0].startswith("-") else ""
    except OSError:
        return False
    return "adaptive" in text or any("adaptive" in word for word in words)
