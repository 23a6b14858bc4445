"""One training run inside LLaMA-Factory: hand the plan over to the host, prove the result."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamafactory_adaptive.bridge.arguments import (
    Args,
    asks_for_adaptive,
    local_rank,
    our_keys,
    run_seed,
    to_mapping,
)
from llamafactory_adaptive.bridge.host_check import check_host_settings, check_output
from llamafactory_adaptive.bridge.plans import advice, agreed_plan, held, refuse_finished_run
from llamafactory_adaptive.bridge.resuming import (
    checkpoint_to_resume,
    layout,
    named_paths,
    refuse_ranks_in_plain_run,
    what_the_host_resumes,
)
from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.config import AdaptiveConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, Problem
from llamafactory_adaptive.files import cannot_write, could_not_write
from llamafactory_adaptive.leftovers import set_older_run_aside
from llamafactory_adaptive.plan import RankPlan


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


def adaptive_training_function(
    original: Callable[[dict[str, Any]], None], require_seams: Callable[[], None]
) -> Callable[[dict[str, Any]], None]:
    """Wrap the host's training function: adaptive runs get their plan first and their proof last."""

    @wraps(original)
    def run(config: dict[str, Any]) -> None:
        raw = config["args"]
        if not asks_for_adaptive(raw):
            _refuse_stray_keys(raw)
            if isinstance(raw, Mapping):
                refuse_ranks_in_plain_run(dict(raw))
            return original(config)
        require_seams()
        args = to_mapping(raw)
        adaptive = parse_config(args)
        if "LOCAL_RANK" not in os.environ:  # workers of a launcher, which has done so, must not meet devices yet
            check_output(args)
            check_host_settings(args)
        if not args.get("do_train"):
            if local_rank() == 0:
                logger.warning("do_train is not set, so no ranks are planned and nothing is trained")
            return original(config)  # evaluation of an existing adapter: nothing to allocate
        with held(Path(str(args["output_dir"]))):
            return _train(original, config, args, adaptive)

    return run


def _train(original: Callable[[dict[str, Any]], None], config: dict[str, Any], args: Args, adaptive: AdaptiveConfig
           ) -> None:  # fmt: skip
    from llamafactory_adaptive.controller import finish
    from llamafactory_adaptive.divergence import DivergenceWatch
    from llamafactory_adaptive.operator_locks import bounded_waits
    from llamafactory_adaptive.zero import init_deepspeed_on_cpu

    started = time.perf_counter()
    _refuse_deepspeed_alone(args)
    checkpoint = checkpoint_to_resume(args)
    refuse_finished_run(args, checkpoint)
    plan, trained_before = agreed_plan(args, adaptive, checkpoint)
    host_args = what_the_host_resumes(args, checkpoint)
    if checkpoint is None:
        _begin_afresh(args)
    callback = _make_callback(args, plan, adaptive, checkpoint, started)
    callback.layout = layout(args)
    if local_rank() == 0:
        for line in advice(plan, adaptive):
            callback.warn(line)
    callback.watch = DivergenceWatch(adaptive.max_nonfinite_steps, Path(str(args["output_dir"])))
    if args.get("deepspeed") and no_accelerator():
        init_deepspeed_on_cpu()
    token = _current.set(callback)
    settings = config["args"] if host_args is args else host_args
    try:
        with bounded_waits() if args.get("deepspeed") else nullcontext():
            original({**config, "args": settings, "callbacks": [*(config.get("callbacks") or []), callback]})
    finally:
        _current.reset(token)
    if int(os.environ.get("RANK", "0")) == 0:
        finish(Path(args["output_dir"]), callback, trained_before)


def _refuse_deepspeed_alone(args: Args) -> None:
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    asked = [("deepspeed", given)] if (given := args.get("deepspeed")) else []
    asked += [("ACCELERATE_USE_DEEPSPEED", by_accelerate)] if by_accelerate == "true" else []
    if asked and "LOCAL_RANK" not in os.environ:
        raise AdaptiveConfigError([Problem(*asked[0], "DeepSpeed runs under torchrun", "FORCE_TORCHRUN=1")])


