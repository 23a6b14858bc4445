"""What the duties of a run have in common: the events that each is told of."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class RunPart:
    """One duty of a run under a Trainer; this class does nothing at every event.

    A part is built complete, with all that it works on, when training begins. From then on the callback tells every
    part of each event once, in the order of the parts. A part defines the events that matter to it.
    ``args``, ``state`` and ``model`` are the Trainer's; ``state.global_step`` counts optimizer steps.
    """

    def begin_epoch(self, state: Any) -> None:
        """The data loader is about to ask for the samples of an epoch."""

    def begin_step(self, state: Any, lr_scheduler: Any) -> None:
        """The first micro-batch of an optimizer step comes next."""

    def end_micro_batch(self) -> None:
        """A micro-batch is over that is not the last of its step."""

    def see_loss(self, loss: Tensor) -> None:
        """A micro-batch has this loss; it stays on its device."""

    def see_gradients(self) -> None:
        """Gradients of the step are complete and not yet clipped (told in a search alone)."""

    def before_step(self, model: nn.Module) -> None:
        """The optimizer steps next; gradients are clipped."""

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """The optimizer has stepped."""

    def add_figures(self, state: Any, logs: dict[str, float]) -> None:
        """The Trainer logs these figures; more may be added."""

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """A checkpoint is written to this folder, on every process."""

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Training is over, and the adapter not yet saved."""
