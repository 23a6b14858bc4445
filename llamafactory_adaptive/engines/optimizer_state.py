"""Weights and optimizer states changed from outside: some elements set anew, whatever the optimizer keeps of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llamafactory_adaptive.errors import GuardError


def put(target: Tensor, where: Tensor, values: Tensor) -> None:
    """Set some elements of a contiguous tensor, from the CPU."""
    flat = target.view(-1)
    chosen = where.to(flat.device)
    flat[chosen] = values.to(flat.device, flat.dtype)[chosen]


def is_like(state: Any, parameter: Tensor) -> bool:
    """Whether an optimizer keeps one number per weight in it."""
    return isinstance(state, Tensor) and state.numel() == parameter.numel() > 1


# What bitsandbytes keeps besides: scales per block of weights, and the 256 values that an 8-bit state can take.
_PER_BLOCK = ("absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "qmap1", "qmap2", "unorm_vec")


# Running means of squared gradients, by which an update is divided.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2")


def _per_weight(state: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """The states kept per weight.

    Raises:
        GuardError: one is not.
    """
    states = {}
    for key, held in state.items():
        if not isinstance(held, Tensor) or held.numel() == 1 or key in _PER_BLOCK:
            continue
        if held.numel() != count:
            raise GuardError(
                f"the optimizer's {key} is not kept per weight, so components that come back cannot start anew; use "
                "optim: adamw_torch"
            )
        states[key] = held
    return states


def square_sums(state: Mapping[str, Any], others: Tensor) -> Tensor:
    """Sum and number over ``others`` of the running mean of squares, (2,) fp64 on the CPU; zeros without any."""
    for key, held in _per_weight(state, others.numel()).items():
        if key in _SQUARES:
            values = state[f"qmap{key[-1]}"][held.long()] if held.dtype == torch.uint8 else held
            chosen = values.view(-1)[others.to(held.device)].double()
            return torch.stack([chosen.sum().cpu(), torch.tensor(float(chosen.numel()), dtype=torch.float64)])
    return torch.zeros(2, dtype=torch.float64)


def restart(state: Mapping[str, Any], where: Tensor, square: float) -> None:
    """Set an optimizer's states of some weights as if they were new, in place.

    Momenta become zero. A running mean of squares becomes ``square``: from zero, and without the correction that only
    the first steps of a run get, updates would be several times too large for hundreds of steps.
    """
    for key, held in _per_weight(state, where.numel()).items():
        value = square if key in _SQUARES else 0.0
        if held.dtype == torch.uint8:  # an index into the values of a quantised state
            value = int((state[f"qmap{key[-1]}"] - value).abs().argmin())
        put(held, where, torch.full((held.numel(),), value))
