"""The protocol of measurements that methods ask for, and the state that a model is measured in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from llamafactory_adaptive.calibration.batches import Batch


# Runs a model on a batch, where its signature is not that of a transformers decoder; returns logits of shape (samples,
# tokens, vocabulary), or an output that has them as ``logits``.
Forward = Callable[[nn.Module, Batch], Any]


class Measurement(Protocol):
    """Expensive pass over model and data. Methods with the same ``key`` share one pass and one cached result.

    A measurement of the model alone says so by an attribute ``needs_rows`` that is False (:func:`needs_rows`): no rows
    are drawn for it, and it is called with no batches.
    """

    @property
    def key(self) -> str:
        """Identify the measurement by its name and every option that changes its result."""

    @property
    def backward(self) -> bool:
        """Tell whether the measurement needs a backward pass."""

    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """Measure a CPU tensor per module name; ``forward`` runs models whose signature is not that of a decoder."""


def needs_rows(measurement: Measurement | None) -> bool:
    """Tell whether calibration rows have to be drawn; they are where a measurement does not say."""
    return measurement is not None and bool(getattr(measurement, "needs_rows", True))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode with all parameters frozen; every flag is restored afterwards."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)
