"""The weights ``diag(lambda * mask) Q`` of all modules of a model, computed together once per forward pass.

Computed by each module, they cost a handful of small operations per module and pass, forward and backward, and the
number of operations is what bounds a small model on a GPU. Here modules of one shape are stacked and multiplied as one
tensor, and no operation is left in the modules: they read their part of it, and autograd leaves dL/dW, the gradient of
that part, at Q. At the end of the step it is converted, again for all modules at once::

    dL/dlambda_i = <dL/dW_i, Q_i>      of the unmasked form, as a masked component may be switched on again
    dL/dQ_i      = lambda_i mask_i dL/dW_i

Both are linear in dL/dW, so that it may be summed over micro-batches and averaged over processes before. That takes
whole parameters and one set of them: one process or DDP. Shapes: M modules of one shape, r rank, d_in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import peft_models
from llamafactory_adaptive.adapter.masked_linear import LAMBDA, MaskedLinear, PathPosition, Slot
from llamafactory_adaptive.engines.optimizer_state import gradient_of


@dataclass
class _Group:
    """Layers of one shape, with their places in the order of all, and the masks of their components, (M, r).

    The masks are None while all components are in use.
    """

    layers: list[MaskedLinear]
    slots: list[Slot]
    places: list[int]
    mask_Mr: Tensor | None = None


class EffectiveWeights:
    """Effective weights of the layers of one model, which are up to date in every forward pass.

    Args:
        model: the model, not yet wrapped by DDP.
        layers: all its layers with masks.
        position: the position that they share.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MaskedLinear], position: PathPosition) -> None:
        groups: dict[torch.Size, _Group] = {}
        for place, layer in enumerate(layers):
            layer.slot = Slot()
            group = groups.setdefault(layer.weight.shape, _Group([], [], []))
            group.layers.append(layer)
            group.slots.append(layer.slot)
            group.places.append(place)
        self.groups = list(groups.values())
        self.position = position
        position.on_move(self.forget)
        for peft_model in peft_models(model):
            # Of these exactly one is called, as a module, in a pass through the model and in one of generation.
            for entry in (peft_model.base_model, peft_model.get_base_model()):
                entry.register_forward_pre_hook(lambda *unused: self.prepare())
        _leave_to_us(model)

    def remask(self, masks: Sequence[Sequence[bool]]) -> None:
        """Read the layers' new masks, which ``masks`` holds as flags, too."""
        self.forget()
        for group in self.groups:
            everything = all(all(masks[place]) for place in group.places)
            group.mask_Mr = None if everything else torch.stack([layer.mask_r for layer in group.layers])

    def forget(self) -> None:
        """Drop the weights: until the next pass begins, a layer that is called computes its own."""
        for group in self.groups:
            for slot in group.slots:
                slot.weight = None

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the effective weights for the pass that begins."""
        for group in self.groups:
            gate_Mr, weights = self._gate(group), [layer.weight for layer in group.layers]
            if gate_Mr is not None:
                gate_Mr1 = gate_Mr.unsqueeze(2)
                weights = list((torch.stack(weights) * gate_Mr1).to(weights[0].dtype).unbind())
            for slot, weight in zip(group.slots, weights, strict=True):
                slot.weight = weight

    def _gate(self, group: _Group) -> Tensor | None:
        """Compute what the rows of Q are multiplied by, (M, r); None if by 1."""
        gate_Mr, factor = group.mask_Mr, self.position.folded
        if lambdas := _lambdas(group):
            lambda_Mr = torch.stack(lambdas)
            gate_Mr = lambda_Mr if gate_Mr is None else lambda_Mr * gate_Mr
        if factor == 1.0:
            return gate_Mr
        return gate_Mr * factor if gate_Mr is not None else self._ones(group) * factor

    @staticmethod
    def _ones(group: _Group) -> Tensor:
        return torch.stack([layer.mask_r for layer in group.layers])

    @torch.no_grad()
    def settle(self) -> None:
        """Convert the gradients of effective weights, which autograd left at Q, to those of Q and lambda.

        Once per step, when gradients are complete. A module without a gradient gets zeros.
        """
        for group in self.groups:
            gate_Mr = self._gate(group)
            if gate_Mr is None:
                continue
            gradients = [gradient_of(layer.weight) for layer in group.layers]
            given_Mrd = torch.stack(gradients)
            if lambdas := _lambdas(group):
                whole_Mrd = torch.stack([layer.weight for layer in group.layers])
                # A dot product per row: no (M, r, d_in) tensor is made for lambda.
                rows_Mr = torch.linalg.vecdot(given_Mrd, whole_Mrd) * self.position.folded
                for lambda_r, row in zip(lambdas, rows_Mr.to(lambdas[0].dtype).unbind(), strict=True):
                    lambda_r.grad = row
            torch._foreach_copy_(gradients, list(given_Mrd.mul_(gate_Mr.unsqueeze(2)).unbind()))
        self.forget()  # the optimizer is about to change what they were computed from


def _lambdas(group: _Group) -> list[Tensor]:
    return [layer.lambda_r for layer in group.layers if layer.lambda_r is not None]


def _leave_to_us(model: nn.Module) -> None:
    """Make DDP leave lambda alone: it has no gradient in a backward pass, and later an equal one on all processes."""
    ignored = {name for name, _ in model.named_parameters() if name.endswith(LAMBDA)}
    ignored |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    setter = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    setter(model, ignored)  # type: ignore[no-untyped-call]
