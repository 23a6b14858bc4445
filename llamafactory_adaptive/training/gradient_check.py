"""The part of a run with fixed ranks that checks, once, that a gradient reaches every factor of the adapter."""

from torch import nn

from llamafactory_adaptive.adapter.lora import factors, live_layers
from llamafactory_adaptive.errors import GuardError, first_of
from llamafactory_adaptive.training.ran_modules import RanModules
from llamafactory_adaptive.training.run_log import Counters
from llamafactory_adaptive.training.run_part import RunPart


class GradientCheck(RunPart):
    """Check of the gradients of every module's first step, in runs without a search whose gradients can be read.

    That is the run's first step for most modules; for an expert that no token was routed to, or an image tower, the
    first in which it is called.

    DeepSpeed keeps gradients in its own buffers, and FSDP 1 in flat tensors; there ``PlanGuard.verify_saved`` looks at
    the saved factors instead.
    In a search ``Components`` checks the gradients of each module, whose masked components have a gradient of zero.

    Args:
        counters: counters of the run, which the message quotes.
        model: model with the adapter.
    """

    def __init__(self, counters: Counters, model: nn.Module) -> None:
        self.counters = counters
        layers = live_layers(model)
        self.waiting = {name: factors(layer, adapter) for name, (layer, adapter) in layers.items()}
        self.ran = RanModules({name: layer.lora_A[adapter] for name, (layer, adapter) in layers.items()})

    def before_step(self, model: nn.Module) -> None:
        """Raise an error if an adapter factor has no gradient although its module was called."""
        if not self.waiting:
            return
        due = {name: pair for name, pair in self.waiting.items() if not self.ran.excuse(name)}
        self.waiting = {name: pair for name, pair in self.waiting.items() if name not in due}
        lost = [name for name, pair in due.items() for factor in pair if factor.grad is None]
        self.counters.gradients_missing += len(lost)
        if lost:
            raise GuardError(
                f"adapter factors without a gradient at the first step: {self.counters}; of {first_of(lost, ', ', 1)}"
            )
