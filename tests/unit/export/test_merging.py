"""Merged files are PEFT's merge bit for bit, made one weight at a time."""

import json
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_adaptive.adapter.lora import contract_arguments
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.export import exporter, merging
from llamafactory_adaptive.export.base_checkpoint import find_base
from llamafactory_adaptive.export.exporter import run_export
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.request import ExportRequest
from llamafactory_adaptive.export.source_adapter import read_adapter
from llamafactory_adaptive.export.verify import log_probabilities
from llamafactory_adaptive.export.verify.compare import Comparer
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from tests.helpers.exports import save_base, weights
from tests.helpers.lora import mixed_ranks, save_adapter
from tests.helpers.tiny import save_tiny, tiny_model


def merged_by_peft(base, adapter, dtype="auto"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload().state_dict()


BASES = {
    "bf16": {},
    "fp32": {"dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "tied": {"tie_word_embeddings": True},
    "tied in shards": {"tie_word_embeddings": True, "shard": "20KB"},
    "shards with biases": {"architecture": "qwen2", "shard": "20KB"},
    "qwen3": {"architecture": "qwen3"},
}


@pytest.mark.parametrize(
    ("kind", "factors"),
    [*((kind, torch.float32) for kind in BASES), ("bf16", torch.bfloat16), ("tied in shards", torch.float16)],
)
def test_merged_weights_are_those_of_peft_bit_for_bit(kind, factors, tmp_path):
    base = save_base(tmp_path / "base", **BASES[kind])
    adapter = save_adapter(base, tmp_path / "adapter", factors)
    said = run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    expected, merged = merged_by_peft(base, adapter), weights(tmp_path / "out")
    assert merged.keys() == weights(base).keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert sum(not torch.equal(merged[name], tensor) for name, tensor in weights(base).items()) == 11
    assert {p.name for p in base.glob("*.safetensors*")} == {p.name for p in (tmp_path / "out").glob("*.safetensors*")}
    assert "(the same weights)" in said
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_type_is_peft_on_a_base_of_that_type(dtype, tmp_path):
    base = save_base(tmp_path / "base", shard="20KB")
    adapter = save_adapter(base, tmp_path / "adapter")
    run_export(ExportRequest(adapter, "merged", tmp_path / "out", dtype=dtype))
    expected, merged = merged_by_peft(base, adapter, getattr(torch, dtype)), weights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())


@pytest.mark.parametrize(
    ("stored", "said"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_the_files_decide_where_the_config_says_another_type(stored, said, tmp_path):
    stored = getattr(torch, stored)
    base = save_base(tmp_path / "base", dtype=stored)
    adapter = save_adapter(base, tmp_path / "adapter")
    say_dtype(base, said)
    run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    expected, merged = merged_by_peft(base, adapter, stored), weights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) and merged[name].dtype == stored for name in merged)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == stored
    document = json.loads((tmp_path / "out" / "parity_certificate.json").read_text())
    assert f"torch.{document['dtype']}" == str(stored)
    run_export(ExportRequest(adapter, "merged", tmp_path / "cast", dtype=said))
    expected, merged = merged_by_peft(base, adapter, getattr(torch, said)), weights(tmp_path / "cast")
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_the_reference_is_the_base_as_stored(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.float32)
    adapter = read_adapter(save_adapter(base, tmp_path / "adapter"))
    stored = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter.folder)
    say_dtype(base, "bfloat16")
    rows = log_probabilities.tokenise(base)
    comparison = Comparer(adapter, find_base(None, adapter), rows, 1e-3, None).layout("vllm", adapter.folder)
    assert (
        log_probabilities.largest_difference(comparison.reference, log_probabilities.log_probabilities(stored, rows))
        < 1e-6
    )


def say_dtype(folder, dtype):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": dtype}))


