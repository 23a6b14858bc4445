"""What a method observes of the adapter at one step: single elements, or means over the elements of components.

Shapes: M modules of one block, r rank.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from llamafactory_adaptive.engines.distributed import all_reduce_sum
from llamafactory_adaptive.methods import ComponentwiseMethod, DynamicMethod
from llamafactory_adaptive.training.component_blocks import Block


if TYPE_CHECKING:
    from llamafactory_adaptive.training.components import Components


class Observation:
    """One step's observation by a method, to which blocks are added one after the other.

    Args:
        components: adapter that is observed.
        method: method that observes.
    """

    def __init__(self, components: "Components", method: DynamicMethod) -> None:
        self.components, self.method = components, method
        self.means: list[tuple[Block, Tensor]] = []

    def add(self, block: Block, weights: Tensor, gradients: Tensor) -> None:
        """Observe this process's weights and gradients of a block, flat; ``gradients`` is overwritten."""
        if not self.method.traits.componentwise:
            self.method.observe(block.name, weights, gradients, self.components.live(block))
            return
        importance = cast(ComponentwiseMethod, self.method).importance_of(weights, gradients)
        self.means.append((block, self.components.by_component(block, importance)))

    def end(self) -> None:
        """Pass on what is observed of components, added up over processes in one collective, which all must join."""
        if not self.means:
            return
        method, partitioned = cast(ComponentwiseMethod, self.method), self.components.engine.partitioned
        means = [mean_Mr for _, mean_Mr in self.means]
        if partitioned:
            flat = all_reduce_sum(torch.cat([mean_Mr.reshape(-1) for mean_Mr in means]))
            parts = torch.split(flat, [mean_Mr.numel() for mean_Mr in means])
            means = [part.view(mean_Mr.shape) for part, mean_Mr in zip(parts, means, strict=True)]
        for (block, _), mean_Mr in zip(self.means, means, strict=True):
            method.observe_components(block.name, mean_Mr, self.components.live_components(block))
