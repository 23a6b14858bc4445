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


def empty(state: Mapping[str, Any], where: Tensor) -> None:
    """Set an optimizer's states of some weights to zero, in place.

    Raises:
        GuardError: a state is not kept per weight.
    """
    for key, held in state.items():
        if not isinstance(held, Tensor) or held.numel() == 1 or key in _PER_BLOCK:
            continue
        if held.numel() != where.numel():
            raise GuardError(
                f"the optimizer's {key} is not kept per weight, so components that come back cannot start anew; use "
                "optim: adamw_torch"
            )
        zero = 0
        if held.dtype == torch.uint8:  # an index into the values of a quantised state
            zero = int(state[f"qmap{key[-1]}"].abs().argmin())
        put(held, where, torch.full((held.numel(),), zero))
