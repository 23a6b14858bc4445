"""Base weights as dense matrices, also of quantised modules, and their largest singular value."""

from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.calibration.devices import weights_present


_ROWS = 1024  # unit vectors that pass through a quantised module at once
_BLOCK, _MOST_ROUNDS, _PRECISION = 8, 200, 1e-7


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """Return the matrix (out_features, in_features) that a linear module multiplies by.

    A quantised weight is read off the outputs for unit vectors: whatever its format, that is what the module computes.
    """
    linear: Any = module
    with weights_present(module):
        weight: Tensor = linear.weight
        shape = (linear.out_features, linear.in_features)
        if weight.is_floating_point() and tuple(weight.shape) == shape:
            return weight.detach()
        unit = torch.eye(linear.in_features, device=weight.device)
        columns = torch.cat([linear(rows) for rows in torch.split(unit, _ROWS)])
        return (columns if linear.bias is None else columns - linear.bias).T


@torch.no_grad()
def largest_singular_value(w_OI: Tensor) -> Tensor:
    """Find the largest singular value by iterating on a block of vectors, without a whole decomposition.

    The error shrinks by ``(sigma_9 / sigma_1)^4`` in each round; it ends where a round changes nothing.
    """
    w = w_OI.float()
    start = torch.randn(w.shape[1], min(_BLOCK, *w.shape), generator=torch.Generator().manual_seed(0))
    basis, value = torch.linalg.qr(start.to(w.device)).Q, w.new_zeros(())
    for _ in range(_MOST_ROUNDS):
        image = w @ basis
        last, value = value, torch.linalg.svdvals(image).max()
        if bool((value - last).abs() <= _PRECISION * value):
            break
        basis = torch.linalg.qr(w.T @ image).Q
    return value
