"""Extra passes at points of the path from zero to the current adapter weights, on a batch of the training step.

Gradients are taken with respect to copies of the adapter, so that ``.grad``, the hooks of DDP and ZeRO, and the random
state of training are not affected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.accelerator import random_state_kept
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.training.components import Components


class _Passes(nn.Module):
    """All extra passes in one forward: ``functional_call`` must be active when gradient checkpointing recomputes."""

    def __init__(self, model: nn.Module, components: Components, seed: int) -> None:
        super().__init__()
        self.model = model
        self.components, self.position = components, components.triplets.position
        self.seed = seed

    def forward(self, inputs: Mapping[str, Any], path: Sequence[tuple[float, float]]) -> None:
        """Add ``sum_i weight_i dL/dw(a_i theta)`` to the gradients of the parameters."""
        for factor, weight in path:
            torch.manual_seed(self.seed)  # the same dropout at every node of the path
            self.position.take(factor)
            loss = self.model(**inputs).loss
            if loss is None:
                raise GuardError("the model returns no loss for a training batch, so the path cannot be probed")
            # The forward sees every weight times a, so its gradient is a times the one at a * theta.
            (loss * (weight / factor)).backward()
        self.components.triplets.settle_gradients()  # of the copies, which are in the model's place here


class Prober:
    """Runner of the extra passes, on one training batch per probed step that a forward hook keeps.

    Args:
        model: the model inside DDP or DeepSpeed.
        components: components of its adapter.
        seed: seed of dropout in the extra passes.
    """

    def __init__(self, model: nn.Module, components: Components, seed: int) -> None:
        self.model, self.components, self.seed = model, components, seed
        self.trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        self.inputs: dict[str, Any] | None = None
        self.armed = False
        self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def close(self) -> None:
        """Remove the hook, and let go of the batch."""
        self._hook.remove()
        self.inputs = None

    def _keep(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if self.armed:
            self.inputs, self.armed = dict(inputs), False

    def gradients(self, path: Sequence[tuple[float, float]], shares: int = 1) -> list[list[Tensor]]:
        """Compute the weighted sum of the gradients at the nodes of ``path`` on the kept batch, a list per block.

        Args:
            path: (factor on every weight, weight of the gradient) per pass.
            shares: number of such batches whose tokens the loss is divided by, where the Trainer gives that number.

        Raises:
            GuardError: no batch was kept, or the model returns no loss.
        """
        if self.inputs is None:
            raise GuardError("no training batch reached the model since the step began")
        if self.inputs.get("num_items_in_batch") is not None:
            path = [(factor, weight * shares) for factor, weight in path]
        names = {id(parameter): name for name, parameter in self.trained.items()}
        blocks = self.components.blocks
        copies = [[p.detach().clone().requires_grad_() for p in block.parameters] for block in blocks]
        # Whatever else trains is swapped for a constant.
        swapped = {name: parameter.detach() for name, parameter in self.trained.items()}
        swapped |= {
            names[id(parameter)]: copy
            for block, row in zip(blocks, copies, strict=True)
            for parameter, copy in zip(block.parameters, row, strict=True)
        }
        passes = _Passes(self.model, self.components, self.seed)
        try:
            with self.components.triplets.position.kept(), random_state_kept(blocks[0].parameters[0].device):
                torch.func.functional_call(passes, swapped, (self.inputs, path), strict=False)
        finally:
            self.inputs = None
        return [[torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in row] for row in copies]
