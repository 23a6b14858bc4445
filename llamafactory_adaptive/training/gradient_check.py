"""The part of a run with fixed ranks that checks, once, that a gradient reaches every factor of the adapter."""

from torch import nn

from llamafactory_adaptive.adapter.lora import factors, live_layers
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.training.run_log import Counters
from llamafactory_adaptive.training.run_part import RunPart


class GradientCheck(RunPart):
    """Check of the first step's gradients, for runs that neither search for ranks nor train under such an engine.

    DeepSpeed keeps gradients in its own buffers, and FSDP 1 in flat tensors; there ``PlanGuard.verify_saved`` looks at
    the saved factors instead.
    In a search ``Components`` checks the gradients of each module, whose masked components have a gradient of zero.

    Args:
        counters: counters of the run, which the message quotes.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters

    def before_step(self, model: nn.Module) -> None:
        """Raise an error if an adapter factor has no gradient at the first step."""
        if self.counters.steps > 0:
            return
        trained = [factor for layer, adapter in live_layers(model).values() for factor in factors(layer, adapter)]
        self.counters.gradients_missing = sum(factor.grad is None for factor in trained)
        if self.counters.gradients_missing:
            raise GuardError(f"adapter factors without a gradient at the first step: {self.counters}")
