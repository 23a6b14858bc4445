"""A run of LLaMA-Factory, with the facts that planning needs of it."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge import fingerprint, measure_process, target_shapes
from llamafactory_adaptive.bridge.arguments import Args, our_keys, split_names
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.scoring_job import ScoringJob
from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.errors import PlanError, refuse
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.training.checkpoint_files import damage, is_sealed


_LONGEST_SCORING = 6 * 3600.0  # ddp_timeout is often set to years


def longest_scoring(run: CheckedRun) -> float:
    """Return for how many seconds processes of a job wait for rank 0's plan: ``ddp_timeout``, at most 6 hours."""
    return min(float(run.args.get("ddp_timeout") or 1800), _LONGEST_SCORING)


def adapter_to_go_on_with(args: Args) -> Path | None:
    """Return the trained adapter that the host loads, where it makes no new LoRA configuration; None for a new one."""
    named = [] if args.get("create_new_adapter") else split_names(args.get("adapter_name_or_path"))
    return Path(named[-1]) if named else None


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
        """Run a measurement in a process of its own, which writes the statistics to ``path``."""
        job = ScoringJob.from_run(self.run, [shape.name for shape in self.shapes], measurement, path)
        measure_process.measure_in_own_process(job)