def mixed_base(folder):
    """Norms in fp32 between weights in bf16, as some checkpoints have it."""
    tensors = load_file(save_base(folder) / "model.safetensors")
    save_file({n: t.float() * 1.001 if "norm" in n else t for n, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def test_weights_of_several_types_need_one_to_be_named(tmp_path):
    base = mixed_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(
        AdaptiveConfigError, match=r"'auto' .* several types \(bfloat16, float32\).*; try --dtype bfloat16"
    ):
        exporter.prepare(ExportRequest(adapter, "merged", tmp_path / "out"))
    run_export(ExportRequest(adapter, "merged", tmp_path / "out", dtype="bfloat16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    run_export(ExportRequest(adapter, "vllm", tmp_path / "layout"))


def test_weights_held_whole_take_their_place(tmp_path):
    """additional_target: lm_head, as LLaMA-Factory saves it."""
    base = save_base(tmp_path / "base")
    live = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    live.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    live.save_pretrained(tmp_path / "adapter")
    run_export(ExportRequest(tmp_path / "adapter", "merged", tmp_path / "out"))
    expected, merged = merged_by_peft(base, tmp_path / "adapter"), weights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert not torch.equal(merged["lm_head.weight"], weights(base)["lm_head.weight"])


def test_configs_and_the_trained_tokenizer_come_along(tmp_path):
    base = save_base(tmp_path / "base")
    (base / "README.md").write_text("the base's own")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    adapter = save_adapter(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }} trained"
    tokenizer.save_pretrained(adapter)
    run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "parity_certificate.json"} <= names
    assert not names & {"README.md", "pytorch_model.bin.index.json", "adapter_config.json"}
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert served.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi trained"


def test_shards_are_processed_one_weight_at_a_time(tmp_path):
    """No earlier weight is alive when the next one is read."""
    base_folder = save_base(tmp_path / "base", shard="20KB")
    adapter = read_adapter(save_adapter(base_folder, tmp_path / "adapter"))
    base, earlier = find_base(None, adapter), []

    def prepare(name, weight):
        assert [reference for reference in earlier if reference() is not None] == []
        copy = weight.clone()
        earlier.extend([weakref.ref(weight), weakref.ref(copy)])
        return copy

    assert len(base.shards) > 3
    (tmp_path / "out").mkdir()
    merging.merge(adapter, base, tmp_path / "out", torch.bfloat16, prepare)
    assert len(earlier) == 2 * len(base.weights)


def test_a_merge_that_overflows_names_the_weight(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.float16)
    settings = contract_arguments(mixed_ranks(tiny_model()), 1e6)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(
        ExportError, match=r"gate_proj.weight would leave the range of torch.float16 .* --dtype bfloat16"
    ):
        run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_base_that_is_no_number_is_not_blamed_on_the_type(tmp_path):
    base = save_base(tmp_path / "base")
    [path] = base.glob("*.safetensors")
    held = load_file(path)
    held["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(held, path, {"format": "pt"})
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"q_proj.weight of the base holds NaN or infinity"):
        run_export(ExportRequest(adapter, "merged", tmp_path / "out"))


def test_a_planted_wrong_update_fails_and_leaves_nothing(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    honest = merging.update
    monkeypatch.setattr(merging, "update", lambda *words: honest(*words) * 1.02)
    with pytest.raises(ExportError, match=r"parity failed.*: 11 of the merged weights are not .* \(and 8 more\)"):
        run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.norm.weight"
FAULTS = {  # the first two are below any tolerance of log-probabilities
    "one last place": lambda t: t[NORM].view(torch.int16)[:1].add_(1),
    "no part of the model": lambda t: t["rotary.inv_freq"].add_(1),
    "invented": lambda t: t.update(other=torch.ones(1)),
    "missing": lambda t: t.pop("rotary.inv_freq"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_must_be_pefts_in_every_weight(fault, tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    rewritten(base, lambda t: t.update({"rotary.inv_freq": torch.ones(4, dtype=torch.bfloat16)}))
    adapter = save_adapter(base, tmp_path / "adapter")
    run_export(ExportRequest(adapter, "merged", tmp_path / "right"))  # what PEFT does not load is the base's
    honest = exporter.write

    def write(export, target):
        notes = honest(export, target)
        rewritten(target, FAULTS[fault])
        return notes

    monkeypatch.setattr(exporter, "write", write)
    with pytest.raises(
        ExportError, match=r"1 of the merged weights are not those of PEFT's merge: (model|rotary|other)"
    ):
        run_export(ExportRequest(adapter, "merged", tmp_path / "out", tolerance=1e9))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "hinted"), [(4, True), (None, False)])
def test_a_plan_made_on_four_bits_hints_at_the_other_merge(bits, hinted, tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    modules = (ModulePlan("model.layers.0.mlp.up_proj", 32, 64, rank=1),)
    RankPlan("random", {}, "params", 1, 2.0, modules, {"quantization_bit": bits}).save(adapter / PLAN_FILE)
    said = run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    assert ("--quantization-aware merges into the weights that training saw" in said) is hinted


def test_interrupted_exports_leave_nothing(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(exporter, "certify", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_export(ExportRequest(adapter, "peft", tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
