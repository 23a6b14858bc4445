"""The part of a run that trains given ranks in the form ``P diag(lambda) Q``: all components, to the end."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from llamafactory_adaptive.training.fixed_ranks import FixedRanks
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.sample_selection import SampleSelection
from llamafactory_adaptive.training.search_checkpoint import SearchCheckpoint


logger = logging.getLogger("llamafactory.adaptive")


class GivenRanks(FixedRanks):
    """Fixed ranks whose lambda, P and Q are trained, with the regulariser of a method: nothing is scored or masked.

    Args:
        guard: guard of the run, with the plan.
        log: receives the lines, and the seconds of the regulariser.
        selection: selection of training samples, if any.
        checkpoint: reader and writer of the exact factors, with the observer that adds the regulariser.
    """

    def __init__(
        self, guard: PlanGuard, log: RunLog, selection: SampleSelection | None, checkpoint: SearchCheckpoint
    ) -> None:
        super().__init__(guard, log, selection)
        self.checkpoint, self.observer = checkpoint, checkpoint.observer

    def announce(self, args: Any, state: Any) -> None:
        """Write plan, heat-map and a log line, and tell in which form the ranks are trained."""
        super().announce(args, state)
        if args.should_save:
            logger.info("adaptive: the given ranks are trained as P diag(lambda) Q, and saved as plain LoRA")

    def see_gradients(self) -> None:
        """Add the gradient of the regulariser, and the seconds that this takes to the overhead."""
        self.observer.before_step(final=True)
        self.log.spend("observing", self.observer.take_seconds())

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Write the exact factors into a checkpoint, beside its plain adapter."""
        self.checkpoint.write(folder, args, state)

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Restore the exact factors of the best checkpoint, which the Trainer has loaded as plain LoRA."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.checkpoint.restore(Path(state.best_model_checkpoint), state.max_steps)
