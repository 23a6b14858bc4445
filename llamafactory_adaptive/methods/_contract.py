"""What a method is: the protocols and the values it takes and gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.methods._traits import MethodTraits
from llamafactory_adaptive.ranks.plan import ModuleShape


@dataclass(frozen=True)
class Sampling:
    """How a method wants training data chosen.

    Attributes:
        weights: of gradient norm, loss drop and alignment in the quality.
        loss_drop: ``first_order`` or ``exact``.
        step_size: eta of the loss drop; None for the run's learning rate.
        projection: dimensions of the random projection for the alignment; 0 for the exact one.
        temperature: of the softmax over qualities.
        subset_ratio: share of the pool that is trained on between two refreshes.
        clip_term: ``loss`` or ``gradient_norm``: what ``clip_quantile`` looks at.
        clip_quantile: samples whose term lies above it are left out; 1 keeps all.
        batch_size: samples per scoring batch; None for the run's.
        refresh_ratio: share of all optimizer steps between two draws.
        scales_budget: whether the rank budget follows the quality of the subset.
    """

    weights: tuple[float, float, float]
    loss_drop: str
    step_size: float | None
    projection: int
    temperature: float
    subset_ratio: float
    clip_term: str
    clip_quantile: float
    batch_size: int | None
    refresh_ratio: float
    scales_budget: bool

    def pool_size(self, samples: int) -> int:
        """Samples left when the tail is clipped."""
        return max(1, samples - int((1.0 - self.clip_quantile) * samples + 1e-9))

    def subset_size(self, samples: int) -> int:
        """Samples of one subset, of a training set of ``samples``."""
        return max(1, round(self.subset_ratio * self.pool_size(samples)))


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


class Method(Protocol):
    """What every method has.

    Attributes:
        Options: a dataclass of options, made with :func:`~llamafactory_adaptive.options.option`.
        concentration_advice: what a user can change when few modules hold most of the score; empty when that is no
            fault of the method's.
    """

    Options: ClassVar[type[Any]]
    concentration_advice: ClassVar[str]

    @property
    def traits(self) -> MethodTraits:
        """What kind of method it is: a constant of the class, or a property where options decide."""


class SamplingMethod(Method, Protocol):
    """What a method of any strategy has besides when its traits say that it ``samples``."""

    @property
    def sampling(self) -> Sampling:
        """How training data is chosen."""


class StaticMethod(Method, Protocol):
    """Ranks fixed before training."""

    def measurement(self) -> Measurement | None:
        """The pass over model and data it needs; None when it needs neither."""

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Score every module from what the measurement returned. Cheap, deterministic, no model at hand."""


@dataclass(frozen=True)
class Orthogonality:
    """Regulariser on the factors of ``P diag(lambda) Q``: ``weight * mean over all P and Q of the Frobenius norm``.

    Attributes:
        weight: factor of the mean.
        form: what of the Gram matrix (``P^T P``, ``Q Q^T``) counts: its ``off_diagonal`` part, or its difference from
            the ``identity`` (AdaLoRA, Eq. 4).
    """

    weight: float
    form: str


class DynamicMethod(Method, Protocol):
    """Ranks found while training. The adapter of every module is ``P diag(lambda) Q``, over-ranked at first.

    Between backward pass and optimizer step the method sees weights and gradients, in blocks: all elements of one
    kind (``lambda``, ``P`` or ``Q``) and shape, flat; under ZeRO the elements this process owns. What it keeps per
    element must depend on that element alone, so that it can live where the element lives.

    Attributes:
        initial_lambda: value lambda starts from; None for plain LoRA factors without lambda.
    """

    initial_lambda: ClassVar[float | None]

    @property
    def orthogonality(self) -> Orthogonality | None:
        """The regulariser to train with, if any."""

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        """Factor in (0, 1] on every adapter weight in the training forward of this micro-batch; 1 trains plainly."""

    def observe(self, block: str, weights: Tensor, gradients: Tensor, live: Tensor | None) -> None:
        """See one block.

        Args:
            block: its name, ``<kind>/<shape>``.
            weights, gradients: fp32, flat; ``gradients`` is the method's own, to keep or to use up as scratch.
            live: 1.0 for elements that took part, 0.0 for P and Q of components that are masked (whose gradient is
                zero by construction and says nothing); None when all did.
        """

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        """Score of each element. A component scores its lambda plus the means over its column of P and row of Q."""

    def state(self) -> dict[str, Tensor]:
        """Tensors an exact resume needs."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave."""


class ProbingMethod(DynamicMethod, Protocol):
    """What a dynamic method has besides when its traits say that it ``probes``."""

    def path(self, seed: int, step: int) -> list[tuple[float, float]]:
        """Extra passes to observe at this step in place of the training gradient; an empty list for none.

        Each pass is (factor on every adapter weight, weight of the gradient there); their weighted sum is observed.
        """


class ReallocatingMethod(DynamicMethod, Protocol):
    """What a dynamic method has besides when its strategy is ``reallocate``."""

    @property
    def refresh_ratio(self) -> float:
        """Share of all optimizer steps between two allocations."""

    @property
    def beta(self) -> float:
        """What the sensitivities of earlier intervals count, compared with those of the next; 0 to 1."""

    def allocated(self) -> None:
        """Ranks were shared anew: another interval begins, and what was seen of elements is over."""
