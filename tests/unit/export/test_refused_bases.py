"""Bases that an adapter cannot be exported on are refused before any model is loaded, and their code is not run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.exports import refusal
from tests.helpers.lora import change_tensors, save_adapter
from tests.helpers.tiny import save_tiny, tiny_model


pytestmark = pytest.mark.usefixtures("no_model_is_loaded")


def damaged_base(tmp_path, name, **changes):
    folder = save_tiny(tmp_path / name)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_bases_that_cannot_be_used(adapter, tmp_path):
    four_bit = damaged_base(tmp_path, "four", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "it is quantised; try --base <the 16-bit checkpoint" in refusal(adapter, tmp_path, base=str(four_bit))
    unknown = damaged_base(tmp_path, "unknown", model_type="no_such_model")
    assert "it is no causal language model" in refusal(adapter, tmp_path, base=str(unknown))
    bare = damaged_base(tmp_path, "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    assert "its tokenizer cannot be loaded" in refusal(adapter, tmp_path, base=str(bare))
    content = (bare / "model.safetensors").read_bytes()
    (bare / "model.safetensors").write_bytes(content[:-8])
    assert "its files cannot be read" in refusal(adapter, tmp_path, base=str(bare))
    (bare / "model.safetensors").unlink()
    assert "it has no weights as safetensors" in refusal(adapter, tmp_path, base=str(bare))
    (bare / "config.json").unlink()
    assert "it has no config.json" in refusal(adapter, tmp_path, base=str(bare))


def test_a_missing_shard_is_named(adapter, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing; try a complete copy" in refusal(adapter, tmp_path, base=str(tmp_path / "base"))


def test_another_base_is_told_apart(adapter, tmp_path):
    wide, short = save_tiny(tmp_path / "wide", hidden_size=64), save_tiny(tmp_path / "short", num_hidden_layers=1)
    message = refusal(adapter, tmp_path, base=str(wide))
    assert "the adapter does not fit: model.layers.0.mlp.down_proj is 64x64 there and 64x32 in the adapter" in message
    assert "(and 8 more)" in message
    assert "layers.1.mlp.down_proj is no linear layer of it" in refusal(adapter, tmp_path, base=str(short))


def test_weights_under_other_names_and_tied_heads(base, tmp_path):
    renamed = save_tiny(tmp_path / "renamed")
    tensors = load_file(renamed / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, renamed / "model.safetensors")
    message = refusal(save_adapter(base, tmp_path / "a"), tmp_path, base=str(renamed))
    assert "is saved there under another name" in message
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    head = save_adapter(base, tmp_path / "head", r=2, target_modules=["lm_head"])
    change_tensors(head, lambda tensors: tensors.pop("base_model.model.lm_head.base_layer.weight"))
    assert "lm_head is tied to the embeddings" in refusal(head, tmp_path, base=str(tied))


def test_weights_held_whole_that_fit_nowhere(base, tmp_path):
    with_head = save_adapter(base, tmp_path / "with_head", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight is tied to another weight" in refusal(with_head, tmp_path, "merged", base=str(tied))
    wider = save_tiny(tmp_path / "wider", vocab_size=300)
    message = refusal(with_head, tmp_path, "merged", base=str(wider))
    assert "the base has no lm_head.weight of shape (260, 32)" in message


def test_code_that_comes_with_a_checkpoint_is_not_run_nor_asked_for(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("the user was asked"))
    calls = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    foreign = damaged_base(tmp_path, "foreign", model_type="foreign", auto_map=calls)
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (foreign / "code.py").write_text(bomb)
    message = refusal(adapter, tmp_path, base=str(foreign))
    assert "loads by itself (it comes with Python code of its own, which is never run here); try" in message
    words = damaged_base(tmp_path, "words")
    (words / "code.py").write_text(bomb)
    settings = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["code.Foreign", None]}}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refusal(adapter, tmp_path, base=str(words))
    assert "its tokenizer cannot be loaded (it comes with Python code of its own" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("server", ["peft", "merged"])
def test_a_base_of_whole_numbers_is_no_16_bit_checkpoint(server, adapter, tmp_path):
    base = save_tiny(tmp_path / "integers")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, base / "model.safetensors", {"format": "pt"})
    said = refusal(adapter, tmp_path, server, base=str(base))
    assert "q_proj is held as torch.int8 there" in said
    assert "--base <the 16-bit checkpoint it came from>" in said
