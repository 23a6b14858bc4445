"""Control: plain LoRA at the budget, every module at ``lora_rank``. Costs nothing, needs neither model nor data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext


@dataclass(frozen=True)
class UniformOptions:
    """Options of the uniform control: it has none."""


class Uniform:
    """The method registered as ``uniform``."""

    Options: ClassVar[type[UniformOptions]] = UniformOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = ""

    def __init__(self, options: UniformOptions) -> None:
        self.options = options

    def measurement(self) -> None:
        return None

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Return the same score for every module."""
        return Scores({shape.name: 1.0 for shape in context.shapes})
