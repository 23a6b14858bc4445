"""What is known of a model and its data before a run: layers that cannot be adapted, and steps."""

import json

import pytest

from llamafactory_adaptive.api import targets
from llamafactory_adaptive.bridge.target_shapes import (
    _refuse_conv1d,
    estimated_steps,
)
from llamafactory_adaptive.errors import AdaptiveConfigError
from tests.helpers.tiny import settings, write_datasets


def test_steps_are_estimated_from_rows_epochs_and_batches(tmp_path, monkeypatch):
    data = write_datasets(tmp_path / "data")  # 24 rows
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    args = settings(tmp_path, data, tmp_path / "out", max_steps=-1, num_train_epochs=3.0)
    assert estimated_steps({**args, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}) == 9
    assert estimated_steps({**args, "val_size": 4, "per_device_train_batch_size": 3}) == 21
    assert estimated_steps({**args, "max_samples": 10, "per_device_train_batch_size": 5, "num_train_epochs": 0.5}) == 1
    (data / "lines.jsonl").write_text('{"a": 1}\n' * 8)
    info = json.loads((data / "dataset_info.json").read_text()) | {"lines": {"file_name": "lines.jsonl"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    assert estimated_steps({**args, "dataset": "tiny_sft,lines", "per_device_train_batch_size": 32}) == 3
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert estimated_steps({**args, "per_device_train_batch_size": 2}) == 18
    for unknown in ({"dataset": "tiny_lost"}, {"dataset": "tiny_test_split"}, {"streaming": True}, {"packing": True}):
        assert estimated_steps({**args, **unknown}) is None


def test_layers_that_cannot_be_adapted_are_named(caplog):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}
    with torch.device("meta"):
        small = GPT2LMHeadModel(GPT2Config(**sizes))
        experts = MixtralForCausalLM(MixtralConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
            num_key_value_heads=1, num_local_experts=4))  # fmt: skip
    with pytest.raises(AdaptiveConfigError, match=r"'GPT2LMHeadModel' is invalid: .*of type Conv1D"):
        _refuse_conv1d(small)
    _refuse_conv1d(experts)
    targets._warned_of.clear()
    targets.tell_of_fused_experts(experts)
    targets.tell_of_fused_experts(experts)
    told = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("4 weights hold the experts of a layer in one tensor")
