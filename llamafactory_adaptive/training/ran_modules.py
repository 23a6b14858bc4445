"""Which modules a pass through the model has reached: the experts of its tokens, an image tower if it has images."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


class RanModules:
    """Names of the modules that were called with gradients enabled; hooks see each of them once.

    Args:
        modules: modules to watch, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.names: set[str] = set()
        self._hooks = {name: m.register_forward_hook(partial(self._saw, name)) for name, m in modules.items()}

    def _saw(self, name: str, *unused: Any) -> None:
        if torch.is_grad_enabled() and name in self._hooks:  # not yet in the first pass of gradient checkpointing
            self.names.add(name)
            self._hooks.pop(name).remove()

    def excuse(self, name: str) -> bool:
        """Tell whether a module has no gradient because it was not called, although others were."""
        return bool(self.names) and name not in self.names
