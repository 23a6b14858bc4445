"""A run of LLaMA-Factory, with the facts that planning needs of it."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from llamafactory_adaptive.bridge import fingerprint, measure_process, target_shapes
from llamafactory_adaptive.bridge.arguments import Args, adapter_to_go_on_with, our_keys, split_names
from llamafactory_adaptive.bridge.base_loading import handover
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.scoring_job import ScoringJob
from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.errors import PlanError, refuse
from llamafactory_adaptive.launcher import accelerate_starts, is_worker
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.training.checkpoint_files import damage, is_sealed


_LONGEST_SCORING = 6 * 3600.0  # ddp_timeout is often set to years


def longest_scoring(run: CheckedRun) -> float:
    """Return for how many seconds processes of a job wait for rank 0's plan: ``ddp_timeout``, at most 6 hours."""
    return min(float(run.args.get("ddp_timeout") or 1800), _LONGEST_SCORING)


# What the host's chat has to be told of a base besides its name: how it is loaded and addressed.
_OF_THE_BASE = ("template", "trust_remote_code", "quantization_bit", "quantization_method")


def chat_command(args: Args) -> str:
    """Write the command that talks to the adapter of a run: its base, and adapters that were merged into it before."""
    output, named = str(args["output_dir"]), split_names(args.get("adapter_name_or_path"))
    merged = named if args.get("create_new_adapter") else named[:-1]
    settings = {"model_name_or_path": args["model_name_or_path"], "adapter_name_or_path": ",".join([*merged, output])}
    settings |= {key: args[key] for key in _OF_THE_BASE if args.get(key)}
    return " ".join(["llamafactory-cli chat", *(f"--{key} {quote(str(value))}" for key, value in settings.items())])


class LlamaFactoryRun:
    """One training run of LLaMA-Factory, described by its settings.

    Args:
        run: the checked settings.
        checkpoint: the checkpoint it resumes from, if any.

    Raises:
        AdaptiveError: the host could not load that checkpoint, or the adapter to go on with is damaged.
    """

    def __init__(self, run: CheckedRun, checkpoint: Path | None = None) -> None:
        self.run, self.checkpoint, args = run, checkpoint, run.args
        self.adapter = adapter_to_go_on_with(args)
        if checkpoint is not None and args.get("stage") == "rm" and not args.get("deepspeed"):
            reason = "without DeepSpeed the Trainer cannot load the value-head checkpoints that LLaMA-Factory writes"
            refuse("resume_from_checkpoint", str(checkpoint), reason, "overwrite_output_dir: true")
        adapter = self.adapter
        if checkpoint is None and adapter and is_sealed(adapter) and (fault := damage(adapter)):
            raise PlanError(f"{adapter} is damaged: {fault}; go on from another checkpoint or adapter")

    @cached_property
    def shapes(self) -> list[ModuleShape]:
        """Return the target modules with their shapes, from the model on the meta device."""
        return target_shapes.target_shapes(self.run.args)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Return everything that determines the statistics, JSON-able."""
        return fingerprint.identity(self.run.args)

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """Return the facts that a plan records of its origin."""
        return fingerprint.provenance(self.run.args)

    @property
    def given_keys(self) -> Collection[str]:
        """List the adaptive settings that the user wrote."""
        return our_keys(self.run.args)

    def measure(self, measurement: Measurement, path: Path) -> None:
        """Run a measurement, which writes the statistics to ``path``: where this process trains in it, if it can."""
        job = ScoringJob.from_run(self.run, [shape.name for shape in self.shapes], measurement, path)
        base = handover.get()
        if base is not None and measures_here(self.run, str(self.provenance.get("architecture"))):
            measure_process.measure_in_training_process(job, base)
        else:
            measure_process.measure_in_own_process(job)


# Settings that change modules or weights of the base as it is loaded, or have it loaded by other code.
_LOADED_OTHERWISE = ("use_unsloth", "use_kt", "use_hyper_parallel", "mixture_of_depths", "train_from_scratch",
                     "enable_liger_kernel", "shift_attn", "moe_aux_loss_coef", "resize_vocab", "add_tokens",
                     "add_special_tokens", "new_special_tokens_config", "create_new_adapter",
                     "infer_dtype")  # fmt: skip


def measures_here(run: CheckedRun, architecture: str) -> bool:
    """Tell whether a training process may measure its base: it trains alone, a text model that it loads unchanged."""
    from llamafactory.extras.misc import use_ray

    args = run.args
    alone = not (is_worker() or use_ray() or accelerate_starts("FSDP") or accelerate_starts("DEEPSPEED"))
    unchanged = not any(args.get(key) for key in _LOADED_OTHERWISE)
    quantised = str(args.get("quantization_bit")) in ("None", "4") and args.get("quantization_method", "bnb") == "bnb"
    text = architecture.endswith("ForCausalLM")
    return alone and unchanged and quantised and text and not run.config.placement.asks_for_own_process
