"""How each server reads an adapter folder: its own rule, from its own documentation and source, without PEFT.

A certificate compares PEFT on the original adapter with these rules on the exported files. Where a server would refuse
the files, the rule raises.

=============  ==========================================================================================
vllm           >= 0.32: alpha_i / r_i by ``rank_pattern`` and ``alpha_pattern`` (``lora/peft_helper.py``)
vllm-legacy    <= 0.31: ``lora_alpha / r`` for every module, patterns ignored
sglang         ``lora_alpha / r``; every factor must have exactly rank r, and members of the stacked
               projections (q, k, v; gate, up) come together (``srt/lora/lora.py``, ``mem_pool.py``)
llamacpp       ``lora_alpha`` over the rank of each tensor (``convert_lora_to_gguf.py``, ``llama-adapter.h``)
=============  ==========================================================================================
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from llamafactory_adaptive.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TENSOR_PREFIX
from llamafactory_adaptive.export.serving import max_lora_rank
from llamafactory_adaptive.export.source import ExportError


Config = Mapping[str, Any]
# What SGLang multiplies in one go.
STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _by_patterns(config: Config, name: str, rank: int) -> float:
    declared = _first_match(config["rank_pattern"], name, config["r"])
    if declared != rank:
        raise ExportError(f"vLLM expects rank {declared} for {name} and finds {rank}")
    max_lora_rank(max(config["r"], *config["rank_pattern"].values(), rank))
    return float(_first_match(config["alpha_pattern"], name, config["lora_alpha"]) / declared)


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _one_global(config: Config, name: str, rank: int) -> float:
    if rank > config["r"]:
        raise ExportError(f"vLLM has buffers of rank {config['r']} for {name} of rank {rank}")
    max_lora_rank(config["r"])
    return float(config["lora_alpha"] / config["r"])


def _one_rank(config: Config, name: str, rank: int) -> float:
    if rank != config["r"]:
        raise ExportError(f"SGLang has buffers of rank {config['r']} for {name} of rank {rank}")
    return float(config["lora_alpha"] / config["r"])


def _by_tensor(config: Config, name: str, rank: int) -> float:
    return float(config["lora_alpha"] / rank)


RULES: dict[str, Callable[[Config, str, int], float]] = {
    "vllm": _by_patterns,
    "vllm-legacy": _one_global,
    "sglang": _one_rank,
    "llamacpp": _by_tensor,
}


def read_as(server: str, folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module name to A, B and scale, as ``server`` understands the folder.

    Raises:
        ExportError: the server would refuse it.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    found = {}
    for key, a in tensors.items():
        name, is_a, _ = key.removeprefix(TENSOR_PREFIX).partition(".lora_A.weight")
        if is_a:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            found[name] = (a, b, RULES[server](config, name, b.shape[1]))
    if server == "sglang":
        _check_stacked(set(found))
    return found


def _check_stacked(names: set[str]) -> None:
    for name in names:
        parent, _, kind = name.rpartition(".")
        for group in STACKED:
            missing = [other for other in group if kind in group and f"{parent}.{other}" not in names]
            if missing:
                raise ExportError(f"SGLang stacks {', '.join(group)}: {parent} has {kind} but no {missing[0]}")


@contextmanager
def applied(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """Within the context every named linear layer adds scale * B A x, in fp32."""

    def hook(a: Tensor, b: Tensor, scale: float) -> Callable[..., Tensor]:
        return lambda layer, inputs, output: output + (inputs[0].float() @ a.float().T @ b.float().T) * scale

    handles = [model.get_submodule(name).register_forward_hook(hook(*triple)) for name, triple in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
