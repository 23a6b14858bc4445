"""What igu and adalora share: element importance ``|w g|``, smoothed, as all there is to keep."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from llamafactory_adaptive.stats import SmoothedImportance


class SmoothingOptions(Protocol):
    """Options with the two smoothing factors."""

    @property
    def beta1(self) -> float:
        """Of the importance."""

    @property
    def beta2(self) -> float:
        """Of its deviation."""


class SmoothedMethod:
    """The observing half of a dynamic method: ``s = |w g|`` to S and U, and their way into checkpoints and back."""

    course: ClassVar[str] = "prune"
    sampling: ClassVar[None] = None

    def __init__(self, options: SmoothingOptions) -> None:
        self.importance = SmoothedImportance(options.beta1, options.beta2)

    def observe(self, block: str, weights: Tensor, gradients: Tensor, live: Tensor | None) -> None:
        """Smooth ``s = |w g|``."""
        self.importance.update(block, gradients.mul_(weights).abs_(), live)

    def state(self) -> dict[str, Tensor]:
        """Running means and deviations."""
        return self.importance.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.importance.load(state)
