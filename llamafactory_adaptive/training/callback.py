"""Watches an adaptive run through the Trainer: proves that the plan is what trains, keeps its files."""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from llamafactory_adaptive.adapter.lora import (
    ADAPTER_WEIGHTS,
    factors,
    keep_4bit_unpacked_on_cpu,
    live_layers,
    name_targets_in_full,
)
from llamafactory_adaptive.adapter.verify import check_live, check_saved
from llamafactory_adaptive.engines.distributed import (
    agree_across_ranks,
    from_main,
    gather,
    refuse_differences,
    wait_for_all,
)
from llamafactory_adaptive.errors import GuardError, PlanError
from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE, append_line, write_digests
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.model_card import update_card
from llamafactory_adaptive.reports.plots import HEATMAP_FILE, save_heatmap
from llamafactory_adaptive.reports.tables import closing_words
from llamafactory_adaptive.training.checkpoint_files import damage, is_sealed, unseal, write_layout
from llamafactory_adaptive.training.divergence import DivergenceWatch
from llamafactory_adaptive.training.guard import Counters
from llamafactory_adaptive.training.sample_selection import Selection


logger = logging.getLogger("llamafactory.adaptive")  # a child of the host's logger: its format, its handlers


class AdaptiveCallback(TrainerCallback):  # type: ignore[misc]
    """Drives one run on every rank; only the main process writes.

    Args:
        plan: the ranks to train.
        overhead_seconds: what planning cost, for the log.
        checkpoint: what the run resumes from, if anything.
        selection: of training samples, if any.
    """

    def __init__(
        self,
        plan: RankPlan,
        overhead_seconds: float,
        checkpoint: Path | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.plan = plan
        self.counters = Counters()
        self.overhead_seconds = overhead_seconds
        self.checkpoint, self.selection = checkpoint, selection
        self.watch: DivergenceWatch | None = None
        self.layout: Mapping[str, Any] | None = None  # how weights are spread over processes, for checkpoints
        self.deepspeed = False
        self.warnings: list[str] = []
        self.started = time.perf_counter()

    def warn(self, text: str) -> None:
        """Tell the user now, and once more at the end of the run."""
        logger.warning(text)
        self.warnings.append(text)

    def attach(self, trainer: Any) -> None:
        """Meet the Trainer before it makes its data loader and its optimizer."""
        if self.selection is not None:
            self.selection.attach(trainer)

    def select(self, args: Any, state: Any, dataloader: Any) -> None:
        """Have samples scored, or take back what was known of them, before the first step draws any."""
        if self.selection is None:
            return
        resumed = self.checkpoint if state.global_step > 0 else None
        self.overhead_seconds += self.selection.begin(state.max_steps, dataloader, resumed)
        agree_across_ranks(self.selection.digest(), QUALITIES_DIFFER)
        if args.should_save:
            self.selection.report(Path(args.output_dir), state.global_step, self.plan)

    def data_figures(self, step: int) -> dict[str, Any]:
        """What log lines say of the samples in use from ``step`` on."""
        return {} if self.selection is None else self.selection.figures(step)

    def prove(self, args: Any, model: nn.Module) -> None:
        """Refuse to train anything but the plan."""
        self.deepspeed = bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        agree_across_ranks(self.plan.digest(), PLANS_DIFFER)
        keep_4bit_unpacked_on_cpu(model)
        name_targets_in_full(model, self.plan)
        self.counters.modules_checked = check_live(model, self.plan)

    def agree_on_steps(self, state: Any) -> None:
        """Processes that would begin or end at other steps stop here, and not in a collective that never ends."""
        facts = {"global_step": state.global_step, "max_steps": state.max_steps}
        everyone = gather("the first step", lambda: facts)
        refuse_differences(everyone, f"would train other steps than rank 0: {everyone}")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Prove the plan, then put it with picture and log line into ``output_dir``."""
        self.prove(args, model)
        self.agree_on_steps(state)
        self.select(args, state, kwargs.get("train_dataloader"))
        if args.should_save:  # one process, or one per node with save_on_each_node
            output = Path(args.output_dir)
            self.plan.save(output / PLAN_FILE)
            save_heatmap(self.plan, output / HEATMAP_FILE)
            b = self.plan.budget()
            changed = len(self.plan.active)
            figures = self.data_figures(state.global_step)
            self.write_log(output, {"step": state.global_step, "budget": b, "ranks_changed": changed, **figures})
            logger.info(
                f"adaptive ({self.plan.method}): {self.counters.modules_checked} modules, ranks up to "
                f"{self.plan.largest_rank}, {b['used_parameters']:,} of {b['asked_parameters']:,} parameters"
            )

    def write_log(self, output: Path, line: Mapping[str, Any]) -> None:
        """Append one line, with what every line has."""
        facts = {
            "method": self.plan.method,
            "counters": asdict(self.counters),
            "overhead_seconds": round(self.overhead_seconds, 3),
            "time": time.time(),
        }
        append_line(output / LOG_FILE, json.dumps({**line, **facts}))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the data loader asks for the samples of an epoch."""
        if self.selection is not None:
            self.selection.sampler.begin_epoch(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Every adapter factor must have a gradient at the first step (DeepSpeed keeps its own; judged at the end)."""
        if self.counters.steps == 0 and not self.deepspeed:
            trained = [factor for layer, adapter in live_layers(model).values() for factor in factors(layer, adapter)]
            self.counters.gradients_missing = sum(factor.grad is None for factor in trained)
            if self.counters.gradients_missing:
                raise GuardError(f"adapter factors without a gradient at the first step: {self.counters}")

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Remember whether the learning rate was ever above zero: only then must the weights have moved."""
        rates = lr_scheduler.get_last_lr() if lr_scheduler is not None else [0.0]
        self.counters.largest_learning_rate = max(self.counters.largest_learning_rate, *map(float, rates))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count optimizer steps; stop a run that has gone wrong; say when another subset begins."""
        self.counters.steps += 1
        if self.watch is not None:
            was_skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
            self.watch.end_step(state.global_step, kwargs["model"], was_skipped)
        if self.selection is not None and args.should_save and self.selection.begins_at(state.global_step):
            self.log_subset(Path(args.output_dir), state.global_step)

    def log_subset(self, output: Path, step: int) -> None:
        """A line of its own."""
        self.write_log(output, {"step": step, "event": "sampling", **self.data_figures(step)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse an adapter that is not finite; say how often each sample was used."""
        if self.watch is not None:
            self.watch.refuse_end(state.global_step, kwargs["model"])
        if self.selection is not None and args.should_save:
            self.selection.report(Path(args.output_dir), state.global_step, self.plan)

    def judge(self) -> None:
        """Raise where a finished run did not do what was asked, beyond what the files show."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing unchecked goes to a hub (pushes during training come from checkpoints, before the final save)."""
        if (Path(args.output_dir) / ADAPTER_WEIGHTS).is_file():
            check_saved(Path(args.output_dir), self.plan)

    def begin_checkpoint(self, folder: Path, args: Any) -> None:
        """What marks an older checkpoint of that name as complete goes before it is written over."""
        if args.should_save:
            unseal(folder)

    def save_into(self, folder: Path, args: Any, state: Any) -> None:
        """A checkpoint carries the plan it was trained on; resuming checks it."""
        if args.should_save:
            if self.selection is not None:
                self.selection.save(folder)
            self.current_plan().save(folder / PLAN_FILE)
            if self.layout is not None:
                write_layout(folder, self.layout)

    def seal(self, folder: Path, args: Any) -> None:
        """Note the digests of a checkpoint once every process has written its files into it."""
        wait_for_all(f"the end of saving {folder.name}")
        if args.should_save and folder.is_dir() and not is_sealed(folder):
            write_digests(folder)

    def check_best(self, folder: Path) -> None:
        """Refuse to end with a damaged checkpoint.

        Raises:
            PlanError: on every process.
        """
        fault = from_main(f"the check of {folder.name}", lambda: damage(folder))
        if fault:
            raise PlanError(
                f"{folder}, the best checkpoint, is damaged: {fault}; run the same command with "
                "load_best_model_at_end: false, which resumes from the newest checkpoint"
            )

    def current_plan(self) -> RankPlan:
        """With the ranks now in use."""
        return self.plan

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With ``save_only_model`` the Trainer passes over the place where checkpoints get their plan."""
        if args.save_only_model:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.save_into(folder, args, state)
            self.seal(folder, args)


QUALITIES_DIFFER = (
    "hold other sample qualities than rank 0, so they would draw other subsets; delete the cache folder and run again"
)
PLANS_DIFFER = (
    "hold another plan than rank 0 (nodes that score for themselves can differ in the last bit): write one with "
    "`llamafactory-adaptive plan`, copy it to every node and set adaptive_plan"
)


def prove_saved(output: Path, callback: AdaptiveCallback) -> None:
    """Prove on the main process that the saved adapter is the plan, then complete the model card.

    Args:
        output: where the adapter was saved.
        callback: with plan and counters.

    Raises:
        GuardError: no allocation reached the model, or what was saved is not the plan.
    """
    counters = callback.counters
    if counters.modules_checked == 0:
        raise GuardError(f"the run asked for adaptive ranks but no allocation reached the model: {counters}")
    callback.judge()
    untrained, moved = check_saved(output, callback.plan), counters.largest_learning_rate > 0
    everything = untrained == len(callback.plan.active)
    # Under DeepSpeed nobody saw the gradients at the first step: a factor that never moved is the only sign there is.
    if moved and untrained and (everything or callback.deepspeed):
        raise GuardError(f"{untrained} modules were saved untrained (B is zero), no gradient arrived: {counters}")
    if untrained:
        callback.warn(f"{untrained} of {len(callback.plan.active)} modules were saved untrained: B is still zero")
    update_card(output / "README.md", callback.plan)
    logger.info(
        f"adaptive: adapter in {output} checked: {len(callback.plan.active)} modules, r={callback.plan.largest_rank}, "
        f"alpha/r={callback.plan.scale:g} everywhere"
    )


def finish(output: Path, callback: AdaptiveCallback, trained_before: bool) -> None:
    """End a run of the host on its main process: prove the saved adapter and say what came of it.

    Args:
        output: the run's ``output_dir``.
        callback: with plan and counters.
        trained_before: the adapter came from a checkpoint or another run, so no new LoRA config was due.

    Raises:
        GuardError: the host made its adapter without the plan, or as :func:`prove_saved`.
    """
    if callback.counters.configs_injected == 0 and not trained_before:
        raise GuardError(f"the run asked for adaptive ranks but no allocation reached the model: {callback.counters}")
    prove_saved(output, callback)
    seconds = time.perf_counter() - callback.started
    print(closing_words(callback.plan, output, callback.overhead_seconds, seconds, callback.warnings), flush=True)
