"""One training run inside LLaMA-Factory: its plan is passed to the host, and the result verified."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.adapter.name_lookup import look_names_up_once
from llamafactory_adaptive.bridge.arguments import (
    Args,
    adapter_to_go_on_with,
    asks_for_adaptive,
    our_keys,
    run_seed,
    split_names,
)
from llamafactory_adaptive.bridge.base_loading import BaseHandover
from llamafactory_adaptive.bridge.checked_run import CheckedRun, checked_run
from llamafactory_adaptive.bridge.resuming import (
    checkpoint_to_resume,
    has_ended,
    layout,
    named_paths,
    refuse_finished_run,
    refuse_ranks_in_plain_run,
    what_the_host_resumes,
)
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.launcher import accelerate_starts, is_worker, launched_number, local_rank
from llamafactory_adaptive.reports.plaintext import tell
from llamafactory_adaptive.training.current_run import current_run
from llamafactory_adaptive.training.previous_run import set_previous_run_aside


if TYPE_CHECKING:
    from llamafactory_adaptive.planning.sources import PlanSource

logger = logging.getLogger("llamafactory.adaptive")


def inject_ranks(lora_config: Any) -> Callable[..., Any]:
    """Wrap ``LoraConfig`` in the host, so that in an adaptive run its rank arguments come from the plan."""
    look_names_up_once()  # for adapters that are loaded, too

    @wraps(lora_config, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        callback = current_run.get()
        if callback is not None:
            kwargs |= callback.lora_arguments()
        return lora_config(*args, **kwargs)

    return make


def adaptive_training_function(
    original: Callable[[dict[str, Any]], None], require_seams: Callable[[], None]
) -> Callable[[dict[str, Any]], None]:
    """Wrap the host's training function: in an adaptive run, plan before it and verify the result after it."""

    @wraps(original)
    def run(config: dict[str, Any]) -> None:
        raw = config["args"]
        if not asks_for_adaptive(raw):
            _refuse_stray_keys(raw)
            if isinstance(raw, Mapping):
                refuse_ranks_in_plain_run(dict(raw))
            return original(config)
        from llamafactory_adaptive.bridge.plans import agreed_settings, lock_output_folder

        require_seams()
        # The launcher has checked the host's settings; its workers must not touch devices yet.
        checked = agreed_settings(lambda: checked_run(raw, host_too=not is_worker()))
        if not checked.args.get("do_train"):
            if local_rank() == 0:
                logger.warning("do_train is not set, so no ranks are planned and nothing is trained")
            return original(config)  # evaluation of an existing adapter: nothing to allocate
        with lock_output_folder(Path(str(checked.args["output_dir"]))), BaseHandover().offered():
            return _train(original, config, checked)

    return run


def _train(original: Callable[[dict[str, Any]], None], config: dict[str, Any], checked: CheckedRun) -> None:
    from llamafactory_adaptive.bridge.host_run import chat_command
    from llamafactory_adaptive.bridge.plans import agreed_plan
    from llamafactory_adaptive.engines.distributed import from_main, gather
    from llamafactory_adaptive.engines.operator_locks import bounded_waits
    from llamafactory_adaptive.engines.zero import init_deepspeed_on_cpu
    from llamafactory_adaptive.planning.sources import advice

    args, adaptive, started = checked.args, checked.config, time.perf_counter()
    _refuse_deepspeed_alone(args)
    checkpoint = checkpoint_to_resume(args)
    gather("the look into output_dir", lambda: refuse_finished_run(args, checkpoint))
    source = agreed_plan(checked, checkpoint)
    if from_main("the look for steps that are left", lambda: has_ended(args, checkpoint)):
        _tell_of_the_end(args)
        return
    host_args = what_the_host_resumes(args, checkpoint)
    if checkpoint is None:
        _begin_afresh(args)
    callback = _make_callback(args, source, adaptive, checkpoint, started)
    if launched_number() == 0:
        for line in advice(source.plan, adaptive):
            callback.guard.log.warn(line)
    if args.get("deepspeed") and no_accelerator():
        init_deepspeed_on_cpu()
    token = current_run.set(callback)
    settings = config["args"] if host_args is args else host_args
    try:
        with bounded_waits() if args.get("deepspeed") else nullcontext():
            original({**config, "args": settings, "callbacks": [*(config.get("callbacks") or []), callback]})
    finally:
        current_run.reset(token)
    if launched_number() == 0:
        loads_adapter = adapter_to_go_on_with(args) is not None
        callback.finish(Path(args["output_dir"]), loads_adapter, chat_command(args), _told_of_training(args))


