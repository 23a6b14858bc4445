"""Where a parameter and its gradient live, by training engine.

Plain and DDP processes hold whole parameters. Under ZeRO each process owns a piece of every flattened parameter (maybe
an empty one), in fp32 beside the working copy, and after the backward pass the averaged gradient of that piece.
Whoever needs the two asks a :class:`Engine` and works on pieces; nothing is gathered for it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llamafactory_adaptive.engines.optimizer_state import put, restart, square_sums
from llamafactory_adaptive.engines.zero import Zero3Engine, Zero12Engine


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also while ZeRO-3 holds it in partitions."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Engine(Protocol):
    """Access to weights and gradients between backward pass and optimizer step, before clipping.

    Attributes:
        partitioned: whether a process owns pieces only, so that sums over elements must be added up over processes.
    """

    partitioned: bool

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Start and length of what this process owns of the flattened parameter."""

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The owned pieces, flat; under ZeRO the fp32 copies that the optimizer updates."""

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients of the owned pieces, flat, averaged over processes; zeros where none arrived."""

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Take back what :meth:`gradients` gave, after it was edited in place."""

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        """Sum and number of the optimizer's running squared gradients over owned elements among ``others``, (2,)."""

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        """Set some elements and their optimizer states anew, the working copy included; all processes call it.

        Args:
            parameter: any.
            where: which elements of the whole, flattened parameter, bool on the CPU.
            values: of that shape, on the CPU.
            square: where the running mean of squared gradients starts from.
        """

    def loss_scale(self) -> float:
        """Factor on all gradients (fp16)."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Context in which the parameters are whole on this process."""


class UnpartitionedEngine:
    """One process, DDP, and DeepSpeed without partitions: every process holds everything.

    Args:
        scale: the current loss scale.
        optimizer: whose states :meth:`overwrite` empties.
    """

    partitioned = False

    def __init__(self, scale: Callable[[], float] = lambda: 1.0, optimizer: Any = None) -> None:
        self.loss_scale = scale
        self.optimizer = optimizer

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        return 0, parameter.numel()

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach().view(-1) for parameter in parameters]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Flat views of ``.grad``, which is made where it is missing."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad.view(-1) for parameter in parameters if parameter.grad is not None]

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Views: nothing to do."""

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        return square_sums(self._state(parameter), others)

    def _state(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        state: Mapping[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        return state

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        put(parameter.data, where, values)
        restart(self._state(parameter), where, square)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()


def find_engine(parameter: nn.Parameter, trainer: Any) -> Engine:
    """The engine that a prepared Trainer trains with."""
    optimizer: Any = getattr(getattr(trainer, "deepspeed", None), "optimizer", None)
    if hasattr(parameter, "ds_id"):
        return Zero3Engine(optimizer)
    if hasattr(optimizer, "grad_partition_insertion_offset"):
        return Zero12Engine(optimizer)
    if hasattr(optimizer, "cur_scale"):  # DeepSpeed without ZeRO
        return UnpartitionedEngine(lambda: float(optimizer.cur_scale))
    scaler, optimizer = getattr(trainer.accelerator, "scaler", None), trainer.optimizer
    scale = (lambda: 1.0) if scaler is None else (lambda: float(scaler.get_scale()))
    return UnpartitionedEngine(scale, getattr(optimizer, "optimizer", optimizer))
