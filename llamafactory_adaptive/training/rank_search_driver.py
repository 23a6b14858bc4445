"""The part of a run that searches for ranks: observe, regularise, allocate, log, save, cut to the ranks found.

Every process makes every decision itself from the same numbers, and compares it with the other processes.
"""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from llamafactory_adaptive.accelerator import bytes_held, peak_memory
from llamafactory_adaptive.engines.distributed import agree_across_ranks, synchronize
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.files import PLAN_FILE, digest_of
from llamafactory_adaptive.methods import ExchangingMethod, ReallocatingMethod, SpectralMethod
from llamafactory_adaptive.ranks.schedule import AnySchedule, Exchanges, short_run_warning
from llamafactory_adaptive.reports.plots import HEATMAP_FILE, HISTORY_FILE, save_heatmap, save_history
from llamafactory_adaptive.seeding import seeded_index
from llamafactory_adaptive.training.component_resets import begin_new, rescale_lambda, reset_lambda, restart
from llamafactory_adaptive.training.divergence import DivergenceWatch
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.masked_search import MaskedSearch
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.rank_search import Exchange, Masks, counts
from llamafactory_adaptive.training.rotation import rotate
from llamafactory_adaptive.training.run_part import RunPart
from llamafactory_adaptive.training.sample_selection import SampleSelection, figures_of
from llamafactory_adaptive.training.search_checkpoint import SearchCheckpoint


DECISIONS_DIFFER = (
    "chose other components than rank 0: their scores differ, so the processes no longer train one adapter; this is a "
    "hardware fault or a bug, and the run stops here (the last checkpoint is intact)"
)
logger = logging.getLogger("llamafactory.adaptive")


