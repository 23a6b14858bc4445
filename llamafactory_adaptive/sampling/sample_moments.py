"""Moments of single samples' gradients per element of the LoRA factors, taken during training's own backward passes.

A sample's gradient at a factor is ``sum_t left_t right_t^T`` of the factor's output gradient and input, which the
backward pass has anyway (:mod:`~llamafactory_adaptive.sampling.sample_gradients`): no extra pass is made, and the
training gradient is not touched. Shapes: b samples, t tokens, k and j the two sides of a factor.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.sampling.sample_gradients import Layers, Tap


class SampleMoments:
    """Sums over the samples of an optimizer step of ``|s_i|`` or ``s_i^2``, s_i what sample i adds to the gradient.

    The loss of a step is a mean over its tokens, so that ``sum |s_i|`` is the mean of ``|g_i|`` over samples, each
    weighted by its tokens; ``n sum s_i^2`` of n samples is that of ``g_i^2`` where samples have equally many.

    Args:
        layers: A and B of every adapted module, which hooks are registered on.
        order: 1 or 2.

    Attributes:
        active: whether backward passes are observed.
    """

    def __init__(self, layers: Layers, order: int) -> None:
        self.order, self.active = order, False
        self.samples, self.sums = 0, dict[int, Tensor]()
        first = next(iter(layers.values()))[1]
        self._hooks = [
            factor.register_forward_hook(self._hook(name, factor, counts=factor is first))
            for name, factors in layers.items()
            for factor in factors
        ]

    def close(self) -> None:
        """Remove the hooks, and let go of the sums."""
        for hook in self._hooks:
            hook.remove()
        self.sums.clear()

    def begin(self) -> None:
        """Begin an optimizer step."""
        self.samples, self.active = 0, True
        self.sums.clear()

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """End the step, and return the mean over this process's samples for a factor's weight; None if it saw none."""
        self.active = False
        moment = self.sums.pop(id(parameter), None)
        return moment if moment is None or self.order == 1 else moment.mul_(float(self.samples))

    def _hook(self, name: str, factor: nn.Module, counts: bool) -> Callable[..., Tensor | None]:
        key = id(factor.weight)

        def take(gradient: Tensor, x: Tensor) -> None:
            mask_r = getattr(factor, "mask_r", None)
            # The wider side is not converted, which would take longer than the product.
            kind = x.dtype if x.shape[-1] > gradient.shape[-1] else gradient.dtype
            if kind == torch.float16:  # the loss scale could carry products out of its range
                kind = torch.float32
            left_btk = gradient.to(kind) if mask_r is None else gradient.to(kind) * mask_r.to(kind)
            g_bkj = left_btk.mT @ x.to(kind)
            moment_kj = (g_bkj.abs_() if self.order == 1 else g_bkj.float().square_()).sum(0, dtype=torch.float32)
            self.sums[key] = self.sums[key].add_(moment_kj) if key in self.sums else moment_kj
            self.samples += len(x) if counts else 0

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.active or not torch.is_grad_enabled():
                return None
            if output.dim() != 3:
                raise GuardError(
                    f"{name} reads {tuple(args[0].shape)}, no sequence per sample (a routed expert or an image "
                    "tower?), so its gradients belong to no sample; take it out of lora_target or set "
                    "tsq_sensitivity_over: step"
                )
            tapped: Tensor = Tap.apply(args[0], output, take)  # type: ignore[no-untyped-call]
            return tapped

        return hook
