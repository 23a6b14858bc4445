"""The rotation of all factors to the form of their singular values, whatever engine holds them.

The adapter's product stays the same, but its components are now those of a singular value decomposition. Shapes: r
rank, P is (d_out, r), Q is (r, d_in).
"""

import torch
from torch import Tensor

from llamafactory_adaptive.engines.distributed import broadcast_from_first
from llamafactory_adaptive.methods import SpectralMethod
from llamafactory_adaptive.training.component_blocks import Block
from llamafactory_adaptive.training.component_resets import mean_squares
from llamafactory_adaptive.training.components import Components


def rotate(components: Components, method: SpectralMethod) -> list[list[float]]:
    """Rotate the factors of every module, and return the squares of the singular values by module and component.

    Factors are made whole from the pieces of all processes, which takes their size in fp32 on each, and the first
    process decides what becomes of them: no two may differ by rounding. The momenta of rotated weights would be those
    of other directions, so that they restart from zero; the optimizer's squared gradients restart from their mean over
    the factor. All processes must call it.

    Args:
        components: components of the live adapter, which has no lambda.
        method: method that rotates the factors of one module.
    """
    whole_blocks = [components.whole_weights(block).cpu() for block in components.blocks]
    factors = {
        (block.kind, module): factor
        for block, whole in zip(components.blocks, whole_blocks, strict=True)
        for module, factor in zip(block.modules, whole, strict=True)
    }
    masks = components.triplets.masks
    squares = [_rotate_in_place(factors["P", i], factors["Q", i], row, method) for i, row in enumerate(masks)]
    for block, whole in zip(components.blocks, whole_blocks, strict=True):
        _write(components, block, _from_first(components, whole))
    agreed = _from_first(components, torch.cat(squares))
    return [part.tolist() for part in torch.split(agreed, [len(row) for row in masks])]


def _rotate_in_place(p: Tensor, q: Tensor, used: list[bool], method: SpectralMethod) -> Tensor:
    """Rotate one module's factors, and return the squares; NaN where a factor is not finite, which stays as it is."""
    if not bool(torch.isfinite(p).all() and torch.isfinite(q).all()):
        return torch.full((len(used),), float("nan"))
    new_p, new_q, squares_r = method.rotate(p * torch.tensor(used), q)
    p.copy_(new_p)
    q.copy_(new_q)
    return squares_r.to(torch.float32)


def _from_first(components: Components, tensor: Tensor) -> Tensor:
    return broadcast_from_first(tensor.to(components.triplets.modules[0].a.mask_r.device)).cpu()


def _write(components: Components, block: Block, whole: Tensor) -> None:
    """Replace all weights of a block, and restart their optimizer states."""
    squares_M = mean_squares(components, block)
    everywhere = torch.ones(whole[0].numel(), dtype=torch.bool)
    for parameter, values, square in zip(block.parameters, whole, squares_M, strict=True):
        components.engine.overwrite(parameter, everywhere, values.reshape(-1), square)