class RankSearchDriver(RunPart):
    """Driver of a search for ranks, in which a dynamic method chooses rank-1 components while they train.

    Args:
        search: the live adapter, and the decisions so far.
        observer: passes gradients to the method.
        schedule: steps at which components are chosen, and the budget at each.
        checkpoint: reader and writer of the exact state.
        guard: receives the plan that is found.
        watch: raises an error if components are to be chosen after a loss that is not finite.
        selection: selection of training samples, if any.
        step: optimizer steps already made.
    """

    def __init__(
        self,
        search: MaskedSearch,
        observer: Observer,
        schedule: AnySchedule,
        checkpoint: SearchCheckpoint,
        guard: PlanGuard,
        watch: DivergenceWatch,
        selection: SampleSelection | None,
        step: int,
    ) -> None:
        self.search, self.observer, self.schedule, self.checkpoint = search, observer, schedule, checkpoint
        self.guard, self.watch, self.selection, self.step = guard, watch, selection, step
        self.log, self.start, self.method = guard.log, search.request.start, search.request.method
        self.state, self.triplets, self.components = search.state, search.triplets, observer.components

    def announce(self, args: Any, state: Any) -> None:
        """Write to the log with which ranks and schedule the search begins or resumes."""
        if not args.should_save:
            return
        if warning := short_run_warning(self.schedule, state.max_steps):
            self.log.warn(warning)
        event, ranks = "resumed" if self.step else "begin", counts(self.triplets.masks)
        names = [module.name for module in self.start.modules]
        line = {"step": self.step, "event": event, "interval": self.schedule.interval}
        self._write(args, {**line, "modules": names, "ranks": ranks})
        logger.info(
            f"adaptive ({self.start.method}): {self.log.counters.modules_checked} modules start at rank {max(ranks)}, "
            f"{self.schedule.describe(self.start.budget_kind)} of {state.max_steps}"
        )

    # -- during a step -----------------------------------------------------------------------------------------------

    def begin_step(self, state: Any, lr_scheduler: Any) -> None:
        """Start observing a step, at its first micro-batch."""
        self.step = state.global_step
        self.observer.begin(self.step, self.state.final)

    def end_micro_batch(self) -> None:
        """Set the path position of the next micro-batch of the step."""
        self.observer.next_micro_batch(self.state.final)

    def see_gradients(self) -> None:
        """Pass the step's gradients to the method, and add the seconds that this takes to the overhead."""
        self.observer.before_step(self.state.final)
        self.log.spend("observing", self.observer.take_seconds())

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """End the step, so that evaluation uses what would be saved; allocate if it is due."""
        self.step = state.global_step
        self.triplets.position.leave()
        if not self.state.final and self.schedule.due(self.step):
            trains_on = self.step < state.max_steps
            self._allocate(args, self.schedule.budget(self.step), self.schedule.is_final(self.step), trains_on)

    # -- allocation --------------------------------------------------------------------------------------------------

    def _allocate(self, args: Any, budget: int, final: bool, trains_on: bool) -> None:
        """Keep the best components under ``budget``, and check that every process kept the same."""
        synchronize()  # what follows waits for the device anyway, and its work until here is training
        started, peak = time.perf_counter(), peak_memory()
        self.watch.refuse(self.step, "choosing ranks")
        if self.log.counters.observations == 0:
            raise GuardError(
                f"components are to be chosen at step {self.step}, but none was observed: {self.log.counters}"
            )
        if self.selection is not None:
            budget = int(budget * self.selection.budget_share(self.step))
        self.log.hold("observing", bytes_held(self.method.state().values()))
        scores, before = self._scores(), self.triplets.masks
        rule = self.method.return_rule
        exchange = self._exchange(final) if self.state.exchanges else None
        masks = self.state.choose(self.step, scores, budget, before, rule.hysteresis, rule.used_first, exchange)
        agree_across_ranks(digest_of(masks), DECISIONS_DIFFER)
        self._restart_returned(masks)
        self.triplets.mask(masks)
        synchronize()
        self.log.counters.allocations += 1
        self.log.spend("allocating", time.perf_counter() - started)
        raised = self.log.memory.get("allocating", {})
        self.log.hold("allocating", {kind: raised.get(kind, 0) + size - peak.get(kind, 0)
                                     for kind, size in peak_memory().items()})  # fmt: skip
        line = self.state.record(self.step, budget, final, scores, before, masks)
        if final:
            self._end_shrinkage(trains_on)
        if args.should_save:
            self._write(args, line)

    def _scores(self) -> list[list[float]]:
        """Score every component, by what was observed or, once the factors are rotated, by singular values."""
        if not self.method.traits.spectral:
            return self.components.scores(self.method, mean=self.state.reallocates)
        squares = rotate(self.components, cast(SpectralMethod, self.method))
        return [[square / cost for square in row] for row, cost in zip(squares, self.state.costs, strict=True)]

    def _exchange(self, final: bool) -> Exchange:
        """Return the method's own choice of components, at what is over of the time of exchanges by now."""
        progress = 1.0 if final else cast(Exchanges, self.schedule).progress(self.step)
        return partial(cast(ExchangingMethod, self.method).exchange, progress=progress)

    def _restart_returned(self, used: Masks) -> None:
        """Restart the components that come back, by the rule of the method."""
        fresh, seed = self.state.fresh, seeded_index(self.search.request.schedule.seed, self.step, 0, 2**62)
        if self.state.reallocates:  # they start as new components do, and the method begins another interval
            cast(ReallocatingMethod, self.method).allocated()
            restart(self.components, fresh, seed)
        elif self.state.exchanges:
            begin_new(self.components, used, fresh, cast(ExchangingMethod, self.method), seed)
        elif self.method.return_rule.resets_lambda:
            reset_lambda(self.components, fresh)

    def _end_shrinkage(self, trains_on: bool) -> None:
        """Move the strength of the adapter into lambda once the ranks are final, and go on at the full position."""
        shrinkage = self.method.shrinkage
        if shrinkage is not None and (shrinkage.lasting or not trains_on):
            rescale_lambda(self.components, shrinkage)
        self.search.set_strength()

    def _write(self, args: Any, line: dict[str, Any]) -> None:
        """Write a line to the log file, with figures of the samples in use and the seconds of probing so far."""
        probing = {"probing_seconds": round(self.observer.probe_budget.probing, 3)}
        self.log.write(Path(args.output_dir), {**line, **figures_of(self.selection, self.step), **probing})

    def add_figures(self, state: Any, logs: dict[str, float]) -> None:
        """Add the last allocation's figures to what goes to TensorBoard, W&B and the log history."""
        if "loss" in logs and self.state.metrics:
            overhead = round(self.log.overhead_seconds, 3)
            figures = {**self.state.metrics, "adaptive/overhead_seconds": overhead}
            logs.update(figures)
            state.log_history[-1].update(figures)

    # -- saving, and the end -----------------------------------------------------------------------------------------

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Write the exact state into a checkpoint, beside its plain adapter."""
        self.checkpoint.write(folder, args, state)

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Restore the best checkpoint if set, allocate if the budget is exceeded, and make the adapter plain LoRA."""
        self.triplets.position.leave()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.step = int(state.best_model_checkpoint.rpartition("-")[2])
            self.checkpoint.restore(Path(state.best_model_checkpoint), state.max_steps)
        if not self.state.history or self.state.cost(self.triplets.masks) > self.state.final_budget:
            if args.should_save:
                self.log.warn(
                    f"ranks were not yet found at step {self.step} (they are final from step "
                    f"{self.schedule.end}); they are chosen now, without training afterwards"
                )
            self._allocate(args, self.schedule.target_budget, final=True, trains_on=False)
        plan = self.search.plan()
        self.guard.settle(plan)
        self.triplets.finalize(model, plan)
        if args.should_save:
            output = Path(args.output_dir)
            plan.save(output / PLAN_FILE)
            save_heatmap(plan, output / HEATMAP_FILE)
            save_history(
                self.start, self.state.first_masks(), self.state.history, state.global_step, output / HISTORY_FILE
            )