def _told_of_training(args: Args) -> dict[str, Any]:
    """Return the settings of the training that a report shows, as far as they are LLaMA-Factory's."""
    from llamafactory_adaptive.reports.learning_rate import TRAINERS_RATE

    rate = args.get("learning_rate")
    return {
        "dataset": split_names(args.get("dataset")),
        "learning_rate": float(TRAINERS_RATE if rate is None else rate),
        "batch_size": layout(args)["global_batch"],
    }


def _tell_of_the_end(args: Args) -> None:
    if launched_number() == 0:
        tell(
            f"the run in {args['output_dir']} has ended at its last step: nothing was trained or written. To go on, "
            "ask for more steps or epochs; to begin anew, set overwrite_output_dir: true or another output_dir"
        )


def _refuse_deepspeed_alone(args: Args) -> None:
    asked = [("deepspeed", given)] if (given := args.get("deepspeed")) else []
    asked += [("ACCELERATE_USE_DEEPSPEED", "true")] if accelerate_starts("DEEPSPEED") else []
    if asked and not is_worker():
        refuse(*asked[0], "DeepSpeed runs under torchrun", "FORCE_TORCHRUN=1")


def _begin_afresh(args: Args) -> None:
    """Move records and checkpoints of an older run in ``output_dir`` aside; every process waits until that is done."""
    from llamafactory_adaptive.engines.distributed import gather

    writes = launched_number() == 0 or (args.get("save_on_each_node") and local_rank() == 0)

    def move() -> None:
        aside = set_previous_run_aside(Path(str(args["output_dir"])), named_paths(args)) if writes else None
        if aside:
            logger.warning(f"the records and checkpoints of an older run in this output_dir were moved to {aside}")

    gather("the beginning of a fresh run", move)


def _make_callback(
    args: Args, source: "PlanSource", adaptive: AdaptiveConfig, checkpoint: Path | None, started: float
) -> Any:
    from llamafactory_adaptive.bridge.host_callback import HostCallback
    from llamafactory_adaptive.methods import make_method
    from llamafactory_adaptive.training.bound_run import RunRequest
    from llamafactory_adaptive.training.guard import PlanGuard
    from llamafactory_adaptive.training.masked_search import SearchRequest
    from llamafactory_adaptive.training.run_log import RunLog

    method, plan = make_method(adaptive.method, adaptive.options), source.plan
    start = _starting_factors(source, adaptive)
    request = RunRequest(
        adaptive.max_nonfinite_steps,
        search=SearchRequest(plan, adaptive, method) if adaptive.search or adaptive.given else None,
        samples=_sample_request(args, method.sampling) if method.traits.samples else None,
        layout=layout(args),
        start=start,
    )
    log = RunLog(plan.method, time.perf_counter() - started, origin=source.origin)
    guard = PlanGuard(plan, log, is_final=adaptive.search is None, start=start)
    remedy = "llamafactory-adaptive doctor checks why"
    return HostCallback(guard, request, checkpoint, remedy)


def _starting_factors(source: "PlanSource", adaptive: AdaptiveConfig) -> Any:
    """Return what the factors of a fresh adapter start from; None where they start as PEFT starts them."""
    from llamafactory_adaptive.adapter.starting_factors import StartingFactors

    if source.start is None:
        return None
    return StartingFactors(adaptive.init, source.start.path, adaptive.init_gamma)


def _sample_request(args: Args, sampling: Any) -> Any:
    """Build the settings by which the training samples of this run are chosen."""
    from llamafactory_adaptive.bridge.fingerprint import identity
    from llamafactory_adaptive.planning.cache import cache_folder
    from llamafactory_adaptive.training.sample_scoring import SampleRequest

    if launched_number() != 0:  # the scores are rank 0's, measured together or from its cache
        return SampleRequest(sampling, run_seed(args))
    return SampleRequest(sampling, run_seed(args), identity(args), cache_folder() / "quality")


def _refuse_stray_keys(raw: Mapping[str, Any] | list[str]) -> None:
    """Refuse the plugin's keys without ``finetuning_type: adaptive``: they would train plain LoRA unnoticed."""
    stray = our_keys(raw)
    if stray:
        kind = raw.get("finetuning_type", "lora") if isinstance(raw, Mapping) else "lora"
        refuse("finetuning_type", kind, f"{', '.join(stray)} would have no effect", "finetuning_type: adaptive")


def no_accelerator() -> bool:
    """Tell whether this machine has no accelerator, so that it computes on its CPU."""
    import torch

    return not torch.accelerator.is_available()
