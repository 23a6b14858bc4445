"""The form of AdaLoRA, which ElaLoRA builds on: P diag(lambda) Q from N(0, 0.02), score S * U, penalty |Gram - I|."""

from typing import ClassVar, Protocol

from torch import Tensor

from llamafactory_adaptive.methods._adapter_form import InitialAdapter, Orthogonality
from llamafactory_adaptive.methods._running_stats import SmoothedImportance, SmoothedMethod


class FormOptions(Protocol):
    """Options of a method of this form."""

    @property
    def beta1(self) -> float:
        """Return the decay rate of the running mean of importances."""

    @property
    def beta2(self) -> float:
        """Return the decay rate of the running mean of their deviations."""

    @property
    def orthogonality_weight(self) -> float:
        """Return the weight of the regulariser; 0 for none."""

    @property
    def statistics_dtype(self) -> str:
        """Return the name of the type in which both are kept."""


class AdaloraForm(SmoothedMethod):
    """The start, the scores and the regulariser of AdaLoRA (arXiv 2303.10512, Eq. 4 and 7-11)."""

    concentration_advice: ClassVar[str] = ""
    initial_adapter: ClassVar[InitialAdapter] = InitialAdapter(0.0, "gaussian")
    importance: SmoothedImportance

    def __init__(self, options: FormOptions) -> None:
        super().__init__(SmoothedImportance(options.beta1, options.beta2, options.statistics_dtype))
        self._weight = options.orthogonality_weight

    @property
    def orthogonality(self) -> Orthogonality | None:
        """Return the regulariser |Gram - I|; None at weight 0."""
        return Orthogonality(self._weight, "identity") if self._weight else None

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        return 1.0

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        return self.importance.product(block)
