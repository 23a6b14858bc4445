"""Changes to weights, gradients and optimizer states from outside the optimizer, whatever it keeps per weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llamafactory_adaptive.accelerator import widest_float
from llamafactory_adaptive.errors import GuardError


def gradient_of(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient; where there is none, zeros that become it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped, or that it has not."""
    return getattr(optimizer, "optimizer", optimizer)


def put(target: Tensor, where: Tensor, values: Tensor) -> None:
    """Copy the values that ``where`` marks into a contiguous tensor; both may be on another device."""
    flat = target.view(-1)
    chosen = where.to(flat.device)
    flat[chosen] = values.to(flat.device, flat.dtype)[chosen]


def is_like(state: Any, parameter: Tensor) -> bool:
    """Tell whether an optimizer's state holds one number per weight of ``parameter``."""
    return isinstance(state, Tensor) and state.numel() == parameter.numel() > 1


# What bitsandbytes keeps besides: scales per block of weights, and the 256 values that an 8-bit state can take.
_PER_BLOCK = ("absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "qmap1", "qmap2", "unorm_vec")


# Classes whose states are those below, by package; what derives from them keeps the same ones. RMSprop and Adagrad of
# bitsandbytes do not: their squares lie where its other optimizers keep momenta.
_KNOWN = {
    "torch": {"Adam", "AdamW", "NAdam", "RAdam", "SGD", "Adagrad", "RMSprop"},
    "apex": {"FusedAdam"},
    "bitsandbytes": {
        f"{paged}{name}{bits}"
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW", "Lion")
        for bits in ("", "8bit", "32bit")
    },
}


def keeps_known_states(optimizer: Any) -> bool:
    """Tell whether an optimizer keeps its states in a way that is known here, so that some can be reset."""
    kinds = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(optimizer).__mro__]
    return any(name in _KNOWN.get(package, ()) for package, name in kinds)


# Running means of squared gradients, by which an update is divided.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2")


def _per_weight(state: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """Select the states that hold one number per weight; the step count and scales per block are left out.

    A single number in a tensor with a dimension counts as per weight: a process may own one weight of a parameter.

    Raises:
        GuardError: another state has a different size, so it is not kept per weight.
    """
    states = {}
    for key, held in state.items():
        if not isinstance(held, Tensor) or held.dim() == 0 or key in ("step", *_PER_BLOCK):
            continue
        if held.numel() != count:
            raise GuardError(
                f"the optimizer's {key} is not kept per weight, so components that come back cannot start anew; use "
                "optim: adamw_torch"
            )
        states[key] = held
    return states


def square_sums(state: Mapping[str, Any], others: Tensor) -> Tensor:
    """Sum and count the running mean of squares over ``others``, (2,) fp64 on the CPU; zeros if there is none."""
    for key, held in _per_weight(state, others.numel()).items():
        if key in _SQUARES:
            values = state[f"qmap{key[-1]}"][held.long()] if held.dtype == torch.uint8 else held
            chosen = values.view(-1)[others.to(held.device)].to(widest_float(held.device))
            return torch.stack([chosen.sum().cpu().double(), torch.tensor(float(chosen.numel()), dtype=torch.float64)])
    return torch.zeros(2, dtype=torch.float64)


def scale_states(state: Mapping[str, Any], count: int, factor: float) -> None:
    """Scale an optimizer's states in place, as if all gradients so far had been ``factor`` times what they were.

    RMSprop's momentum is left as it is: it holds steps, which were divided by the root of the squares.

    Args:
        state: states of ``count`` weights, by name.
        count: number of weights.
        factor: factor of the gradients; running means of squares are scaled by its square.
    """
    for key, held in _per_weight(state, count).items():
        if key == "momentum_buffer" and "square_avg" in state:
            continue
        by = factor**2 if key in _SQUARES else factor
        if held.dtype == torch.uint8:  # quantised: the scales of its blocks hold the magnitude
            for name in (f"absmax{key[-1]}", f"max{key[-1]}"):
                if isinstance(state.get(name), Tensor):
                    state[name].mul_(by)
        else:
            held.mul_(by)


def restart(state: Mapping[str, Any], where: Tensor, square: float) -> None:
    """Reset an optimizer's states of some weights in place, as if these weights were new.

    Momenta become zero. A running mean of squares becomes ``square``: if it started from zero, without the bias
    correction that only the first steps of a run get, updates would be several times too large for hundreds of steps.
    """
    for key, held in _per_weight(state, where.numel()).items():
        value = square if key in _SQUARES else 0.0
        if held.dtype == torch.uint8:  # an index into the values of a quantised state
            value = int((state[f"qmap{key[-1]}"] - value).abs().argmin())
        put(held, where, torch.full((held.numel(),), value))
