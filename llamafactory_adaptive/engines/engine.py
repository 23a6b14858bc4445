"""Access to parameters and their gradients, whatever engine trains them.

Plain and DDP processes hold whole parameters. Under ZeRO each process owns a piece of every flattened parameter (maybe
an empty one), in fp32 beside the working copy, and after the backward pass the averaged gradient of that piece; under
FSDP2 it owns rows, and there is no other copy. Code that needs either takes it from an :class:`Engine` and works on
pieces; nothing is gathered for it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from llamafactory_adaptive.engines.fsdp import Fsdp2Engine, is_sharded
from llamafactory_adaptive.engines.optimizer_state import (
    gradient_of,
    put,
    restart,
    scale_states,
    square_sums,
    unwrapped,
)
from llamafactory_adaptive.engines.zero import Zero3Engine, Zero12Engine


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also while ZeRO-3 holds it in partitions."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Engine(Protocol):
    """Access to weights and gradients between backward pass and optimizer step, before clipping.

    Attributes:
        partitioned: whether a process owns pieces only, so that sums over elements must be added up over processes.
    """

    partitioned: bool

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return start and length of the piece of the flattened parameter that this process owns."""

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the owned pieces of the parameters; under ZeRO flat, the fp32 copies that the optimizer updates.

        Whole parameters keep their shape: a view of each would cost as much as some of what is done with all at once.
        """

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of what :meth:`weights` returns, averaged over processes; zeros where there is none."""

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Store gradients that :meth:`gradients` returned and that were then edited in place."""

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        """Sum and count the optimizer's running squared gradients of owned elements that ``others`` marks, (2,)."""

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        """Set some elements and reset their optimizer states, the working copy included; all processes must call it.

        Args:
            parameter: the parameter to change.
            where: which elements of the whole, flattened parameter, bool on the CPU.
            values: the new values in the same shape, on the CPU; only those of the chosen elements are used.
            square: initial value of the running mean of squared gradients.
        """

    def rescale(self, parameter: nn.Parameter, factor: float, gradient_factor: float) -> None:
        """Scale a parameter, the working copy included, and its optimizer states; all processes must call it.

        Args:
            parameter: the parameter to change.
            factor: factor of its elements.
            gradient_factor: factor by which its gradients will differ from those that the optimizer has averaged.
        """

    def loss_scale(self) -> float:
        """Return the factor by which all gradients are scaled; 1 except in fp16."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        """Return a context manager of the whole parameters, in their order; they must not be changed."""


class UnpartitionedEngine:
    """Engine of one process, DDP, and DeepSpeed without partitions: every process holds everything.

    Args:
        scale: returns the current loss scale.
        optimizer: the optimizer whose states :meth:`overwrite` resets.
    """

    partitioned = False

    def __init__(self, scale: Callable[[], float] = lambda: 1.0, optimizer: Any = None) -> None:
        self.loss_scale = scale
        self.optimizer = optimizer

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        return 0, parameter.numel()

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return list(parameters)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return every ``.grad``; a missing one is created as zeros."""
        return [gradient_of(parameter) for parameter in parameters]

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Do nothing: the gradients were edited in place, where they are stored."""

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        return square_sums(self._state(parameter), others)

    def _state(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        state: Mapping[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
        return state

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        put(parameter.data, where, values)
        restart(self._state(parameter), where, square)

    def rescale(self, parameter: nn.Parameter, factor: float, gradient_factor: float) -> None:
        parameter.data.mul_(factor)
        scale_states(self._state(parameter), parameter.numel(), gradient_factor)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        return nullcontext([parameter.detach() for parameter in parameters])


def find_engine(parameter: nn.Parameter, trainer: Any) -> Engine:
    """Return the engine that a prepared Trainer trains with; ``parameter`` is any that it trains."""
    optimizer: Any = getattr(getattr(trainer, "deepspeed", None), "optimizer", None)
    if hasattr(parameter, "ds_id"):
        return Zero3Engine(optimizer)
    if hasattr(optimizer, "grad_partition_insertion_offset"):
        return Zero12Engine(optimizer)
    if hasattr(optimizer, "cur_scale"):  # DeepSpeed without ZeRO
        return UnpartitionedEngine(lambda: float(optimizer.cur_scale))
    scaler, optimizer = getattr(trainer.accelerator, "scaler", None), trainer.optimizer
    scale = (lambda: 1.0) if scaler is None else (lambda: float(scaler.get_scale()))
    kind = Fsdp2Engine if is_sharded(parameter) else UnpartitionedEngine
    return kind(scale, unwrapped(optimizer))
