"""Protocols of methods, and the types that methods take and return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.methods._adapter_form import InitialAdapter, Orthogonality, ReturnRule, Shrinkage
from llamafactory_adaptive.methods._sampling import Sampling
from llamafactory_adaptive.methods._traits import MethodTraits
from llamafactory_adaptive.ranks.allocation import Bounds
from llamafactory_adaptive.ranks.plan import ModuleShape


Masks = Sequence[Sequence[bool]]  # of components, by module


@dataclass(frozen=True)
class ScoringContext:
    """Inputs of a static method besides its statistics.

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
    """Scores of all modules, as a static method returns them.

    Attributes:
        values: module name to a non-negative finite score; ideal ranks are proportional to it.
        metrics: column name to module name to a figure that the plan keeps (the method's own terms).
        zeros_stay: empty where modules of score 0 take what all others leave of the budget. Otherwise they keep their
            lowest rank, or one more to use up the last of the budget, and this tells what a user can change where the
            others cannot hold it.
    """

    values: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    zeros_stay: str = ""


class Method(Protocol):
    """The members that every method has.

    Attributes:
        Options: a dataclass of options, made with :func:`~llamafactory_adaptive.options.option`.
        concentration_advice: what a user can change when few modules hold most of the score; empty if nothing helps.
    """

    Options: ClassVar[type[Any]]
    concentration_advice: ClassVar[str]

    @property
    def traits(self) -> MethodTraits:
        """Return the kind of the method: a constant of the class, or a property if options decide."""


class SamplingMethod(Method, Protocol):
    """Further members of a method, of any strategy, whose traits set ``samples``."""

    @property
    def sampling(self) -> Sampling:
        """Return the settings by which training samples are chosen."""


class StaticMethod(Method, Protocol):
    """A method whose ranks are fixed before training."""

    def measurement(self) -> Measurement | None:
        """Return the measurement on model and data that the method needs; None if it needs neither."""

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Score every module from what the measurement returned; cheap, deterministic, without the model."""


class SearchingMethod(Method, Protocol):
    """A method that finds ranks while training. The adapter of a module is ``P diag(lambda) Q``, over-ranked."""

    @property
    def initial_adapter(self) -> InitialAdapter:
        """Return the start of P, lambda and Q."""

    @property
    def return_rule(self) -> ReturnRule:
        """Return how components that were removed come back; it is read where ranks are pruned."""

    @property
    def shrinkage(self) -> Shrinkage | None:
        """Return the moments of the factor that random positions put on the adapter, if its strength is to be mended.

        Training at a random :meth:`position` makes the adapter too strong for use at the full one. Until the ranks are
        final, what is evaluated and saved is then weakened by the strength. Afterwards lambda is: where the mend is
        lasting or no training follows.
        """

    @property
    def orthogonality(self) -> Orthogonality | None:
        """Return the regulariser to train with, if any."""

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        """Return the factor in (0, 1] on every adapter weight in this micro-batch's forward; 1 is plain training."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that an exact resume needs; one with a number per element is named ``<kind>.<block>``."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned."""


class DynamicMethod(SearchingMethod, Protocol):
    """A method that observes gradients while it finds ranks.

    Between backward pass and optimizer step the method receives weights and gradients, in blocks: all elements of one
    kind (``lambda``, ``P`` or ``Q``) and shape, flat; under ZeRO the elements this process owns. What it keeps per
    element must depend on that element alone, so that it can be stored on the process of that element.
    """

    def observe(self, block: str, weights: Tensor, gradients: Tensor, live: Tensor | None) -> None:
        """Observe weights and gradients of one block.

        Args:
            block: name of the block, ``<kind>/<shape>``.
            weights, gradients: fp32, flat; the method may keep or overwrite ``gradients``.
            live: 1.0 for elements that took part, 0.0 for P and Q of components that are masked (whose gradient is
                zero by construction); None when all did.
        """

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        """Score each element; a component's score is its lambda's plus the means over its column of P and row of Q."""


