"""Layouts of adapters: what is written for each server, and why that server reads it correctly.

contract   ranks by module, every module scaled by ``lora_alpha / r`` of the config, full names. PEFT, and vLLM from
           0.32 on, read the patterns; older vLLM ignores them, copies each tensor into a zeroed buffer of its largest
           rank and scales by ``lora_alpha / r``, which is right here.
padded     one rank for all: zero rows in A, zero columns in B, zero factors for layers of a targeted type that have no
           adapter. SGLang sizes its buffers by one ``r`` and stacks q, k, v and gate, up; llama.cpp and Ollama divide
           one alpha by each tensor's own rank. Zeros change no product, so the padding is exact.

Where modules are scaled differently (rsLoRA over mixed ranks, hand-made alphas), the difference is multiplied into B,
in fp32.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, contract_arguments, int_if_integral
from llamafactory_adaptive.export.safetensors_stream import TensorSpec, write_streaming
from llamafactory_adaptive.export.source_adapter import SourceAdapter, factor_key
from llamafactory_adaptive.ranks.module_names import module_type


Factors = Iterator[tuple[str, Tensor, Tensor]]


def write_contract(adapter: SourceAdapter, base: str, target: Path) -> None:
    """Write the adapter with a rank per module and one scale for all."""
    scale = common_scale(adapter)
    ranks = {module.name: module.rank for module in adapter.modules}
    _write(adapter, base, target, contract_arguments(ranks, scale), _scaled_alike(adapter, scale))


def write_padded(
    adapter: SourceAdapter, base: str, target: Path, skeleton: nn.Module, together: Sequence[tuple[str, ...]] = ()
) -> None:
    """Write the adapter padded to one rank, with factors for all layers of its types and one scale.

    Args:
        together: groups of layer types; all types of a group are written if the adapter has one of them.
    """
    scale = common_scale(adapter)
    rank = max(module.rank for module in adapter.modules)
    present = {module_type(module.name) for module in adapter.modules}
    types = sorted(present.union(*(group for group in together if present.intersection(group))))
    settings = {"r": rank, "lora_alpha": int_if_integral(scale * rank), "target_modules": types}
    _write(adapter, base, target, settings, _padded(adapter, scale, rank, types, skeleton))


def common_scale(adapter: SourceAdapter) -> float:
    """Return the scale that most modules of the adapter have."""
    return Counter(module.scale for module in adapter.modules).most_common(1)[0][0]


def _scaled_alike(adapter: SourceAdapter, scale: float) -> Factors:
    """Yield every module's factors, with the ratio of its scale to ``scale`` multiplied into B."""
    for module in adapter.modules:
        a, b = adapter.factors(module.name)
        if not math.isclose(module.scale, scale, rel_tol=1e-9):
            a, b = a.float(), b.float() * (module.scale / scale)
        yield module.name, a, b


def _padded(adapter: SourceAdapter, scale: float, rank: int, types: list[str], skeleton: nn.Module) -> Factors:
    given = {}
    for name, a, b in _scaled_alike(adapter, scale):
        given[name] = a.dtype
        missing = rank - a.shape[0]
        yield name, nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    dtype = Counter(given.values()).most_common(1)[0][0]
    for name, layer in skeleton.named_modules():
        if isinstance(layer, nn.Linear) and module_type(name) in types and name not in given:
            yield (
                name,
                torch.zeros(rank, layer.in_features, dtype=dtype),
                torch.zeros(layer.out_features, rank, dtype=dtype),
            )


def _write(adapter: SourceAdapter, base: str, target: Path, settings: Mapping[str, Any], factors: Factors) -> None:
    write_config(base, target, settings)
    tensors: dict[str, Tensor] = {}
    for name, a, b in factors:
        tensors |= {factor_key(name, "A"): a.contiguous(), factor_key(name, "B"): b.contiguous()}
    # Not safetensors' own writer, whose files only their owner can read, whatever the umask.
    specs = [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    write_streaming(target / ADAPTER_WEIGHTS, specs, lambda spec: tensors[spec.name])


def write_config(base: str | None, target: Path, settings: Mapping[str, Any]) -> None:
    """Write the config of a PEFT adapter, with sorted keys and sets, so that equal adapters give equal files."""
    config = LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
        **settings,
    ).to_dict()  # fmt: skip
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (target / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
