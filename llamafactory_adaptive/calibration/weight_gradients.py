"""Passes that hand over what gradients of base weights are made of: inputs, and gradients at the outputs.

The gradient of the summed token loss for a weight W (O, I) is ``G = sum_t g_t x_t^T`` over tokens, x (I,) the module's
input and g (O,) the gradient at its output. The frozen weights themselves get none.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.calibration.batches import Batch
from llamafactory_adaptive.calibration.input_moments import back_propagate, decoder_forward
from llamafactory_adaptive.calibration.measurement import Forward, evaluating
from llamafactory_adaptive.errors import CalibrationError, first_of
from llamafactory_adaptive.progress import watched


# Takes a module's name, its inputs (samples, tokens, I) and the gradients at its outputs (samples, tokens, O), fp32;
# rows without samples, (tokens, ...), where the module reads tokens of several samples mixed, as a routed expert does.
Take = Callable[[str, Tensor, Tensor], None]


def pass_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    forward: Forward | None,
    take: Take,
) -> None:
    """Back-propagate the token loss of every batch, and hand inputs and output gradients of each module to ``take``.

    Every module's input is held until the backward pass reaches it. The model is left as it was.

    Raises:
        CalibrationError: no gradient reached a module.
    """
    seen: set[str] = set()

    def taken(name: str, x: Tensor, gradient: Tensor) -> None:
        seen.add(name)
        take(name, x.detach().float(), gradient.detach().float())

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(_hook(name, taken)).remove)
        stack.enter_context(torch.enable_grad())
        for batch in watched(batches, "Scoring modules"):
            back_propagate(model, batch, forward or decoder_forward)
    unseen = [name for name in modules if name not in seen]
    if unseen:
        raise CalibrationError(
            f"no gradient reached {first_of(unseen, ', ', 1)}; raise adaptive_calibration_samples or take the modules "
            "out of lora_target"
        )


def _hook(name: str, taken: Take) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:  # a frozen base: the graph begins at the first target
            output.requires_grad_(True)
        x = inputs[0].detach()
        output.register_hook(lambda gradient: taken(name, x, gradient))  # type: ignore[no-untyped-call]

    return hook


def squared_norms(left_btk: Tensor, right_btj: Tensor) -> Tensor:
    """Compute ``|sum_t left_t right_t^T|_F^2`` per sample in fp32, in the cheaper of two ways.

    The sum itself takes t k j multiplications, the Gram matrices over tokens take t^2 (k + j).
    """
    tokens, k, j = left_btk.shape[1], left_btk.shape[2], right_btj.shape[2]
    if tokens * (k + j) < k * j:
        return ((left_btk @ left_btk.mT) * (right_btj @ right_btj.mT)).sum((1, 2))
    return (left_btk.mT @ right_btj).square().sum((1, 2))
