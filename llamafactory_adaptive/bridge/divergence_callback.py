"""Callback of a run of a comparison: it ends a run that diverges, and times the steps."""

import time
from typing import Any

from llamafactory_adaptive.comparison.loss_watch import LossWatch


def divergence_callback() -> Any:
    """Build the callback; ``diverged`` tells why the run diverges, ``steps`` and ``seconds`` how far it came.

    The Trainer logs a mean over many steps, and leaves what is not finite out of it: the loss is taken from the model.
    """
    from transformers import TrainerCallback

    class StopDiverged(TrainerCallback):  # type: ignore[misc]
        diverged, steps, seconds = "", 0, 0.0
        began = 0.0  # the first step, once all that is done before it
        loss: Any = None  # of the micro-batches of a step, added up

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            self.watch = LossWatch()
            self.hook = model.register_forward_hook(self._see)

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.began = self.began or time.perf_counter()

        def _see(self, module: Any, inputs: Any, output: Any) -> None:
            if module.training and (loss := getattr(output, "loss", None)) is not None:
                self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
            self.steps, self.seconds = state.global_step, round(time.perf_counter() - self.began, 2)
            if self.loss is None:  # a loss of its own, which the model does not compute
                return
            loss, self.loss = float(self.loss), None
            if why := self.watch.see(loss, getattr(optimizer, "step_was_skipped", False)):
                self.diverged, control.should_training_stop = f"{why} (up to step {state.global_step})", True

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.hook.remove()

    return StopDiverged()
