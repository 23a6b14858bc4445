"""Rules by which servers read an adapter folder, from their own documentation and source, without PEFT.

A certificate compares PEFT on the original adapter with these rules on the exported files. A rule raises an error if
its server would refuse the files.

=============  ==========================================================================================
vllm           >= 0.32: alpha_i / r_i by ``rank_pattern`` and ``alpha_pattern`` (``lora/peft_helper.py``)
vllm-legacy    <= 0.31: ``lora_alpha / r`` for every module, patterns ignored
sglang         ``lora_alpha / r``; every factor must have exactly rank r, and members of the stacked
               projections (q, k, v; gate, up) come together (``srt/lora/lora.py``, ``mem_pool.py``)
llamacpp       ``lora_alpha`` over the rank of each tensor (``convert_lora_to_gguf.py``, ``llama-adapter.h``)
=============  ==========================================================================================
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TENSOR_PREFIX
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.serve_command import max_lora_rank
from llamafactory_adaptive.export.verify.module_updates import Update
from llamafactory_adaptive.files import read_mapping
from llamafactory_adaptive.ranks.module_groups import STACKED
from llamafactory_adaptive.ranks.module_names import PatternValues, is_plain_key


Config = Mapping[str, Any]


def _by_patterns(config: Config, name: str, rank: int) -> float:
    declared = config["ranks"].value_of(name, config["r"])
    if declared != rank:
        raise ExportError(f"vLLM expects rank {declared} for {name} and finds {rank}")
    max_lora_rank(max(config["largest_rank"], rank))
    return float(config["alphas"].value_of(name, config["lora_alpha"]) / declared)


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


def read_as(server: str, folder: Path) -> dict[str, Update]:
    """Read A, B and scale of every module in a folder as ``server`` does.

    Raises:
        ExportError: the server would refuse the folder.
    """
    config = _read_config(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{server} cannot read {ADAPTER_WEIGHTS} ({error})") from error
    updates = {name: (a, b, RULES[server](config, name, b.shape[1])) for name, a, b in _pairs(server, tensors)}
    if server == "sglang":
        _check_stacked(set(updates))
    return updates


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the config and check what servers read of it; keys of its patterns must be names, not expressions."""
    config = read_mapping(folder / ADAPTER_CONFIG, ADAPTER_CONFIG, error=ExportError)
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    for pattern in patterns:
        if not isinstance(pattern, dict) or not all(map(is_plain_key, pattern)):
            raise ExportError(f"{ADAPTER_CONFIG} has a pattern whose keys are not all names of modules")
    numbers = [config.get("r"), config.get("lora_alpha"), *(value for part in patterns for value in part.values())]
    if not all(isinstance(value, (int, float)) and value > 0 for value in numbers):
        raise ExportError(f"{ADAPTER_CONFIG} has a rank or an alpha that is no positive number")
    return {
        **config,
        "ranks": PatternValues(patterns[0]),
        "alphas": PatternValues(patterns[1]),
        "largest_rank": max(config["r"], *patterns[0].values()) if patterns[0] else config["r"],
    }


def _pairs(server: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, A and B of every module; a tensor that belongs to no pair is an error."""
    for key, a in tensors.items():
        name, is_a, rest = key.removeprefix(TENSOR_PREFIX).partition(".lora_A.weight")
        other = key.replace(".lora_A.", ".lora_B.") if is_a else key.replace(".lora_B.", ".lora_A.")
        if other == key or other not in tensors or rest:
            raise ExportError(f"{server} finds {key} without the other factor of its module")
        if is_a:
            b = tensors[other]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ExportError(f"{server} finds A {tuple(a.shape)} and B {tuple(b.shape)} for {name}")
            yield name, a, b


def only_in(folder: Path, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Select the updates of modules that have factors in the files; PEFT may have made others of its own.

    Raises:
        ExportError: the files have factors that PEFT does not read.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = {key.removeprefix(TENSOR_PREFIX).rpartition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    if passed_over := sorted(names - set(updates)):
        raise ExportError(f"parity failed: PEFT passes over the factors of {passed_over[0]}")
    return {name: update for name, update in updates.items() if name in names}


def _check_stacked(names: set[str]) -> None:
    for name in names:
        parent, _, kind = name.rpartition(".")
        for group in STACKED:
            missing = [other for other in group if kind in group and f"{parent}.{other}" not in names]
            if missing:
                raise ExportError(f"SGLang stacks {', '.join(group)}: {parent} has {kind} but no {missing[0]}")


@contextmanager
def applied(model: nn.Module, factors: Mapping[str, Update]) -> Iterator[None]:
    """Make every named linear layer add scale * B A x, in fp32, within the context."""

    def hook(a: Tensor, b: Tensor, scale: float) -> Callable[..., Tensor]:
        return lambda layer, inputs, output: output + (inputs[0].float() @ a.float().T @ b.float().T) * scale

    try:
        layers = {name: model.get_submodule(name) for name in factors}
    except AttributeError as error:
        raise ExportError(f"parity failed: the base has no module for some factors ({error})") from error
    handles = [layers[name].register_forward_hook(hook(*triple)) for name, triple in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
