"""The factor A of a LoRA layer while ranks are being found: Q with a gate per row, ``diag(lambda * mask) Q``.

Shapes: rank r, d_in; Q is (r, d_in), lambda and mask are (r,), and one column in ``gate_r1``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional


LAMBDA = "lambda_r"


class PathPosition:
    """Position of the forward pass on the path from no adapter (0) to the current one (1), shared by the whole model.

    Scaling each of the three factors by the position scales their product by its cube. In a training step the layers'
    own scale carries that factor, at no cost. Outside of steps the adapter has its ``strength``, which is folded into
    the weights, as it is in those that are saved.

    Attributes:
        strength: factor on the adapter outside of training steps: in evaluation, and in what is saved.
        folded: factor on the weights in the next forward pass.
    """

    def __init__(self) -> None:
        self.strength = self.folded = self._output = 1.0
        self._scales: list[tuple[dict[str, float], str, float]] = []
        self._listeners: list[Callable[[], None]] = []

    @property
    def factor(self) -> float:
        """Return the factor on the adapter in the next forward pass."""
        return self._output * self.folded

    def join(self, layer: LoraLayer, adapter: str) -> None:
        """Scale the output of a layer's adapter by the position from now on."""
        self._scales.append((layer.scaling, adapter, layer.scaling[adapter]))

    def on_move(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever the position may have changed, at least once in every training step."""
        self._listeners.append(listener)

    def take(self, value: float) -> None:
        """Set the position of the next forward passes of training."""
        self._move(value**3, 1.0)

    def leave(self) -> None:
        """End a training step: the next forward passes see the adapter as it would be saved."""
        self._move(1.0, self.strength)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the position at the end of the context."""
        before = self._output, self.folded
        try:
            yield
        finally:
            self._move(*before)

    def _move(self, output: float, folded: float) -> None:
        if output != self._output:
            for scaling, adapter, scale in self._scales:
                scaling[adapter] = scale * output
        self._output, self.folded = output, folded
        for listener in self._listeners:
            listener()


class _MaskedScale(torch.autograd.Function):
    """Autograd function ``diag(lambda * mask) Q * factor`` whose gradient for lambda ignores the mask.

    A masked component adds exactly zero to the output, yet its lambda still gets the gradient that it would have
    unmasked, so that it can be switched on again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, lambda_r: Tensor, mask_r: Tensor, factor: float) -> Tensor:
        gate_r1 = column(lambda_r * mask_r, factor)
        ctx.save_for_backward(q, gate_r1)
        ctx.factor = factor
        return q * gate_r1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        q, gate_r1 = ctx.saved_tensors
        # A dot product per row: no (r, d_in) tensor is made for lambda.
        grad_lambda = torch.linalg.vecdot(grad, q)
        return grad * gate_r1, grad_lambda if ctx.factor == 1.0 else grad_lambda * ctx.factor, None, None


def column(gate_r: Tensor, factor: float) -> Tensor:
    """Compute the factors that the rows of Q are multiplied by, (r, 1)."""
    return (gate_r if factor == 1.0 else gate_r * factor).unsqueeze(1)


class Slot:
    """Place for the weight of one layer that was computed together with those of all others; None if it was not."""

    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight: Tensor | None = None


class MaskedLinear(nn.Linear):
    """Replacement of a layer's ``lora_A``: ``weight`` is Q, and the layer applies ``diag(lambda * mask) Q``.

    A parametrisation of ``weight`` would do the same at more cost: PEFT reads ``weight`` twice in each forward. Code
    that reads ``weight`` directly (PEFT's merge) gets Q alone; it should work on a saved adapter instead.

    Args:
        plain: the ``lora_A`` to replace; its parameter is reused.
        initial_lambda: initial value of lambda; None for a layer without lambda.
        position: the position that the whole model shares.

    Attributes:
        slot: None while autograd computes the gradients of Q and lambda. Otherwise it leaves the gradient of the
            effective weight at Q (``effective_weights``).
    """

    def __init__(self, plain: nn.Linear, initial_lambda: float | None, position: PathPosition) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.position = position
        self.slot: Slot | None = None
        # No buffer: engines that cast or move buffers would cut the view into the one tensor that holds all masks.
        self.mask_r = torch.ones_like(plain.weight.data[:, 0])
        self.lambda_r: nn.Parameter | None = None
        if initial_lambda is not None:
            self.lambda_r = nn.Parameter(torch.full_like(self.mask_r, initial_lambda))
            self.register_load_state_dict_pre_hook(_accept_plain_weight)  # type: ignore[no-untyped-call]

    def effective_weight(self) -> Tensor:
        """Compute ``diag(lambda * mask) Q``, (r, d_in), outside of training steps bit for bit as it is saved."""
        if self.slot is None:
            return self._gated()
        weight = self.slot.weight
        if weight is None:  # the layer is called by itself
            with torch.no_grad():
                weight = self._gated()
        if weight is self.weight or not torch.is_grad_enabled():
            return weight
        return _standing_for(self.weight, weight)

    def _gated(self) -> Tensor:
        """Compute the effective weight of this layer alone."""
        factor = self.position.folded
        mask_r = self.mask_r.to(self.weight.dtype)  # FSDP computes with copies of another type than the optimizer's
        if self.lambda_r is None:
            return self.weight * column(mask_r, factor)
        if not torch.is_grad_enabled():  # the first pass of gradient checkpointing, and evaluation
            return self.weight * column(self.lambda_r * mask_r, factor)
        masked: Tensor = _MaskedScale.apply(self.weight, self.lambda_r, mask_r, factor)  # type: ignore[no-untyped-call]
        return masked

    def forward(self, x: Tensor) -> Tensor:
        """Apply the masked factor to ``x``: (..., d_in) becomes (..., r)."""
        return functional.linear(x, self.effective_weight())


def _standing_for(q: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight`` as a tensor whose gradient autograd adds to that of ``q``: no operation on the device.

    A view of Q is given other contents. An autograd function of Python's would do the same at several times the cost
    on the host, which is what bounds the speed of small models.
    """
    stand_in = q.view_as(q)
    stand_in.data = weight
    return stand_in


def _accept_plain_weight(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Load a plain ``lora_A.weight`` as Q with lambda 1, the same function; exact factors follow from our state."""
    weight = state.get(prefix + "weight")
    if weight is not None and prefix + LAMBDA not in state:
        state[prefix + LAMBDA] = torch.ones_like(weight[:, 0])
