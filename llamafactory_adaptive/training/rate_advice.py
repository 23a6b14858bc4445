"""The part of a run that tells how its learning rate compares with that of plain LoRA."""

import logging
from typing import Any

from llamafactory_adaptive.reports.learning_rate import rate_advice
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart


logger = logging.getLogger("llamafactory.adaptive")


class RateAdvice(RunPart):
    """Advice at the first step on the learning rate, where the adapter does not start as plain LoRA does.

    Args:
        trainer: the run's Trainer.
        method: name of the run's method.
        slowdown: how many times smaller the first update of a component is than plain LoRA's at the same rate.
        log: receives the warning.
    """

    def __init__(self, trainer: Any, method: str, slowdown: float, log: RunLog) -> None:
        self.trainer, self.method, self.slowdown, self.log = trainer, method, slowdown, log

    def announce(self, args: Any, state: Any) -> None:
        """Write which learning rate of plain LoRA has the same first update, and warn if that is very small."""
        if not args.should_save or state.global_step > 0:
            return
        groups = self.trainer.optimizer.param_groups
        # A schedule begins at a smaller rate and keeps the one that it leads to.
        one_rate = len({group.get("initial_lr", group["lr"]) for group in groups}) == 1
        words, warning = rate_advice(args.learning_rate, self.slowdown, args.optim, one_rate)
        if words:
            logger.info(f"adaptive ({self.method}): {words}")
        if warning:
            self.log.warn(warning)
