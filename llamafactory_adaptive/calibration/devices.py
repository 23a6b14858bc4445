"""Where a model takes its inputs, and its weights where they are, of models that accelerate spreads over devices."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


_NOWHERE = torch.device("meta")


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model computes on first; a parameter that is kept elsewhere says nothing of it."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
        for parameter in module.parameters(recurse=False):
            if parameter.device != _NOWHERE:
                return parameter.device
    return torch.device("cpu")


def weights_present(module: nn.Module) -> AbstractContextManager[None]:
    """Keep the weights of a module on the device that it computes on within the context, also of one kept on disk."""
    from accelerate.utils import align_module_device

    present: AbstractContextManager[None] = align_module_device(module)
    return present