class ComponentwiseMethod(SearchingMethod, Protocol):
    """A method whose traits set ``componentwise``: it observes the mean importance of each component's elements.

    What it keeps is a few numbers per component, where a :class:`DynamicMethod` keeps as many per element. Every
    process observes the same. Shapes: M modules of one block, r rank.
    """

    def importance_of(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """Compute the importance of single elements, flat, fp32; ``gradients`` may be overwritten."""

    def observe_components(self, block: str, importance_Mr: Tensor, live_Mr: Tensor | None) -> None:
        """Observe the mean importance over a component's lambda, column of P or row of Q.

        Args:
            block: name of the block, ``<kind>/<shape>``.
            importance_Mr: fp32, (M, r); the method may keep or overwrite it.
            live_Mr: 1.0 for components that took part, 0.0 for those that are masked, where the block is of P or Q;
                None when all did.
        """

    def component_scores(self, block: str) -> Tensor:
        """Score what each component has in a block, (M, r); a component's score is the sum over its three blocks."""


class SpectralMethod(SearchingMethod, Protocol):
    """A method whose traits set ``spectral``: it observes nothing, and scores components by singular values."""

    def rotate(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate one module's factors to the form of the singular values of their product, which stays the same.

        Args:
            p, q: P (d_out, r) and Q (r, d_in), fp32, on the CPU.

        Returns:
            The new P and Q, whose component i has the i-th singular value, and the squares of these, (r,).
        """


class RelativeMethod(DynamicMethod, Protocol):
    """Further members of a dynamic method whose traits set ``relative``: scores depend on the typical importance."""

    def log_importance(self, block: str) -> Tensor:
        """Sum and count the logarithms of the positive importances that this process holds of a block, (2,) fp32."""

    def set_typical(self, typical: Mapping[str, float]) -> None:
        """Store the geometric mean of the importances of each kind (``lambda``, ``P``, ``Q``) over all processes."""


class ProbingMethod(DynamicMethod, Protocol):
    """Further members of a dynamic method whose traits set ``probes``."""

    def path(self, seed: int, step: int) -> list[tuple[float, float]]:
        """Return the extra passes to observe at this step in place of the training gradient; an empty list for none.

        Each pass is (factor on every adapter weight, weight of the gradient there); their weighted sum is observed.
        """


class ReallocatingMethod(DynamicMethod, Protocol):
    """Further members of a dynamic method whose strategy is ``reallocate``."""

    @property
    def refresh_ratio(self) -> float:
        """Return the share of all optimizer steps between two allocations."""

    @property
    def beta(self) -> float:
        """Return the weight of earlier intervals' sensitivities relative to those of the next interval; 0 to 1."""

    def allocated(self) -> None:
        """Begin a new interval after an allocation: clear what was observed of elements."""


class ExchangingMethod(DynamicMethod, Protocol):
    """Further members of a dynamic method, with lambda, whose strategy is ``exchange``.

    Modules start at equal ranks within the budget, below those of the tensors that train. A component that comes into
    use has no effect at first: its lambda is zero, and its column of P and row of Q are new.
    """

    def exchange(
        self, scores: Sequence[Sequence[float]], used: Masks, fresh: Masks, bounds: Bounds, progress: float
    ) -> list[list[bool]]:
        """Choose the components to use from now on, which may not cost more than the budget.

        Args:
            scores: per module, one finite score per component; those of components that are not used say nothing.
            used: per module, which components are in use.
            fresh: per module, which of them came into use at the last exchange, and have had little time to grow.
            bounds: budget, and the fewest and most components of a module.
            progress: how much of the time of exchanges is over, from 0 to 1; at 1 ranks are final.
        """

    def new_directions(self, kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw the rows of Q, or the columns of P, of new components of one module.

        Args:
            kept: rows or columns of the components that stay in use, (k, d), fp32, on the CPU.
            count: new components.
            generator: generator on the CPU, equal on every process.

        Returns:
            The new ones, (count, d).
        """

    def forget(self, block: str, fresh: Tensor) -> None:
        """Clear what was observed of the elements of new components.

        Args:
            block: name of the block, as in :meth:`observe`.
            fresh: 1.0 for elements of new components, 0.0 for all others, flat.
        """
