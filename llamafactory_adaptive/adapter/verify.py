"""Checks of live and saved adapters against the plan; errors name the first faults."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from llamafactory_adaptive.adapter.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TENSOR_PREFIX,
    _base_name,
    factors,
    live_layers,
)
from llamafactory_adaptive.adapter.starting_factors import StartingFactors
from llamafactory_adaptive.engines.engine import full_shape
from llamafactory_adaptive.errors import GuardError, first_of
from llamafactory_adaptive.files import read_mapping
from llamafactory_adaptive.ranks.module_names import NamePattern
from llamafactory_adaptive.ranks.plan import RankPlan


def check_live(model: nn.Module, plan: RankPlan) -> int:
    """Compare the adapter inside ``model`` with the plan: modules, ranks, tensor shapes and scale.

    Returns:
        The number of adapted modules.

    Raises:
        GuardError: the adapter differs from the plan; the message gives counts and the first differences.
    """
    layers = live_layers(model)
    faults = _name_faults(layers, plan)
    for module in plan.active:
        if module.name not in layers:
            continue
        layer, adapter = layers[module.name]
        shape_a, shape_b = map(full_shape, factors(layer, adapter))
        if shape_a != (module.rank, module.in_features) or shape_b != (module.out_features, module.rank):
            faults.append(f"{module.name} has A {shape_a} and B {shape_b} for rank {module.rank}")
        if not math.isclose(layer.scaling[adapter], plan.scale, rel_tol=1e-6):
            faults.append(f"{module.name} is scaled by {layer.scaling[adapter]}, not {plan.scale}")
    _raise(
        faults,
        f"the model's adapter does not match the plan ({len(layers)} adapted modules, {len(plan.active)} planned)",
    )
    return len(layers)


def _name_faults(names: Iterable[str], plan: RankPlan) -> list[str]:
    planned, present = {module.name for module in plan.active}, set(names)
    return [f"{name} is planned but has no adapter" for name in sorted(planned - present)] + [
        f"{name} has an adapter but is not planned" for name in sorted(present - planned)
    ]


def _raise(faults: list[str], headline: str) -> None:
    if faults:
        raise GuardError(f"{headline}: {first_of(faults)}")


def check_saved(folder: Path, plan: RankPlan, start: StartingFactors | None = None) -> int:
    """Compare a saved adapter with the plan, from its files alone: config, patterns, tensor shapes and finiteness.

    Args:
        folder: folder of the adapter.
        plan: what it should be.
        start: what its factors started from; None where B started at zero.

    Returns:
        The number of modules whose B factor is still exactly what it started from, that is, untrained.

    Raises:
        GuardError: the saved adapter is missing or differs from the plan; the message names the first faults.
    """
    config_path, weights_path = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    for path in (config_path, weights_path):
        if not path.is_file():
            raise GuardError(f"no adapter was saved: {path} is missing")
    config = read_mapping(config_path, str(config_path), error=GuardError)
    faults = _config_faults(config, plan)
    tensor_faults, untrained = _tensor_faults(weights_path, plan, start)
    _raise(faults + tensor_faults, f"the adapter saved in {folder} does not match the plan")
    return untrained


def _config_faults(config: dict[str, Any], plan: RankPlan) -> list[str]:
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {config.get('peft_type')}, not LORA")
    faults += [f"{key} is set" for key in ("use_rslora", "use_dora") if config.get(key)]
    if config.get("r") != plan.largest_rank:
        faults.append(f"r is {config.get('r')}, the largest rank in use is {plan.largest_rank}")
    elif not math.isclose(alpha := _number(config.get("lora_alpha")) / config["r"], plan.scale, rel_tol=1e-6):
        faults.append(f"lora_alpha / r is {alpha}, not {plan.scale}")
    targets = config.get("target_modules")
    faults += [
        f"target_modules: {fault}" for fault in _name_faults(targets if isinstance(targets, list) else [], plan)
    ]
    ranks, alphas = (_mapping(config.get(key)) for key in ("rank_pattern", "alpha_pattern"))
    faults += _name_faults(ranks, plan)
    keys = NamePattern(ranks)
    for module in plan.active:
        key = keys.key_of(module.name) or module.name
        if key != module.name:
            faults.append(f"the pattern {key} also hits {module.name}")
        elif ranks.get(key) != module.rank:
            faults.append(f"rank_pattern gives {module.name} {ranks.get(key)}, planned {module.rank}")
        elif not math.isclose(_number(alphas.get(key)) / module.rank, plan.scale, rel_tol=1e-6):
            faults.append(f"alpha_pattern gives {module.name} {alphas.get(key)}")
    return faults


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    """Return a number of a config as a float; NaN, which is close to no value, if it is no number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _tensor_faults(path: Path, plan: RankPlan, start: StartingFactors | None) -> tuple[list[str], int]:
    """List the faults in names, shapes and finiteness of the saved factors, and count modules with an untrained B."""
    faults, untrained = [], 0
    with safe_open(path, framework="pt") as file:
        adapted = {_base_name(key).rpartition(".lora_")[0] for key in file.keys() if ".lora_" in key}  # noqa: SIM118
        faults += _name_faults(adapted, plan)
        for module in (module for module in plan.active if module.name in adapted):
            stem = f"{TENSOR_PREFIX}{module.name}"
            a = file.get_tensor(f"{stem}.lora_A.weight")
            b = file.get_tensor(f"{stem}.lora_B.weight")
            if tuple(a.shape) != (module.rank, module.in_features) or b.shape[1] != module.rank:
                faults.append(f"{module.name} holds A {tuple(a.shape)} and B {tuple(b.shape)}, planned {module.rank}")
            if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
                faults.append(f"{module.name} holds NaN or infinity")
            at_start = not bool(b.any()) if start is None else start.is_start(module.name, b)
            untrained += int(at_start)
    return faults, untrained
