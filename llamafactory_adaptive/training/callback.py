"""The callback of an adaptive run: it forwards the Trainer's events to the parts of the run."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.sampling.sampler import SubsetSampler
from llamafactory_adaptive.training.bound_run import BoundRun, RunRequest
from llamafactory_adaptive.training.checkpoint_record import seal
from llamafactory_adaptive.training.guard import PlanGuard, flattens, uses_deepspeed
from llamafactory_adaptive.training.run_part import RunPart


class AdaptiveCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that forwards each event to every part once, in the order of the parts, on every rank.

    Args:
        guard: guard of the run, with plan and log.
        request: settings of the run beyond its plan.
        checkpoint: checkpoint that the run resumes from, if any.
        remedy: advice for a Trainer that was made in another way than the run needs.

    Attributes:
        bound: the run, once its Trainer is known.
        parts: parts of the run; empty before training begins.
        trains: whether training has begun and not come to its end.
    """

    def __init__(
        self, guard: PlanGuard, request: RunRequest, checkpoint: Path | None = None, remedy: str = ""
    ) -> None:
        self.guard, self.request, self.checkpoint, self.remedy = guard, request, checkpoint, remedy
        self.bound: BoundRun | None = None
        self.parts: tuple[RunPart, ...] = ()
        self.flattened = self.trains = False

    # -- events that callbacks do not get, forwarded by the Trainer of trainer.py -------------------------------------

    def bind_trainer(self, trainer: Any) -> None:
        """Bind the run to its Trainer, which has not made its data loader and its optimizer yet.

        Raises:
            GuardError: the model, which FSDP 1 is about to flatten, does not match the plan.
        """
        self.flattened = flattens(trainer)
        if self.flattened:
            self.guard.verify_live(trainer.model, watches_gradients=False)
        self.bound = BoundRun(self.request, self.guard, trainer, self.see_gradients)
        if self.request.search is not None:  # loggers must find our figures in what they log
            callbacks = trainer.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def resume_from(self, checkpoint: Path | None) -> None:
        """Set the checkpoint that training, which has not begun, resumes from; None for a fresh run."""
        self.checkpoint = checkpoint

    def begin_attempt(self, checkpoint: Any) -> None:
        """Forward that training begins, or begins anew with smaller batches where parts of an attempt are left.

        Args:
            checkpoint: what the Trainer resumes from, if anything.
        """
        if self.trains and self.bound is not None:  # memory ran out
            self.bound.begin_again(checkpoint)

    @property
    def train_sampler(self) -> SubsetSampler | None:
        """Return the sampler of the training data loader; None for the Trainer's own."""
        return None if self.bound is None or self.bound.samples is None else self.bound.samples.sampler

    def current_plan(self) -> RankPlan:
        """Return the plan with the ranks now in use."""
        return self.guard.plan if self.bound is None else self.bound.current_plan()

    def see_loss(self, loss: Tensor) -> None:
        """Forward one micro-batch's loss."""
        for part in self.parts:
            part.see_loss(loss)

    def see_gradients(self) -> None:
        """Forward that the step's gradients are complete and not clipped."""
        for part in self.parts:
            part.see_gradients()

    def counts_as_best(self) -> bool:
        """Tell whether an evaluation now counts for the best checkpoint and for early stopping."""
        best = None if self.bound is None else self.bound.best_model
        return best is None or best.counts_as_best()

    def save_into(self, folder: Path, args: Any, state: Any) -> None:
        """Forward that a checkpoint is written to ``folder``."""
        for part in self.parts:
            part.save(folder, args, state)

    # -- the Trainer's events ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Verify the live adapter, build the parts of the run, and have them announce it.

        Raises:
            GuardError: the model does not match the plan, or its Trainer is not made by :func:`adaptive_trainer`.
        """
        if not self.flattened:
            self.guard.verify_live(model, watches_gradients=not uses_deepspeed(args))
        if self.bound is None:
            fault = "the run asked for adaptive ranks but its Trainer did not pass itself to the run"
            raise GuardError(f"{fault}; {self.remedy}" if self.remedy else fault)
        self.parts = self.bound.build_parts(state, kwargs.get("train_dataloader"), self.checkpoint)
        self.trains = True
        for part in self.parts:
            part.announce(args, state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forward the beginning of an epoch."""
        for part in self.parts:
            part.begin_epoch(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Forward the beginning of a step."""
        for part in self.parts:
            part.begin_step(state, lr_scheduler)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forward the end of a micro-batch within a step."""
        for part in self.parts:
            part.end_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Forward that the optimizer is about to step."""
        for part in self.parts:
            part.before_step(model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Forward the end of a step."""
        for part in self.parts:
            part.after_step(args, state, model, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Forward figures that are logged."""
        for part in self.parts:
            part.add_figures(state, {} if logs is None else logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the parts' files with ``save_only_model``, for which the Trainer skips the call that saves them."""
        if args.save_only_model:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.save_into(folder, args, state)
            seal(folder, args)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Forward the end of training."""
        self.trains = False
        for part in self.parts:
            part.end(args, state, model)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the adapter before a push to a hub; pushes during training come from sealed checkpoints."""
        self.guard.verify_push(Path(args.output_dir))
