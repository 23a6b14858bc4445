"""PRILoRA's ranks (arXiv 2401.11316): linear over the layers, growing from the first to the last; nothing is measured.

    weight of layer l of L = 1 + (last_to_first - 1) (l - 1) / (L - 1)

The line from a first to a last rank around a given mean, with one rank for all modules of a layer, is the paper's.

What is left out: PRILoRA also prunes single weights of A during training, by their size and the statistics of the
inputs, which leaves the ranks as they are. Ours: the default, a last layer with three times the rank of the first (4
to 12 around 8); the scaling to the exact budget; that ranks may fall, below 1; that layers of each tower of a model
(vision, language) are counted apart; that a module outside of all layers, or in a tower of one, has the mean weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext
from llamafactory_adaptive.options import option
from llamafactory_adaptive.ranks.module_groups import group_name


@dataclass(frozen=True)
class PriloraOptions:
    """Options of PRILoRA's ranks, the YAML keys ``prilora_*``."""

    last_to_first: float = option(
        3.0,
        "Rank of the last layer as a multiple of that of the first (the default is ours); below 1 ranks fall.",
        low=0.01,
        high=100.0,
    )


class Prilora:
    """The method registered as ``prilora``."""

    Options: ClassVar[type[PriloraOptions]] = PriloraOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = ""

    def __init__(self, options: PriloraOptions) -> None:
        self.options = options

    def measurement(self) -> None:
        return None

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Return the weight of each module's layer."""
        layers = {shape.name: group_name(shape.name, "layer") for shape in context.shapes}
        places = _places({layer for name, layer in layers.items() if layer != name})
        rise = self.options.last_to_first - 1.0
        return Scores({name: 1.0 + rise * places.get(layer, 0.5) for name, layer in layers.items()})


def _places(layers: set[str]) -> dict[str, float]:
    """Map every layer to its place among those of its tower, from 0 to 1, and the only one of a tower to 1/2."""
    towers: dict[str, list[int]] = {}
    for layer in layers:
        tower, _, number = layer.rpartition(".")
        towers.setdefault(tower, []).append(int(number))
    places = dict.fromkeys(layers, 0.5)
    for tower, numbers in towers.items():
        last = len(numbers) - 1
        for place, of_layer in enumerate(sorted(numbers)):
            if last:
                places[f"{tower}.{of_layer}" if tower else str(of_layer)] = place / last
    return places
