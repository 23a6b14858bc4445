"""Ranks per type of module, by hand: the simplest placement, without model or data, that others must beat.

``ranks: "q_proj:4,down_proj:16"`` gives every module of a type the same number, taken as a weight: ideal ranks are
proportional to the weights, at exactly the budget. A type that is left out has the weight 0: its modules keep
``adaptive_min_rank``, and where that is 0 get no adapter, but for members of a packed group (q, k, v; gate, up) beside
one that has. Of the last of the budget, too little for a rank of a type with a weight, others may have one rank more
where they have an adapter. Types that cannot hold the budget within ``adaptive_max_rank`` are refused.

Where the weights should come from scores, ``adaptive_granularity: type`` of another method is that: its scores, one
mean for every type. No paper states this method; placement by type (MLP against attention) is what "LoRA Without
Regret" (Schulman et al., 2025) found to matter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.errors import Problem, refuse
from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext
from llamafactory_adaptive.options import option
from llamafactory_adaptive.ranks.module_names import module_type


_KEY = "by_type_ranks"


@dataclass(frozen=True)
class ByTypeOptions:
    """Options of ranks by type, the YAML keys ``by_type_*``."""

    ranks: str = option(
        "",
        "Relative rank of each type of module, as type:number with commas between them (q_proj:4,down_proj:16). The "
        "numbers are scaled to the budget; a type that is left out keeps adaptive_min_rank. It must be given.",
    )

    def weights(self) -> dict[str, float]:
        """Read the number of each type.

        Raises:
            ValueError: the text is not made of types and numbers.
        """
        pairs = [entry.strip().partition(":") for entry in self.ranks.split(",")]
        return {kind.strip(): float(number) for kind, _, number in pairs}

    def check(self) -> list[Problem]:
        """List what is wrong with the text of ``ranks``."""
        try:
            weights = self.weights()
        except ValueError:
            weights = {}
        count = len(self.ranks.split(","))
        if len(weights) < count or not all(weights) or not all(map(_is_weight, weights.values())):
            reason = "must be types and numbers from 0 on, type:number, each type once, with commas between them"
        elif not any(weights.values()):
            reason = "gives every type 0, and no rank follows from that"
        else:
            return []
        return [Problem(_KEY, self.ranks, reason, f"{_KEY}: q_proj:4,down_proj:16")]


def _is_weight(number: float) -> bool:
    return math.isfinite(number) and number >= 0


class ByType:
    """The method registered as ``by_type``."""

    Options: ClassVar[type[ByTypeOptions]] = ByTypeOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = ""

    def __init__(self, options: ByTypeOptions) -> None:
        self.options = options

    def measurement(self) -> None:
        return None

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Return the number of each module's type.

        Raises:
            AdaptiveConfigError: a type is that of no target module.
        """
        weights = self.options.weights()
        types = list(dict.fromkeys(module_type(shape.name) for shape in context.shapes))
        for kind in weights:
            if kind not in types:
                reason = f"{kind} is the type of no target module; theirs are {', '.join(types)}"
                refuse(_KEY, self.options.ranks, reason, f"{_KEY}: {types[0]}:4")
        values = {shape.name: weights.get(module_type(shape.name), 0.0) for shape in context.shapes}
        return Scores(values, zeros_stay=f"name more types in {_KEY}")
