"""The part of a run whose ranks are fixed before training: it writes plan, heat-map and log lines."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.reports.plots import HEATMAP_FILE, save_heatmap
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart
from llamafactory_adaptive.training.sample_selection import SampleSelection, figures_of


logger = logging.getLogger("llamafactory.adaptive")


class FixedRanks(RunPart):
    """Writer of a run's plan, and of a log line whenever a new subset of samples begins.

    Args:
        guard: guard of the run, with the plan.
        log: receives the lines.
        selection: selection of training samples, if any.
    """

    def __init__(self, guard: PlanGuard, log: RunLog, selection: SampleSelection | None) -> None:
        self.guard, self.log, self.selection = guard, log, selection

    def announce(self, args: Any, state: Any) -> None:
        """Write plan, heat-map and a log line into ``output_dir``."""
        if not args.should_save:  # one process does, or one per node with save_on_each_node
            return
        output, plan = Path(args.output_dir), self.guard.plan
        plan.save(output / PLAN_FILE)
        save_heatmap(plan, output / HEATMAP_FILE)
        b = plan.budget()
        line = {"step": state.global_step, "budget": b, "ranks_changed": len(plan.active)}
        self.log.write(output, {**line, **figures_of(self.selection, state.global_step)})
        logger.info(
            f"adaptive ({plan.method}): {self.log.counters.modules_checked} modules, ranks up to "
            f"{plan.largest_rank}, {b['used_parameters']:,} of {b['asked_parameters']:,} parameters"
        )

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Write a log line if the next step begins a new subset (in a search, allocation lines hold the figures)."""
        step = state.global_step
        if self.selection is not None and args.should_save and self.selection.begins_at(step):
            self.log.write(Path(args.output_dir), {"step": step, "event": "sampling", **self.selection.figures(step)})
