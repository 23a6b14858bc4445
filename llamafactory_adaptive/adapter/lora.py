"""The PEFT side of a plan: the arguments of its LoraConfig, and the LoRA layers and factors of a live model.

Saved adapters follow one rule: every module has the same alpha/r, equal to ``lora_alpha / r`` of the config, where
``r`` is the largest rank in use. A server that ignores ``rank_pattern`` and ``alpha_pattern`` then scales right too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from llamafactory_adaptive.ranks.plan import RankPlan


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TENSOR_PREFIX = "base_model.model."


def int_if_integral(value: float) -> int | float:
    """Convert a whole value to int, since some servers declare ``lora_alpha`` as int; leave others as they are."""
    return int(value) if float(value).is_integer() else value


def lora_config_arguments(plan: RankPlan) -> dict[str, Any]:
    """Build the arguments of ``peft.LoraConfig`` that carry the plan; all others are left to the caller."""
    return contract_arguments({module.name: module.rank for module in plan.active}, plan.scale)


def contract_arguments(ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """Build the arguments of ``peft.LoraConfig`` for ranks by full module name; every module has the same scale."""
    largest = max(ranks.values())
    return {
        "r": largest,
        "lora_alpha": int_if_integral(scale * largest),
        "target_modules": list(ranks),
        "rank_pattern": dict(ranks),
        "alpha_pattern": {name: int_if_integral(scale * rank) for name, rank in ranks.items()},
        "use_rslora": False,
        "use_dora": False,
    }


@dataclass
class PlannedLoraConfig(LoraConfig):  # type: ignore[misc]
    """A LoraConfig that is saved with the full names of its targets, whichever program attaches the adapter.

    PEFT condenses a list of 20 or more targets to suffixes when it builds the adapter; the patterns keep full names.
    """

    def to_dict(self) -> dict[str, Any]:
        """Convert the config to a dict, with every target by its full name in ``rank_pattern``."""
        return {**super().to_dict(), "target_modules": list(self.rank_pattern)}


def live_layers(model: nn.Module) -> dict[str, tuple[LoraLayer, str]]:
    """Map base-model names to (LoRA layer, adapter name), whatever wraps the model (DDP, DeepSpeed, value head)."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in getattr(module, "lora_A", {}):
            layers[_base_name(name)] = (module, "default")
    return layers


def live_factors(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Map base-model names to the modules A and B of each LoRA layer."""
    return {
        name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, (layer, adapter) in live_layers(model).items()
    }


def _base_name(name: str) -> str:
    """Cut off wrapper prefixes: PEFT puts ``base_model.model.`` before the base model's own names."""
    return name.rpartition(TENSOR_PREFIX)[2]


def factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the trained tensors A (r, d_in) and B (d_out, r) of a layer."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def name_targets_in_full(model: nn.Module, plan: RankPlan) -> None:
    """Restore the full module names in the live config, which is the one that is saved.

    PEFT condenses a list of 20 or more targets to suffixes when it builds the adapter.
    """
    for peft_model in peft_models(model):
        peft_model.peft_config["default"].target_modules = {planned.name for planned in plan.active}


def peft_models(model: nn.Module) -> list[PeftModel]:
    """List the PEFT models among the modules of ``model``, whatever wraps them (DDP, DeepSpeed, value head)."""
    return [module for module in model.modules() if isinstance(module, PeftModel)]


def keep_4bit_unpacked_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The packed form is for inference only, but it stays when training goes on: gradients then no longer pass through
    the base weights, with a warning but without an error. It also fails on layers narrower than 128 (bitsandbytes
    0.50.2, ``Linear4bit.forward``).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
