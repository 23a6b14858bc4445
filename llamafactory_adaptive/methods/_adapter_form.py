"""How a searching method's adapter begins, is regularised, is strengthened, and lets components return."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llamafactory_adaptive.ranks.first_update import median_slowdown
from llamafactory_adaptive.ranks.plan import ModuleShape


@dataclass(frozen=True)
class Orthogonality:
    """A regulariser on the factors of ``P diag(lambda) Q``: ``weight * mean over all P and Q of the Frobenius norm``.

    Attributes:
        weight: factor of the mean.
        form: of ``P^T P``, ``Q Q^T``, the ``off_diagonal`` part or the difference from the ``identity`` (AdaLoRA).
        relative: whether ``weight`` is the norm of its gradient as a share of that of the training gradient, over all
            factors of one kind and shape.
        in_use: whether masked components are left out.
    """

    weight: float
    form: str
    relative: bool = False
    in_use: bool = False


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter ``P diag(lambda) Q`` at the first step.

    Attributes:
        lambda_value: value of every lambda; None for plain LoRA factors without lambda.
        factors: ``gaussian``: P and Q are drawn from N(0, 0.02) (AdaLoRA, IGU-LoRA). ``lora``: P is zero and Q is
            drawn as LoRA draws A; with lambda at 1 the first update of ``Delta W`` is that of plain LoRA.
    """

    lambda_value: float | None
    factors: Literal["gaussian", "lora"]

    def slowdown(self, shapes: Sequence[ModuleShape]) -> float:
        """Compute how many times smaller the first AdamW update is than plain LoRA's, in the median module."""
        return median_slowdown(self.lambda_value, self.factors, shapes)


@dataclass(frozen=True)
class ReturnRule:
    """How components that were removed come back.

    Attributes:
        hysteresis: share by which scores of components in use are raised before they are compared with the others.
        used_first: whether components in use are all kept, and those that were removed fill what the budget leaves.
        resets_lambda: whether the lambda of a component that comes back starts at zero, rather than where it was.
    """

    hysteresis: float = 0.0
    used_first: bool = False
    resets_lambda: bool = False


@dataclass(frozen=True)
class Shrinkage:
    """A random factor f = a^3 on the adapter's output in training, for positions a.

    Attributes:
        mean: E f.
        mean_square: E f^2.
        lasting: whether lambda keeps the mended strength where training goes on at the full position, too.
    """

    mean: float
    mean_square: float
    lasting: bool = True

    @property
    def strength(self) -> float:
        """Return the best factor on an adapter trained so: the optimum of E (f w - w*)^2 is ``w = w* E f / E f^2``."""
        return self.mean_square / self.mean

    @property
    def gradient_rms(self) -> float:
        """Return the root mean square of the factor, which is on the gradients as well."""
        return math.sqrt(self.mean_square)
