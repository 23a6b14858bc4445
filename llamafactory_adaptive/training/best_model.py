"""Evaluations that count for the best checkpoint and for early stopping, in a run that searches for ranks.

Until ranks are final the adapter is larger than what will be saved. Its losses say little about that, and its
checkpoints would have to be cut without training afterwards.
"""

import logging
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback

from llamafactory_adaptive.ranks.schedule import AnySchedule, Refreshes
from llamafactory_adaptive.training.rank_search import RankSearchState
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart


logger = logging.getLogger("llamafactory.adaptive")


class BestModel(RunPart):
    """Rule by which evaluations count: those with final ranks, or all of them if the configuration says so.

    Args:
        search: decisions of the search so far.
        schedule: steps at which components are chosen.
        log: log of the run.
        callbacks: callbacks of the Trainer, one of which may stop early.
    """

    def __init__(self, search: RankSearchState, schedule: AnySchedule, log: RunLog, callbacks: list[Any]) -> None:
        self.search, self.schedule, self.log, self.callbacks = search, schedule, log, callbacks
        self.waits, self.warned = search.config.best_model_from == "final", False

    def counts_as_best(self) -> bool:
        """Tell whether an evaluation now counts."""
        return self.search.final or not self.waits

    def announce(self, args: Any, state: Any) -> None:
        """Warn if too few evaluations will count, and drop the best one of a resumed run that no longer counts."""
        readers = _readers(args, self.callbacks) if self.waits else []
        if not readers:
            return
        self._forget_earlier(state)
        count = evaluations_from(self.schedule.end, args, state)
        self.warned = args.should_save and count is not None and count < 2
        if self.warned:
            many = "only one evaluation comes" if count else "no evaluation comes"
            self.log.warn(
                f"{many} after the ranks are final (step {self.schedule.end} of {state.max_steps}) and earlier ones "
                f"do not count, so {' and '.join(readers)} cannot choose, and the last adapter is saved; "
                f"{self._remedy(state.max_steps)}"
            )

    def _forget_earlier(self, state: Any) -> None:
        best = state.best_global_step
        if best is not None and not self.schedule.is_final(best):
            logger.info(f"adaptive: the best evaluation so far (step {best}) no longer counts: ranks were not final")
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _remedy(self, total_steps: int) -> str:
        width = total_steps - self.schedule.end
        ways = [f"evaluate more often (eval_steps: {max(1, width // 4)})"] if width else []
        ways += ["raise adaptive_final_ratio"] if not isinstance(self.schedule, Refreshes) else []
        return ", ".join([*ways, "or set adaptive_best_model_from: start"])

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Warn if there was no best checkpoint to load, unless that was said before."""
        lost = args.load_best_model_at_end and state.best_model_checkpoint is None
        if self.waits and lost and args.should_save and not self.warned:
            self.log.warn(
                f"no checkpoint was evaluated after the ranks were final (step {self.schedule.end}), so there is none "
                "that load_best_model_at_end could load; the last adapter is saved"
            )


def _readers(args: Any, callbacks: list[Any]) -> list[str]:
    """List what depends on the best evaluation."""
    asked = ["load_best_model_at_end"] if args.load_best_model_at_end else []
    asked += ["save_strategy: best"] if args.save_strategy == "best" else []
    early = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    return [*asked, *(["early stopping"] if early else [])]


def evaluations_from(first: int, args: Any, state: Any) -> int | None:
    """Count the evaluations from step ``first`` on; None if that cannot be known before training."""
    total = state.max_steps
    if args.eval_strategy == "steps":  # and at the last step, in any case
        steps = {*range(state.eval_steps, total + 1, state.eval_steps), total}
        return len([step for step in steps if step >= max(first, args.eval_delay)])
    epochs = int(args.num_train_epochs)
    if args.eval_strategy == "epoch" and args.max_steps <= 0 and epochs == args.num_train_epochs:
        ends = [(epoch, total * epoch // epochs) for epoch in range(1, epochs + 1)]
        return len([step for epoch, step in ends if step >= first and epoch >= args.eval_delay])
    return None
