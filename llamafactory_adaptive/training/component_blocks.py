"""A flat block of parameters of one kind and shape, and how its elements belong to components.

Shapes: M modules of one block, r rank, X all elements of a parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor, nn

from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.engine import full_shape


@dataclass(frozen=True)
class Block:
    """Parameters of one kind and shape.

    Attributes:
        name: ``<kind>/<shape>``.
        kind: ``lambda``, ``P`` or ``Q``.
        shape: of one parameter: (r,), (d_out, r) or (r, d_in).
        modules: index of each parameter's module.
        parameters: the parameters.
        pieces: start and length of this process's part of each flattened parameter.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    modules: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int:
        """Return r, the rank of the block's parameters."""
        return self.shape[1] if self.kind == "P" else self.shape[0]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a flat block into the pieces of its parameters."""
        return list(torch.split(flat, [length for _, length in self.pieces]))

    def select(self, chosen: Sequence[bool]) -> "Block":
        """Select the parameters that ``chosen`` marks, one flag each."""
        return replace(
            self,
            modules=tuple(compress(self.modules, chosen)),
            parameters=tuple(compress(self.parameters, chosen)),
            pieces=tuple(compress(self.pieces, chosen)),
        )

    def by_component(self, x_MX: Tensor) -> Tensor:
        """Average whole parameters, flat per module (M, numel), over each component: (M, r)."""
        x = x_MX.view(-1, *self.shape)
        return x if self.kind == "lambda" else x.mean(1 if self.kind == "P" else 2)

    def spread(self, per_component_Mr: Tensor) -> Tensor:
        """Copy each component's value to all its elements, (M, numel)."""
        x = per_component_Mr
        if self.kind == "Q":
            x = x.unsqueeze(2)
        elif self.kind == "P":
            x = x.unsqueeze(1)
        return x.expand(-1, *self.shape).reshape(len(self.modules), -1)


def share_of_component(block: Block, triplets: Triplets) -> Tensor:
    """Compute the share of a component's elements that a block holds, per module (M,)."""
    held = math.prod(block.shape) // block.rank
    every = [
        sum(math.prod(full_shape(p)) for p in triplets.modules[index].parameters().values()) // block.rank
        for index in block.modules
    ]
    return torch.tensor([held / count for count in every])
