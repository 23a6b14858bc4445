"""Saved LoRA adapters for the tiny models: mixed ranks, trained by no one, with an effect one can measure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.adapter.lora import contract_arguments
from tests.helpers.tiny import TARGETS


def save_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter of ``base`` with random factors; without ``settings``, of ranks 1 to 8 by our own contract."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = settings or contract_arguments(mixed_ranks(model), 2.0)
    torch.manual_seed(1)
    live = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    live.save_pretrained(folder)
    return folder


def mixed_ranks(model: torch.nn.Module) -> dict[str, int]:
    """Ranks 1, 3, 8, 5 in turn; every fifth module has none."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    return {name: rank for name, rank in zip(names, (1, 3, 0, 8, 5) * len(names), strict=False) if rank}


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of ``adapter_config.json``."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the saved factors in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def saved_parameters(folder):
    """Count the parameters of a saved adapter."""
    return sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
