"""Bases to export on, the weights of what was exported, and exports that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.export import exporter
from llamafactory_adaptive.export.request import ExportRequest
from tests.helpers.tiny import tiny_model, tiny_tokenizer


def save_base(
    folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "50GB", **sizes: Any
) -> Path:
    """A tiny checkpoint of one type, in shards of at most ``shard``."""
    tiny_model(architecture, **sizes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint, of all its shards."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def refusal(
    adapter: Path, tmp_path: Path, server: str = "peft", error: type[AdaptiveError] = AdaptiveError, **more: Any
) -> str:
    """Export an adapter that must be refused with nothing written; returns what is said."""
    with pytest.raises(error) as caught:
        exporter.run_export(ExportRequest(adapter, server, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()
    return str(caught.value)
