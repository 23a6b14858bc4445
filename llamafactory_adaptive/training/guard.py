"""The proof that a run trains its plan, from the live model at the beginning to the saved files at the end."""

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from llamafactory_adaptive.adapter.lora import (
    ADAPTER_WEIGHTS,
    factors,
    keep_4bit_unpacked_on_cpu,
    live_layers,
    name_targets_in_full,
)
from llamafactory_adaptive.adapter.verify import check_live, check_saved
from llamafactory_adaptive.engines.distributed import agree_across_ranks, gather, refuse_differences
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.model_card import update_card
from llamafactory_adaptive.reports.tables import closing_words
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart


PLANS_DIFFER = (
    "hold another plan than rank 0 (nodes that score for themselves can differ in the last bit): write one with "
    "`llamafactory-adaptive plan`, copy it to every node and set adaptive_plan"
)
logger = logging.getLogger("llamafactory.adaptive")


def uses_deepspeed(args: Any) -> bool:
    """Whether a Trainer with these arguments trains under DeepSpeed."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def agree_on_steps(state: Any) -> None:
    """Stop processes that would begin or end at other steps here, and not in a collective that never ends."""
    facts = {"global_step": state.global_step, "max_steps": state.max_steps}
    everyone = gather("the first step", lambda: facts)
    refuse_differences(everyone, f"would train other steps than rank 0: {everyone}")


class PlanGuard(RunPart):
    """Refuses to train, save or push anything but the plan.

    Args:
        plan: of the live adapter; over-ranked where ranks are still to be found.
        log: with the counters that messages quote.
        is_final: whether these are the ranks that the run will end with.

    Attributes:
        plan: what is trained, in the end what was found.
        is_final: as above, and once a search has ended.
        deepspeed: whether the run trains under DeepSpeed, known from :meth:`verify_live` on.
    """

    def __init__(self, plan: RankPlan, log: RunLog, is_final: bool = True) -> None:
        self.plan, self.log, self.is_final = plan, log, is_final
        self.searches = not is_final
        self.counters = log.counters
        self.deepspeed = False

    def verify_live(self, args: Any, model: nn.Module) -> None:
        """Refuse to train anything but the plan, which is the same on all processes.

        Raises:
            GuardError: the processes hold other plans, or the live adapter is not of this one.
        """
        self.deepspeed = uses_deepspeed(args)
        agree_across_ranks(self.plan.digest(), PLANS_DIFFER)
        keep_4bit_unpacked_on_cpu(model)
        name_targets_in_full(model, self.plan)
        self.counters.modules_checked = check_live(model, self.plan)

    def settle(self, found: RankPlan) -> None:
        """Take the ranks that a search has found for those to hold the saved adapter to."""
        self.plan, self.is_final = found, True

    # -- while training ----------------------------------------------------------------------------------------------

    def begin_step(self, state: Any, lr_scheduler: Any) -> None:
        """Remember whether the learning rate was ever above zero: only then must the weights have moved."""
        rates = lr_scheduler.get_last_lr() if lr_scheduler is not None else [0.0]
        self.counters.largest_learning_rate = max(self.counters.largest_learning_rate, *map(float, rates))

    def before_step(self, model: nn.Module) -> None:
        """Refuse a first step without a gradient at every adapter factor.

        DeepSpeed keeps gradients to itself, so that :meth:`verify_saved` judges by the end. In a search factors of
        components that are off have none to show; there ``Components`` looks for each module's.
        """
        if self.counters.steps > 0 or self.deepspeed or self.searches:
            return
        trained = [factor for layer, adapter in live_layers(model).values() for factor in factors(layer, adapter)]
        self.counters.gradients_missing = sum(factor.grad is None for factor in trained)
        if self.counters.gradients_missing:
            raise GuardError(f"adapter factors without a gradient at the first step: {self.counters}")

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Count optimizer steps."""
        self.counters.steps += 1

    def verify_push(self, output: Path) -> None:
        """Refuse to push an adapter that is not the plan; what lies there before ranks are final is not this run's."""
        if self.is_final and (output / ADAPTER_WEIGHTS).is_file():
            check_saved(output, self.plan)

    # -- the end -----------------------------------------------------------------------------------------------------

    def verify_run(self) -> None:
        """Refuse a run that did not do what was asked, beyond what the files show."""
        if self.counters.modules_checked == 0:
            raise GuardError(f"the run asked for adaptive ranks but no allocation reached the model: {self.counters}")
        if self.searches and 0 in (self.counters.allocations, self.counters.observations):
            raise GuardError(f"the run asked for {self.plan.method} but no component was chosen: {self.counters}")

    def verify_saved(self, output: Path) -> None:
        """Prove on the main process that the adapter saved in ``output`` is the plan, then complete the model card.

        Raises:
            GuardError: no allocation reached the model, or what was saved is not the plan.
        """
        self.verify_run()
        untrained, moved = check_saved(output, self.plan), self.counters.largest_learning_rate > 0
        modules = len(self.plan.active)
        # Under DeepSpeed nobody saw the gradients at the first step: a factor that never moved is the only sign.
        if moved and untrained and (untrained == modules or self.deepspeed):
            raise GuardError(
                f"{untrained} modules were saved untrained (B is zero), no gradient arrived: {self.counters}"
            )
        if untrained:
            self.log.warn(f"{untrained} of {modules} modules were saved untrained: B is still zero")
        update_card(output / "README.md", self.plan)
        logger.info(
            f"adaptive: adapter in {output} checked: {modules} modules, r={self.plan.largest_rank}, "
            f"alpha/r={self.plan.scale:g} everywhere"
        )

    def finalize(self, output: Path, trained_before: bool) -> None:
        """End a run of the host on its main process: prove the saved adapter and say what came of it.

        Args:
            output: the run's ``output_dir``.
            trained_before: the adapter came from a checkpoint or another run, so no new LoRA config was due.

        Raises:
            GuardError: the host made its adapter without the plan, or as :meth:`verify_saved`.
        """
        if self.counters.configs_injected == 0 and not trained_before:
            raise GuardError(f"the run asked for adaptive ranks but no allocation reached the model: {self.counters}")
        self.verify_saved(output)
        log = self.log
        print(closing_words(self.plan, output, log.overhead_seconds, log.seconds, log.warnings), flush=True)
