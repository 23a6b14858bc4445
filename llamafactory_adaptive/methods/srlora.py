"""SR-LoRA (arXiv 2507.00327): ranks by the stable rank of the base weights, without data.

    stable rank of W = |W|_F^2 / |W|_2^2        between 1 and the rank of W; not changed by the scale of W

Ranks are proportional to it: a weight whose energy is spread over many directions gets a larger update. That the
stable rank of the pre-trained weights divides ranks among layers, without a search, is the paper's.

What differs:

* Ranks are in proportion to the stable rank to the power ``srlora_power``, at the exact budget and within its bounds
  (the authors' code for ViT-B has no budget, but one rank for each attention weight, 9 to 116). How a budget is
  divided is ours to choose: 1, the proportion itself, by default.
* Weights of every kind count, not those of attention alone: ``lora_target`` chooses them.

Cost: some products of each weight with a block of 8 vectors. The model is loaded, but no rows are read. Quantised
weights count as what their modules compute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llamafactory_adaptive.accelerator import widest_float
from llamafactory_adaptive.calibration.base_weights import dense_weight, largest_singular_value
from llamafactory_adaptive.calibration.batches import Batch
from llamafactory_adaptive.calibration.measurement import Forward
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext
from llamafactory_adaptive.options import option


@dataclass(frozen=True)
class SrloraOptions:
    """Options of SR-LoRA, the YAML keys ``srlora_*``."""

    power: float = option(
        1.0,
        "Exponent of the stable rank; 0.5 takes the root, which makes ranks more equal.",
        low=0.01,
        high=4.0,
    )


@dataclass(frozen=True)
class StableRanks:
    """The stable rank of each module's weight; one fp64 number."""

    needs_rows: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """Return the key of this measurement in the statistics cache."""
        return "stable_rank"

    @property
    def backward(self) -> bool:
        """Return False: nothing is passed through the model."""
        return False

    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """Measure the stable rank of every weight, a tensor of shape (1,).

        Raises:
            CalibrationError: a weight is zero or not finite.
        """
        return {name: _stable_rank(name, dense_weight(module)) for name, module in modules.items()}


def _stable_rank(name: str, weight: Tensor) -> Tensor:
    total = weight.float().square().sum(dtype=widest_float(weight.device)).cpu().double()
    if not (bool(torch.isfinite(total)) and total > 0):
        raise CalibrationError(f"the weight of {name} is zero or not finite, so it has no stable rank: check the base")
    return (total / largest_singular_value(weight).cpu().double().square()).reshape(1)


class Srlora:
    """The method registered as ``srlora``."""

    Options: ClassVar[type[SrloraOptions]] = SrloraOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = "srlora_power: 0.5 takes the root of the stable rank, which spreads ranks"

    def __init__(self, options: SrloraOptions) -> None:
        self.options = options

    def measurement(self) -> StableRanks:
        """Return the measurement, which looks at weights alone."""
        return StableRanks()

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Raise the stable ranks to the power."""
        ranks = {shape.name: float(statistics[shape.name]) for shape in context.shapes}
        return Scores({name: rank**self.options.power for name, rank in ranks.items()}, {"stable_rank": ranks})
