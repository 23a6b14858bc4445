"""Hooks that let a base model compute with the first components of each module's update, and leave it as it was."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def first_components_applied(
    layers: Mapping[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    ranks: Mapping[str, int],
    scale: float,
) -> Iterator[None]:
    """Make linear layers add ``scale * B[:, :r] A[:r] x`` within the context, as PEFT's LoRA layers compute it.

    Args:
        layers: the layers of the base model, by name.
        factors: A (k, d_in) and B (d_out, k) of each, on its device, components in order of importance.
        ranks: r of each; 0, or a name that is missing, adds nothing.
        scale: the same for all layers.
    """

    def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda layer, inputs, output: (output + inputs[0].to(a.dtype) @ a.T @ b.T * scale).to(output.dtype)

    with ExitStack() as stack:
        for name, (a, b) in factors.items():
            if rank := ranks.get(name, 0):
                stack.callback(layers[name].register_forward_hook(hook(a[:rank], b[:, :rank])).remove)
        yield