def _begin_afresh(args: Args) -> None:
    """Nothing of an older run in the folder may be taken for this one's; every process goes on when that is done."""
    from llamafactory_adaptive.processes import gather, launched_number

    writes = launched_number() == 0 or (args.get("save_on_each_node") and local_rank() == 0)

    def move() -> None:
        aside = set_older_run_aside(Path(str(args["output_dir"])), named_paths(args)) if writes else None
        if aside:
            logger.warning(f"the records and checkpoints of an older run in this output_dir were moved to {aside}")

    gather("the beginning of a fresh run", move)


def _make_callback(
    args: Args, plan: RankPlan, adaptive: AdaptiveConfig, checkpoint: Path | None, started: float
) -> Any:
    from llamafactory_adaptive.pipeline import make_method

    method = make_method(adaptive)
    selection = _make_selection(args, method)
    if adaptive.course is None:
        from llamafactory_adaptive.controller import AdaptiveCallback

        return AdaptiveCallback(plan, time.perf_counter() - started, checkpoint, selection)
    from llamafactory_adaptive.dynamic import DynamicCallback

    return DynamicCallback(plan, adaptive, method, time.perf_counter() - started, checkpoint, selection)


def _make_selection(args: Args, method: Any) -> Any:
    """The data side of the run, where the method has one."""
    sampling = getattr(method, "sampling", None)
    if sampling is None:
        return None
    from llamafactory_adaptive.bridge.loading import identity
    from llamafactory_adaptive.pipeline import cache_folder
    from llamafactory_adaptive.selection import Selection

    return Selection(sampling, run_seed(args), identity(args), cache_folder() / "quality")


def meet_trainer(trainer_class: type) -> type:
    """A subclass of one of the host's trainers that shows itself to the run's callback once it is built.

    Callbacks are not given the Trainer, and the Trainer's accelerator is where complete, unclipped gradients are
    found.
    """

    class Met(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            callback = _current.get()
            self.adaptive_callback = callback
            if callback is not None:
                callback.attach(self)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            watch = getattr(self.adaptive_callback, "watch", None)
            if watch is not None:
                watch.see(loss)
            return loss

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            selection = getattr(self.adaptive_callback, "selection", None)
            if selection is not None:
                return selection.sampler
            return super()._get_train_sampler(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if self.adaptive_callback is None:
                super()._save_checkpoint(*args, **kwargs)
                return
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self.adaptive_callback.begin_checkpoint(folder, self.args)
            try:
                super()._save_checkpoint(*args, **kwargs)
            except (OSError, RuntimeError, SafetensorError) as error:
                if not could_not_write(error):
                    raise
                raise cannot_write(folder, error) from error
            if not self.args.save_only_model:
                self.adaptive_callback.seal(folder, self.args)

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            if self.adaptive_callback is not None and not self.args.save_only_model:
                self.adaptive_callback.seal(Path(checkpoint_folder), self.args)
            super()._push_from_checkpoint(checkpoint_folder)

        def _load_best_model(self) -> None:
            if self.adaptive_callback is not None:
                self.adaptive_callback.check_best(Path(self.state.best_model_checkpoint))
            super()._load_best_model()

        def _save_rng_state(self, output_dir: str) -> None:
            # Before the Trainer writes its own state, pushes the checkpoint and deletes older ones.
            super()._save_rng_state(output_dir)
            if self.adaptive_callback is not None:
                self.adaptive_callback.save_into(Path(output_dir), self.args, self.state)

    Met.__name__, Met.__qualname__, Met.__module__ = trainer_class.__name__, trainer_class.__qualname__, __name__
    return Met


def _refuse_stray_keys(raw: Mapping[str, Any] | list[str]) -> None:
    """Keys of ours without ``finetuning_type: adaptive`` would train plain LoRA unnoticed."""
    stray = our_keys(raw)
    if stray:
        kind = raw.get("finetuning_type", "lora") if isinstance(raw, Mapping) else "lora"
        raise AdaptiveConfigError(
            [Problem("finetuning_type", kind, f"{', '.join(stray)} would have no effect", "finetuning_type: adaptive")]
        )


def no_accelerator() -> bool:
    """Whether this machine computes on its CPU."""
    import torch

    return not torch.accelerator.is_available()
