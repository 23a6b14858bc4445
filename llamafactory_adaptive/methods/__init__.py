"""Methods that turn a model and data into ranks: one file each, found through the registry.

A static method scores once, before training. It is any class with the two members of :class:`StaticMethod` and an
``Options`` dataclass whose fields become the YAML keys ``<method>_<field>``; there is nothing to inherit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llamafactory_adaptive.calibration import Measurement
from llamafactory_adaptive.plan import ModuleShape


@dataclass(frozen=True)
class ScoringContext:
    """What a method may know besides its statistics.

    Attributes:
        shapes: target modules in model order.
        lora_rank: the budget as a uniform rank.
        seed: for methods that draw at random.
    """

    shapes: tuple[ModuleShape, ...]
    lora_rank: int
    seed: int


@dataclass(frozen=True)
class Scores:
    """What a static method returns.

    Attributes:
        values: module name to a non-negative finite score; ideal ranks are proportional to it.
        metrics: column name to module name to a figure worth keeping in the plan (the method's own terms).
    """

    values: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class StaticMethod(Protocol):
    """Ranks fixed before training.

    Attributes:
        Options: a dataclass of options, made with :func:`~llamafactory_adaptive.config.option`.
        concentration_advice: what a user can change when few modules hold most of the score; empty when that is no
            fault of the method's.
    """

    Options: ClassVar[type[Any]]
    concentration_advice: ClassVar[str]

    def measurement(self) -> Measurement | None:
        """The pass over model and data it needs; None when it needs neither."""

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Score every module from what the measurement returned. Cheap, deterministic, no model at hand."""
