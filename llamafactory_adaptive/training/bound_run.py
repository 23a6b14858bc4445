"""Assembly of a run: its parts, and the order in which they are built and receive events."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llamafactory_adaptive.accelerator import peak_memory
from llamafactory_adaptive.adapter.starting_factors import StartingFactors
from llamafactory_adaptive.engines.distributed import agree_across_ranks
from llamafactory_adaptive.engines.engine import find_engine
from llamafactory_adaptive.engines.optimizer_state import unwrapped
from llamafactory_adaptive.engines.step_hooks import before_clipping, before_deepspeed_step
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.schedule import AnySchedule, make_schedule
from llamafactory_adaptive.training.best_model import BestModel
from llamafactory_adaptive.training.checkpoint_record import CheckpointRecord
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.divergence import DivergenceWatch
from llamafactory_adaptive.training.fixed_ranks import FixedRanks
from llamafactory_adaptive.training.given_ranks import GivenRanks
from llamafactory_adaptive.training.gradient_check import GradientCheck
from llamafactory_adaptive.training.guard import PlanGuard, agree_on_steps, epoch_steps, flattens, uses_deepspeed
from llamafactory_adaptive.training.masked_search import MaskedSearch, SearchRequest
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.optimizer_check import check_optimizer
from llamafactory_adaptive.training.previous_run import set_previous_run_aside
from llamafactory_adaptive.training.rank_search_driver import RankSearchDriver
from llamafactory_adaptive.training.rate_advice import RateAdvice
from llamafactory_adaptive.training.run_part import RunPart
from llamafactory_adaptive.training.sample_preparation import TrainingSamples
from llamafactory_adaptive.training.sample_scoring import SampleRequest
from llamafactory_adaptive.training.sample_selection import QUALITIES_DIFFER, SampleSelection
from llamafactory_adaptive.training.search_checkpoint import SearchCheckpoint


logger = logging.getLogger("llamafactory.adaptive")


@dataclass(frozen=True)
class RunRequest:
    """Settings of a run beyond its plan.

    Attributes:
        max_nonfinite_steps: the run ends at this many optimizer steps in a row with a NaN or infinite loss.
        search: settings of a search for ranks, or of given ranks in the form ``P diag(lambda) Q``; None for plain LoRA
            on fixed ranks.
        samples: how training samples are chosen; None for all of them.
        layout: how weights are spread over processes, for checkpoints.
        start: what the factors of a fresh adapter start from; None where they start as PEFT starts them.
    """

    max_nonfinite_steps: int
    search: SearchRequest | None = None
    samples: SampleRequest | None = None
    layout: Mapping[str, Any] | None = None
    start: StartingFactors | None = None


class BoundRun:
    """A run together with its Trainer, from which the parts of the run are built.

    Args:
        request: settings of the run.
        guard: guard of the run, with plan and log.
        trainer: Trainer that has not made its data loader and its optimizer yet.
        see_gradients: is called at every step where ``request.search`` is set, once gradients are complete and not yet
            clipped.
    """

    def __init__(self, request: RunRequest, guard: PlanGuard, trainer: Any, see_gradients: Callable[[], None]) -> None:
        self.request, self.guard, self.log, self.trainer = request, guard, guard.log, trainer
        self.see_gradients, self.deepspeed = see_gradients, uses_deepspeed(trainer.args)
        self.slowdown = 1.0
        if request.start is not None:  # the factors are whole, and no optimizer holds a copy of them yet
            slowdowns = request.start.copy_into(trainer.model, guard.plan.scale, trainer.args.device)
            self.slowdown = median(slowdowns)
            logger.info(
                f"adaptive: the factors of {len(slowdowns)} modules start from the data ({request.start.kind})"
            )
        self.samples = None if request.samples is None else TrainingSamples(request.samples, trainer)
        self.search = None if request.search is None else MaskedSearch(request.search, trainer)
        self.best_model: BestModel | None = None
        self.observer: Observer | None = None
        self.watch = self._new_watch()
        if self.search is not None and not self.deepspeed:
            before_clipping(trainer.accelerator, see_gradients)

    def current_plan(self) -> RankPlan:
        """Return the plan with the ranks now in use."""
        return self.guard.plan if self.search is None or self.guard.is_final else self.search.plan()

    def build_parts(self, state: Any, dataloader: Any, checkpoint: Path | None) -> tuple[RunPart, ...]:
        """Build the parts of the run before the first step, on a model whose adapter has been verified.

        Args:
            state: state of the Trainer.
            dataloader: training data loader of the Trainer.
            checkpoint: what the Trainer resumes from, if anything.

        Raises:
            GuardError: processes differ in their steps, or the Trainer has resumed but ``checkpoint`` is None.
        """
        agree_on_steps(state, epoch_steps(dataloader, self.trainer.args))
        if state.global_step > 0 and checkpoint is None:
            raise GuardError(
                f"the Trainer has resumed at step {state.global_step}, but the run was not given the checkpoint and "
                "would begin anew: pass resume_from_checkpoint to the Trainer's train(), or train afresh"
            )
        resumed = checkpoint if state.global_step > 0 else None
        ranks = self._fixed_ranks if self.search is None else self._searched_ranks
        record = CheckpointRecord(self.current_plan, self.request.layout)
        parts = (self.guard, self.watch, *ranks(state, dataloader, resumed), record)
        return tuple(part for part in parts if part is not None)

    def begin_again(self, checkpoint: Any) -> None:
        """Set a search to its start: memory ran out, and the Trainer is about to begin anew with smaller batches.

        It would go on with the adapter, the ranks and the optimizer's states of what it broke off. Where ranks are
        fixed before training it does, as it does with plain LoRA.

        Args:
            checkpoint: what the Trainer resumed from, if anything.

        Raises:
            GuardError: there is more to set back than the adapter.
        """
        broken_off = f"memory ran out after {self.log.counters.steps} steps"
        self.watch = self._new_watch()
        if self.search is None:
            logger.warning(f"{broken_off}; training goes on from there with smaller batches")
            return
        lost = self._changed_besides(checkpoint)
        if lost:
            size = max(1, int(self.trainer._train_batch_size * 0.9))
            raise GuardError(
                f"{broken_off}, and auto_find_batch_size cannot begin anew: {lost}; set "
                f"per_device_train_batch_size: {size} and auto_find_batch_size: false"
            )
        logger.warning(f"{broken_off}; the search for ranks begins anew with smaller batches")
        if self.observer is not None:
            self.observer.close()
        self.search.begin_again()
        unwrapped(self.trainer.optimizer).state.clear()
        self.log.begin_again()
        set_previous_run_aside(Path(self.trainer.args.output_dir))

    def _changed_besides(self, checkpoint: Any) -> str:
        """Tell what an attempt has changed beyond the adapter; empty if it has changed nothing else."""
        if checkpoint is not None:
            return "the run was resumed, and its checkpoint belongs to steps of the larger batch"
        assert self.search is not None
        own = {id(p) for module in self.search.triplets.modules for p in module.parameters().values()}
        others = [name for name, p in self.trainer.model.named_parameters() if p.requires_grad and id(p) not in own]
        return f"{others[0]} trains beside the adapter, and has changed" if others else ""

    def _new_watch(self) -> DivergenceWatch:
        return DivergenceWatch(self.request.max_nonfinite_steps, Path(self.trainer.args.output_dir))

    def _fixed_ranks(self, state: Any, dataloader: Any, resumed: Path | None) -> tuple[RunPart | None, ...]:
        hidden = self.deepspeed or flattens(self.trainer)
        gradient_check = None if hidden else GradientCheck(self.log.counters, self.trainer.model)
        selection = self._prepare_samples(state, dataloader, resumed)
        ranks, advice = FixedRanks(self.guard, self.log, selection), None
        if self.request.start is not None:  # elsewhere the first update is plain LoRA's
            advice = RateAdvice(self.trainer, self.guard.plan.method, self.slowdown, self.log)
        return gradient_check, selection, ranks, advice

    def _searched_ranks(self, state: Any, dataloader: Any, resumed: Path | None) -> tuple[RunPart | None, ...]:
        """Build what trains triplets; what is resumed is restored before samples are scored on its adapter."""
        search = self.search
        assert search is not None
        if not self.deepspeed:  # which makes or wraps an optimizer of its own
            check_optimizer(self.trainer.optimizer, search)
        schedule = self._schedule(search, state, dataloader)
        interval = None if schedule is None else schedule.interval
        kept = SearchCheckpoint(search, self._observer(search), self.log, not self.deepspeed, interval)
        if resumed is not None:
            kept.resume(resumed, state.max_steps)
        selection = self._prepare_samples(state, dataloader, resumed)
        request = search.request
        advice = RateAdvice(self.trainer, request.config.method, request.slowdown, self.log)
        if schedule is None:
            return selection, GivenRanks(self.guard, self.log, selection, kept), advice
        self.best_model = BestModel(search.state, schedule, self.log, self.trainer.callback_handler.callbacks)
        driver = RankSearchDriver(
            search, kept.observer, schedule, kept, self.guard, self.watch, selection, state.global_step
        )
        return selection, driver, self.best_model, advice

    def _schedule(self, search: MaskedSearch, state: Any, dataloader: Any) -> AnySchedule | None:
        """Return the steps at which ranks change and the budget at each; None where they are given."""
        changes = search.request.config.search
        if changes is None:
            return None
        begin, final_budget = search.state.cost(search.state.first_masks()), search.state.final_budget
        steps = epoch_steps(dataloader, self.trainer.args)
        return make_schedule(changes, state.max_steps, begin, final_budget, steps)

    def _observer(self, search: MaskedSearch) -> Observer:
        """Build the observer once the model is wrapped and on its device, and apply the masks there."""
        triplets, method, config = search.triplets, search.request.method, search.request.schedule
        engine = find_engine(triplets.modules[0].q, self.trainer)
        if self.deepspeed:  # its engine is there by now
            before_deepspeed_step(self.trainer.deepspeed, self.see_gradients)
        components = Components(triplets, engine)
        triplets.mask(triplets.masks)
        self.observer = Observer(method, components, self.trainer, self.log.counters, config.seed, config.max_overhead)
        return self.observer

    def _prepare_samples(self, state: Any, dataloader: Any, resumed: Path | None) -> SampleSelection | None:
        """Score the samples or restore their scores, and check that all processes have the same ones."""
        if self.samples is None:
            return None
        started = time.perf_counter()
        selection = self.samples.prepare_samples(self.guard.plan, state.max_steps, dataloader, resumed, self.log)
        self.log.spend("scoring_samples", time.perf_counter() - started)
        self.log.hold("scoring_samples", peak_memory())
        agree_across_ranks(selection.digest(), QUALITIES_DIFFER)
        selection.rescore(self.trainer.args, state.global_step)  # if its checkpoint's run fetched fewer samples ahead
        return selection
