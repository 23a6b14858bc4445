"""Checks that a run trains its plan, from the live model at the start to the saved files at the end."""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import has_length

from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS, keep_4bit_unpacked_on_cpu, name_targets_in_full
from llamafactory_adaptive.adapter.starting_factors import StartingFactors
from llamafactory_adaptive.adapter.verify import check_live, check_saved
from llamafactory_adaptive.engines.distributed import agree_across_ranks, gather, refuse_differences
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.launcher import accelerate_starts
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.model_card import update_card
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart


PLANS_DIFFER = (
    "hold another plan than rank 0 (processes that score for themselves can differ in the last bit): compute it on "
    "one of them, save it, and load it on all"
)
logger = logging.getLogger("llamafactory.adaptive")


def uses_deepspeed(args: Any) -> bool:
    """Tell whether a Trainer with these arguments trains under DeepSpeed."""
    return bool(args.deepspeed) or accelerate_starts("DEEPSPEED")


def flattens(trainer: Any) -> bool:
    """Tell whether a Trainer trains under FSDP 1, which packs parameters into flat tensors."""
    sharded = getattr(trainer, "is_fsdp_enabled", False)
    return sharded and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1


def epoch_steps(dataloader: Any, args: Any) -> int | None:
    """Return the optimizer steps of an epoch, as the Trainer counts them; None where the data has no length."""
    if dataloader is None or not has_length(dataloader):
        return None
    batches_per_step: int = args.gradient_accumulation_steps
    return max(1, -(-len(dataloader) // batches_per_step))


def agree_on_steps(state: Any, steps_of_an_epoch: int | None) -> None:
    """Stop every process if any number of steps differs, since a collective would then wait forever."""
    facts = {"global_step": state.global_step, "max_steps": state.max_steps, "epoch_steps": steps_of_an_epoch}
    everyone = gather("the first step", lambda: facts)
    refuse_differences(everyone, f"would train other steps than rank 0: {everyone}")


class PlanGuard(RunPart):
    """Guard of a run, which raises an error if what is trained, saved or pushed is not the plan.

    Args:
        plan: plan of the live adapter; over-ranked while ranks are searched for.
        log: log with the counters that messages quote.
        is_final: whether these are the ranks that the run will end with.
        start: what the factors of this run start from; None where B starts at zero, or was trained before.

    Attributes:
        plan: plan that is trained; after a search, the plan that was found.
        is_final: as above; true once a search has ended.
        watches_gradients: whether the first step's gradients are looked at; they are not where an engine hides them.
    """

    def __init__(
        self, plan: RankPlan, log: RunLog, is_final: bool = True, start: StartingFactors | None = None
    ) -> None:
        self.plan, self.log, self.is_final, self.start = plan, log, is_final, start
        self.counters = log.counters
        self.watches_gradients = True

    def verify_live(self, model: nn.Module, watches_gradients: bool = True) -> None:
        """Check that the plan is the same on all processes, and that the live adapter matches it.

        Args:
            model: model of the Trainer.
            watches_gradients: whether the first step's gradients will be looked at, on which the last check depends.

        Raises:
            GuardError: plans differ between processes, or the live adapter does not match the plan.
        """
        self.watches_gradients = watches_gradients
        agree_across_ranks(self.plan.digest(), PLANS_DIFFER)
        keep_4bit_unpacked_on_cpu(model)
        name_targets_in_full(model, self.plan)
        self.counters.modules_checked = check_live(model, self.plan)

    def settle(self, plan: RankPlan) -> None:
        """Replace the plan by the one that a search has found, with which the saved adapter is then compared.

        Raises:
            GuardError: the search observed or chose no components.
        """
        if 0 in (self.counters.allocations, self.counters.observations):
            raise GuardError(f"the run asked for {plan.method} but no component was chosen: {self.counters}")
        self.plan, self.is_final = plan, True

    # -- while training ----------------------------------------------------------------------------------------------

    def begin_step(self, state: Any, lr_scheduler: Any) -> None:
        """Store the largest learning rate so far: weights must have changed only if it is above zero."""
        rates = lr_scheduler.get_last_lr() if lr_scheduler is not None else [0.0]
        self.counters.largest_learning_rate = max(self.counters.largest_learning_rate, *map(float, rates))

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Count the optimizer step that was just made."""
        self.counters.steps += 1

    def verify_push(self, output: Path) -> None:
        """Check the adapter in ``output`` before a push; until ranks are final, what is there is of another run."""
        if self.is_final and (output / ADAPTER_WEIGHTS).is_file():
            check_saved(output, self.plan)

    # -- the end -----------------------------------------------------------------------------------------------------

    def verify_run(self) -> None:
        """Raise an error if no module was checked, or if a search has not found its ranks."""
        if self.counters.modules_checked == 0:
            raise GuardError(f"the run asked for adaptive ranks but no allocation reached the model: {self.counters}")
        if not self.is_final:
            raise GuardError(f"the run asked for {self.plan.method} but its search has not ended: {self.counters}")

    def verify_saved(self, output: Path) -> None:
        """Check on the main process that the adapter saved in ``output`` matches the plan, then update its model card.

        Raises:
            GuardError: no allocation reached the model, or the saved adapter does not match the plan.
        """
        self.verify_run()
        untrained, moved = check_saved(output, self.plan, self.start), self.counters.largest_learning_rate > 0
        modules, state = len(self.plan.active), "B is still " + ("zero" if self.start is None else "as it started")
        # Where no gradient was looked at in the first step, a factor that never changed is the only sign.
        if moved and untrained and (untrained == modules or not self.watches_gradients):
            raise GuardError(
                f"{untrained} modules were saved untrained ({state}), no gradient arrived: {self.counters}"
            )
        if untrained:
            self.log.warn(f"{untrained} of {modules} modules were saved untrained: {state}")
        update_card(output / "README.md", self.plan)
        ranks = [module.rank for module in self.plan.active]
        logger.info(
            f"adaptive: adapter in {output} checked: {modules} modules, ranks {min(ranks)} to {max(ranks)}, "
            f"alpha/r={self.plan.scale:g} for each"
        )
