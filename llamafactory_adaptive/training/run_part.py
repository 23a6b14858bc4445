"""The common base of the parts of a run: the events that each part receives."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class RunPart:
    """One part of a run under a Trainer; in this class every event does nothing.

    A part is built when training begins, with all objects that it works on. From then on the callback passes each
    event once to every part, in the order of the parts. A part overrides the events that it needs.
    ``args``, ``state`` and ``model`` are the Trainer's; ``state.global_step`` counts optimizer steps.
    """

    def announce(self, args: Any, state: Any) -> None:
        """Handle the beginning of training, once all parts are built: write what the run begins with."""

    def begin_epoch(self, state: Any) -> None:
        """Handle the beginning of an epoch, before the data loader draws its samples."""

    def begin_step(self, state: Any, lr_scheduler: Any) -> None:
        """Handle the beginning of an optimizer step, before its first micro-batch."""

    def end_micro_batch(self) -> None:
        """Handle the end of a micro-batch that is not the last of its step."""

    def see_loss(self, loss: Tensor) -> None:
        """Handle the loss of a micro-batch, a tensor on the training device."""

    def see_gradients(self) -> None:
        """Handle the step's gradients, complete and not yet clipped; only where components are trained."""

    def before_step(self, model: nn.Module) -> None:
        """Handle the step's clipped gradients, right before the optimizer step."""

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Handle the end of an optimizer step."""

    def add_figures(self, state: Any, logs: dict[str, float]) -> None:
        """Add figures to ``logs``, which the Trainer is about to log."""

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Write this part's files into the checkpoint ``folder``; called on every process."""

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Handle the end of training, before the adapter is saved."""
