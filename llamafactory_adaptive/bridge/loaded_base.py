"""A base model that is measured between its load and the training, and what tells whether it is still as loaded."""

import copy
from typing import Any

from torch import nn


def described(value: Any) -> Any:
    """Return what is compared of an argument of ``from_pretrained``: of a configuration, its type and all it holds."""
    if not hasattr(value, "to_dict"):
        return value
    return type(value), value.to_dict(), getattr(value, "_attn_implementation", None)


class LoadedBase:
    """A base model as it was loaded.

    Modules hold more than weights: hooks, flags, and what forward passes leave, such as the compute type that
    bitsandbytes settles on at the first one. All of it is noted module by module, and put back by :meth:`restore`.

    Args:
        model: the model, just loaded.
        arguments: of ``from_pretrained``.
        drew: whether random numbers were drawn to load it, as for weights that its files lack.
    """

    def __init__(self, model: Any, arguments: dict[str, Any], drew: bool) -> None:
        self.model, self.arguments, self.drew = model, arguments, drew
        self._modules = [(module, dict(vars(module)), _containers(module)) for module in model.modules()]
        self._tensors = [(t, t._version, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
        self._config = described(getattr(model, "config", None))

    def restore(self) -> bool:
        """Put back everything that was rebound since, and tell whether the model then is as after a fresh load.

        It is not where loading drew random numbers, which training would draw again, where a tensor was written to, or
        where modules keep state that is not to be seen from here.
        """
        for module, attributes, containers in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in containers.items():
                _refill(attributes[name], content)
        same = all(t._version == version and t.requires_grad == flag and t.grad is None
                   for t, version, flag in self._tensors)  # fmt: skip
        return same and not self.drew and self._is_transparent() and described(self.model.config) == self._config

    def _is_transparent(self) -> bool:
        """Tell whether all state of the modules is in their attributes, as far as is known.

        8-bit layers move their weights at the first pass, other code than transformers' may keep anything, and layers
        that accelerate spreads are moved about.
        """
        known = type(self.model).__module__.startswith("transformers.")
        plain = not getattr(self.model, "is_quantized", False) or getattr(self.model, "is_loaded_in_4bit", False)
        spread = len({str(place) for place in (getattr(self.model, "hf_device_map", None) or {}).values()}) > 1
        return known and bool(plain) and not spread


def _containers(module: nn.Module) -> dict[str, Any]:
    """Copy the dictionaries and lists among a module's attributes: hooks, parameters, buffers, children."""
    return {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, (dict, list))}


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.update(content) if isinstance(container, dict) else container.extend(content)
