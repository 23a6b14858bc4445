"""The engine of FSDP2, where every parameter is a DTensor of which each process holds some rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from llamafactory_adaptive.engines.optimizer_state import gradient_of, put, restart, scale_states, square_sums
from llamafactory_adaptive.errors import GuardError


class Fsdp2Engine:
    """Engine of FSDP2: parameters, gradients and optimizer states lie in pieces of whole rows.

    Args:
        scale: returns the current loss scale.
        optimizer: the optimizer of the sharded parameters.
    """

    partitioned = True

    def __init__(self, scale: Callable[[], float], optimizer: Any) -> None:
        self.loss_scale = scale
        self.optimizer = optimizer

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return start and length of this process's rows: as many on each, rounded up, and fewer or none on the last.

        Raises:
            GuardError: the parameter is spread otherwise, as by FSDP over copies of the model.
        """
        sharded = _sharded(parameter)
        mesh = sharded.device_mesh
        width = sharded.numel() // max(1, sharded.shape[0])
        share = -(-sharded.shape[0] // mesh.size())
        start = min(share * mesh.get_local_rank(), sharded.shape[0])
        return start * width, _local(sharded).numel()

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return views of this process's rows, flat."""
        return [_local(parameter) for parameter in parameters]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return flat views of ``.grad``, which FSDP has averaged; a missing ``.grad`` is created as zeros."""
        return [_local(gradient_of(parameter)) for parameter in parameters]

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Do nothing: the gradients are views, so edits in place are already stored."""

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer's states of the owned rows, by name."""
        held = self.optimizer.state.get(parameter, {})
        return {key: _local(value) if isinstance(value, DTensor) else value for key, value in held.items()}

    def _owned(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        start, length = self.piece(parameter)
        return whole[start:][:length]

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        """Sum and count the optimizer's running squared gradients of owned elements that ``others`` marks, (2,)."""
        return square_sums(self._state(parameter), self._owned(parameter, others))

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        """Set some elements of the owned rows, and reset their optimizer states."""
        where, values = self._owned(parameter, where), self._owned(parameter, values)
        put(_local(parameter), where, values)
        restart(self._state(parameter), where, square)

    def rescale(self, parameter: nn.Parameter, factor: float, gradient_factor: float) -> None:
        """Scale the owned rows and their optimizer states."""
        rows = _local(parameter)
        rows.mul_(factor)
        scale_states(self._state(parameter), rows.numel(), gradient_factor)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """Gather whole copies of parameters for the time of the context."""
        yield [_sharded(parameter).full_tensor().detach() for parameter in parameters]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Tell whether FSDP2 holds a parameter in pieces."""
    return isinstance(parameter, DTensor)


def _sharded(parameter: nn.Parameter) -> DTensor:
    if not (isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)):
        raise GuardError(
            "FSDP spreads the adapter in a way in which ranks cannot be searched for: use fsdp_version: 2 over all "
            "processes, without copies of the model or tensor parallelism"
        )
    return parameter


@torch.no_grad()
def _local(tensor: Any) -> Tensor:
    """Return a view of this process's rows of a DTensor, flat."""
    rows: Tensor = tensor.to_local()
    return rows.detach().view(-1)
