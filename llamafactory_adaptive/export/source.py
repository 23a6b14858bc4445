"""The adapter that is exported: read from disk, refused where a plain LoRA layout could not say what it says."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamafactory_adaptive.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TENSOR_PREFIX
from llamafactory_adaptive.errors import AdaptiveConfigError, AdaptiveError, Problem
from llamafactory_adaptive.files import STATE_JSON


# What LLaMA-Factory's reward stage writes beside an adapter.
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
# Starts that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ subtract from it when PEFT loads them.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# Keys of adapter_config.json that change what the tensors mean, and why no layout can carry them.
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA normalises whole columns, which no LoRA layout can say",
    "lora_bias": "biases of LoRA layers have no place in these layouts",
    "use_qalora": "QALoRA pools its inputs",
    "fan_in_fan_out": "the base stores its weights transposed (Conv1D)",
    "trainable_token_indices": "trained tokens are no LoRA",
    "target_parameters": "adapters on bare parameters (fused experts) have no module of their own",
    "layer_replication": "the adapter is for a model with repeated layers",
    "alora_invocation_tokens": "activated LoRA starts in the middle of a text",
    "megatron_config": "it belongs to Megatron's parallel layers",
    "arrow_config": "routing between adapters is no single adapter",
}
_ELSEWHERE = "`llamafactory-cli export`, which merges through PEFT"


class ExportError(AdaptiveError, RuntimeError):
    """An adapter could not be exported; nothing carries the name of the output folder."""


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: its full name in the base model, sizes, rank, and what multiplies B A."""

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
        replaced: weights the adapter holds whole (``modules_to_save``): name in the base model to key in the file.
    """

    folder: Path
    config: Mapping[str, Any]
    modules: tuple[LoraModule, ...]
    replaced: Mapping[str, str]

    @cached_property
    def by_name(self) -> dict[str, LoraModule]:
        """Modules by their full name."""
        return {module.name: module for module in self.modules}

    def tensor(self, key: str) -> Tensor:
        """One tensor of the file."""
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r) of a module."""
        return self.tensor(factor_key(name, "A")), self.tensor(factor_key(name, "B"))


def factor_key(name: str, side: str) -> str:
    """What PEFT calls factor ``side`` (A or B) of a module in a saved adapter."""
    return f"{TENSOR_PREFIX}{name}.lora_{side}.weight"


def read_adapter(folder: Path) -> SourceAdapter:
    """Read a saved adapter and refuse, all reasons at once, what is no plain LoRA.

    Raises:
        AdaptiveConfigError: the folder holds no adapter, or one that no layout can carry.
    """
    config = _read_config(folder)
    if problems := _config_problems(folder, config):
        raise AdaptiveConfigError(problems)
    try:
        modules, replaced, faults = _read_tensors(folder / ADAPTER_WEIGHTS, config)
    except (SafetensorError, OSError) as error:
        problem = Problem("adapter", str(folder / ADAPTER_WEIGHTS), f"it cannot be read ({error})", "saving it again")
        raise AdaptiveConfigError([problem]) from error
    if faults:
        raise AdaptiveConfigError(Problem("adapter", str(folder), fault, _ELSEWHERE) for fault in faults[:3])
    return SourceAdapter(folder, config, modules, replaced)


def _read_config(folder: Path) -> dict[str, Any]:
    for name, allowed, suggestion in (
        (ADAPTER_CONFIG, "there is no adapter in it", "the output_dir of a finished run"),
        (ADAPTER_WEIGHTS, "it has no weights as safetensors (pickled ones are not opened)", "saving it again"),
    ):
        if not (folder / name).is_file():
            problem = Problem("adapter", str(folder), f"{name} is missing: {allowed}", suggestion)
            raise AdaptiveConfigError([problem])
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        problem = Problem(
            "adapter", str(folder / ADAPTER_CONFIG), f"it is no JSON mapping ({error})", "saving it again"
        )
        raise AdaptiveConfigError([problem]) from error
    return config


def _config_problems(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [Problem("peft_type", kind, "only LORA adapters can be laid out for servers", _ELSEWHERE)]
    problems = [
        Problem(key, config[key], why, "plain LoRA, or " + _ELSEWHERE)
        for key, why in _REFUSED.items()
        if config.get(key)
    ]
    problems += _number_problems(config)
    if config.get("bias", "none") != "none":
        problems.append(Problem("bias", config["bias"], "trained biases have no place in these layouts", _ELSEWHERE))
    if config.get("init_lora_weights") not in HARMLESS_INITS:
        why = "PEFT changes the base weights when it loads such an adapter, servers do not"
        try_it = "PEFT's path_initial_model_for_weight_conversion when saving"
        problems.append(Problem("init_lora_weights", config["init_lora_weights"], why, try_it))
    if (folder / STATE_JSON).is_file():
        why = "it is a checkpoint of a run that still finds its ranks"
        problems.append(Problem("adapter", str(folder), why, "the output_dir of the finished run"))
    if heads := [name for name in VALUE_HEADS if (folder / name).is_file()]:
        problems.append(Problem("adapter", heads[0], "the value head of a reward model would be lost", _ELSEWHERE))
    return problems


def _number_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Ranks are whole numbers from 1 on, alphas positive numbers."""
    ranks = {"r": config.get("r"), **(config.get("rank_pattern") or {})}
    alphas = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    wrong = {key: value for key, value in ranks.items() if not isinstance(value, int) or value < 1}
    wrong |= {key: value for key, value in alphas.items() if not isinstance(value, (int, float)) or not value > 0}
    return [
        Problem(key, value, "ranks are whole numbers from 1 on, alphas positive numbers", "saving the adapter again")
        for key, value in wrong.items()
    ]


def _read_tensors(path: Path, config: Mapping[str, Any]) -> tuple[tuple[LoraModule, ...], dict[str, str], list[str]]:
    """The modules, the weights held whole, and what is wrong in words."""
    modules, replaced, faults = [], {}, []
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for key in sorted(keys):
            name, is_a, _ = key.removeprefix(TENSOR_PREFIX).partition(".lora_A.weight")
            if is_a and factor_key(name, "B") in keys:
                a, b = file.get_tensor(key), file.get_tensor(factor_key(name, "B"))
                module, fault = _module(name, a, b, config)
                modules.append(module)
                faults += fault
            elif _saved_whole(key, config):
                replaced[key.removeprefix(TENSOR_PREFIX)] = key
            elif not (name.endswith(".lora_B.weight") and key.replace("lora_B", "lora_A") in keys):
                faults.append(f"the tensor {key} is no factor of a linear LoRA layer")
    if not modules and not faults:
        faults.append("it holds no LoRA factors")
    return tuple(modules), replaced, faults


def _saved_whole(key: str, config: Mapping[str, Any]) -> bool:
    name = key.removeprefix(TENSOR_PREFIX).rpartition(".")[0]
    return any(name == saved or name.endswith(f".{saved}") for saved in config.get("modules_to_save") or ())


def _module(name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> tuple[LoraModule, list[str]]:
    """Resolve rank and scale of one module by PEFT's own pattern rule, and compare with its tensors."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    faults = []
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        faults.append(f"{name} has rank {rank} by {ADAPTER_CONFIG} but A {tuple(a.shape)} and B {tuple(b.shape)}")
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        faults.append(f"{name} holds NaN or infinity")
    return LoraModule(name, a.shape[-1], b.shape[0], rank, scale), faults
