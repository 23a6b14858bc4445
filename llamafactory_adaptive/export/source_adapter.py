"""The adapter to export: it is read from disk, and refused if a plain LoRA layout cannot express it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TENSOR_PREFIX
from llamafactory_adaptive.errors import Problem, refuse, refuse_all
from llamafactory_adaptive.export.adapter_config import ELSEWHERE, NARROWED, read_config
from llamafactory_adaptive.export.faults import first_line
from llamafactory_adaptive.export.safetensors_stream import TensorSpec, read_spec
from llamafactory_adaptive.ranks.module_names import PatternValues, is_module_name, too_many_keys


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: its full name in the base model, sizes, rank, and the factor on B A."""

    name: str
    in_features: int
    out_features: int
    rank: int
    scale: float


@dataclass(frozen=True)
class SourceAdapter:
    """A plain LoRA adapter on disk.

    Attributes:
        modules: the adapted layers, sorted by name.
        replaced: fully trained weights (``modules_to_save``): name in the base model to key in the file.
    """

    folder: Path
    config: Mapping[str, Any]
    modules: tuple[LoraModule, ...]
    replaced: Mapping[str, str]

    @cached_property
    def by_name(self) -> dict[str, LoraModule]:
        """Map the full names of modules to the modules."""
        return {module.name: module for module in self.modules}

    @property
    def peft_settings(self) -> dict[str, Any]:
        """Build arguments of ``peft.LoraConfig`` from the checked values of the adapter's config alone.

        Targets that are a regular expression, or are narrowed down by layers, are never evaluated: the file has
        tensors for exactly the modules that they matched.
        """
        config, keys = (
            self.config,
            ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"),
        )
        settings = {key: config[key] for key in keys if config.get(key) is not None}
        targets = config.get("target_modules")
        if not isinstance(targets, list) or any(config.get(key) is not None for key in NARROWED):
            targets = [module.name for module in self.modules]
        return {**settings, "target_modules": targets, "task_type": "CAUSAL_LM", "inference_mode": True}

    def tensor(self, key: str) -> Tensor:
        """Read one tensor of the adapter's file by its key."""
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Read A (r, d_in) and B (d_out, r) of a module."""
        return self.tensor(factor_key(name, "A")), self.tensor(factor_key(name, "B"))


def factor_key(name: str, side: str) -> str:
    """Return PEFT's key of factor ``side`` (A or B) of a module in a saved adapter."""
    return f"{TENSOR_PREFIX}{name}.lora_{side}.weight"


def read_adapter(folder: Path) -> SourceAdapter:
    """Read a saved adapter, and refuse one that is not plain LoRA, with all reasons at once.

    Raises:
        AdaptiveConfigError: the folder holds no adapter, or one that no layout can carry.
    """
    config = read_config(folder)
    path = folder / ADAPTER_WEIGHTS
    try:
        modules, replaced, faults = _read_tensors(path, config)
    except (SafetensorError, OSError, ValueError) as error:
        refuse("adapter", str(path), f"it cannot be read ({first_line(error)})", "saving it again", cause=error)
    refuse_all(*(Problem("adapter", str(folder), fault, ELSEWHERE) for fault in faults[:3]))
    return SourceAdapter(folder, config, modules, replaced)


def _read_tensors(path: Path, config: Mapping[str, Any]) -> tuple[tuple[LoraModule, ...], dict[str, str], list[str]]:
    """Read the modules and the keys of fully trained weights, and list the faults in words."""
    replaced: dict[str, str] = {}
    names, faults = [], []
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for key in sorted(keys):
            name, is_a, _ = key.removeprefix(TENSOR_PREFIX).partition(".lora_A.weight")
            if is_a and key == factor_key(name, "A") and factor_key(name, "B") in keys and is_module_name(name):
                names.append(name)
            elif _is_fully_trained(key, config):
                replaced[key.removeprefix(TENSOR_PREFIX)] = key
            elif not (key.endswith(".lora_B.weight") and key.replace("lora_B", "lora_A") in keys):
                faults.append(f"the tensor {key} is no factor of a linear LoRA layer")
        modules, wrong = _modules(file, names, config)
    if not modules and not faults and not wrong:
        faults.append("it holds no LoRA factors")
    return modules, replaced, faults + wrong


def _is_fully_trained(key: str, config: Mapping[str, Any]) -> bool:
    name = key.removeprefix(TENSOR_PREFIX).rpartition(".")[0]
    return any(name == saved or name.endswith(f".{saved}") for saved in config.get("modules_to_save") or ())


def _modules(file: Any, names: list[str], config: Mapping[str, Any]) -> tuple[tuple[LoraModule, ...], list[str]]:
    """Resolve rank and scale of each module by PEFT's pattern rule, and compare with its tensors."""
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if any(too_many_keys(pattern, len(names)) for pattern in (ranks, alphas)):
        return (), [f"{ADAPTER_CONFIG} has many more patterns than the {len(names)} modules it is for"]
    declared_ranks, declared_alphas = PatternValues(ranks), PatternValues(alphas)
    modules, faults = [], []
    for name in names:
        rank = declared_ranks.value_of(name, config["r"])
        alpha = declared_alphas.value_of(name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        sides = (read_spec(file, factor_key(name, side)) for side in "AB")
        (in_features, out_features), fault = _sizes(file, name, rank, *sides)
        modules.append(LoraModule(name, in_features, out_features, rank, scale))
        faults += fault
    return tuple(modules), faults


def _sizes(file: Any, name: str, rank: int, a: TensorSpec, b: TensorSpec) -> tuple[tuple[int, int], list[str]]:
    """Check one module's factors: return its sizes, in and out, and the faults; values are read if shapes fit."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return (0, 0), [f"{name} has rank {rank} by {ADAPTER_CONFIG} but A {a.shape} and B {b.shape}"]
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        return (0, 0), [f"{name} holds {a.dtype} and {b.dtype}, which are no trained factors"]
    finite = all(bool(torch.isfinite(file.get_tensor(spec.name)).all()) for spec in (a, b))
    return (a.shape[1], b.shape[0]), [] if finite else [f"{name} holds NaN or infinity"]
