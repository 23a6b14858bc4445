"""Control: a random composition of the same budget, seeded. Costs nothing, needs neither model nor data.

Exponential draws are the shares of a point uniform on the simplex (a Dirichlet draw with all parameters 1), so every
division of the budget is equally likely before bounds and rounding. Any method worth its name must beat this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random as Generator
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext


@dataclass(frozen=True)
class RandomOptions:
    """Options of the random control: it has none; the seed is ``adaptive_calibration_seed``."""


class Random:
    """The method registered as ``random``."""

    Options: ClassVar[type[RandomOptions]] = RandomOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = ""

    def __init__(self, options: RandomOptions) -> None:
        self.options = options

    def measurement(self) -> None:
        return None

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        generator = Generator(context.seed)
        return Scores({shape.name: generator.expovariate(1.0) for shape in context.shapes})
