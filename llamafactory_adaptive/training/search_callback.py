"""Drives a dynamic method through training: observe, regularise, allocate, log, resume, cut to the ranks found.

Counts optimizer steps. Every process takes every decision itself, from the same numbers, and proves that it was the
same.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import nn

from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.engines.distributed import agree_across_ranks, wait_for_all
from llamafactory_adaptive.engines.engine import find_engine
from llamafactory_adaptive.engines.step_hooks import before_clipping, before_deepspeed_step
from llamafactory_adaptive.errors import GuardError, PlanError
from llamafactory_adaptive.files import PLAN_FILE, digest_of
from llamafactory_adaptive.methods import DynamicMethod, ReallocatingMethod
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.schedule import Refreshes, Schedule, make_schedule, short_run_warning
from llamafactory_adaptive.reports.plots import HEATMAP_FILE, HISTORY_FILE, save_heatmap, save_history
from llamafactory_adaptive.seeding import seeded_index
from llamafactory_adaptive.training.callback import AdaptiveCallback
from llamafactory_adaptive.training.checkpoint import read_state, write_state
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.rank_search import RankSearchState
from llamafactory_adaptive.training.sample_selection import Selection


DECISIONS_DIFFER = (
    "chose other components than rank 0: their scores differ, so the processes no longer train one adapter; this is a "
    "hardware fault or a bug, and the run stops here (the last checkpoint is intact)"
)
logger = logging.getLogger("llamafactory.adaptive")


class DynamicCallback(AdaptiveCallback):
    """One run of a dynamic method on one process.

    Args:
        start: the plan of the live tensors; ``plan`` becomes the plan found.
        config: with its search.
        method: what observes and scores.
        overhead_seconds: what preparing cost.
        checkpoint: what the run resumes from, if anything.
        selection: of training samples, if any.
    """

    def __init__(
        self,
        start: RankPlan,
        config: AdaptiveConfig,
        method: DynamicMethod,
        overhead_seconds: float,
        checkpoint: Path | None,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(start, overhead_seconds, checkpoint, selection)
        assert config.search is not None
        self.start, self.method, self.config = start, method, config.search
        self.search = RankSearchState(start, config)
        self.step = 0
        self.trainer: Any = None
        self.triplets: Triplets
        self.components: Components
        self.observer: Observer
        self.schedule: Schedule | Refreshes

    # -- before training ---------------------------------------------------------------------------------------------

    def attach(self, trainer: Any) -> None:
        """Turn the adapter into triplets before an optimizer is made; find the place before gradients are clipped."""
        super().attach(trainer)
        self.trainer = trainer
        self.triplets = Triplets(trainer.model, self.start, self.method.initial_lambda, self.config.seed)
        self.triplets.mask(self.search.first_masks())
        before_clipping(trainer.accelerator, self._before_clipping)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))  # loggers must find our figures in what they log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Everything is where it will stay: find engine and blocks, take back the state of a resumed run."""
        self.prove(args, model)
        self.agree_on_steps(state)
        engine = find_engine(self.triplets.modules[0].q, self.trainer)
        if self.deepspeed:
            before_deepspeed_step(self.trainer.deepspeed, self._before_step)
        self.components = Components(self.triplets, engine)
        self.triplets.mask(self.triplets.masks)
        begin = self.search.cost(self.triplets.masks)
        self.schedule = make_schedule(self.config, state.max_steps, begin, self.search.asked)
        self.step = state.global_step
        limit = getattr(self.config, "max_overhead", None)
        self.observer = Observer(self.method, self.components, self.trainer, self.counters, self.config.seed, limit)
        if self.checkpoint is not None and state.global_step > 0:
            document = self._restore(self.checkpoint, state.max_steps)
            self.observer.probe_budget.load(document["thinner"])
            self.overhead_seconds += document["overhead_seconds"]
            for name in ("observations", "probes", "allocations", "steps"):
                setattr(self.counters, name, document["counters"][name])
        self.select(args, state, kwargs["train_dataloader"])
        if args.should_save:
            if warning := short_run_warning(self.schedule, state.max_steps):
                self.warn(warning)
            event = "resumed" if self.step else "begin"
            self.write_log(Path(args.output_dir), {"step": self.step, "event": event, **self.data_figures(self.step)})
            largest = max(sum(row) for row in self.triplets.masks)
            logger.info(
                f"adaptive ({self.start.method}): {self.counters.modules_checked} modules start at rank {largest}, "
                f"{self.schedule.describe(self.start.budget_kind)} of {state.max_steps}"
            )

    # -- during a step -----------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Begin to observe a step with its first micro-batch."""
        super().on_step_begin(args, state, control, lr_scheduler=lr_scheduler, **kwargs)
        self.step = state.global_step
        self.observer.begin(self.step, self.search.final)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe the next micro-batch of the step."""
        self.observer.next_micro_batch(self.search.final)

    def _before_clipping(self) -> None:
        if not self.deepspeed:  # its own place is before engine.step; here it is over
            self._before_step()

    def _before_step(self) -> None:
        self.observer.before_step(self.search.final)
        self.overhead_seconds += self.observer.take_seconds()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Missing gradients were found before, by the components."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation and saving see the whole adapter; allocate where the schedule says so."""
        super().on_step_end(args, state, control, **kwargs)
        self.step, self.triplets.position.value = state.global_step, 1.0
        if not self.search.final and self.schedule.due(self.step):
            self._allocate(self.schedule.budget(self.step), self.schedule.is_final(self.step))

    def log_subset(self, output: Path, step: int) -> None:
        """Allocations say it: they come at the same steps."""

    # -- allocation --------------------------------------------------------------------------------------------------

    def _allocate(self, budget: int, final: bool) -> None:
        """Keep the best components under ``budget``, and prove that every process kept the same."""
        started, args = time.perf_counter(), self.trainer.args
        if self.watch is not None:
            self.watch.refuse(self.step, "choosing ranks")
        if self.counters.observations == 0:
            raise GuardError(
                f"components are to be chosen at step {self.step}, but none was observed: {self.counters}"
            )
        if self.selection is not None:
            budget = int(budget * self.selection.budget_share(self.step))
        scores, before = self.components.scores(self.method, mean=self.search.reallocates), self.triplets.masks
        masks = self.search.choose(self.step, scores, budget, before)
        agree_across_ranks(digest_of(masks), DECISIONS_DIFFER)
        if self.search.reallocates:  # what comes back starts as new components do; the method begins another interval
            cast(ReallocatingMethod, self.method).allocated()
            self.components.restart(self.search.fresh, seeded_index(self.config.seed, self.step, 0, 2**62))
        self.triplets.mask(masks)
        self.counters.allocations += 1
        self.overhead_seconds += time.perf_counter() - started
        line = self.search.record(self.step, budget, final, scores, before, masks)
        if args.should_save:
            self.write_log(Path(args.output_dir), {**line, **self.data_figures(self.step)})

    def write_log(self, output: Path, line: Mapping[str, Any]) -> None:
        """With what probing cost so far."""
        super().write_log(output, {**line, "probing_seconds": round(self.observer.probe_budget.probing, 3)})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the last allocation's figures to what goes to TensorBoard, W&B and the log history."""
        if logs is not None and "loss" in logs and self.search.metrics:
            figures = {**self.search.metrics, "adaptive/overhead_seconds": round(self.overhead_seconds, 3)}
            logs.update(figures)
            state.log_history[-1].update(figures)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_into(self, folder: Path, args: Any, state: Any) -> None:
        """Put the exact state beside a checkpoint's plain adapter, and the plan with the ranks now in use."""
        document = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            **self.search.state(),
            "masks": {
                module.name: "".join("1" if flag else "0" for flag in row)
                for module, row in zip(self.triplets.modules, self.triplets.masks, strict=True)
            },
            "counters": asdict(self.counters),
            "thinner": self.observer.probe_budget.state(),
            "overhead_seconds": self.overhead_seconds,
        }
        tensors = {f"method.{key}": value for key, value in self.method.state().items()}
        if not self.deepspeed:  # DeepSpeed's own checkpoint holds the factors, with their fp32 copies
            tensors |= {
                f"{kind}.{module.name}": parameter.detach()
                for module in self.triplets.modules
                for kind, parameter in module.parameters().items()
            }
        write_state(folder, tensors, document, self.components.engine.partitioned, args.should_save)
        wait_for_all(f"the adaptive state of {folder.name}")
        super().save_into(folder, args, state)

    def current_plan(self) -> RankPlan:
        """What the masks amount to."""
        return self.search.found(self.triplets.masks)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """While ranks are being found, what lies in ``output_dir`` is not yet this run's."""
        if self.triplets.compact is not None:
            super().on_push_begin(args, state, control, **kwargs)

    def _restore(self, folder: Path, total_steps: int) -> dict[str, Any]:
        """Take back the adapter that :meth:`save_into` wrote.

        Raises:
            PlanError: the state is missing, of other modules, or of a run of another length.
        """
        tensors, document = read_state(folder, self.components.engine.partitioned)
        names = [module.name for module in self.triplets.modules]
        if list(document["masks"]) != names:
            raise PlanError(f"{folder} holds the state of other modules; use another output_dir")
        if document["total_steps"] != total_steps and not document["final"]:
            raise PlanError(
                f"{folder} belongs to a run of {document['total_steps']} steps and this one has {total_steps}: the "
                "schedule is a share of them; set max_steps or num_train_epochs back, or use another output_dir"
            )
        masks = [[flag == "1" for flag in document["masks"][name]] for name in names]
        device = self.triplets.modules[0].q.device
        method = {k.removeprefix("method."): v.to(device) for k, v in tensors.items() if k.startswith("method.")}
        self.method.load(method)
        if not self.deepspeed:
            for module in self.triplets.modules:
                for kind, parameter in module.parameters().items():
                    parameter.data.copy_(tensors[f"{kind}.{module.name}"])
        self.triplets.mask(masks)
        self.search.load(document)
        return document

    # -- the end -----------------------------------------------------------------------------------------------------

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Within budget whatever happened, then plain LoRA at the ranks found."""
        super().on_train_end(args, state, control, **kwargs)
        self.triplets.position.value = 1.0
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.step = int(state.best_model_checkpoint.rpartition("-")[2])
            self._restore(Path(state.best_model_checkpoint), state.max_steps)
        if not self.search.history or self.search.cost(self.triplets.masks) > self.search.asked:
            if args.should_save:
                logger.warning(
                    f"adaptive: ranks were not yet found at step {self.step} (they are final from step "
                    f"{self.schedule.end}); they are chosen now, without training afterwards"
                )
            self._allocate(self.schedule.target_budget, final=True)
        self.plan = self.current_plan()
        self.triplets.finish(kwargs["model"], self.plan)
        if args.should_save:
            output = Path(args.output_dir)
            self.plan.save(output / PLAN_FILE)
            save_heatmap(self.plan, output / HEATMAP_FILE)
            save_history(
                self.start, self.search.first_masks(), self.search.history, state.global_step, output / HISTORY_FILE
            )

    def judge(self) -> None:
        """A run that never allocated, or never saw a gradient, did not do what it was asked."""
        if self.counters.allocations == 0 or self.counters.observations == 0:
            raise GuardError(f"the run asked for {self.start.method} but no component was chosen: {self.counters}")
