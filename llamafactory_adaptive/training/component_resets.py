"""Changes to components from outside the optimizer: a new start, new directions, lambda zero, another strength.

All processes must call them, with the same arguments. Shapes as in ``components``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llamafactory_adaptive.adapter.masked_lora import fresh_rows
from llamafactory_adaptive.engines.distributed import all_reduce_sum, broadcast_from_first
from llamafactory_adaptive.methods import ExchangingMethod, Shrinkage
from llamafactory_adaptive.training.component_blocks import Block
from llamafactory_adaptive.training.components import Components


Flags = Sequence[Sequence[bool]]  # per module and component


def restart(components: Components, fresh: Flags, seed: int) -> None:
    """Reset components that were masked: no effect on the output, no optimizer history.

    Their column of P becomes zero, their row of Q is drawn as for a new LoRA, their momenta become zero. The
    optimizer's squared gradients start from the mean over the components of the same factor that were in use.

    Args:
        components: components of the live adapter, which has no lambda.
        fresh: flags of the components to reset, per module.
        seed: seed of the new rows; equal on every process.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in components.blocks:
        _overwrite(components, block, fresh, generator if block.kind == "Q" else None)


def begin_new(components: Components, used: Flags, fresh: Flags, method: ExchangingMethod, seed: int) -> None:
    """Give components that come into use new directions and a lambda of zero, without optimizer history.

    The factors of modules that grow are made whole for it, which takes their size in fp32 on every process.

    Args:
        components: components of the live adapter, which has lambda.
        used: flags of the components in use from now on, per module.
        fresh: flags of those of them that are new.
        method: draws the directions, and forgets what it observed of the elements.
        seed: seed of the directions; equal on every process.
    """
    draw = partial(method.new_directions, generator=torch.Generator().manual_seed(seed))
    for block in components.blocks:
        grown = [any(fresh[index]) for index in block.modules]
        if not any(grown):
            continue
        if block.kind == "lambda":
            _overwrite(components, block, fresh, None)
        else:
            _redirect(components, block.select(grown), used, fresh, draw)
        method.forget(block.name, components.marked(block, fresh))


def _redirect(components: Components, block: Block, used: Flags, fresh: Flags, draw: Callable[..., Tensor]) -> None:
    """Replace rows of Q or columns of P; the first process draws them, as no two may differ by rounding."""
    whole, squares_M = components.whole_weights(block).cpu(), mean_squares(components, block)
    fresh_Mr, used_Mr = (torch.tensor([list(flags[index]) for index in block.modules]) for flags in (fresh, used))
    for factor, new_r, kept_r in zip(whole, fresh_Mr, used_Mr & ~fresh_Mr, strict=True):
        rows = factor if block.kind == "Q" else factor.mT
        rows[new_r] = draw(rows[kept_r], int(new_r.sum()))
    whole = broadcast_from_first(whole.to(components.triplets.modules[0].a.mask_r.device)).cpu()
    for parameter, flags_X, values, square in zip(
        block.parameters, block.spread(fresh_Mr), whole, squares_M, strict=True
    ):
        components.engine.overwrite(parameter, flags_X, values.reshape(-1), square)


def reset_lambda(components: Components, fresh: Flags) -> None:
    """Set the lambda of some components to zero, without optimizer history: they grow anew from no effect.

    Args:
        components: components of the live adapter.
        fresh: flags of the components to reset, per module.
    """
    for block in components.blocks:
        if block.kind == "lambda":
            _overwrite(components, block, fresh, None)


def _overwrite(components: Components, block: Block, fresh: Flags, rows: torch.Generator | None) -> None:
    """Set the flagged components of a block to zero, or to new rows of Q drawn from ``rows``."""
    fresh_Mr = torch.tensor([list(fresh[index]) for index in block.modules])
    if not bool(fresh_Mr.any()):
        return
    flags_MX, squares_M = block.spread(fresh_Mr), mean_squares(components, block)
    for parameter, flags_X, square in zip(block.parameters, flags_MX, squares_M, strict=True):
        if bool(flags_X.any()):
            new = torch.zeros(block.shape) if rows is None else fresh_rows(block.shape, rows)
            components.engine.overwrite(parameter, flags_X, new.view(-1), square)


def mean_squares(components: Components, block: Block) -> list[float]:
    """Average the optimizer's running squared gradients per parameter, over elements in use of all processes."""
    masks = components.triplets.masks
    used_MX = block.spread(torch.tensor([list(masks[index]) for index in block.modules]))
    pairs = zip(block.parameters, used_MX, strict=True)
    sums_M2 = torch.stack([components.engine.square_sums(parameter, used_X) for parameter, used_X in pairs])
    if components.engine.partitioned:
        sums_M2 = all_reduce_sum(sums_M2.to(components.triplets.modules[0].a.mask_r.device)).cpu()
    mean_M: list[float] = (sums_M2[:, 0] / sums_M2[:, 1].clamp(min=1.0)).tolist()
    return mean_M


def rescale_lambda(components: Components, shrinkage: Shrinkage) -> None:
    """Multiply every lambda by the strength of an adapter that was trained under shrinkage, which ends.

    The states of optimizers that divide by the size of gradients are scaled to those that follow, so that the next
    update is as large as the last.
    """
    strength, rms = shrinkage.strength, shrinkage.gradient_rms
    for block in components.blocks:
        is_lambda = block.kind == "lambda"
        for parameter in block.parameters:
            gradient_factor = (1.0 if is_lambda else strength) / rms
            components.engine.rescale(parameter, strength if is_lambda else 1.0, gradient_factor)
