"""The rank allocation of GoRA (arXiv 2502.12171): ranks by gradients of the base weights.

    G_m = mean gradient of the loss for W_m over the calibration data
    I_m = mean |W_m * G_m|, element-wise                                   (Section 3, rank allocation)
    r_m proportional to I_m / sqrt(d_in + d_out)

The paper's budget is ``sum_m sqrt(d_in + d_out) r_ref``, of which a module gets the share I_m; here the same
proportions are scaled to the exact budget in parameters or ranks, within ``adaptive_min_rank`` and
``adaptive_max_rank``.

GoRA also starts B from the gradient, compressed by the pseudo-inverse of A: with ``adaptive_init: gora`` this is the
whole of GoRA. Without that key the adapter starts as LoRA does, which is why the method is not called ``gora``.

What differs:

* Gradients come from the calibration samples, not from the first steps of training: ``adaptive_calibration_samples``
  says how many. They are summed before their size counts, as the paper accumulates them.
* The loss is summed over tokens and divided by their number. No key: a mean over rows would let short answers weigh
  more, and any divisor that all modules share leaves the proportions as they are.
* Ranks are rounded so that the budget is spent exactly, as by all methods here. No key: each rounded by itself, as
  published, their sum is what happens to come out.

Cost: one forward and backward pass; on the host's memory 4 bytes for every target weight (28 GB for 7B), since the
gradients of all samples are summed before their size counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llamafactory_adaptive.calibration.base_weights import dense_weight
from llamafactory_adaptive.calibration.batches import Batch, count_tokens
from llamafactory_adaptive.calibration.measurement import Forward
from llamafactory_adaptive.calibration.weight_gradients import pass_gradients
from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext


@dataclass(frozen=True)
class GoraRanksOptions:
    """Options of GoRA's ranks: it has none."""


@dataclass(frozen=True)
class WeightTimesGradient:
    """Mean over a weight's elements of ``|w g|``, g the gradient of the loss per token; one fp64 number a module."""

    @property
    def key(self) -> str:
        """Return the key of this measurement in the statistics cache."""
        return "weight_times_gradient"

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
        """Measure ``I_m`` of every module, a tensor of shape (1,).

        Raises:
            CalibrationError: no gradient reached a module.
        """
        sums: dict[str, Tensor] = {}

        def take(name: str, x: Tensor, gradient: Tensor) -> None:
            added = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).cpu()
            sums[name] = sums[name].add_(added) if name in sums else added

        pass_gradients(model, modules, batches, forward, take)
        tokens = count_tokens(batches)
        return {name: _mean_product(dense_weight(module), sums[name]) / tokens for name, module in modules.items()}


def _mean_product(weight: Tensor, gradient: Tensor) -> Tensor:
    """Average ``|w g|`` over all elements, (1,) fp64 on the CPU."""
    return (weight.cpu().float() * gradient).abs().mean(dtype=torch.float64).reshape(1)


class GoraRanks:
    """The method registered as ``gora_ranks``."""

    Options: ClassVar[type[GoraRanksOptions]] = GoraRanksOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = "a lower adaptive_max_rank bounds what one module gets"

    def __init__(self, options: GoraRanksOptions) -> None:
        self.options = options

    def measurement(self) -> WeightTimesGradient:
        """Return the measurement, a forward and backward pass over the calibration data."""
        return WeightTimesGradient()

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Divide the importance of each module by the root of its two sizes."""
        importances = {shape.name: float(statistics[shape.name]) for shape in context.shapes}
        values = {shape.name: importances[shape.name] / shape.parameters_per_rank**0.5 for shape in context.shapes}
        return Scores(values, {"importance": importances})
