"""Detection of NaN and infinite losses: the error names the first such step, and a checkpoint to resume from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import factors, live_layers
from llamafactory_adaptive.engines.distributed import all_reduce_sum, from_main, gather
from llamafactory_adaptive.errors import DivergedError
from llamafactory_adaptive.training.checkpoint_files import damage
from llamafactory_adaptive.training.run_part import RunPart


_MOST_SKIPPED = 40  # a scale starts at 2**16 and is halved each time: it is 2**-24 by then


class DivergenceWatch(RunPart):
    """Counter of optimizer steps in a row whose loss is NaN or infinite, over all processes.

    A gradient that is not finite makes the weights, and with them the next loss, NaN. Steps that a loss scaler skips
    instead (fp16) are counted separately: some are normal while the scale is found, but never as many in a row as it
    takes to halve the scale to nothing.

    Args:
        limit: number of such steps in a row at which the run ends.
        output: the run's ``output_dir``.
    """

    def __init__(self, limit: int, output: Path) -> None:
        self.limit, self.output = limit, output
        self.in_a_row = 0
        self.skipped = 0  # in a row, by the loss scaler
        self._bad: Tensor | None = None

    def see_loss(self, loss: Tensor) -> None:
        """Store whether a micro-batch's loss is finite, on the loss's device."""
        bad = (~torch.isfinite(loss.detach())).any().float()
        self._bad = bad if self._bad is None else self._bad + bad

    def after_step(self, args: Any, state: Any, model: nn.Module, optimizer: Any) -> None:
        """Check the optimizer step that was just made, as :meth:`end_step` does."""
        self.end_step(state.global_step, model, getattr(optimizer, "step_was_skipped", False))

    def end(self, args: Any, state: Any, model: nn.Module) -> None:
        """Raise an error if the trained adapter is not finite."""
        self.refuse_end(state.global_step, model)

    def end_step(self, step: int, model: nn.Module, was_skipped: bool = False) -> None:
        """Raise an error if losses or gradients were not finite for too many steps in a row.

        The Trainer itself reads every loss on the host to filter NaN, so this check adds no wait for the device.

        Args:
            step: optimizer step that was just made, counted from 1.
            model: model that is trained.
            was_skipped: whether the loss scaler skipped the step; equal on every process.

        Raises:
            DivergedError: too many steps in a row were not finite; every process raises it.
        """
        self.skipped = self.skipped + 1 if was_skipped else 0
        if self.skipped >= _MOST_SKIPPED:
            raise DivergedError(
                f"the gradients have been NaN or infinite for {self.skipped} steps in a row (up to step {step}), so "
                "the loss scaler skipped them all and nothing was trained; set bf16: true in place of fp16: true, or "
                "lower learning_rate"
            )
        if self._bad is None:
            return
        bad, self._bad = all_reduce_sum(self._bad.clone()), None
        if not bool(bad > 0):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row == 1 and (weight := _first_bad_weight(model)):
            raise DivergedError(
                f"the loss of step {step} is NaN or infinite because the base model itself is: {weight} holds such "
                "values; use another copy of the model, or another precision"
            )
        if self.in_a_row >= self.limit:
            raise DivergedError(self._words(step))

    def refuse(self, step: int, what: str) -> None:
        """Raise DivergedError if the last step's loss was not finite; ``what`` names what is not possible then."""
        if self.in_a_row:
            raise DivergedError(f"{what} at step {step} is not possible: {self._words(step)}")

    def refuse_end(self, step: int, model: nn.Module) -> None:
        """Raise DivergedError if the adapter that is about to be saved is not finite."""
        live = live_layers(model).items()
        names = [name for name, (layer, adapter) in live if not _finite(map(_held, factors(layer, adapter)))]
        everyone = gather("the check of the trained adapter", lambda: names)
        if bad := sorted({name for theirs in everyone for name in theirs}):
            since = f": {self._words(step)}" if self.in_a_row else "; lower learning_rate"
            raise DivergedError(f"the trained adapter holds NaN or infinity ({bad[0]}, of {len(bad)} modules){since}")

    def _words(self, step: int) -> str:
        first = step - self.in_a_row + 1
        good = from_main("the search for a good checkpoint", lambda: _last_good(self.output, first))
        back = f"resume from {good}" if good else "no checkpoint from before is there: start afresh"
        return (
            f"the loss has been NaN or infinite since step {first} ({self.in_a_row} steps): training diverged; lower "
            f"learning_rate, and {back} (adaptive_max_nonfinite_steps: {self.limit} can be raised to bear more)"
        )


def _held(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds: its piece under ZeRO-3, else all of it."""
    piece = getattr(parameter, "ds_tensor", None)
    return parameter if piece is None else piece


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _first_bad_weight(model: nn.Module) -> str:
    """Find the name of a frozen weight that is not finite; empty if there is none. Quantised ones are not checked."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and not _finite([parameter]):
            return name
    return ""


def _last_good(output: Path, before: int) -> str | None:
    """Find the newest undamaged checkpoint of a step before ``before``."""
    steps = {path: path.name.rpartition("-")[2] for path in output.glob("checkpoint-*")}
    older = sorted((int(step), path) for path, step in steps.items() if step.isdigit() and int(step) < before)
    for _, path in reversed(older):
        if not damage(path):
            return str(path)
    return None
