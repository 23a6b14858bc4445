"""The check that a search makes once: a gradient reaches every module of the adapter."""

from collections.abc import Iterable

import torch
from torch import Tensor

from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.distributed import all_reduce_sum
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.training.component_blocks import Block
from llamafactory_adaptive.training.ran_modules import RanModules


class Arrival:
    """Whether gradients have been looked at, and the look.

    Args:
        triplets: adapter as masked triplets.
        partitioned: whether a process holds pieces of gradients only.
    """

    def __init__(self, triplets: Triplets, partitioned: bool) -> None:
        self.triplets, self.partitioned = triplets, partitioned
        self.done, self.ran = False, RanModules({module.name: module.a for module in triplets.modules})

    def check(self, gradients: Iterable[tuple[Block, Tensor]]) -> None:
        """Raise an error if neither P nor lambda of a module has a gradient when gradients are first looked at.

        One of them may be zero: that of lambda as long as P is, that of P where lambda is. A module that the first
        batch did not reach, an expert or an image tower, is passed over.

        Args:
            gradients: blocks with the gradients that this process owns, (M, numel), and zeros in place of others'.

        Raises:
            GuardError: a module that ran has no gradient.
        """
        if self.done:
            return
        self.done = True
        strengths = torch.zeros(len(self.triplets.modules), device=self.triplets.modules[0].a.mask_r.device)
        for block, own_MX in gradients:
            if block.kind != "Q":
                strengths[list(block.modules)] += own_MX.abs().sum(1)
        if self.partitioned:
            all_reduce_sum(strengths)
        names = [module.name for module in self.triplets.modules]
        lost = [name for name, value in zip(names, strengths.tolist(), strict=True)
                if value == 0.0 and not self.ran.excuse(name)]  # fmt: skip
        if lost:
            raise GuardError(f"no gradient arrived at {len(lost)} modules at the first step, for example at {lost[0]}")
