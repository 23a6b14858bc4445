"""The part of a run that tells how its learning rate compares with that of plain LoRA."""

import logging
from typing import Any

from llamafactory_adaptive.reports.learning_rate import rate_warning, rate_words
from llamafactory_adaptive.training.masked_search import SearchRequest
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart


logger = logging.getLogger("llamafactory.adaptive")


class RateAdvice(RunPart):
    """Advice at the first step on the learning rate, where the adapter does not start as plain LoRA does.

    Args:
        request: settings of what trains.
        log: receives the warning.
    """

    def __init__(self, request: SearchRequest, log: RunLog) -> None:
        self.request, self.log = request, log

    def announce(self, args: Any, state: Any) -> None:
        """Write which learning rate of plain LoRA has the same first update, and warn if that is very small."""
        if not args.should_save or state.global_step > 0 or "adam" not in args.optim:
            return
        if words := rate_words(args.learning_rate, self.request.slowdown):
            logger.info(f"adaptive ({self.request.config.method}): {words}")
        if warning := rate_warning(args.learning_rate, self.request.slowdown):
            self.log.warn(warning)
