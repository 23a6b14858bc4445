"""A method's state, whole in a checkpoint whatever engine trains: joined to be written, cut to pieces when read.

Shapes: M modules of one block, r rank.
"""

from collections.abc import Mapping

from torch import Tensor

from llamafactory_adaptive.training.component_blocks import Block
from llamafactory_adaptive.training.components import Components


def whole_state(components: Components, state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Join a method's state over all processes, which all must call this; it is the same under every engine.

    Args:
        components: adapter that the method observes.
        state: one number per owned element of a block, flat, under the name ``<kind>.<block>``; whatever else it holds
            is the same on every process.
        keep: whether this process gets the result, on the CPU; an empty one otherwise.
    """
    whole = {}
    for name in sorted(state):  # in one order on every process
        block = _block_of(components, name, state[name])
        values = state[name] if block is None else components.whole(block, state[name]).flatten()
        if keep:
            whole[name] = values.cpu()
    return whole


def owned_state(components: Components, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a whole state down to the elements that this process owns."""
    owned = {}
    for name, values in whole.items():
        block = _block_of(components, name, values)
        owned[name] = values if block is None else components.owned(block, values.view(len(block.modules), -1))
    return owned


def component_state(components: Components, state: Mapping[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """Average over components what earlier versions kept per element, for a method that observes components.

    Args:
        components: adapter that the method observes.
        state: the method's state as it was stored; what is kept per component has two dimensions.
        whole: whether tensors of elements are whole; otherwise they are the pieces that this process owns, and all
            processes must call this.
    """
    averaged = dict(state)
    for name in sorted(state):  # in one order on every process
        block = _named(components, name) if state[name].dim() == 1 else None
        if block is not None:
            flat_MX = state[name].view(len(block.modules), -1) if whole else components.whole(block, state[name])
            averaged[name] = block.by_component(flat_MX)
    return averaged


def _block_of(components: Components, name: str, values: Tensor) -> Block | None:
    """Return the block that a tensor has one number per element of; None where elements are not in pieces."""
    if not components.engine.partitioned or values.dim() != 1:
        return None
    return _named(components, name)


def _named(components: Components, name: str) -> Block | None:
    """Return the block of a tensor that is named ``<kind>.<block>``; None for others."""
    return next((block for block in components.blocks if block.name == name.partition(".")[2]), None)
