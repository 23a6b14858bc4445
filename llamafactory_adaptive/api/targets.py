"""Selection of the linear modules of a model that get an adapter."""

import logging
from collections.abc import Sequence

from peft.tuners.lora import LoraLayer
from torch import nn

from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.launcher import local_rank
from llamafactory_adaptive.ranks.module_names import module_type


ALL_LINEAR = "all-linear"
logger = logging.getLogger("llamafactory.adaptive")
_warned_of: set[str] = set()


def find_targets(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, nn.Linear]:
    """Find the modules to adapt, in model order.

    Args:
        model: a base model without an adapter.
        wanted: ``"all-linear"``, or names of modules or their last parts.

    Returns:
        Full name to linear layer.

    Raises:
        AdaptiveConfigError: the model has an adapter, a name matches nothing, or what it matches is not linear.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        remedy = "the base model, or model.merge_and_unload()"
        refuse("model", type(model).__name__, "it has a LoRA adapter already", remedy)
    if wanted == ALL_LINEAR:
        tell_of_fused_experts(model)
        return _all_linear(model)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    modules = dict(model.named_modules())
    matches = {name: [full for full in modules if _is_named(full, name)] for name in names}
    known = sorted({module_type(full) for full in _all_linear(model)})
    remedy = f"target_modules={ALL_LINEAR!r}, or some of {', '.join(known)}"
    missing = [name for name in matches if not matches[name]]
    for full in fused_experts(model):
        if any(_is_named(full, name) for name in missing):
            reason = f"{full} holds the experts of a layer in one tensor, which gets no adapter"
            refuse("target_modules", wanted, reason, remedy)
    if missing or not names:
        refuse("target_modules", wanted, f"no module is called {', '.join(missing)}", remedy)
    chosen = {full for each in matches.values() for full in each}
    for full in sorted(chosen):
        if not isinstance(modules[full], nn.Linear):
            reason = f"{full} is a {type(modules[full]).__name__}, not a linear layer"
            refuse("target_modules", wanted, reason, remedy)
    return {full: module for full, module in modules.items() if full in chosen and isinstance(module, nn.Linear)}


def fused_experts(model: nn.Module) -> list[str]:
    """List the weights that hold all experts of a layer in one tensor."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]


def tell_of_fused_experts(model: nn.Module) -> None:
    """Warn once that experts kept in one tensor get no adapter, as plain LoRA gives them none."""
    fused = fused_experts(model)
    if fused and local_rank() == 0 and "fused" not in _warned_of:
        _warned_of.add("fused")
        logger.warning(
            f"{len(fused)} weights hold the experts of a layer in one tensor ({fused[0]}, ...) and get no adapter: "
            "ranks are shared among the other modules"
        )


def _is_named(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _all_linear(model: nn.Module) -> dict[str, nn.Linear]:
    """Find every linear layer but the output head, as ``all-linear`` means in PEFT.

    Raises:
        AdaptiveConfigError: the model has no linear layer.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        reason = "it has no nn.Linear to adapt (GPT-2's Conv1D layers are none)"
        refuse("model", type(model).__name__, reason, "a Llama, Qwen or Mistral model")
    return layers
