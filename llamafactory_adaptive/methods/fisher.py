"""Empirical Fisher information of the base weights, as a static score; after FLoE (arXiv 2506.00495).

    F_m = 1/N sum_i |d log p(x_i) / dW_m|_F^2        the trace of module m's block, over N samples

log p(x_i) is the sum of the log-probabilities of a sample's target tokens, so that a sample's own gradient is squared,
not that of a batch. Without forming the gradient, ``|sum_t g_t x_t^T|^2 = sum_tu (g_t . g_u)(x_t . x_u)``, g the
gradients at the module's output and x its inputs.

What differs: FLoE scores layers by the Fisher information of the LoRA experts of a first training, to leave layers
out, and finds ranks by Bayesian optimisation. Here base weights are scored in one pass, and ranks are proportional.
How scores of elements become one of a module is a key: ``reduction: sum`` is the trace, ``mean`` the mean over the
elements of W. ``power`` is ours: a trace is a square, and a half takes its root, which concentrates the ranks less.

Cost: one forward and backward pass without weight gradients, which holds every target's input; per sample and module
products of T x T over its tokens, or the gradient itself where that is cheaper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llamafactory_adaptive.accelerator import widest_float
from llamafactory_adaptive.calibration.batches import Batch
from llamafactory_adaptive.calibration.measurement import Forward
from llamafactory_adaptive.calibration.weight_gradients import pass_gradients, squared_norms
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext
from llamafactory_adaptive.options import option


@dataclass(frozen=True)
class FisherOptions:
    """Options of the Fisher score, the YAML keys ``fisher_*``."""

    reduction: str = option(
        "sum",
        "How the elements of a weight become one score: sum takes the trace of the Fisher information, mean its mean "
        "over the elements, which does not grow with the size of the module.",
        choices=("sum", "mean"),
    )
    power: float = option(
        1.0, "Exponent of the score; 0.5 takes the root, which spreads the ranks more evenly.", low=0.01, high=4.0
    )


@dataclass(frozen=True)
class SampleFisher:
    """Mean over samples of the squared norm of the gradient that each has for a module's weight; one fp64 number."""

    @property
    def key(self) -> str:
        """Return the key of this measurement in the statistics cache."""
        return "sample_fisher"

    @property
    def backward(self) -> bool:
        """Return True: gradients are taken."""
        return True

    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """Measure ``F_m`` of every module, a tensor of shape (1,).

        Raises:
            CalibrationError: a module reads tokens of several samples mixed, or no gradient reaches it.
        """
        sums: dict[str, float] = dict.fromkeys(modules, 0.0)

        def take(name: str, x: Tensor, gradient: Tensor) -> None:
            if x.dim() != 3:
                raise CalibrationError(
                    f"{name} reads tokens of several samples mixed (a routed expert?), which have no gradients of "
                    "their own; take it out of lora_target, or use adaptive_method: sensitivity"
                )
            sums[name] += float(squared_norms(x, gradient).sum(dtype=widest_float(x.device)))

        pass_gradients(model, modules, batches, forward, take)
        samples = sum(len(batch.input_ids) for batch in batches)
        return {name: torch.tensor([total / samples], dtype=torch.float64) for name, total in sums.items()}


class Fisher:
    """The method registered as ``fisher``."""

    Options: ClassVar[type[FisherOptions]] = FisherOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = "fisher_power: 0.5 takes the root of the score, which spreads it"

    def __init__(self, options: FisherOptions) -> None:
        self.options = options

    def measurement(self) -> SampleFisher:
        """Return the measurement, a forward and backward pass over the calibration data."""
        return SampleFisher()

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Reduce and scale the Fisher information of each module; the trace is a column of its own."""
        traces = {shape.name: float(statistics[shape.name]) for shape in context.shapes}
        mean = self.options.reduction == "mean"
        sizes = {shape.name: shape.in_features * shape.out_features if mean else 1 for shape in context.shapes}
        values = {name: (trace / sizes[name]) ** self.options.power for name, trace in traces.items()}
        return Scores(values, {"fisher_trace": traces})
